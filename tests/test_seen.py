"""What a person sees of a run: validation, samples, curves, console."""

import contextlib
import importlib.metadata
import io
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from ranks import run_ranks

import data
import train
from configs import curve, kernels, log, pictures
from configs.random_clips import RandomClips
from configs.schema import load_config
from configs.video import write_video

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "configs/smoke_tokenizer.safetensors"
TINY = [str(ROOT / "configs/smoke.yaml"), f"tokenizer.path={TOKENIZER}",
        "checkpoint.base_path=random", "data.cache=null", "model.model_channels=64",
        "model.text_tokens=8", "model.num_blocks=2", "model.num_control_blocks=2",
        "model.crossattn_emb_channels=32",
        "data.num_frames=9", "data.height=48", "data.width=80", "data.batch_size=1",
        "trainer.sample_iter=0", "trainer.val_iter=0", "trainer.sample_steps=2",
        "optimizer.warmup_steps=0"]
MULTI_VIEW = ["data.views=3", "model.conditioning=v2w"]


class HeldNoise(RandomClips):
    """Random latents of which three clips are held out."""

    held_out = ["a", "b", "c"]

    def held(self, i):
        return self.sample(1000 + i)


def open_noise(cfg):
    d, size = cfg.data, cfg.model
    return HeldNoise(d.hint, d.num_frames, d.views, d.height, d.width, 0, size.text_tokens,
                     size.crossattn_emb_channels)


def open_restless(words, scheme="megatron"):
    """(cfg, clips, model): every parameter has its part in the output, on every mesh the same."""
    cfg = load_config(TINY[0], [*TINY[1:], *words])
    model = train.m.build(cfg.model, "cpu", torch.float32)
    train.tp.use_scheme(scheme)
    train.tp.init_weights(model, 0)
    for name, p in model.named_parameters():
        if not hasattr(p, "tp_dim") and not name.startswith("logvar"):
            rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            p.data += 0.05 * torch.randn(p.shape, generator=rng)
    train.tp.gather_weights(model.parameters())
    return cfg, open_noise(cfg), model


def measure(words, *schemes):
    """The validation losses: a tensor for each scheme."""
    cfg = load_config(TINY[0], [*TINY[1:], *words])
    train.tp.init(cfg.parallel.tp, cfg.model.num_heads)
    tensors = []
    for scheme in schemes:
        cfg, clips, model = open_restless(words, scheme)
        found = train.validate(cfg, model, train.hold(cfg, clips, None, "cpu"), "cpu")
        values = [found["val_loss"], found["val_zero"], *found["val_losses"]]
        tensors.append(torch.tensor(values, dtype=torch.float64))
    return tensors


def test_validation_depends_on_neither_replicas_nor_batch_size_to_the_last_digit():
    (reference,) = measure([], "megatron")
    again = measure(["data.batch_size=2"], "megatron", "megatron")
    assert reference.std() > 0
    for found in sum(run_ranks(2, measure, [], "megatron"), again):
        assert torch.equal(found, reference)


def test_validation_of_several_views_is_the_same_at_tp_2_in_both_schemes():
    (reference,) = measure(MULTI_VIEW, "megatron")
    ranks = run_ranks(2, measure, [*MULTI_VIEW, "parallel.tp=2"], "megatron", "ulysses")
    for found in sum(ranks, []):
        assert torch.allclose(found, reference, rtol=1e-5, atol=0)


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
    assert "predicting zero" not in capsys.readouterr().out


# ---- samples -------------------------------------------------------------------------------------

def write_clips(root, count, kinds):
    """Clips c0, c1, ... of 9 frames, 48x80: a bright bar that moves over a colour of the clip."""
    words = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    for i in range(count):
        frames = np.full((9, 48, 80, 3), [40 * i, 120, 200 - 40 * i], np.uint8)
        for t, frame in enumerate(frames):
            frame[:, 8 * t : 8 * t + 8] = 250
        for kind in kinds:
            write_video(root / kind / "pinhole_front" / f"c{i}_0.mp4", frames, 10)
        text = root / "t5_xxl/pinhole_front" / f"c{i}.pkl"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_bytes(pickle.dumps([words]))
    return root


def start(out, *words):
    os.environ["OUTPUT_ROOT"] = str(out)
    return train.main([*TINY, *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps on four clips, of which one is held out: (folder, drive, its words)."""
    folder = tmp_path_factory.mktemp("run")
    drive = write_clips(folder / "drive", 4, ("videos", "lidar"))
    words = [f"data.root={drive}", "trainer.max_iter=2", "trainer.val_iter=1",
             "trainer.sample_iter=2", "checkpoint.save_iter=2", "trainer.logging_iter=1"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert start(folder, *words) == 0
    (folder / "said.txt").write_text(said.getvalue())
    return folder, drive, words


def run_folder(out):
    return next(Path(out).rglob("metrics.jsonl")).parent


def test_a_sample_is_a_video_that_plays_everywhere_and_a_contact_sheet(run):
    samples = run_folder(run[0]) / "samples"
    assert sorted(p.name for p in samples.iterdir()) == ["iter_000000002.png",
                                                         "iter_000000002_c3_0.mp4"]
    video = samples / "iter_000000002_c3_0.mp4"
    height, width = pictures.tile_size(48, 80, pictures.VIDEO_TILE)
    assert data.probe(video)[:4] == (9, 10.0, 3 * width, height)
    told = subprocess.run([data.ffmpeg(), "-i", video], capture_output=True, text=True).stderr
    assert "h264" in told and "yuv420p" in told
    truth = data.decode(run[1] / "videos/pinhole_front/c3_0.mp4", 0, 9)
    shown = data.decode(video, 0, 9)
    for column in (0, 2):  # control and real are the same picture here
        tile = shown[:, 100:, column * width : (column + 1) * width]
        expected = truth.repeat(height // 48, 1).repeat(width // 80, 2)[:, 100:]
        assert np.abs(tile.astype(int) - expected).mean() < 6
    sheet = pictures.read_png(samples / "iter_000000002.png")
    height, width = pictures.tile_size(48, 80, pictures.SHEET_TILE)
    assert sheet.shape == (height + pictures.GAP, 3 * (3 * width + 2 * pictures.GAP), 3)
    # the real clip at the first, the fifth and the last frame; the bar begins at the left
    moments = sheet[height // 2, 2 * width :: 3 * width + 2 * pictures.GAP]
    assert (moments[0] > 200).all() and not (moments[1] > 200).all()


def test_samples_of_a_run_are_made_again_without_training(run, monkeypatch, capsys):
    """The newest checkpoint's EMA weights and the same noise: the same file, byte by byte."""
    video = run_folder(run[0]) / "samples/iter_000000002_c3_0.mp4"
    before, metrics = video.read_bytes(), (run_folder(run[0]) / "metrics.jsonl").read_text()
    video.unlink()
    monkeypatch.setattr(train.tp, "FlatParams", None)  # nor is anything there to train with
    assert start(run[0], "--sample", *run[2]) == 0
    assert video.read_bytes() == before
    assert (run_folder(run[0]) / "metrics.jsonl").read_text() == metrics
    psnr = json.loads(metrics.splitlines()[-1])["psnr"]
    assert f"PSNR to the real ones {psnr:.2f} dB" in capsys.readouterr().out


def sample_at(out, words):
    assert start(out, "--sample", *words) == 0
    return True


def test_own_clips_without_camera_videos_are_sampled_at_any_tp(run, tmp_path):
    drive = write_clips(tmp_path / "mine", 2, ("lidar",))
    checkpoint = run_folder(run[0]) / "checkpoints/iter_000000002.pt"
    words = [f"data.root={drive}", f"checkpoint.load_path={checkpoint}", "trainer.guidance=2"]
    sample_at(tmp_path / "1", words)
    run_ranks(2, sample_at, tmp_path / "2", [*words, "parallel.tp=2"])
    one, two = ([*map(data.decode, sorted((tmp_path / n).rglob("*.mp4")), (0, 0), (9, 9))]
                for n in "12")
    assert len(one) == len(two) == 2 and one[0].shape[2] == 2 * 640  # control and sample
    for a, b in zip(one, two):
        assert np.abs(a.astype(int) - b).mean() < 1
    assert len([*(tmp_path / "2").rglob("*.png")]) == 1
    run_ranks(2, sample_at, tmp_path / "idle", [*words, "data.val_clips=1"])  # one has no clip
    assert len([*(tmp_path / "idle").rglob("*.mp4")]) == 1


def test_psnr_leaves_out_the_given_view_and_views_without_video():
    rng = torch.Generator().manual_seed(0)
    video = lambda: torch.randint(256, (3, 9, 16, 32), generator=rng).to(torch.uint8)
    real, black = video(), torch.zeros(3, 9, 16, 32, dtype=torch.uint8)
    near = (real.int() + 2).clamp(max=255).to(torch.uint8)
    given = {"control": video(), "sample": video(), "real": video()}
    views = [given, {"control": video(), "sample": near, "real": real},
             {"control": video(), "sample": video(), "real": black}]
    shown = pictures.compare(views)
    error = (near.double() - real.double()).square().mean()
    assert shown.psnr == pytest.approx(10 * math.log10(255**2 / error))
    assert pictures.psnr(real, real) == 100
    assert shown.video.shape == (9, 3 * 16 * 20, 3 * 32 * 20, 3)
    none = {"control": video(), "sample": video(), "real": black}
    assert pictures.compare([given, none, none]).psnr is None  # what was given says nothing
    unseen = [none, {"control": video(), "sample": near, "real": real}]
    assert pictures.compare(unseen).psnr == shown.psnr
    single = pictures.compare([{"control": real, "sample": near}])
    assert single.psnr is None and single.video.shape[2] == 2 * 32 * 20


# ---- what may fail -------------------------------------------------------------------------------

def test_what_is_only_to_be_looked_at_never_ends_a_training(run, tmp_path, capsys):
    folder = tmp_path / "smoke/smoke/smoke"
    (folder / "metrics.jsonl").mkdir(parents=True)
    (folder / "loss_curve.tmp").mkdir()
    (folder / "samples").write_text("in the way")
    assert start(tmp_path, *run[2]) == 0
    said = capsys.readouterr().out
    for what in ("metrics.jsonl could not be written", "the curves could not be drawn",
                 "the sample of clip 0 could not be written"):
        assert what in said
    assert "things to look at that could not be written" in said
    assert (folder / "checkpoints/iter_000000002.pt").is_file()


@pytest.mark.parametrize("sampling", [False, True])
def test_a_stop_that_comes_meanwhile_records_no_part(sampling, run, tmp_path, monkeypatch, capsys):
    """After the first of two held-out clips: the step is saved, a mean over one clip is nowhere."""
    drive = write_clips(tmp_path / "drive", 8, ("videos", "lidar"))
    words = [f"data.root={drive}", "data.val_clips=2", "trainer.max_iter=9", "trainer.val_iter=9",
             "trainer.logging_iter=1", "checkpoint.save_iter=9"]
    words.append("trainer.sample_iter=1" if sampling else "trainer.val_iter=1")
    name, steps = ("write_sample", 0) if sampling else ("training_loss", 1)
    where = pictures if sampling else train.m
    healthy, calls = getattr(where, name), []

    def interrupted(*args):
        calls.append(args)
        # a step's loss, and of a validation two networks at eight noise levels a clip, twice
        if sampling or len(calls) > 2 * 8 * 2 + steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return healthy(*args)

    monkeypatch.setattr(where, name, interrupted)
    assert start(tmp_path, *words) == 0
    assert (run_folder(tmp_path) / "checkpoints/iter_000000001.pt").is_file()
    first, last = curve.read_metrics(run_folder(tmp_path) / "metrics.jsonl")
    assert last["step"] == 1 and "val_loss" in first and not {"val_loss", "psnr"} & last.keys()
    samples = [*(run_folder(tmp_path) / "samples").glob("*")] if sampling else [Path("a.mp4")]
    assert [path.suffix for path in samples] == [".mp4"]
    assert len(calls) == (1 if sampling else 2 * 8 * 2 + 1 + 2 * 8)


def test_a_torn_line_does_no_harm_and_nan_is_null(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    cfg, clips, _ = open_restless([])
    cfg.run_dir.mkdir(parents=True)
    path = cfg.run_dir / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    written = log.Log(cfg, clips, 0)
    written.write({"step": 3, "loss": float("nan"), "val_losses": [1.0, float("inf")]})
    written.write({"step": 4, "loss": np.float64(1.5)})
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    lines = curve.read_metrics(path)
    assert [line["step"] for line in lines] == [1, 3, 4]
    assert lines[1] == {"step": 3, "loss": None, "val_losses": [1.0, None]} and curve.svg(lines)


def test_tensorboard_gets_scalars_config_and_the_contact_sheet(run, tmp_path, monkeypatch, capsys):
    calls = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def __getattr__(self, name):
            return lambda *args, **options: calls.append((name, *args))

    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert start(tmp_path, *run[2], "trainer.tensorboard=true") == 0
    scalars = {(tag, step): value for name, tag, value, step, *_ in
               (call for call in calls if call[0] == "add_scalar")}
    lines = curve.read_metrics(run_folder(tmp_path) / "metrics.jsonl")
    assert scalars["val_loss", 0] == lines[0]["val_loss"] and scalars["loss", 2] == lines[2]["loss"]
    assert {"add_text", "add_image"} <= {call[0] for call in calls}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    assert log.Log(load_config(TINY[0], [*TINY[1:], "trainer.tensorboard=true"]), None, 0).failed
    assert "pip install tensorboard" in capsys.readouterr().out


# ---- curves and console --------------------------------------------------------------------------

NUMBER = r"-?[\d.]+(?:e-?\d+)?"


def read_panel(text, title):
    """{label: [(step, value)]} of a panel of the SVG, read off its axes as a person would."""
    root = ElementTree.fromstring(text)
    tags = [(e.tag.split("}")[1], e.attrib, e.text or "") for e in root]
    begins = [i for i, (_, a, _) in enumerate(tags) if a.get("class") == "title"] + [len(tags)]
    first = next(i for i in begins if title in tags[i][2])
    part = tags[first : begins[begins.index(first) + 1]]
    scale = math.log10 if "log scale" in part[0][2] else float
    axes = {"left": [], "below": []}
    for tag, a, words in part:
        if a.get("class") in axes and words != "step":
            place = float(a["y"]) - 4 if a["class"] == "left" else float(a["x"])
            axes[a["class"]].append((place, float(words)))
    value = np.polyfit([p for p, _ in axes["left"]], [scale(v) for _, v in axes["left"]], 1)
    step = np.polyfit(*zip(*axes["below"]), 1)
    labels = [w for tag, a, w in part if tag == "text" and not a.get("class")]
    curves = [a["d"] for tag, a, _ in part if a.get("fill") == "none" and "class" not in a]
    found = {}
    for label, d in zip(labels, curves):
        points = re.findall(f"({NUMBER}) ({NUMBER})", d)
        read = [(np.polyval(step, float(x)), np.polyval(value, float(y))) for x, y in points]
        found[label] = [(s, 10**v if scale is math.log10 else v) for s, v in read]
    return found


def test_the_curves_show_the_values_of_the_metrics():
    lines = [{"step": 10 * i, "loss": 3 / (1 + i), "loss_mean": 3 / (1 + i), "lr": 1e-4 * i,
              "grad_norm": 1 + i % 3, "seconds": 2.0 + i / 100} for i in range(40)]
    for i in (0, 20, 39):
        lines[i] |= {"val_loss": 2 - i / 40, "val_zero": 1.0, "val_sigmas": [0.5, 2.0],
                     "val_losses": [2 - i / 40, 1 - i / 80]}
    lines[25]["resumed_at"] = 240
    text = curve.svg(lines, "a <run>")
    found = read_panel(text, "loss")
    assert len(found["training loss"]) == 39 and "log scale" in text
    for (step, value), line in zip(found["training loss"], lines[1:]):
        assert step == pytest.approx(line["step"], abs=1)
        assert value == pytest.approx(line["loss"], rel=0.05)
    levels = read_panel(text, "each noise level")
    assert [v for _, v in levels["sigma 2"]] == pytest.approx([1, 0.75, 41 / 80], abs=0.02)
    assert [v for _, v in read_panel(text, "learning rate")["lr"]] == pytest.approx(
        [line["lr"] for line in lines], abs=5e-5)
    assert text.count('class="resume"') == text.count('class="title"') == 5
    assert "a &lt;run>" in text


def test_the_curves_can_be_drawn_alone_and_of_next_to_nothing(run, tmp_path, capsys):
    assert curve.main([str(run_folder(run[0]))]) == 0
    assert capsys.readouterr().out.strip().endswith("loss_curve.svg")
    assert curve.main([str(tmp_path)]) == 2 and "usage" in capsys.readouterr().err
    for lines in ([], [{"step": 1, "loss": 0.0}], [{"step": 3, "loss": -1, "lr": 0}],
                  [{"step": i, "loss": 1e-9, "seconds": 1e12} for i in range(5000)]):
        assert len(curve.svg(lines)) < 200_000
        ElementTree.fromstring(curve.svg(lines))


@pytest.mark.parametrize("message, reason", [
    ("", "DSLRuntimeError"),
    ("\n  no such head\nframe #0", "DSLRuntimeError: no such head"),
    ("\x1b[91m\x1b[1merror:\x1b[0m no valid IR", "DSLRuntimeError: error: no valid IR"),
])
def test_a_kernel_that_is_not_taken_is_named_with_the_reason(monkeypatch, message, reason):
    def activate(name):
        raise type("DSLRuntimeError", (Exception,), {})(message)

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.0b36")
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    said = kernels.activate_flash_attention_4(None, None)
    assert said == (f" (not flash-attn-4 4.0.0b36: {reason}; torch {torch.__version__} was seen "
                    "working with 4.0.0b18 and heads 128 wide)")


@pytest.mark.parametrize("message, reason", [
    ("backend='inductor' raised:\nRuntimeError: Failed to find C compiler.\n\nSet VERBOSE=1",
     "RuntimeError: Failed to find C compiler."),
    ("Command '['/usr/bin/gcc', 'cuda_utils.c']' returned non-zero exit status 1.",
     "Command '['/usr/bin/gcc', 'cuda_utils.c']' returned non-zero exit status 1."),
    ("", "RuntimeError('')"),
])
def test_a_machine_on_which_nothing_can_be_compiled_is_told_what_it_lacks(monkeypatch, message,
                                                                          reason):
    def broken(fn):
        def run(x):
            raise RuntimeError(message)
        return run

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    with pytest.raises(ValueError) as caught:
        kernels.check_compiler(torch.device("cuda", 3))
    assert f"builds no kernels here: {reason}; it needs a C compiler" in str(caught.value)
    assert kernels.check_compiler(torch.device("cpu")) is None


def test_the_console_says_what_is_trained_each_logged_step_and_how_it_ended(run):
    said = (run[0] / "said.txt").read_text()
    for words in (r"^model +base [\d,]+, control [\d,]+ parameters; [\d,]+ are trained$",
                  r"^ranks +1 x 1 \(dp x tp\) on CPU, float32, attention kernel torch",
                  r"^memory +about [\d.]+ GiB a rank$", r"^data .* lidar control, 1 view, 9 frames",
                  r"^held out +c3_0$", r"^tokenizer ", r"^run .*/smoke/smoke/smoke$",
                  r"^step 0 validation loss [\d.]+ over 1 held-out clips",
                  r"^step 2 loss [\d.]+ lr 0.0015 norm [\d.]+ [\d.]+ s/step data [\d.e-]+ s",
                  r"^2 steps with 2 clips in \d+ s, 0 steps and 0 clips skipped, best validation "
                  r"loss [\d.]+ at step \d$"):
        assert len(re.findall(words, said, re.M)) == 1, words
    assert re.search(r"^sampling 1 clips: ", said, re.M)
    assert "\x1b" not in said  # nobody watches: no cursor is moved
    lines = curve.read_metrics(run_folder(run[0]) / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["loss"] == lines[0]["val_loss"] and len(lines[0]["val_losses"]) == 8
    parts = sum(lines[2][f"{part}_s"] for part in log.PARTS)
    assert lines[2]["seconds"] == pytest.approx(parts) and lines[2]["psnr"] > 0
