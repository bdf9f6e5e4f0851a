"""configs/rehearsal.py: one can train on what it writes, and it harms no file but its own."""

import json
import math
import os
import pickle
from pathlib import Path

import pytest
import torch

import convert
import data
import model as m
import train
from configs import check, rehearsal
from configs.schema import load_config

ROOT = Path(__file__).parent.parent
SMALL = ["model.model_channels=64", "model.num_heads=4", "model.num_blocks=3",
         "model.num_control_blocks=2", "model.adaln_lora_dim=16", "model.text_tokens=8",
         "model.crossattn_emb_channels=64", "model.max_img_h=32", "model.max_img_w=32",
         "data.num_frames=9", "data.height=48", "data.width=80", "data.num_workers=0",
         "parallel.tp=1", "trainer.max_iter=2", "trainer.logging_iter=1",
         "trainer.precision=float32"]  # bfloat16 convolutions take CPUs long


@pytest.fixture(autouse=True, scope="module")
def small_tokenizer():
    """A narrow one, drawn once for all tests."""
    released, rehearsal.CHANNELS = rehearsal.CHANNELS, 8
    rehearsal.draw_tokenizer.cache_clear()
    yield
    rehearsal.CHANNELS = released
    rehearsal.draw_tokenizer.cache_clear()


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path / "runs"))


def words(name, folder, *overrides):
    return [str(ROOT / f"configs/{name}.yaml"), *SMALL, f"data.root={folder / 'drive'}",
            f"tokenizer.path={folder / 'tokenizer'}",
            f"checkpoint.base_path={folder / 'base_model.pt'}", *overrides]


def stamps(folder):
    return {path: rehearsal.stamp(path) for path in folder.rglob("*") if path.is_file()}


def test_a_rehearsed_launch_trains_merges_and_posttrains(tmp_path, capsys):
    run = words("lidar", tmp_path)
    assert rehearsal.main([*run, "--clips", "4"]) == 0
    out = capsys.readouterr().out
    assert "python train.py" in out and "python data.py check" in out and "torchrun" in out
    for video in tmp_path.rglob("*.mp4"):
        assert (data.probe(video).fps, data.probe(video).frames) == (10, 18)

    assert train.main([*run, "--dryrun"]) == 0
    assert "MISSING" not in capsys.readouterr().out
    assert check.main(["check", *run]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 clips usable" in out and "stands still" not in out

    assert train.main(run) == 0
    cfg = load_config(run[0], run[1:])
    metrics = (cfg.run_dir / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in metrics if "loss" in json.loads(line)]
    assert losses and all(map(math.isfinite, losses))

    assert convert.main(["merge", str(cfg.run_dir / "checkpoints/iter_000000002.pt")]) == 0
    merged = cfg.run_dir / "fsdp_checkpoints/iter_000000002_ema_model.pt"
    after = words("lidar_posttrain", tmp_path, f"checkpoint.load_path={merged}")
    before = stamps(tmp_path)
    assert rehearsal.main([*after, "--clips", "4"]) == 0  # all there, the last not its own
    assert "NOT made up" in capsys.readouterr().out and stamps(tmp_path) == before
    assert train.main(after) == 0


def test_control_checkpoint_and_five_views_of_a_multi_view_posttraining(tmp_path):
    control = tmp_path / "control.pt"
    run = words("mv_t2w_hdmap_posttrain", tmp_path, f"checkpoint.load_path={control}")
    assert rehearsal.main([*run, "--clips", "3"]) == 0
    for view in data.VIEWS:
        for kind in ("videos", "hdmap"):
            names = sorted(p.name for p in (tmp_path / "drive" / kind / view).iterdir())
            assert names == [f"rehearsal_{i:04d}_0.mp4" for i in range(3)]
    texts = [data.load_text(path, 8, 64) for path in (tmp_path / "drive").rglob("*.pkl")]
    assert len(texts) == 3 + 4
    captions = sorted((tmp_path / "drive/t5_xxl/pinhole_front").iterdir())
    assert {type(pickle.loads(path.read_bytes())) for path in captions} == {list, dict}
    assert train.main(run) == 0


def test_weights_have_the_released_names_and_none_is_idle_or_doubled(tmp_path):
    run = words("lidar_posttrain", tmp_path, f"checkpoint.load_path={tmp_path / 'control.pt'}")
    assert rehearsal.main(run) == 0
    cfg = load_config(run[0], run[1:])
    shapes = m.build(cfg.model, "meta", torch.bfloat16)
    for file, part in (("base_model.pt", "base"), ("control.pt", "control")):
        tensors = torch.load(tmp_path / file, weights_only=True)
        wanted = {convert.to_nvidia(name).removeprefix("base_model.")
                  for name in shapes.state_dict() if name.startswith((part, "logvar"))}
        assert tensors.keys() == wanted | {convert.SEQ}
        linears = {name: t for name, t in tensors.items() if t.ndim == 2}
        for name, tensor in linears.items():
            assert tensor.dtype in (torch.bfloat16, torch.float32)
            assert tensor.isfinite().all() and tensor.float().abs().max() < 3, name
            assert tensor.float().abs().mean() > 1e-4, name
        sums = [tensor.double().sum().item() for tensor in linears.values()]
        assert len(set(sums)) == len(sums)


def test_files_of_others_are_never_touched(tmp_path, capsys):
    run = words("lidar", tmp_path)
    mine = tmp_path / "base_model.pt"
    mine.write_bytes(b"a download of an hour")
    assert rehearsal.main([*run, "--clips", "1"]) == 0
    assert mine.read_bytes() == b"a download of an hour"
    assert f"NOT made up, left alone: {mine}" in capsys.readouterr().out

    # A download over a file of ours is no longer ours, whatever the config.
    mean_std = tmp_path / "tokenizer/mean_std.pt"
    mean_std.write_bytes(b"a download")
    video = tmp_path / "drive/videos/pinhole_front/rehearsal_0000_0.mp4"
    size = video.stat().st_size
    assert rehearsal.main([*run, "--clips", "1", "data.num_frames=17", "data.height=64"]) == 0
    assert mean_std.read_bytes() == b"a download"
    assert video.stat().st_size != size  # ours, of another config: written anew

    assert rehearsal.main([*run, "--remove"]) == 0
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == [mine, mean_std]


def test_a_full_disk_is_a_sentence_before_anything_is_written(tmp_path, capsys, monkeypatch):
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: free)
    assert rehearsal.main(words("lidar", tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the disk of") and "GB are to be written there" in error
    assert os.listdir(tmp_path) == []


def test_what_is_broken_off_leaves_no_half_file(tmp_path, monkeypatch):
    def fail(tensors, target):
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(rehearsal.torch, "save", fail)
    assert rehearsal.main(words("lidar", tmp_path)) == 2
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
