"""Every key that a config may have, its type and its default, and what cannot work together."""

import dataclasses
import difflib
import math
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from configs.reading import Dumper, need, parse_yaml, place, read_yaml, short
from model import LATENT, ModelConfig

REQUIRED = "required"
HELP = """Every key, with comments: configs/lidar.yaml; its type and default: configs/schema.py;
what to do first: README.md, Four steps."""
PATHS = ("data.root", "data.cache", "tokenizer.path", "checkpoint.base_path",
         "checkpoint.load_path")
MAY_BE_ZERO = (
    "data.num_workers", "data.val_clips", "parallel.whole_blocks", "parallel.host_gib",
    "optimizer.weight_decay", "optimizer.warmup_steps",
    "trainer.seed", "trainer.val_iter", "trainer.sample_iter", "trainer.guidance",
    "trainer.check_every", "checkpoint.save_iter", "checkpoint.keep_every", "checkpoint.retries",
)
# A number beyond these is a typing error; one without an entry ends at MOST.
MOST = 10**12
AT_MOST = dict.fromkeys((f"model.{key.name}" for key in dataclasses.fields(ModelConfig)), 2**16) | {
    "model.num_blocks": 100, "model.rope_t_ratio": 1000,
    "data.num_workers": 256, "data.batch_size": 1000, "data.cache_windows": 10**5,
    "data.max_bad": 1, "optimizer.lr": 1, "optimizer.weight_decay": 1, "optimizer.eps": 1,
    "optimizer.ema_rate": 0.28,  # there the exponent of the average becomes 0
    "trainer.sample_steps": 10**4, "trainer.guidance": 1000,
}


@dataclass
class Job:
    stage: Literal["pretrain", "posttrain"] = "pretrain"  # posttrain: from checkpoint.load_path
    project: str | None = None  # null: cosmos_transfer1_{stage}
    group: str = "CTRL_7Bv1_sampleAV"
    name: str | None = None


@dataclass
class Data:
    root: str = REQUIRED  # folder; synthetic: write a small drive and use it; random: no clips
    hint: Literal["lidar", "hdmap"] = REQUIRED
    num_frames: int = 121
    views: int = 1
    height: int = 704
    width: int = 1280
    batch_size: int = 1  # clips per replica and forward pass
    num_workers: int = 2  # threads that decode ahead
    cache: str | None = None  # folder of latents made by `python data.py cache`; auto: in the root
    cache_windows: int = 4  # windows a clip in it
    trim: bool = False  # admit files of unequal length; the frames that all have are used
    timeout_s: float = 120  # for decoding a clip; grows with frames and size
    max_bad: float = 0.5  # more than this part of the clips unusable at the start is an error
    val_clips: int = 4  # the last clips are held out for validation; at most a quarter of them


@dataclass
class Tokenizer:
    path: str = "checkpoints/nvidia/Cosmos-Tokenize1-CV8x8x8-720p"


@dataclass
class Parallel:
    tp: int = 1
    scheme: Literal["auto", "megatron", "ulysses"] = "auto"  # auto: ulysses where it fits
    recompute: Literal["auto", "none", "mlp_saved", "residual_saved", "attention_saved",
                       "full"] = "auto"
    whole_blocks: int | None = None  # blocks that recompute nothing; null: what fits
    host_gib: float | None = None  # of host memory for a rank; null: its share of half of the free
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
    device: Literal["auto", "cpu"] = "auto"  # cpu: whatever GPUs there are
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    grad_accum: int = 1  # forward passes a step
    sample_iter: int = 0  # write a sample video every so many steps; 0: never
    sample_steps: int = 35
    guidance: float = 5.0
    train: list[str] = field(default_factory=lambda: ["control"])  # prefixes of our module names
    val_iter: int = 1000  # validation loss every so many steps, and before the first; 0: never
    check_every: int = 1000  # steps between checks of frozen and replicated weights; 0: never
    max_skipped: int = 20  # steps in a row without finite gradients that end the run
    tensorboard: bool = False  # write scalars, pictures and the config for TensorBoard too


@dataclass
class Checkpoint:
    base_path: str = REQUIRED  # file of the frozen base; random: a base with random weights
    load_path: str | None = None  # control checkpoint that posttraining starts from
    save_iter: int = 1000  # also after the last step; 0: never
    keep_last: int = 3
    keep_every: int = 0
    retries: int = 3  # failed writes in a row that a run survives


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

    def flat(self):  # {"section.key": value}
        return {f"{section}.{key}": value for section, keys in dataclasses.asdict(self).items()
                for key, value in keys.items()}

    def paths(self):  # {"section.key": path} of everything that the run reads
        unread = ("tokenizer.path",) if self.data.root == "random" else ()
        words = (None, "random", "synthetic", "auto")
        return {key: path for key, path in self.flat().items()
                if key in PATHS and key not in unread and path not in words}

    @property
    def latent_shape(self):  # (16, V*T, H, W) of a sample
        frames = (self.data.num_frames - 1) // 8 + 1
        return LATENT, self.data.views * frames, self.data.height // 8, self.data.width // 8

    @property
    def tokens(self):
        return math.prod(self.latent_shape[1:]) // 4

    @property
    def run_dir(self):
        root = place("OUTPUT_ROOT", os.environ.get("OUTPUT_ROOT", "checkpoints"))
        return Path(root, self.job.project, self.job.group, self.job.name)


def dump(cfg: Config) -> str:
    return yaml.dump(dataclasses.asdict(cfg), Dumper=Dumper, sort_keys=False)


# ---- reading and checking ------------------------------------------------------------------------

def load_config(path, overrides=()) -> Config:
    """Config from a YAML file and `key.sub=value` overrides, checked, with what follows from it.

    ValueError or FileNotFoundError, one sentence, for anything that could not be trained.
    """
    values = read_yaml(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        need(equals and "." in key, f"override {short(override)} must look like section.key=value, "
             "such as trainer.max_iter=100")
        values[key] = parse_yaml(value, f"the value in {short(override)}")
    cfg = Config()
    kinds = {f"{s.name}.{key}": kind for s in dataclasses.fields(Config)
             for key, kind in typing.get_type_hints(s.type).items()}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if key not in kinds:
            same = [k for k in kinds if k.endswith(f".{name}")]  # right key, wrong section
            close = same or difflib.get_close_matches(key[:60], kinds, n=1, cutoff=0)
            raise ValueError(f"there is no config key {key[:60]}; did you mean {close[0]}?")
        setattr(getattr(cfg, section), name, typed(key, value, kinds[key]))
    for key, value in cfg.flat().items():
        need(value is not REQUIRED, f"the config lacks the key {key}, which has no default")
        if key in PATHS and value is not None:
            section, _, name = key.partition(".")
            setattr(getattr(cfg, section), name, place(key, value))
    derive(cfg)
    return cfg


def typed(key, value, kind):
    """value as the type that its key declares; a whole number does for a float, 1e3 for an int.

    typed("optimizer.lr", 1, float) is 1.0; typed("model.n_views", "3", int | None) is refused.
    """
    options = (kind,) if typing.get_origin(kind) in (None, list, Literal) else typing.get_args(kind)
    wanted = []
    for option in options:
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if type(value) is option or origin is Literal and type(value) is str and value in inner:
            return value
        if origin is list and isinstance(value, list):
            return [typed(key, item, inner[0]) for item in value]
        if option is float and type(value) is int and abs(value) < 2**53:
            return float(value)
        if option is int and type(value) is float and value.is_integer():
            return int(value)
        name = "null" if option is type(None) else getattr(option, "__name__", option)
        wanted += inner if origin is Literal else [name]
    raise ValueError(f"{key} must be {' or '.join(map(str, wanted))}, not {short(value)}")


def check_trained(prefixes, names):
    """ValueError unless each of trainer.train is the start of one of the parameters' names."""
    parts = [name.split(".") for name in names]
    known = {".".join(part[:i]) for part in parts for i in range(1, len(part) + 1)}
    need(prefixes, "trainer.train is empty; give [control], or prefixes of module names")
    for prefix in prefixes:
        if prefix not in known:
            [close] = difflib.get_close_matches(prefix[:60], known, n=1, cutoff=0)
            raise ValueError(f"trainer.train names {prefix[:60]}, which is no part of the model; "
                             f"did you mean {close}?")


def derive(cfg: Config):
    """Fill in what follows from other keys, and refuse what cannot work, with the remedy."""
    d, size, opt, load_path = cfg.data, cfg.model, cfg.optimizer, cfg.checkpoint.load_path
    _, frames, h, w = cfg.latent_shape
    for key, value in cfg.flat().items():
        most, zero = AT_MOST.get(key, MOST), key in MAY_BE_ZERO
        if type(value) in (int, float):
            need(value > 0 or zero and value == 0,
                 f"{key} is {short(value)}; it must be positive{' or 0' if zero else ''}")
            need(value <= most, f"{key} is {short(value)}; it must be at most {most:g}")
    need(1 <= d.views <= 5, f"data.views is {d.views}; use 1, or 2 to 5 for a multi-view model")
    need(size.conditioning in (("t2w", "v2w") if d.views > 1 else (None,)),
         f"data.views is {d.views} but model.conditioning is {size.conditioning or 'null'}; for "
         "several views give data.views=3 and t2w or v2w, for one data.views=1 and null")
    need(size.n_views in (None, d.views),
         f"model.n_views is {size.n_views} but data.views {d.views}; give only one")
    need(d.num_frames % 8 == 1, f"data.num_frames is {d.num_frames}; the tokenizer needs 8k+1, "
         f"such as {d.num_frames // 8 * 8 + 1}")
    need(d.height % 16 == 0 and d.width % 16 == 0, f"data.height x data.width is {d.height} x "
         f"{d.width}; both must be multiples of 16 (8 a latent cell, 2 a token)")
    need(h <= size.max_img_h and w <= size.max_img_w and frames // d.views <= size.max_frames,
         f"a clip of {frames // d.views} x {h} x {w} latent cells is more than the position tables "
         f"hold: {size.max_frames} x {size.max_img_h} x {size.max_img_w}, which are "
         "model.max_frames, max_img_h and max_img_w, those of the base's file")
    need(size.model_channels % (2 * size.num_heads) == 0, f"model.num_heads ({size.num_heads}) "
         f"must divide half of model_channels ({size.model_channels})")
    need(size.num_control_blocks <= size.num_blocks, f"model.num_control_blocks is "
         f"{size.num_control_blocks}; it must not exceed num_blocks ({size.num_blocks})")
    need(d.views == 1 or size.n_views_emb > 5, f"model.n_views_emb is {size.n_views_emb}; the "
         "views of a clip have numbers up to 5, so it must be at least 6, as in the base's file")
    need((cfg.job.stage == "posttrain") == bool(load_path), f"job.stage is {cfg.job.stage} but "
         f"checkpoint.load_path is {load_path or 'null'}; posttraining needs the control "
         "checkpoint to start from, pretraining starts from the base and takes null")
    need(len(opt.betas) == 2 and all(0 <= beta < 1 for beta in opt.betas),
         f"optimizer.betas is {short(opt.betas)}; give two from 0 to below 1, such as [0.9, 0.99]")
    size.n_views = d.views
    kind = f"{size.conditioning}_sv2mv" if d.views > 1 else "t2w"
    cfg.job.project = cfg.job.project or f"cosmos_transfer1_{cfg.job.stage}"
    cfg.job.name = cfg.job.name or (f"CTRL_7Bv1pt3_{kind}_{d.num_frames}frames_control_input_"
                                    f"{d.hint}_block{size.num_control_blocks}_{cfg.job.stage}")
