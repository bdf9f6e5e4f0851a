"""Train the control branch of a Cosmos-Transfer1-Sample-AV model: config, loop, validation, logging.

    python train.py CONFIG [--dryrun] [--allow-config-change] [key.sub=value ...]      also under torchrun
"""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
Recompute = Literal["auto", "none", "attention_saved", "full"]


@dataclass
class Job:
    stage: Literal["pretrain", "posttrain"] = "pretrain"  # posttrain starts from checkpoint.load_path
    project: str | None = None  # null: the released names of SPEC section 8
    group: str = "CTRL_7Bv1_sampleAV"
    name: str | None = None


@dataclass
class Data:
    root: str = REQUIRED  # a Waymo drive; synthetic: write a small one and use it; random: no clips, random latents
    hint: Literal["lidar", "hdmap"] = REQUIRED
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
    recompute: Recompute = "auto"  # by the backward pass; auto: the fastest that fits, by the estimate
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
    precision: Literal["bfloat16", "float32"] = "bfloat16"
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

    def get(self, key):  # "section.key"
        return functools.reduce(getattr, key.split("."), self)

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
    tree = parse_yaml(path.read_text(), path) or {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold sections such as 'data:', it holds {tree!r}")
    base = tree.pop("base", None)
    return merge(read_yaml(path.parent / base), tree) if base else tree


def parse_yaml(text, source):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


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
        section, dot, name = key.partition(".")
        need(equals and dot, f"override {override!r} must look like section.key=value, such as trainer.max_iter=100")
        tree = merge(tree, {section: {name: parse_yaml(value, f"the value in {override!r}")}})
    cfg = Config()
    known = {f"{s.name}.{name}": kind for s in dataclasses.fields(Config)
             for name, kind in typing.get_type_hints(s.type).items()}
    for section, values in tree.items():
        need(isinstance(values, dict), f"config section {section!r} must hold keys, it holds {values!r}")
        for name, value in values.items():
            key = f"{section}.{name}"
            if key not in known:
                same = [k for k in known if k.endswith(f".{name}")]  # the right key in the wrong section
                close = same or difflib.get_close_matches(key, known, n=1, cutoff=0)
                raise ValueError(f"there is no config key {key}; did you mean {close[0]}?")
            setattr(getattr(cfg, section), name, typed(key, value, known[key]))
    for key in known:
        need(cfg.get(key) is not REQUIRED, f"the config lacks the key {key}, which has no default")
    derive(cfg)
    return cfg


def typed(key, value, kind):
    """value as the annotated type of its key; 1e-10 is a string to YAML, and an int does where a float is wanted."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType | typing._UnionGenericAlias) else (kind,)
    for option in options:
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if type(value) is option or origin is Literal and value in inner:
            return value
        if origin is list and isinstance(value, list):
            return [typed(key, item, inner[0]) for item in value]
        if option is float and (type(value) is int or re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", str(value))):
            return float(value)
    wanted = [" or ".join(map(str, typing.get_args(o))) if typing.get_origin(o) is Literal else
              "null" if o is type(None) else str(getattr(o, "__name__", o)) for o in options]
    raise ValueError(f"{key} must be {' or '.join(wanted)}, not {value!r}")


def derive(cfg: Config):
    """Fill in what follows from other keys, and refuse what cannot work, with the remedy."""
    d, size, load_path = cfg.data, cfg.model, cfg.checkpoint.load_path
    _, frames, h, w = cfg.latent_shape
    posttrain = cfg.job.stage == "posttrain"
    need(1 <= d.views <= 5, f"data.views is {d.views}; use 1, or 2 to 5 for a multi-view model")
    need((d.views > 1) == (size.conditioning is not None), f"data.views is {d.views} but model.conditioning is "
         f"{size.conditioning or 'null'}; for several views give data.views=3 and t2w or v2w, for one data.views=1 and null")
    need(size.n_views in (None, d.views), f"model.n_views is {size.n_views} but data.views {d.views}; give only one")
    need(d.num_frames % 8 == 1, f"data.num_frames is {d.num_frames}; the tokenizer needs 8k+1, such as "
         f"{d.num_frames // 8 * 8 + 1}")
    need(d.height % 16 == 0 and d.width % 16 == 0, f"data.height x data.width is {d.height} x {d.width}; both must be "
         "multiples of 16 (8 a latent cell, 2 a token)")
    need(h <= size.max_img_h and w <= size.max_img_w and frames // d.views <= size.max_frames,
         f"a clip of {frames // d.views} x {h} x {w} latent cells is more than the position tables hold: raise "
         f"model.max_frames ({size.max_frames}), max_img_h ({size.max_img_h}) or max_img_w ({size.max_img_w})")
    for key in ("data.batch_size", "trainer.grad_accum", "trainer.logging_iter", "parallel.tp", "data.num_frames",
                "data.height", "data.width"):
        need(cfg.get(key) > 0, f"{key} is {cfg.get(key)}; it must be positive")
    need(size.model_channels % size.num_heads == 0 and size.num_control_blocks <= size.num_blocks,
         f"model.num_heads ({size.num_heads}) must divide model_channels ({size.model_channels}), and num_control_blocks "
         f"({size.num_control_blocks}) not exceed num_blocks ({size.num_blocks})")
    need(posttrain == bool(load_path), f"job.stage is {cfg.job.stage} but checkpoint.load_path is {load_path or 'null'}; "
         "posttraining needs the control checkpoint to start from, pretraining starts from the base and takes null")
    need(len(cfg.optimizer.betas) == 2, f"optimizer.betas is {cfg.optimizer.betas}; give two, such as [0.9, 0.99]")
    size.n_views = d.views
    cfg.job.project = cfg.job.project or f"cosmos_transfer1_{cfg.job.stage}"
    kind = f"{size.conditioning}_sv2mv" if d.views > 1 else "t2w"
    cfg.job.name = cfg.job.name or (f"CTRL_7Bv1pt3_{kind}_{d.num_frames}frames_control_input_{d.hint}_"
                                    f"block{size.num_control_blocks}_{cfg.job.stage}")


def need(condition, message):
    if not condition:
        raise ValueError(message)


# ---- optimization (SPEC section 5) -------------------------------------------------------------------------------------


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
        from tests.synthetic_drive import write_drive
        tp.from_rank0(lambda: write_drive(root, clips=8, frames=max(40, d.num_frames), height=d.height, width=d.width,
                                          text_width=size.crossattn_emb_channels))
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


def random_batch(cfg: Config, numbers, _, device, dtype):
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


def say(message):
    if tp.world_rank() == 0:
        tqdm.write(message)


def train(cfg: Config, clips, tokenizer, model, flat, base, step, position):
    """Train from `step` and data position to max_iter or a signal. What is trained depends on neither tp nor dp."""
    device, dtype = flat.master.device, model.base.patch_embed.weight.dtype
    t, accum, views = cfg.trainer, cfg.trainer.grad_accum, cfg.data.views
    read = lambda numbers: numbers if clips is None else [clips.sample(n) for n in numbers]
    reader = data.prefetch(read, read_numbers(cfg, position), cfg.data.num_workers)
    stop, log = stop_signals(), Log(cfg, device, clips, step)
    batches, saved = 0, None

    while step < t.max_iter and not any(tp.from_all(bool(stop))):
        loss = torch.zeros((), device=device)
        for micro in range(accum):
            turn = batches % tp.size()
            if turn == 0:  # every rank of the group reads and encodes one of the next tp batches
                samples = next(reader)
                log.lap("data")
                own = (random_batch if clips is None else encode)(cfg, samples, tokenizer, device, dtype)
            batch = own if turn == tp.rank() else empty_batch(cfg, device, dtype)
            tp.broadcast(batch, src=turn)
            batches += 1
            noise = noise_of(cfg, step, micro, device)
            log.lap("encode")
            part = m.training_loss(model, batch["latents"], condition_of(batch, views), noise)
            log.lap("forward")
            part.backward()
            flat.take_gradients(1 / accum)
            loss += part.detach() / accum
            log.lap("backward")
        norm = flat.sync_gradients()
        log.lap("sync")
        if norm.isfinite():
            flat.grad.mul_((cfg.optimizer.clip_norm / norm).clamp(max=1.0))
            flat.optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.optimizer)
            flat.optimizer.step()
            flat.ema.lerp_(flat.master, 1 - ema_beta(step, cfg.optimizer.ema_rate))
            flat.write("master")
        else:
            log.skipped += 1
            say(f"step {step + 1}: the gradient norm is {norm.item()}, so this step changes nothing ({log.skipped} so far)")
        flat.grad.zero_()
        log.lap("optimizer")
        log.step(step + 1, loss, norm, learning_rate(step, cfg.optimizer))
        step, position = step + 1, position + accum * tp.dp_size() * cfg.data.batch_size

        if t.check_drift and step % t.logging_iter == 0:
            flat.check_drift()
        if t.sample_iter and step % t.sample_iter == 0 and clips is not None:
            flat.write("ema")
            write_sample(cfg, model, tokenizer, batch, noise, step)
            flat.write("master")
        if cfg.checkpoint.save_iter and (step % cfg.checkpoint.save_iter == 0 or step == t.max_iter):
            saved = save(cfg, model, flat, step, position, base, saved)
        log.lap("save")
    reader.close()
    if cfg.checkpoint.save_iter and step < t.max_iter and (saved is None or saved.step != step):
        saved = save(cfg, model, flat, step, position, base, saved)
    if saved is not None:
        saved.wait()
    tp.barrier()
    log.close(step)


def prepare(cfg: Config, allow_change, argv):
    """Everything of a run before its first step, cheapest checks first: the arguments of `train`."""
    missing = [f"{key} {path}" for key, path in paths(cfg) if not Path(path).exists()]
    need(not missing, f"not there: {', '.join(missing)}; README's first steps say where to get them")
    device = tp.init(cfg.parallel.tp, cfg.model.num_heads, cfg.parallel.timeout_s)
    dtype = getattr(torch, cfg.trainer.precision)
    tp.from_rank0(lambda: open_run(cfg, allow_change, argv))
    clips = open_clips(cfg)
    shapes = m.build(cfg.model, "meta", dtype)
    base = load_weights(cfg, shapes)  # checks names and shapes, before any memory is allocated
    model = m.build(cfg.model, device, dtype)
    model.recompute = choose_recompute(cfg, shapes)
    m.init_weights(model, cfg.trainer.seed)
    load_weights(cfg, model)
    flat = tp.FlatParams([(name, p) for name, p in model.named_parameters() if p.requires_grad], lr=cfg.optimizer.lr,
                         betas=tuple(cfg.optimizer.betas), eps=cfg.optimizer.eps, weight_decay=cfg.optimizer.weight_decay)
    step, position = resume(cfg, flat, base)
    encodes = clips is not None and (cfg.trainer.sample_iter or not cfg.data.cache)
    tokenizer = load_tokenizer(cfg.tokenizer.path, device, dtype) if encodes else None
    say(f"{tp.dp_size()} x {tp.size()} ranks (dp x tp) on {device.type}, {cfg.trainer.precision}, attention "
        f"{model.attention or 'chosen by torch'}, recompute {model.recompute}, "
        + (f"{len(clips)} clips in {clips.root}" if clips else "random latents"))
    return cfg, clips, tokenizer, model, flat, base, step, position


def load_weights(cfg: Config, model):
    """Base and control weights as job.stage wants them; returns the base's identity. A model on meta is only checked."""
    path, posttrain = cfg.checkpoint.base_path, cfg.job.stage == "posttrain"
    if path != "random":
        weights = convert.open_weights(path)
        convert.load(model.base, weights, "base")
        convert.load(model.logvar, weights, "logvar")
    if posttrain:
        convert.load(model.control, convert.open_weights(cfg.checkpoint.load_path), "control")
    elif not model.logvar.weight.is_meta:
        convert.copy_base_to_control(model)
        say(f"base: {'RANDOM weights' if path == 'random' else path}; control: a copy of it, hint and zero linears new")
    if path == "random":
        return {"file": path, "size": 0, "digest": f"seed {cfg.trainer.seed}"}
    return convert.base_identity(path)


def open_run(cfg: Config, allow_change, argv):
    """Make the run's folder and note config, command, commit and versions; refuse a config that trains something else."""
    path, new = cfg.run_dir / "config.yaml", dataclasses.asdict(cfg)
    if path.is_file() and not allow_change:
        old = yaml.safe_load(path.read_text())
        changes = [f"{s}.{k}: {old[s].get(k)!r} -> {v!r}" for s, keys in relevant(new).items() for k, v in keys.items()
                   if old[s].get(k) != v]
        need(not changes, f"{cfg.run_dir} holds a run with another config ({'; '.join(changes)}); give this run its own "
             "job.name, or start it with --allow-config-change")
    try:
        (cfg.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(new, sort_keys=False))
    except OSError as error:
        raise ValueError(f"cannot write the run's folder {cfg.run_dir}: {error.strerror}; set OUTPUT_ROOT") from None
    commit = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True)
    with open(cfg.run_dir / "starts.jsonl", "a") as f:
        f.write(json.dumps({"command": argv, "commit": commit.stdout.decode().strip(), "python": sys.version.split()[0],
                            "torch": torch.__version__, "numpy": np.__version__, "time": time.ctime()}) + "\n")


def relevant(tree):
    """A config's dict without the keys that change neither what is trained nor the model."""
    harmless = ("checkpoint.save_iter", "checkpoint.keep_last", "checkpoint.keep_every", "data.num_workers")
    return {s: {k: v for k, v in keys.items() if f"{s}.{k}" not in harmless} for s, keys in tree.items()
            if s not in ("trainer", "parallel")}


def save(cfg: Config, model, flat, step, position, base, previous):
    """Write checkpoint `step` in the background: control branch, logvar, EMA, optimizer; not the frozen base."""
    size, kinds = cfg.model, ("master", "exp_avg", "exp_avg_sq")
    weights = {f"control.{k}": v.detach() for k, v in model.control.named_parameters()}
    weights |= {f"logvar.{k}": v.detach() for k, v in model.logvar.state_dict().items()}
    views = {kind: flat.views(kind) for kind in kinds}
    state = {"model": weights, "ema": flat.views("ema"),
             "optim": {name: {kind: views[kind][name] for kind in kinds} for name in flat.params}}
    config = json.dumps(relevant(dataclasses.asdict(cfg)), sort_keys=True)
    meta = {"config_digest": hashlib.sha256(config.encode()).hexdigest(), "position": position, "base": base,
            "optimizer_steps": int(flat.steps),
            "seq_length": max(size.max_img_h // 2, size.max_img_w // 2, size.max_frames)}
    saved = convert.save(cfg.run_dir, step, state, meta, cfg.checkpoint.keep_last, cfg.checkpoint.keep_every, previous)
    say(f"step {step}: checkpoint stall {saved.stall:.1f} s")
    return saved


def resume(cfg: Config, flat, base):
    """(step, data position) of the newest intact checkpoint of this run, loaded in place, or (0, 0)."""
    found = tp.from_rank0(lambda: convert.find_resume(cfg.run_dir))
    if found is None:
        return 0, 0
    step, path = found
    buffers = {kind: flat.views(kind) for kind in ("master", "ema", "exp_avg", "exp_avg_sq")}
    meta = convert.resume(path, buffers, flat.tp_dims)
    convert.check_base(meta["base"], base)
    flat.steps.fill_(meta["optimizer_steps"])
    flat.write("master")
    say(f"resuming at step {step} from {path}")
    return step, meta["position"]


def stop_signals():
    """A list that SIGTERM and SIGINT append to; a second signal ends the process the usual way."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return received


def write_sample(cfg: Config, model, tokenizer, batch, noise, step):
    """Denoise with this batch's control and write control | sample | real, a row a view, as an mp4 beside the metrics."""
    cond, x0 = condition_of(batch, cfg.data.views), batch["latents"].float()
    cond.known = noise.known
    rng = torch.Generator(x0.device).manual_seed(m.seed_of(cfg.trainer.seed, step))
    latents = m.sample(model, x0.shape, cond, rng, cfg.trainer.guidance, cfg.trainer.sample_steps, x0)
    if tp.world_rank() == 0:
        rows = [tokenizer.decode_views(x[:1].to(x0.dtype), cfg.data.views)[0]
                for x in (batch["hint_latents"], latents, x0)]  # (V, 3, F, H, W) each
        frames = rearrange(torch.stack(rows).cpu(), "n v c f h w -> f (v h) (n w) c").numpy()
        path = cfg.run_dir / "samples" / f"iter_{step:09d}.mp4"
        data.write_video(path, frames, float(batch["fps"][0]))
        say(f"sample: {path}")


# ---- logging -----------------------------------------------------------------------------------------------------------

PEAK_TFLOPS = 989.0  # dense bfloat16 of an H100 or H200 (NVIDIA's datasheets)
PARTS = ("data", "encode", "forward", "backward", "sync", "optimizer", "save")


class Log:
    """Clock, progress bar, metrics.jsonl and the closing lines; only world rank 0 writes."""

    def __init__(self, cfg, device, clips, start):
        self.cfg, self.cuda, self.clips, self.path = cfg, device.type == "cuda", clips, cfg.run_dir / "metrics.jsonl"
        self.tflop = m.tflop_per_sample(cfg.model, cfg.tokens) * cfg.trainer.grad_accum * cfg.data.batch_size / tp.size()
        self.losses, self.rows, self.skipped = [], [], 0
        self.parts, self.last = dict.fromkeys(PARTS, 0.0), time.perf_counter()
        self.bar = tqdm(total=cfg.trainer.max_iter, initial=start, disable=tp.world_rank() != 0,
                        mininterval=1 if sys.stderr.isatty() else 30)

    def lap(self, part):
        """Add the seconds since the last lap, work queued on the GPU included, to a part of the step."""
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[part] += now - self.last
        self.last = now

    def step(self, step, loss, norm, lr):
        parts, self.parts = self.parts, dict.fromkeys(PARTS, 0.0)
        self.rows.append(list(parts.values()))
        self.losses.append(tp.mean_over_replicas(loss))
        self.bar.update()
        if (step % self.cfg.trainer.logging_iter and step != self.cfg.trainer.max_iter) or tp.world_rank() != 0:
            return
        seconds = sum(parts.values())
        line = {"step": step, "loss": self.losses[-1].item(), "loss_mean": torch.stack(self.losses).mean().item(),
                "lr": lr, "grad_norm": norm.item(), "seconds": seconds, **{f"{k}_s": v for k, v in parts.items()},
                **self.speed(seconds), "skipped_steps": self.skipped, "bad_clips": len(self.clips.bad) if self.clips else 0}
        with open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")
        self.losses = []
        self.bar.set_postfix({"loss": f"{line['loss_mean']:.4f}", "lr": f"{lr:.1e}", "norm": f"{line['grad_norm']:.2f}",
                              "s/it": f"{seconds:.2f}", "data": f"{parts['data']:.2f}s",
                              "GiB": f"{line.get('peak_gib', 0):.1f}"}, refresh=False)

    def speed(self, seconds):
        rate = {"tflops": self.tflop / seconds}
        return rate | {"mfu": self.tflop / seconds / PEAK_TFLOPS,
                       "peak_gib": torch.cuda.max_memory_allocated() / 2**30} if self.cuda else rate

    def close(self, step):
        """How the run ended, and the seconds of a step: the median of tp-step rounds, in which every rank reads once."""
        self.bar.close()
        rounds = len(self.rows) // tp.size()
        rows = np.array(self.rows[: rounds * tp.size()]).reshape(rounds, tp.size(), len(PARTS)).mean(1)[3:]  # 3 to warm up
        if len(rows):
            seconds = np.median(rows.sum(1))
            say(f"seconds a step (median) {seconds:.3f}: " + ", ".join(
                [f"{part} {s:.3f}" for part, s in zip(PARTS, np.median(rows, axis=0))]
                + [f"{k} {v:.3f}" for k, v in self.speed(seconds).items()]))
        where = self.cfg.run_dir / "checkpoints" / f"iter_{step:09d}.pt"
        if not self.cfg.checkpoint.save_iter:
            where = "none, as checkpoint.save_iter is 0"
        if step < self.cfg.trainer.max_iter:
            say(f"stopped after step {step}, saved {where}, rerun the same command to continue")
        elif tp.world_rank() == 0 and self.path.is_file():
            losses = {line["step"]: line["loss"] for line in map(json.loads, self.path.read_text().splitlines())}
            losses = [losses[i] for i in sorted(losses)]
            n = max(1, min(20, len(losses) // 4))
            say(f"loss {np.mean(losses[:n]):.4f} -> {np.mean(losses[-n:]):.4f} (means of {n} logged steps), checkpoint "
                f"{where}, metrics {self.path}")


# ---- dry run -------------------------------------------------------------------------------------------------------------


LIVE_STREAMS = 27  # of one block run backward, and of positions and residuals


def estimate(cfg: Config, shapes, recompute: str) -> dict[str, float]:
    """GiB a GPU by part. `shapes`: the model on meta. Activations are counted in residual streams (L x D), fitted to
    measured peaks: kept for the backward pass, and alive at once while one block is run backward."""
    ranks, word = cfg.parallel.tp, 2 if cfg.trainer.precision == "bfloat16" else 4
    local = lambda part: sum(p.numel() / (ranks // tp.size() if hasattr(p, "tp_dim") else 1) for p in part.parameters())
    trained = local(shapes.control) - local(shapes.control.head)
    blocks, control = cfg.model.num_blocks - 1, cfg.model.num_control_blocks
    streams = {"none": 16 * blocks + 26 * control, "attention_saved": 2 * (blocks + control), "full": blocks + control}
    stream = cfg.data.batch_size * cfg.tokens * cfg.model.model_channels * word
    parts = {"base weights": local(shapes.base) * word, "control weights": local(shapes.control) * word,
             "masters and moments": 12 * trained, "EMA": 4 * trained, "gradients": (4 + word) * trained,
             f"activations ({recompute})": (streams[recompute] + LIVE_STREAMS) * stream / ranks,
             "tokenizer": 0.2e9 if cfg.data.root != "random" and not cfg.data.cache else 0.0}
    return {part: size / 2**30 for part, size in parts.items()}


def choose_recompute(cfg: Config, shapes):
    """parallel.recompute, or for auto the first policy whose estimate fits into the GPU with 6% to spare."""
    policies = typing.get_args(Recompute)[1:]
    if cfg.parallel.recompute != "auto":
        return cfg.parallel.recompute
    memory = (torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 79 * 2**30) / 2**30
    needs = {policy: sum(estimate(cfg, shapes, policy).values()) for policy in policies}
    need(needs["full"] < 0.94 * memory, f"even with full recomputation this needs about {needs['full']:.0f} GiB a GPU of "
         f"{memory:.0f}; use more GPUs with a larger parallel.tp")
    return next(policy for policy in policies if needs[policy] < 0.94 * memory)


def dryrun(cfg: Config):
    """Print the resolved config, what it needs and what is missing, from the config alone."""
    world = int(os.environ.get("WORLD_SIZE", cfg.parallel.tp))
    tp.check_mesh(world, cfg.parallel.tp, cfg.model.num_heads)
    shapes = m.build(cfg.model, "meta", getattr(torch, cfg.trainer.precision))
    count = lambda params: sum(p.numel() for p in params)
    params, control = list(shapes.parameters()), count(shapes.control.parameters())
    trained, sharded = count(p for p in params if p.requires_grad), count(p for p in params if hasattr(p, "tp_dim"))
    parts = estimate(cfg, shapes, choose_recompute(cfg, shapes))
    gpu = f" of {torch.cuda.get_device_properties(0).total_memory / 2**30:.1f}" if torch.cuda.is_available() else ""
    rows = {"run": cfg.run_dir, "mesh": f"{world} ranks = dp {world // cfg.parallel.tp} x tp {cfg.parallel.tp}",
            "parameters: base": f"{count(shapes.base.parameters()):,}", "parameters: control": f"{control:,}",
            "parameters: trained": f"{trained:,}",
            "parameters: sharded, replicated": f"{sharded:,}, {count(params) - sharded:,}",
            "tokens a sample": f"{cfg.tokens:,}",
            "latents": "{} x {} x {} x {}".format(*cfg.latent_shape),
            "sigma multiplier": f"{math.sqrt(cfg.latent_shape[1] / cfg.data.views):.3f}",
            "TFLOP a sample and step": f"{m.tflop_per_sample(cfg.model, cfg.tokens):,.0f}",
            **{f"GiB a GPU: {part}": f"{size:.2f}" for part, size in parts.items()},
            "GiB a GPU: total": f"{sum(parts.values()):.2f}{gpu}",
            "GiB a checkpoint": f"{(control * (2 if cfg.trainer.precision == 'bfloat16' else 4) + 16 * trained) / 2**30:.2f}",
            **{f"path: {key}": f"{path}{'' if Path(path).exists() else '   MISSING'}" for key, path in paths(cfg)}}
    print(yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
    print("\n".join(f"{name:<39} {value}" for name, value in rows.items()))


def paths(cfg: Config):
    """(config key, path) of everything the run reads."""
    keys = ["data.root", "data.cache", "checkpoint.base_path", "checkpoint.load_path"]
    keys += ["tokenizer.path"] if cfg.data.root != "random" else []
    return [(key, cfg.get(key)) for key in keys if cfg.get(key) not in (None, "random", "synthetic")]


def main(argv):
    """Exit status: 0 done or stopped on request, 2 a mistake that a sentence on stderr explains."""
    flags = {a for a in argv if a.startswith("--")}
    words = [a for a in argv if not a.startswith("--")]
    config = words.pop(0) if words and "=" not in words[0] else "configs/smoke.yaml"
    try:
        need(flags <= {"--dryrun", "--allow-config-change"}, f"{' '.join(flags)}: the options are --dryrun and "
             "--allow-config-change")
        cfg = load_config(config, words)
        if "--dryrun" in flags:
            open_run(cfg, "--allow-config-change" in flags, argv)
            dryrun(cfg)
            return 0
        run = prepare(cfg, "--allow-config-change" in flags, argv)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        train(*run)
    except data.BadClip as error:  # no clip is left that could be trained on
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        tp.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
