"""The training loop: meshes agree, resume is exact, signals and mistakes lose nothing."""

import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
from ranks import run_ranks
from test_tp import gathered

import data
import train
from configs import log
from configs.random_clips import RandomClips
from configs.recompute import host

ROOT = Path(__file__).parent.parent
TINY = [str(ROOT / "configs/smoke.yaml"), "data.root=random", "model.model_channels=64",
        "model.text_tokens=8", "model.crossattn_emb_channels=32", "data.num_frames=17",
        "data.height=48", "data.width=80", "trainer.sample_iter=0", "optimizer.warmup_steps=4",
        "model.num_blocks=3", "model.num_control_blocks=2",
        "data.batch_size=2", "optimizer.lr=1e-3", "checkpoint.base_path=random",
        "trainer.device=auto",
        ]  # 3 x 3 x 5 = 45 tokens: no tp but 1 divides them
MULTI_VIEW = ["data.views=3", "model.conditioning=v2w"]


def run(out, *words):
    """train.py in this process; the metrics it has written so far."""
    os.environ["OUTPUT_ROOT"] = str(out)
    assert train.main([*TINY, *words]) == 0
    return metrics(out)


def metrics(out):
    text = next(Path(out).rglob("metrics.jsonl")).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


def checkpoint(out, step):
    """Every tensor of a checkpoint, rank by rank."""
    files = sorted(next(Path(out).rglob("checkpoints")).glob(f"iter_{step:09d}_*_mp_*.pt"))
    contents = {file.stem.removeprefix(f"iter_{step:09d}"): torch.load(file, weights_only=True)
                for file in files}
    return {f"{stem}/{kind}/{name}": t for stem, content in contents.items()
            for kind, group in content.items() for name, t in group.items()}


def close(a, b, tolerance):
    assert a.keys() == b.keys()
    for step in a:
        for x, y in zip(a[step], b[step]):
            assert abs(x - y) <= tolerance * abs(y), (step, a[step], b[step])


# Meshes (dp, tp), and how the ranks share a clip and what their blocks keep of it.
ULYSSES = "parallel.scheme=ulysses", "parallel.recompute=residual_saved", "parallel.whole_blocks=0"
MEGATRON = "parallel.scheme=megatron", "parallel.recompute=mlp_saved", "parallel.whole_blocks=1"
PAIRS = [(1, 2, *MEGATRON), (1, 2, *ULYSSES), (2, 1)]
FOURS = [(1, 4, *ULYSSES), (2, 2, "parallel.scheme=megatron"), (2, 2, "parallel.scheme=auto")]


@pytest.mark.parametrize("family, precision, meshes", [
    ([], "float32", [PAIRS[0], PAIRS[2], FOURS[0], FOURS[2]]),
    ([], "bfloat16", PAIRS[:2]),
    (MULTI_VIEW, "float32", [FOURS[1]]),
    (MULTI_VIEW, "bfloat16", PAIRS[1:2]),
], ids=["float32", "bfloat16", "multi_view-float32", "multi_view-bfloat16"])
def test_meshes_train_the_same(tmp_path, family, precision, meshes):
    common = ["trainer.max_iter=20", "checkpoint.save_iter=0", "trainer.check_every=5",
              f"trainer.precision={precision}", *family]
    tolerance = {"float32": 1e-4, "bfloat16": 2e-3}[precision]
    reference = run(tmp_path / "11", *common, "data.batch_size=4")
    assert reference[20][0] < reference[1][0]
    accumulated = run(tmp_path / "accumulated", *common, "data.batch_size=1",
                      "trainer.grad_accum=4")
    close(accumulated, reference, tolerance)
    gpus = torch.cuda.device_count()
    if gpus:  # all that they are enough for: compilation makes each of these a minute there
        meshes = [mesh for mesh in PAIRS + FOURS if mesh[0] * mesh[1] <= gpus]
        if not meshes:
            pytest.skip("one GPU has nobody to be compared with")
    for i, (dp, tp, *words) in enumerate(meshes):
        mesh = f"parallel.tp={tp}", f"data.batch_size={4 // dp}", *words
        run_ranks(dp * tp, run, tmp_path / str(i), *common, *mesh)
        close(metrics(tmp_path / str(i)), reference, tolerance)


def test_host_memory_trains_the_same_bits(tmp_path, monkeypatch, capsys):
    """With two forward passes a step, and validation in between."""
    words = ["trainer.max_iter=6", "trainer.grad_accum=2", "trainer.val_iter=2",
             "parallel.recompute=mlp_saved", "parallel.whole_blocks=1"]
    wanted = run(tmp_path / "a", *words)
    agree = train.agree_on_plan

    def with_host_memory(*args):
        plan = agree(*args)
        monkeypatch.setattr(host, "room", 62.6)
        monkeypatch.setattr(host, "bus", 51.4)
        return plan._replace(host=3)

    monkeypatch.setattr(train, "agree_on_plan", with_host_memory)
    assert run(tmp_path / "b", *words) == wanted
    told = capsys.readouterr().out
    assert "3 of the 4 in host memory" in told
    assert "and 0.000772 of 62.6 GiB of the machine's (51 GB/s)\n" in told


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_is_exact(tmp_path, ranks):
    def launch(name, *words):
        words = (tmp_path / name, f"parallel.tp={ranks}", *words)
        run(*words) if ranks == 1 else run_ranks(ranks, run, *words)

    launch("a", "trainer.max_iter=8", "checkpoint.save_iter=4")
    launch("b", "trainer.max_iter=5", "checkpoint.save_iter=2")
    launch("b", "trainer.max_iter=8", "checkpoint.save_iter=4")
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")
    a, b = checkpoint(tmp_path / "a", 8), checkpoint(tmp_path / "b", 8)
    assert a.keys() == b.keys() and len(a) > 100 + 200 * ranks
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_on_another_mesh_and_in_another_scheme(tmp_path):
    straight = run(tmp_path / "a", "trainer.max_iter=9", "checkpoint.save_iter=3")
    out, save = tmp_path / "b", "checkpoint.save_iter=3"
    two = "parallel.tp=2", "parallel.scheme=ulysses"
    four = "parallel.tp=4", "parallel.scheme=megatron"
    run_ranks(2, run, out, "trainer.max_iter=3", save, *two)
    run(out, "trainer.max_iter=6", save)
    run_ranks(4, run, out, "trainer.max_iter=9", save, *four)
    close(metrics(out), straight, 1e-5)
    # Nobody changes a bit of the state: it is what the files hold, on each mesh, in each scheme.
    wanted = state(out, "trainer.max_iter=9")
    assert {name.split()[0] for name in wanted} >= {"master", "ema", "exp_avg", "exp_avg_sq"}
    for ranks, words in ((2, two), (4, four)):
        for found in run_ranks(ranks, state, out, "trainer.max_iter=9", *words):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def state(out, *words):
    """Every tensor that a resumed run starts from, whole."""
    os.environ["OUTPUT_ROOT"] = str(out)
    cfg = train.load_config(TINY[0], [*TINY[1:], *words])
    idle = SimpleNamespace(start=lambda seconds: None, take=lambda folder: None)
    flat = train.prepare(cfg, idle, idle, False, []).flat
    kinds = ["master", "ema", *flat.state()]
    found = {f"{kind} {name}": gathered(flat.params[name], value)
             for kind in kinds for name, value in flat.views(kind).items()}
    train.tp.shutdown()
    return found


def test_the_last_lines_say_how_fast_and_where(tmp_path, capsys):
    run(tmp_path, "trainer.max_iter=6", "checkpoint.save_iter=6")
    *_, speed, result = capsys.readouterr().out.splitlines()
    words = dict(word.split() for word in speed.removeprefix("median step: ").split(", "))
    parts = sum(float(words[f"{part}_s"]) for part in log.PARTS)
    assert float(words["seconds"]) == pytest.approx(parts, abs=0.004)
    assert float(words["forward_s"]) > 0
    assert result.startswith("loss ") and "iter_000000006.pt" in result
    assert "metrics.jsonl" in result


def test_one_save_among_ten_steps_does_not_make_the_median_step_longer(monkeypatch):
    monkeypatch.setattr(log.tp, "size", lambda: 4)
    encode, save = log.PARTS.index("encode"), log.PARTS.index("save")
    rows = [[0.5] * len(log.PARTS) for _ in range(10)]
    for i, row in enumerate(rows):
        row[encode], row[save] = (0.4, 0.1, 0.1, 0.1)[i % 4], 6.0 if i == 4 else 0.0
    parts = dict(zip(log.PARTS, log.Log.median(SimpleNamespace(rows=rows))))
    assert parts.pop("save") == 0 and parts.pop("encode") == pytest.approx(0.7 / 4)
    assert set(parts.values()) == {0.5}


def test_random_clips_are_a_function_of_seed_and_number():
    settings = dict(hint="lidar", num_frames=17, views=3, height=32, width=48, seed=0,
                    text_tokens=6, text_width=8)
    clips = RandomClips(**settings)
    sample = clips.sample(5)
    shapes = dict(latents=(16, 9, 4, 6), hint_latents=(16, 9, 4, 6), text=(18, 8), fps=(),
                  padding_mask=(1, 32, 48), view_index=(3,))
    assert {key: tuple(value.shape) for key, value in sample.items()} == shapes
    assert sample["view_index"].tolist() == [0, 1, 2] and sample["fps"] == 10
    assert not sample["padding_mask"].any()
    assert not clips.bad and str(clips) == "random latents"
    again, other = clips.sample(5), clips.sample(6)
    reseeded = RandomClips(**settings | {"seed": 1}).sample(5)
    for key in ("latents", "hint_latents", "text"):
        assert torch.equal(again[key], sample[key]) and abs(sample[key].std() - 1) < 0.3
        assert not torch.equal(other[key], sample[key])
        assert not torch.equal(reseeded[key], sample[key])
    assert not torch.equal(sample["latents"], sample["hint_latents"])


@pytest.mark.parametrize("cached", [False, True])
def test_encoding_keeps_rows_apart(cached):
    """Samples of pixels or cached latents become latents and a condition's fields, a row each."""
    rng = torch.Generator().manual_seed(0)
    pixels = lambda: torch.randint(256, (2, 3, 9, 16, 16), generator=rng).to(torch.uint8)
    encode_views = lambda video: video[:, :, 0].float().mean(-1) / 255  # tells the clips apart
    samples = [{"video": pixels(), "hint": pixels(), "text": torch.full((4, 8), float(i)),
                "fps": torch.tensor(10.0 + i), "view_index": torch.tensor([0, i + 1]),
                "padding_mask": torch.zeros(1, 16, 16, dtype=torch.bool),
                "clip": f"clip {i}", "start": i} for i in range(3)]
    latents, hints = ([encode_views(s[key][None])[0] for s in samples] for key in ("video", "hint"))
    if cached:
        for sample, video, hint in zip(samples, latents, hints):
            del sample["video"], sample["hint"]
            sample |= {"latents": video, "hint_latents": hint}
    tokenizer = None if cached else SimpleNamespace(encode_views=encode_views)
    batch = train.encode(data.collate(samples), tokenizer, "cpu")
    assert torch.equal(batch.pop("latents"), torch.stack(latents))
    cond = train.m.Condition(**batch)
    assert torch.equal(cond.hint, torch.stack(hints))
    for i in range(3):
        assert (cond.text[i] == i).all() and cond.fps[i] == 10 + i
        assert cond.view_index[i].tolist() == [0, i + 1]
    assert cond.text.shape == (3, 4, 8) and cond.padding_mask.shape == (3, 1, 16, 16)
    assert cond.known is None


def train_main(*words):
    return train.main([*TINY, *words])


def start(out, *words):
    """train.py in a process of its own, which prints into out/printed."""
    out.mkdir()
    return ranks.start(out / "printed", train_main, *words, OUTPUT_ROOT=str(out))


def wait_for_step(out, step):
    deadline = time.time() + 60
    while time.time() < deadline:
        files = list(Path(out).rglob("metrics.jsonl"))
        if files and files[0].read_text().count("\n") >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in 60 s")


def test_sigterm_loses_no_step(tmp_path):
    process = start(tmp_path / "a", "trainer.max_iter=100000", "checkpoint.save_iter=100000")
    wait_for_step(tmp_path / "a", 3)
    process.terminate()
    process.join(60)
    output = (tmp_path / "a/printed").read_text()
    assert process.exitcode == 0, output
    done = max(metrics(tmp_path / "a"))
    assert f"iter_{done:09d}.pt, rerun the same command to continue" in output
    resumed = run(tmp_path / "a", f"trainer.max_iter={done + 2}", "checkpoint.save_iter=100000")
    assert resumed == run(tmp_path / "b", f"trainer.max_iter={done + 2}",
                          "checkpoint.save_iter=100000")


def test_sigkill_goes_on_from_the_last_checkpoint(tmp_path):
    process = start(tmp_path / "a", "trainer.max_iter=100000", "checkpoint.save_iter=3")
    wait_for_step(tmp_path / "a", 8)
    process.kill()
    process.join()
    done = max(metrics(tmp_path / "a"))
    resumed = run(tmp_path / "a", f"trainer.max_iter={done + 2}", "checkpoint.save_iter=3")
    assert resumed == run(tmp_path / "b", f"trainer.max_iter={done + 2}", "checkpoint.save_iter=3")


def test_nonfinite_gradients_never_reach_the_weights(tmp_path, monkeypatch, capsys):
    healthy = train.m.training_loss
    calls = []

    def sick(model, *args):
        calls.append(None)
        return healthy(model, *args) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(train.m, "training_loss", sick)
    run(tmp_path, "trainer.max_iter=3", "checkpoint.save_iter=1", "optimizer.warmup_steps=0",
        "trainer.logging_iter=3")
    line = json.loads(next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines()[-1])
    assert math.isfinite(line["loss_mean"]) and line["skipped_steps"] == 1
    first, second, third = (checkpoint(tmp_path, step) for step in (1, 2, 3))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], third[k]) for k in first)
    assert all(v.isfinite().all() for v in third.values())


def test_no_usable_clip_is_one_sentence(tmp_path, capsys):
    for folder in ("videos", "lidar"):
        clip = tmp_path / "drive" / folder / "pinhole_front/clip_0.mp4"
        clip.parent.mkdir(parents=True)
        clip.write_bytes(b"not a video")
    os.environ["OUTPUT_ROOT"] = str(tmp_path)
    tokenizer = f"tokenizer.path={ROOT / 'configs/smoke_tokenizer.safetensors'}"
    assert train.main([*TINY, f"data.root={tmp_path / 'drive'}", tokenizer]) == 2
    error = capsys.readouterr().err
    assert "error: none of 1 clips" in error and "clip_0.mp4" in error and "Traceback" not in error
