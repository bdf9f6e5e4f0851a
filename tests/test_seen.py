"""What a person sees of a run: validation, samples, curves, console."""

import json
import math
import os
import re
import subprocess
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from ranks import run_ranks

import data
import train
from configs import curve, log, pictures
from configs.schema import load_config

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "configs/smoke_tokenizer.safetensors"
TINY = [str(ROOT / "configs/smoke.yaml"), f"tokenizer.path={TOKENIZER}", "checkpoint.base_path=random",
        "data.cache=null", "model.model_channels=64", "model.text_tokens=8", "model.num_blocks=2",
        "model.crossattn_emb_channels=32", "data.num_frames=9", "data.height=48", "data.width=80",
        "data.batch_size=1", "trainer.sample_iter=0", "trainer.val_iter=0", "trainer.sample_steps=2",
        "optimizer.warmup_steps=0"]
MULTI_VIEW = ["data.views=3", "model.conditioning=v2w"]


class HeldNoise(data.RandomClips):
    """Random latents of which three clips are held out."""

    held_out = ["a", "b", "c"]

    def held(self, i):
        return self.sample(1000 + i)


def open_noise(cfg):
    d, size = cfg.data, cfg.model
    return HeldNoise(d.hint, d.num_frames, d.views, d.height, d.width, 0, size.text_tokens,
                     size.crossattn_emb_channels)


def open_restless(words, device="cpu"):
    """(cfg, clips, model): every parameter has its part in the output, on every mesh the same."""
    cfg = load_config(TINY[0], [*TINY[1:], *words])
    model = train.m.build(cfg.model, device, torch.float32)
    train.tp.init_weights(model, 0)
    for name, p in model.named_parameters():
        if not hasattr(p, "tp_dim") and not name.startswith("logvar"):
            rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            p.data += 0.05 * torch.randn(p.shape, generator=rng)
    return cfg, open_noise(cfg), model


def measure(words):
    """The validation losses as one tensor, and whether the clips arrived in order."""
    cfg = load_config(TINY[0], [*TINY[1:], *words])
    train.tp.init(cfg.parallel.tp, cfg.model.num_heads)
    cfg, clips, model = open_restless(words)
    held = train.hold(cfg, clips, None, "cpu")
    found = train.validate(cfg, model, held, "cpu")
    return torch.tensor([found["val_loss"], found["val_zero"], *found["val_losses"]],
                        dtype=torch.float64)


def test_validation_depends_on_neither_replicas_nor_batch_size_to_the_last_digit():
    reference = measure([])
    assert reference.std() > 0 and torch.equal(measure(["data.batch_size=2"]), reference)
    for replica in run_ranks(2, measure, []):
        assert torch.equal(replica, reference)


def test_validation_of_several_views_is_the_same_at_tp_2():
    reference = measure(MULTI_VIEW)
    for rank in run_ranks(2, measure, [*MULTI_VIEW, "parallel.tp=2"]):
        assert torch.allclose(rank, reference, rtol=1e-5, atol=0)


def test_validation_is_the_loss_at_the_quantiles_of_training_without_text_dropout():
    """The formulas once more, on one clip; T = 2 frames here."""
    cfg, clips, model = open_restless([])
    held = train.hold(cfg, clips, None, "cpu")
    found = train.validate(cfg, model, {1: held[1]}, "cpu")
    sigmas = torch.tensor(found["val_sigmas"])
    assert torch.allclose(torch.special.ndtr((sigmas / math.sqrt(2)).log()),
                          torch.arange(1, 16, 2) / 16, atol=1e-4)
    clip = clips.held(1)
    noise = train.m.draw_noise(cfg.model, cfg.latent_shape, 0, train.NO_STEP, [1], "cpu")
    cond = train.m.Condition(clip["text"][None], clip["fps"][None], clip["padding_mask"][None],
                             clip["hint_latents"][None], clip["view_index"][None])
    x0 = clip["latents"][None]
    for sigma, expected in zip(sigmas, found["val_losses"]):
        total = sigma**2 + 0.25
        x_t = x0 + sigma * noise.eps
        with torch.no_grad():
            net = model(x_t / total.sqrt(), sigma.log().view(1) / 4, cond)
        denoised = 0.25 / total * x_t + sigma * 0.5 / total.sqrt() * net
        loss = (total / (sigma * 0.5) ** 2 * (x0 - denoised).square()).mean()
        assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert found["val_loss"] == pytest.approx(np.mean(found["val_losses"]))


def test_a_network_that_says_nothing_is_the_reference(capsys):
    """Its loss on latents of standard deviation 0.5 is 1; a base above it is told before step 1."""
    cfg, clips, model = open_restless([])
    held = train.hold(cfg, clips, None, "cpu")
    for batch in held.values():
        batch["latents"] *= 0.5
    found = train.validate(cfg, model, held, "cpu")
    assert found["val_zero"] == pytest.approx(1, abs=0.1)
    said = log.Log(cfg, clips, 0)
    said.validated(0, {"val_loss": 1.3, "val_zero": 1.0}, 3)
    assert "no better than predicting zero" in capsys.readouterr().out
    said.validated(0, {"val_loss": 0.9, "val_zero": 1.0}, 3)
    said.validated(5, {"val_loss": 1.3, "val_zero": 1.0}, 3)
    assert "predicting zero" not in capsys.readouterr().out and said.best == (0.9, 0)
