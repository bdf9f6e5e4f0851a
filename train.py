"""Train the control branch of a Cosmos-Transfer1-Sample-AV model: config, loop, validation, logging.

    python train.py CONFIG [--dryrun] [--allow-config-change] [key.sub=value ...]      also under torchrun
"""

import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from einops import rearrange
from tqdm import tqdm

import convert
import data
import model as m
import tp
from model import ModelConfig
from tokenizer import load_tokenizer

# ---- config: one YAML a run, read once into these (SPEC sections 5 to 8) -----------------------------------------------

REQUIRED = "required"


@dataclass
class Job:
    stage: str = "pretrain"  # or posttrain, which starts from checkpoint.load_path
    project: str | None = None  # null: the released names of SPEC section 8
    group: str = "CTRL_7Bv1_sampleAV"
    name: str | None = None


@dataclass
class Data:
    root: str = REQUIRED  # a Waymo drive; synthetic: write a small one and use it; random: no clips, random latents
    hint: str = REQUIRED  # lidar or hdmap
    num_frames: int = 121
    views: int = 1
    height: int = 704
    width: int = 1280
    batch_size: int = 1  # clips per replica and forward pass
    num_workers: int = 2  # threads that decode ahead
    cache: str | None = None  # folder of latents made by `python data.py cache`
    cache_windows: int = 4  # windows a clip in it


@dataclass
class Tokenizer:
    path: str = "checkpoints/nvidia/Cosmos-Tokenize1-CV8x8x8-720p"


@dataclass
class Parallel:
    tp: int = 1
    recompute: str = "auto"  # none, attention_saved, full; auto: the fastest that the estimate fits into the GPU
    timeout_s: float = 600


@dataclass
class Optimizer:
    lr: float = 2**-14.3
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-10
    warmup_steps: int = 1000
    clip_norm: float = 1.0
    ema_rate: float = 0.1  # width of the power-function EMA relative to the run


@dataclass
class Trainer:
    max_iter: int = 999_999_999
    logging_iter: int = 200
    seed: int = 0
    precision: str = "bfloat16"
    grad_accum: int = 1  # forward passes a step
    sample_iter: int = 0  # write a sample video every so many steps; 0: never
    sample_steps: int = 35
    guidance: float = 5.0
    check_drift: bool = False  # at each logged step, verify that parameters which must be equal over ranks are


@dataclass
class Checkpoint:
    base_path: str = REQUIRED  # file of the frozen base; random: a base with random weights
    load_path: str | None = None  # control checkpoint that posttraining starts from
    save_iter: int = 1000  # also after the last step; 0: never
    keep_last: int = 3
    keep_every: int = 0


@dataclass
class Config:
    job: Job = field(default_factory=Job)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    parallel: Parallel = field(default_factory=Parallel)
    optimizer: Optimizer = field(default_factory=Optimizer)
    trainer: Trainer = field(default_factory=Trainer)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    @property
    def latent_shape(self):  # (16, V*T, H, W) of a sample
        frames = (self.data.num_frames - 1) // 8 + 1
        return m.LATENT, self.data.views * frames, self.data.height // 8, self.data.width // 8

    @property
    def tokens(self):
        _, frames, h, w = self.latent_shape
        return frames * (h // 2) * (w // 2)

    @property
    def run_dir(self):
        return Path(os.environ.get("OUTPUT_ROOT", "checkpoints")) / self.job.project / self.job.group / self.job.name


def read_yaml(path):
    """Nested dict of a config file and of those it inherits from, nearest last."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}; the configs are in configs/")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold sections such as 'data:', it holds {tree!r}")
    base = tree.pop("base", None)
    return merge(read_yaml(path.parent / base), tree) if base else tree


def merge(below, above):
    both = dict(below)
    for key, value in above.items():
        both[key] = merge(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
    return both


def load_config(path, overrides=()) -> Config:
    """Config from a YAML file and `key.sub=value` overrides, checked and with what follows from it filled in.

    ValueError or FileNotFoundError, one sentence, for anything that could not be trained.
    """
    tree = read_yaml(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key.count(".") != 1:
            raise ValueError(f"override {override!r} must look like section.key=value, for example trainer.max_iter=100")
        section, name = key.split(".")
        tree = merge(tree, {section: {name: yaml.safe_load(value)}})
    known = [f"{s.name}.{f.name}" for s in dataclasses.fields(Config) for f in dataclasses.fields(s.type)]
    cfg = Config()
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise ValueError(f"config section {section!r} must hold keys, it holds {values!r}; {nearest(section, known)}")
        for name, value in values.items():
            key = f"{section}.{name}"
            if key not in known:
                raise ValueError(f"there is no config key {key}; {nearest(key, known)}")
            kind = typing.get_type_hints(type(getattr(cfg, section)))[name]
            setattr(getattr(cfg, section), name, typed(key, value, kind))
    for key in known:
        if getattr(getattr(cfg, key.split(".")[0]), key.split(".")[1]) is REQUIRED:
            raise ValueError(f"the config lacks the key {key}, which has no default")
    derive(cfg)
    return cfg


def nearest(key, known):
    section_keys = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]  # right key, wrong section
    close = section_keys or difflib.get_close_matches(key, known, n=1, cutoff=0)
    return f"did you mean {close[0]}?"


def typed(key, value, kind):
    """value as the annotated type of its key; 1e-10 is a string to YAML, and an int does where a float is wanted."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if option is type(None) and value is None or option in (str, bool, int) and type(value) is option:
            return value
        if option is float and not isinstance(value, bool):
            with contextlib.suppress(TypeError, ValueError):
                return float(value)
        if typing.get_origin(option) is list and isinstance(value, list):
            return [typed(key, item, typing.get_args(option)[0]) for item in value]
    wanted = " or ".join("null" if o is type(None) else str(getattr(o, "__name__", o)) for o in options)
    raise ValueError(f"{key} must be {wanted}, not {value!r}")


def derive(cfg: Config):
    """Fill in what follows from other keys, and refuse what cannot work, with the remedy."""
    d, size = cfg.data, cfg.model
    need(cfg.job.stage in ("pretrain", "posttrain"), f"job.stage is {cfg.job.stage!r}; use pretrain or posttrain")
    need(d.hint in ("lidar", "hdmap"), f"data.hint is {d.hint!r}; use lidar or hdmap")
    need(1 <= d.views <= 5, f"data.views is {d.views}; use 1, or 2 to 5 for a multi-view model")
    need(size.conditioning in (None, "t2w", "v2w"), f"model.conditioning is {size.conditioning!r}; use t2w, v2w or null")
    need(size.conditioning is None or d.views > 1, f"model.conditioning {size.conditioning} is for multi-view models, "
         f"but data.views is {d.views}; use data.views=3, or model.conditioning=null for a single view")
    need(d.views == 1 or size.conditioning is not None, f"data.views is {d.views}, but model.conditioning says nothing; "
         "use t2w or v2w, or data.views=1")
    need(size.n_views in (None, d.views), f"model.n_views is {size.n_views} but data.views is {d.views}; give one of them")
    size.n_views = d.views
    need(d.num_frames > 0 and d.num_frames % 8 == 1, f"data.num_frames is {d.num_frames}; the tokenizer needs 8k+1, "
         f"such as {d.num_frames // 8 * 8 + 1}")
    need(d.height % 16 == 0 and d.width % 16 == 0 and min(d.height, d.width) > 0,
         f"data.height x data.width is {d.height} x {d.width}; both must be multiples of 16 (8 a latent cell, 2 a token)")
    _, frames, h, w = cfg.latent_shape
    need(h <= size.max_img_h and w <= size.max_img_w and frames // d.views <= size.max_frames,
         f"a clip has {frames // d.views} x {h} x {w} latent cells, more than the position tables hold: model.max_frames "
         f"{size.max_frames}, model.max_img_h {size.max_img_h}, model.max_img_w {size.max_img_w}")
    need(size.model_channels % size.num_heads == 0, f"model.num_heads {size.num_heads} does not divide "
         f"model.model_channels {size.model_channels}")
    need(size.num_control_blocks <= size.num_blocks, f"model.num_control_blocks {size.num_control_blocks} is more than "
         f"model.num_blocks {size.num_blocks}")
    need(cfg.parallel.recompute in ("auto", *RECOMPUTE), f"parallel.recompute is {cfg.parallel.recompute!r}; use auto, "
         + ", ".join(RECOMPUTE))
    need(cfg.trainer.precision in ("bfloat16", "float32"), f"trainer.precision is {cfg.trainer.precision!r}; "
         "use bfloat16 or float32")
    for key in ("data.batch_size", "trainer.grad_accum", "trainer.logging_iter", "parallel.tp"):
        value = getattr(getattr(cfg, key.split(".")[0]), key.split(".")[1])
        need(value > 0, f"{key} is {value}; it must be 1 or more")
    posttrain = cfg.job.stage == "posttrain"
    need(not posttrain or cfg.checkpoint.load_path, "job.stage is posttrain, but checkpoint.load_path is null; give the "
         "control checkpoint to start from, or use job.stage=pretrain")
    need(posttrain or not cfg.checkpoint.load_path, f"checkpoint.load_path is {cfg.checkpoint.load_path}, but job.stage "
         "is pretrain, which starts from the base; use job.stage=posttrain or checkpoint.load_path=null")
    cfg.job.project = cfg.job.project or f"cosmos_transfer1_{cfg.job.stage}"
    kind = f"{size.conditioning}_sv2mv" if d.views > 1 else "t2w"
    cfg.job.name = cfg.job.name or (f"CTRL_7Bv1pt3_{kind}_{d.num_frames}frames_control_input_{d.hint}_"
                                    f"block{size.num_control_blocks}_{cfg.job.stage}")


def need(condition, message):
    if not condition:
        raise ValueError(message)


RECOMPUTE = ("none", "attention_saved", "full")

# ---- optimization: every trained parameter of this rank in one flat float32 buffer, replicated ones first --------------


class FlatParams:
    """Master weights, gradients, moments and EMA of the trained parameters; a step is a handful of whole-buffer calls."""

    def __init__(self, named, cfg: Optimizer):
        self.params = dict(sorted(named, key=lambda item: getattr(item[1], "tp_dim", None) is not None))
        self.tp_dims = {name: getattr(p, "tp_dim", None) for name, p in self.params.items()}
        self.replicated = sum(p.numel() for name, p in self.params.items() if self.tp_dims[name] is None)
        self.master = torch.cat([p.detach().float().flatten() for p in self.params.values()])
        self.grad, self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.master) for _ in range(3))
        self.ema = self.master.clone()
        self.optimizer = torch.optim.AdamW([self.master], lr=cfg.lr, betas=tuple(cfg.betas), eps=cfg.eps,
                                           weight_decay=cfg.weight_decay, fused=True)
        self.steps = torch.zeros((), device=self.master.device)
        self.optimizer.state[self.master] = {"step": self.steps, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        self.master.grad = self.grad

    def views(self, flat):
        """name -> its part of a flat buffer, in the parameter's shape."""
        parts = flat.split([p.numel() for p in self.params.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(self.params.items(), parts)}

    def state(self):
        """What a checkpoint holds, as named views: filled in place when resuming."""
        return {kind: self.views(getattr(self, kind)) for kind in ("master", "ema", "exp_avg", "exp_avg_sq")}

    def take_gradients(self, scale=1.0):
        """Add scale * gradient to the flat buffer and free the parameter's own."""
        with torch.no_grad():
            for part, p in zip(self.views(self.grad).values(), self.params.values()):
                part.add_(p.grad, alpha=scale)
                p.grad = None

    def write(self, flat):
        """Round a flat buffer into the model's weights."""
        torch._foreach_copy_([p.data for p in self.params.values()], list(self.views(flat).values()))


def learning_rate(step, cfg: Optimizer):
    return cfg.lr * (1e-6 + (1 - 1e-6) * min(1.0, step / cfg.warmup_steps) if cfg.warmup_steps else 1.0)


def ema_exponent(rate):
    """Exponent of the power-function EMA whose width is `rate` of the run (arXiv 2312.02696)."""
    roots = np.roots([1, 7, 16 - rate**-2, 12 - rate**-2])
    return float(roots[np.isreal(roots)].real.max())


def ema_beta(i, rate):
    """Weight of the old average at the i-th update, counted from 0."""
    return (1 - 1 / (i + 1)) ** (ema_exponent(rate) + 1) if i else 0.0


# ---- batches -----------------------------------------------------------------------------------------------------------


def open_clips(cfg: Config):
    """The clips of data.root, or None for random latents. Writes the synthetic drive first if that is asked for."""
    d, size = cfg.data, cfg.model
    if d.root == "random":
        return None
    root = Path(d.root)
    if d.root == "synthetic":
        root = Path(f"datasets/synthetic_drive_{d.height}x{d.width}")
        if tp.world_rank() == 0:
            data.write_drive(root, clips=8, frames=max(40, d.num_frames), height=d.height, width=d.width,
                             text_width=size.crossattn_emb_channels)
        tp.barrier()
    settings = dict(root=root, hint=d.hint, num_frames=d.num_frames, views=d.views, height=d.height, width=d.width,
                    seed=cfg.trainer.seed, text_tokens=size.text_tokens, text_width=size.crossattn_emb_channels)
    if d.cache:
        return data.CachedClips(d.cache, d.cache_windows, cfg.tokenizer.path, **settings)
    return data.WaymoClips(**settings)


def empty_batch(cfg: Config, device, dtype):
    """A batch of latents whose contents another rank of the group fills in."""
    d, size, b = cfg.data, cfg.model, cfg.data.batch_size
    new = lambda *shape, kind=dtype: torch.zeros(b, *shape, dtype=kind, device=device)
    return {"latents": new(*cfg.latent_shape), "hint_latents": new(*cfg.latent_shape),
            "text": new(d.views * size.text_tokens, size.crossattn_emb_channels), "fps": new(kind=torch.float32),
            "padding_mask": new(1, d.height, d.width), "view_index": new(d.views, kind=torch.int64)}


def random_batch(cfg: Config, numbers, device, dtype):
    """Samples that are noise, each a function of its number, for benchmarks and tests."""
    batch = empty_batch(cfg, device, dtype)
    for row, n in enumerate(numbers):
        rng = torch.Generator(device).manual_seed(m.seed_of(cfg.trainer.seed, n))
        for key in ("latents", "hint_latents", "text"):
            batch[key][row].normal_(generator=rng)
    batch["fps"].fill_(10)
    batch["view_index"] += torch.tensor([0, 1, 2, 4, 5][: cfg.data.views], device=device)
    return batch


def read_numbers(cfg: Config, position):
    """Sample numbers of the forward passes this rank reads for, a batch at a time, from data position `position`.

    Each rank of a tensor-parallel group reads every tp-th batch of its replica, so that decoding and encoding are shared.
    """
    b = cfg.data.batch_size
    for i in itertools.count(tp.rank(), tp.size()):
        start = position + (i * tp.dp_size() + tp.dp_rank()) * b
        yield list(range(start, start + b))


def encode(cfg: Config, samples, tokenizer, device, dtype):
    """Samples from data.py -> the batch that every rank of the group trains on, its pixels encoded to latents."""
    batch = {key: value.to(device, non_blocking=True) for key, value in data.collate(samples).items()
             if torch.is_tensor(value)}
    for pixels, latents in (("video", "latents"), ("hint", "hint_latents")):
        if pixels in batch:
            batch[latents] = tokenizer.encode_views(batch.pop(pixels))
    return {key: batch[key].to(like.dtype) for key, like in empty_batch(cfg, "meta", dtype).items()}


def noise_of(cfg: Config, step, micro, device):
    """The random draws of this replica's samples in one forward pass of a step."""
    first = (micro * tp.dp_size() + tp.dp_rank()) * cfg.data.batch_size
    return m.draw_noise(cfg.model, cfg.latent_shape, cfg.trainer.seed, step,
                        range(first, first + cfg.data.batch_size), device)


def condition_of(batch, views):
    return m.Condition(batch["text"], batch["fps"], batch["padding_mask"], batch["hint_latents"],
                       batch["view_index"] if views > 1 else None)


# ---- the run -----------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds spent in each part of the current step, work queued on the GPU included."""

    def __init__(self, device):
        self.cuda, self.last, self.parts = device.type == "cuda", time.perf_counter(), {}
        self.take()

    def lap(self, part):
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[part] += now - self.last
        self.last = now

    def take(self):
        parts, self.parts = self.parts, dict.fromkeys(
            ("data", "encode", "forward", "backward", "sync", "optimizer", "save"), 0.0)
        return parts


def say(message):
    if tp.world_rank() == 0:
        tqdm.write(message)


def load_model(cfg: Config, device, dtype):
    """The model with its base and control weights as job.stage wants them."""
    model = m.build(cfg.model, device, dtype)
    m.init_weights(model, cfg.trainer.seed)
    if cfg.checkpoint.base_path == "random":
        say("base: RANDOM weights, as checkpoint.base_path asks")
    else:
        weights = convert.open_weights(cfg.checkpoint.base_path)
        convert.load(model.base, weights, "base")
        convert.load(model.logvar, weights, "logvar")
    if cfg.job.stage == "posttrain":
        convert.load(model.control, convert.open_weights(cfg.checkpoint.load_path), "control")
    else:
        convert.copy_base_to_control(model)
        say("control: a copy of the base, its hint encoder and zero linears new")
    return model


def open_run(cfg: Config, allow_change, argv):
    """Make the run's folder and note config, command, commit and versions; refuse a config that trains something else."""
    path = cfg.run_dir / "config.yaml"
    new = dataclasses.asdict(cfg)
    if path.is_file() and not allow_change:
        old = yaml.safe_load(path.read_text())
        changes = [f"{s}.{k}: {old[s].get(k)!r} -> {v!r}" for s, keys in new.items() for k, v in keys.items()
                   if old.get(s, {}).get(k) != v and not harmless(s, k)]
        need(not changes, f"{cfg.run_dir} holds a run with another config ({'; '.join(changes)}); give this run its own "
             "job.name, or start it with --allow-config-change")
    try:
        (cfg.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(new, sort_keys=False))
    except OSError as error:
        raise ValueError(f"cannot write the run's folder {cfg.run_dir}: {error.strerror}; set OUTPUT_ROOT") from None
    commit = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True)
    with open(cfg.run_dir / "starts.jsonl", "a") as f:
        f.write(json.dumps({"command": argv, "commit": commit.stdout.decode().strip(), "python": platform.python_version(),
                            "torch": torch.__version__, "numpy": np.__version__, "time": time.ctime()}) + "\n")


def harmless(section, key):
    """Keys that change neither what is trained nor the model."""
    return section in ("trainer", "parallel") or (section, key) in (("checkpoint", "save_iter"), ("data", "num_workers"))


def train(cfg: Config, clips, tokenizer, model, flat, base, step, position):
    """Train from `step` and data position to max_iter or a signal. What is trained depends on neither tp nor dp."""
    device, dtype = flat.master.device, model.base.patch_embed.weight.dtype
    opt, t, accum = cfg.optimizer, cfg.trainer, cfg.trainer.grad_accum
    read = lambda numbers: numbers if clips is None else [clips.sample(n) for n in numbers]
    reader = data.prefetch(read, read_numbers(cfg, position), cfg.data.num_workers)
    stop, clock, log = stop_signals(), Clock(device), Log(cfg, device, clips, step)
    batches, skipped, saved = 0, 0, None

    while step < t.max_iter and not any(tp.from_all(bool(stop))):
        loss = torch.zeros((), device=device)
        for micro in range(accum):
            if batches % tp.size() == 0:  # every rank of the group reads and encodes one of the next tp batches
                samples = next(reader)
                clock.lap("data")
                own = (random_batch(cfg, samples, device, dtype) if clips is None else
                       encode(cfg, samples, tokenizer, device, dtype))
            turn = batches % tp.size()
            batch = own if turn == tp.rank() else empty_batch(cfg, device, dtype)
            tp.broadcast(batch, src=turn)
            batches += 1
            noise = noise_of(cfg, step, micro, device)
            clock.lap("encode")
            part = m.training_loss(model, batch["latents"], condition_of(batch, cfg.data.views), noise)
            clock.lap("forward")
            part.backward()
            clock.lap("backward")
            flat.take_gradients(1 / accum)
            loss += part.detach() / accum
        tp.sync_gradients(flat.grad, flat.replicated)
        norm = tp.global_norm(flat.grad, flat.replicated)
        clock.lap("sync")
        if norm.isfinite():
            flat.grad.mul_((opt.clip_norm / norm).clamp(max=1.0))
            flat.optimizer.param_groups[0]["lr"] = learning_rate(step, opt)
            flat.optimizer.step()
            flat.ema.lerp_(flat.master, 1 - ema_beta(step, opt.ema_rate))
            flat.write(flat.master)
        else:
            skipped += 1
            say(f"step {step + 1}: the gradient norm is {norm.item()}, so this step changes nothing ({skipped} so far)")
        flat.grad.zero_()
        step += 1
        position += accum * tp.dp_size() * cfg.data.batch_size
        clock.lap("optimizer")
        log.step(step, loss, norm, learning_rate(step - 1, opt), skipped, clock.take())
        if t.check_drift and step % t.logging_iter == 0:
            tp.check_drift(flat.master, flat.replicated)
        if t.sample_iter and step % t.sample_iter == 0 and clips is not None:
            flat.write(flat.ema)
            write_sample(cfg, model, tokenizer, batch, noise, step)
            flat.write(flat.master)
        if cfg.checkpoint.save_iter and (step % cfg.checkpoint.save_iter == 0 or step == t.max_iter):
            saved = save(cfg, model, flat, step, position, base, saved)
            clock.lap("save")
    reader.close()
    finish(cfg, model, flat, base, step, position, saved, log)


def finish(cfg: Config, model, flat, base, step, position, saved, log):
    """Make sure that the last step is on disk, and say how the run ended."""
    if cfg.checkpoint.save_iter and step < cfg.trainer.max_iter and (saved is None or saved.step != step):
        saved = save(cfg, model, flat, step, position, base, saved)
    if saved is not None:
        saved.wait()
    tp.barrier()
    log.close()
    where = cfg.run_dir / "checkpoints" / f"iter_{step:09d}.pt"
    if step < cfg.trainer.max_iter:
        say(f"saved {where}, rerun the same command to continue")
    elif tp.world_rank() == 0 and log.path.is_file():
        losses = {line["step"]: line["loss"] for line in map(json.loads, log.path.read_text().splitlines())}
        losses = [losses[i] for i in sorted(losses)]
        n = max(1, min(20, len(losses) // 4))
        say(f"loss {np.mean(losses[:n]):.4f} -> {np.mean(losses[-n:]):.4f} (means of {n} logged steps), "
            f"checkpoint {where}, metrics {log.path}")


def stop_signals():
    """A list that SIGTERM and SIGINT append to; a second signal ends the process the usual way."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return received


class Log:
    """Progress bar, metrics.jsonl and the closing table; only world rank 0 writes."""

    def __init__(self, cfg, device, clips, start):
        self.cfg, self.device, self.clips, self.losses, self.rows = cfg, device, clips, [], []
        self.path = cfg.run_dir / "metrics.jsonl"
        self.tflop = m.tflop_per_sample(cfg.model, cfg.tokens) * cfg.trainer.grad_accum * cfg.data.batch_size
        self.bar = tqdm(total=cfg.trainer.max_iter, initial=start, disable=tp.world_rank() != 0,
                        mininterval=1 if sys.stderr.isatty() else 30)

    def step(self, step, loss, norm, lr, skipped, parts):
        seconds = sum(parts.values())
        self.losses.append(tp.mean_over_replicas(loss))
        self.rows.append(parts)
        self.bar.update()
        if step % self.cfg.trainer.logging_iter and step != self.cfg.trainer.max_iter:
            return
        rate = self.tflop / seconds / tp.size()
        line = {"step": step, "loss": self.losses[-1].item(), "loss_mean": torch.stack(self.losses).mean().item(),
                "lr": lr, "grad_norm": norm.item(), "seconds": seconds, **{f"{k}_s": v for k, v in parts.items()},
                "tflops_per_gpu": rate, "skipped_steps": skipped, "bad_clips": len(self.clips.bad) if self.clips else 0}
        if self.device.type == "cuda":
            line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            line["mfu"] = rate / PEAK_TFLOPS if torch.cuda.get_device_capability() == (9, 0) else None
        self.losses = []
        if tp.world_rank() == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")
            self.bar.set_postfix({"loss": f"{line['loss_mean']:.4f}", "lr": f"{lr:.1e}", "norm": f"{line['grad_norm']:.2f}",
                                  "s/it": f"{seconds:.2f}", "data": f"{parts['data']:.2f}s",
                                  "GiB": f"{line.get('peak_gib', 0):.1f}"}, refresh=False)

    def close(self):
        """Print the seconds of each part of a step: the median of tp-step rounds, in which every rank reads once."""
        self.bar.close()
        n = tp.size()
        rows = self.rows[max(3, n):]  # without warm-up
        rows = np.array([list(row.values()) for row in rows[: len(rows) // n * n]]).reshape(-1, n, 7).mean(1)
        if len(rows) == 0:
            return
        seconds = np.median(rows.sum(1))
        table = "  ".join(f"{part} {s:.3f}" for part, s in zip(self.rows[0], np.median(rows, axis=0)))
        if self.device.type == "cuda":
            rate = self.tflop / seconds / n
            table += f"  | {rate:.0f} TFLOP/s a GPU, MFU {rate / PEAK_TFLOPS:.1%} of {PEAK_TFLOPS:.0f}, peak " \
                     f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        say(f"seconds a step (median): {seconds:.3f} = {table}")


PEAK_TFLOPS = 989.0  # dense bfloat16 of an H100 or H200 (NVIDIA's datasheets)


def checkpoint_state(model, flat):
    """Tensors of a checkpoint by name: control branch and logvar as trained, their EMA, and the optimizer's state."""
    views = flat.state()
    saved = {f"control.{k}": v.detach() for k, v in model.control.named_parameters()}
    saved |= {f"logvar.{k}": v.detach() for k, v in model.logvar.state_dict().items()}
    optim = {name: {kind: views[kind][name] for kind in ("master", "exp_avg", "exp_avg_sq")} for name in flat.params}
    return {"model": saved, "ema": views["ema"], "optim": optim}


def write_sample(cfg: Config, model, tokenizer, batch, noise, step):
    """Denoise with this batch's control and write control | sample | real, a row a view, as an mp4 beside the metrics."""
    cond, x0 = condition_of(batch, cfg.data.views), batch["latents"].float()
    cond.known = noise.known
    rng = torch.Generator(x0.device).manual_seed(m.seed_of(cfg.trainer.seed, step))
    latents = m.sample(model, x0.shape, cond, rng, cfg.trainer.guidance, cfg.trainer.sample_steps, x0)
    if tp.world_rank() == 0:
        rows = [tokenizer.decode_views(x.to(x0.dtype), cfg.data.views)[0]
                for x in (batch["hint_latents"][:1], latents[:1], x0[:1])]  # (V, 3, F, H, W) each
        frames = rearrange(torch.stack(rows).cpu(), "n v c f h w -> f (v h) (n w) c").numpy()
        path = cfg.run_dir / "samples" / f"iter_{step:09d}.mp4"
        data.write_video(path, frames, float(batch["fps"][0]))
        say(f"sample: {path}")


def save(cfg: Config, model, flat, step, position, base, previous):
    """Write checkpoint `step` in the background; the training stall is printed. `base`: identity of the frozen base."""
    size = cfg.model
    meta = {"config_digest": digest(cfg), "position": position, "optimizer_steps": int(flat.steps), "base": base,
            "seq_length": max(size.max_img_h // 2, size.max_img_w // 2, size.max_frames)}
    handle = convert.save(cfg.run_dir, step, checkpoint_state(model, flat), meta, cfg.checkpoint.keep_last,
                          cfg.checkpoint.keep_every, previous)
    say(f"step {step}: checkpoint stall {handle.stall:.1f} s")
    return handle


def resume(cfg: Config, model, flat, base):
    """(step, data position) to go on from: those of the newest intact checkpoint of this run, loaded in place, or (0, 0)."""
    found = tp.from_rank0(convert.find_resume(cfg.run_dir) if tp.world_rank() == 0 else None)
    if found is None:
        return 0, 0
    step, path = found
    meta = convert.resume(path, flat.state(), flat.tp_dims)
    convert.check_base(meta["base"], base)
    flat.steps.fill_(meta["optimizer_steps"])
    flat.write(flat.master)
    say(f"resuming at step {step} from {path}")
    return step, meta["position"]


def digest(cfg):
    """Identifies everything in the config that determines what is trained."""
    text = json.dumps({s: {k: v for k, v in keys.items() if not harmless(s, k)}
                       for s, keys in dataclasses.asdict(cfg).items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- dry run -------------------------------------------------------------------------------------------------------------


def estimate(cfg: Config, shapes: m.ControlledDiT, recompute: str) -> dict[str, float]:
    """Bytes per GPU by part. `shapes`: the whole model on the meta device, made at tp 1."""
    ranks, word = cfg.parallel.tp, 2 if cfg.trainer.precision == "bfloat16" else 4
    local = lambda module: sum(p.numel() // (ranks if getattr(p, "tp_dim", None) is not None else 1)
                               for p in module.parameters())
    trained = local(shapes.control) - local(shapes.control.head)
    stream = cfg.data.batch_size * cfg.tokens * cfg.model.model_channels * word
    blocks, control = cfg.model.num_blocks - 1, cfg.model.num_control_blocks
    frozen_block, trained_block = 16 * stream / ranks, (23 / ranks + 3) * stream
    kept = {"none": blocks * frozen_block + control * trained_block,
            "attention_saved": 2 * (blocks + control) * stream / ranks + trained_block,
            "full": (blocks + control) * stream / ranks + trained_block}[recompute]
    return {"base weights": local(shapes.base) * word, "control weights": local(shapes.control) * word,
            "masters and moments": 12 * trained, "EMA": 4 * trained, "gradients": (4 + word) * trained,
            f"activations ({recompute})": kept + 10 * stream / ranks + 8 * stream,
            "tokenizer": 0 if cfg.data.root == "random" or cfg.data.cache else 2e8}


def choose_recompute(cfg: Config, shapes, device):
    """parallel.recompute, or for auto the first policy whose estimate fits into 94% of the GPU."""
    if cfg.parallel.recompute != "auto":
        return cfg.parallel.recompute
    if device.type != "cuda":
        return "none"
    memory = 0.94 * torch.cuda.get_device_properties(device).total_memory
    fitting = [r for r in RECOMPUTE if sum(estimate(cfg, shapes, r).values()) < memory]
    need(fitting, f"this needs about {sum(estimate(cfg, shapes, 'full').values()) / 2**30:.0f} GiB a GPU even with full "
         f"recomputation, the GPU has {memory / 0.94 / 2**30:.0f}; use more GPUs with a larger parallel.tp")
    return fitting[0]


def dryrun(cfg: Config):
    """Print the resolved config, what it needs and what is missing, from the config alone."""
    print(yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
    dtype, ranks = getattr(torch, cfg.trainer.precision), cfg.parallel.tp
    world = int(os.environ.get("WORLD_SIZE", ranks))
    tp.check_mesh(world, ranks, cfg.model.num_heads)
    shapes = m.build(cfg.model, "meta", dtype)
    count = lambda params: sum(p.numel() for p in params)
    params = list(shapes.parameters())
    on_gpu = torch.cuda.is_available()
    recompute = choose_recompute(cfg, shapes, torch.device("cuda" if on_gpu else "cpu"))
    if cfg.parallel.recompute == "auto" and not on_gpu:
        recompute = "attention_saved"
    parts = estimate(cfg, shapes, recompute)
    trained = count(p for p in params if p.requires_grad)
    sharded = count(p for p in params if getattr(p, "tp_dim", None) is not None)
    rows = [("run", cfg.run_dir), ("mesh", f"{world} ranks = dp {world // ranks} x tp {ranks}"),
            ("parameters: base", f"{count(shapes.base.parameters()):,}"),
            ("parameters: control", f"{count(shapes.control.parameters()):,}"), ("parameters: trained", f"{trained:,}"),
            ("parameters: sharded / replicated", f"{sharded:,} / {count(params) - sharded:,}"),
            ("tokens a sample", f"{cfg.tokens:,}"), ("latents", "{} x {} x {} x {}".format(*cfg.latent_shape)),
            ("sigma multiplier", f"{math.sqrt(cfg.latent_shape[1] / cfg.data.views):.3f}"),
            ("TFLOP a sample and step", f"{m.tflop_per_sample(cfg.model, cfg.tokens):,.0f}")]
    rows += [(f"GiB a GPU: {part}", f"{size / 2**30:.2f}") for part, size in parts.items()]
    total = sum(parts.values()) / 2**30
    has = f" of {torch.cuda.get_device_properties(0).total_memory / 2**30:.1f}" if on_gpu else ""
    word = torch.finfo(dtype).bits // 8
    rows += [("GiB a GPU: total", f"{total:.2f}{has}"),
             ("GiB a checkpoint", f"{(count(shapes.control.parameters()) * (word + 4) + 12 * trained) / 2**30:.2f}")]
    rows += [(f"path: {key}", f"{path}{'' if Path(path).exists() else '   MISSING'}") for key, path in paths(cfg)]
    print("\n".join(f"{name:<36} {value}" for name, value in rows))


def paths(cfg: Config):
    """(config key, path) of everything the run reads."""
    special = {"data.root": ("random", "synthetic"), "checkpoint.base_path": ("random",)}
    named = {"data.root": cfg.data.root, "data.cache": cfg.data.cache, "tokenizer.path": cfg.tokenizer.path,
             "checkpoint.base_path": cfg.checkpoint.base_path, "checkpoint.load_path": cfg.checkpoint.load_path}
    if cfg.data.root == "random":
        del named["tokenizer.path"]
    return [(key, path) for key, path in named.items() if path and path not in special.get(key, ())]


def prepare(cfg: Config, allow_change, argv):
    """Everything of a run before its first step, cheapest checks first: the arguments of `train`."""
    missing = [f"{key} {path}" for key, path in paths(cfg) if not Path(path).exists()]
    need(not missing, f"not there: {', '.join(missing)}; README's first steps say where to get them")
    device = tp.init(cfg.parallel.tp, cfg.model.num_heads, cfg.parallel.timeout_s)
    dtype = getattr(torch, cfg.trainer.precision)
    if tp.world_rank() == 0:
        open_run(cfg, allow_change, argv)
    clips = open_clips(cfg)
    shapes = m.build(cfg.model, "meta", dtype)
    model = load_model(cfg, device, dtype)
    model.recompute = choose_recompute(cfg, shapes, device)
    base = {"file": "random", "size": 0, "digest": f"seed {cfg.trainer.seed}"}
    if cfg.checkpoint.base_path != "random":
        base = convert.base_identity(cfg.checkpoint.base_path)
    flat = FlatParams([(name, p) for name, p in model.named_parameters() if p.requires_grad], cfg.optimizer)
    step, position = resume(cfg, model, flat, base)
    cached = clips is None or cfg.data.cache and not cfg.trainer.sample_iter
    tokenizer = None if cached else load_tokenizer(cfg.tokenizer.path, device, dtype)
    say(f"{tp.dp_size()} x {tp.size()} ranks (dp x tp) on {device.type}, {cfg.trainer.precision}, attention "
        f"{model.attention or 'chosen by torch'}, recompute {model.recompute}, "
        + (f"{len(clips)} clips in {clips.root}" if clips else "random latents"))
    return cfg, clips, tokenizer, model, flat, base, step, position


def main(argv):
    flags = [a for a in argv if a.startswith("--")]
    words = [a for a in argv if not a.startswith("--")]
    config = words.pop(0) if words and "=" not in words[0] else "configs/smoke.yaml"
    allow_change = "--allow-config-change" in flags
    try:
        unknown = set(flags) - {"--dryrun", "--allow-config-change"}
        need(not unknown, f"unknown option {', '.join(unknown)}; there are --dryrun and --allow-config-change")
        cfg = load_config(config, words)
        if "--dryrun" in flags:
            open_run(cfg, allow_change, argv)
            dryrun(cfg)
            return 0
        run = prepare(cfg, allow_change, argv)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        train(*run)
    except data.BadClip as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        tp.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
