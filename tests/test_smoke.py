"""The smoke run in small: on the shipped base, a control branch that has learned to be followed."""

import os
from pathlib import Path

import pytest
import torch

import convert
import data
import model as m
import train
from configs.smoke_drive import write_drive
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "configs" / "smoke.yaml")


def test_shipped_weights_are_small_and_the_base_is_loaded_strictly():
    base, tokenizer = [ROOT / "configs" / f"smoke_{name}.safetensors"
                       for name in ("base", "tokenizer")]
    assert base.stat().st_size < 3e6 and base.stat().st_size + tokenizer.stat().st_size < 4e6
    net = m.build(train.load_config(CONFIG).model, "cpu", torch.float32)
    for part in ("base", "logvar"):
        convert.load(net, base, part)
    assert all(p.isfinite().all() for p in net.base.parameters())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A config whose run of 100 steps on 36 clips has been trained and saved."""
    folder = tmp_path_factory.mktemp("smoke")
    os.environ["OUTPUT_ROOT"] = str(folder / "runs")
    root = write_drive(folder / "drive", clips=40, frames=17, height=80, width=128, views=1)
    words = [f"data.root={root}", "data.val_clips=4", "data.batch_size=8",
             "trainer.max_iter=100", "trainer.val_iter=0", "trainer.sample_iter=0",
             "checkpoint.save_iter=100"]
    assert train.main([CONFIG, *words]) == 0
    return train.load_config(CONFIG, words)


def test_the_run_itself_keeps_latents_in_the_data_root(run):
    entries = list(Path(run.data.root).glob("latents_lidar_17x80x128_1_views/*.safetensors"))
    assert len(entries) == 40


@torch.no_grad()
def test_samples_follow_the_control_video(run):
    net = m.build(run.model, "cpu", torch.float32)
    for part in ("base", "logvar"):
        convert.load(net, run.checkpoint.base_path, part)
    saved = run.run_dir / "checkpoints" / "iter_000000100.pt"
    convert.load(net, saved, "control", ema=True)
    tokenizer = load_tokenizer(run.tokenizer.path, "cpu", torch.float32)

    cached = data.open_clips(run)
    clips = cached.source
    held = [cached.held(i) for i in range(len(cached.held_out))]
    batch = {key: torch.stack([sample[key] for sample in held])
             for key in ("text", "fps", "padding_mask", "latents", "hint_latents")}
    real = [clips.held(i)["video"] for i in range(len(held))]
    real = torch.stack(real)                                               # (4, 1, 3, F, H, W)

    def decibels(hint):
        """Mean PSNR to the real clips, from the same noise for every control."""
        cond = m.Condition(batch["text"], batch["fps"], batch["padding_mask"], hint)
        rng = torch.Generator().manual_seed(0)
        latents = m.sample(net, batch["latents"].shape, cond, rng, 0.0, 10)
        error = tokenizer.decode_views(latents, 1).float() - real.float()
        return (10 * torch.log10(255**2 / error.square().flatten(1).mean(1))).mean().item()

    hint = batch["hint_latents"]
    own, other, alone = decibels(hint), decibels(hint.roll(1, 0)), decibels(None)
    assert own > other + 0.9 and own > alone + 0.9, (own, other, alone)
