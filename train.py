"""Train the control branch of a Cosmos-Transfer1-Sample-AV model: config, loop, validation, logging.

    python train.py CONFIG [--dryrun] [--allow-config-change] [key.sub=value ...]      also under torchrun
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
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
from configs.schema import Config, Optimizer, load_config, need, read_yaml
from tokenizer import load_tokenizer

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

class RandomClips:
    """Noise in the form of data.CachedClips' samples, for benchmarks and tests; takes the settings of data.WaymoClips."""

    def __init__(self, hint, num_frames, views, height, width, seed, text_tokens, text_width):
        latents = (m.LATENT, views * ((num_frames - 1) // 8 + 1), height // 8, width // 8)
        self.seed, self.bad = seed, {}
        self.noise = {"latents": latents, "hint_latents": latents, "text": (views * text_tokens, text_width)}
        self.fixed = {"fps": torch.tensor(10.0), "padding_mask": torch.zeros(1, height, width, dtype=torch.bool),
                      "view_index": torch.tensor(list(data.VIEWS.values())[:views])}

    def __str__(self):
        return "random latents"

    def sample(self, n):
        """A function of the seed and n: latents and hint_latents (16, V*T, H, W), text (V*M, width), fps, mask, views."""
        rng = np.random.default_rng([self.seed, n])
        drawn = {key: torch.from_numpy(rng.standard_normal(shape, np.float32)) for key, shape in self.noise.items()}
        return drawn | self.fixed


def open_clips(cfg: Config):
    """The clips of data.root, whose `sample(n)` is a function of n. Writes the synthetic drive first if asked for."""
    d, size = cfg.data, cfg.model
    settings = dict(hint=d.hint, num_frames=d.num_frames, views=d.views, height=d.height, width=d.width,
                    seed=cfg.trainer.seed, text_tokens=size.text_tokens, text_width=size.crossattn_emb_channels)
    if d.root == "random":
        return RandomClips(**settings)
    settings["root"] = Path(d.root)
    if d.root == "synthetic":
        from configs.smoke_drive import write_drive
        settings["root"] = Path(f"datasets/synthetic_drive_{d.height}x{d.width}")
        tp.from_rank0(lambda: write_drive(settings["root"], clips=8, frames=max(40, d.num_frames), height=d.height,
                                          width=d.width, text_width=size.crossattn_emb_channels))
    if d.cache:
        return data.CachedClips(d.cache, d.cache_windows, cfg.tokenizer.path, **settings)
    return data.WaymoClips(**settings)


def read_numbers(cfg: Config, position):
    """Sample numbers of the forward passes this rank reads for, a batch at a time, from data position `position`.

    Each rank of a tensor-parallel group reads every tp-th batch of its replica, so that decoding and encoding are shared.
    """
    b = cfg.data.batch_size
    for i in itertools.count(tp.rank(), tp.size()):
        start = position + (i * tp.dp_size() + tp.dp_rank()) * b
        yield list(range(start, start + b))


def encode(samples, tokenizer, device):
    """Samples from data.py -> {"latents", and what m.Condition holds of them}, pixels encoded to latents."""
    batch = {key: torch.stack([sample[key] for sample in samples]).to(device) for key, value in samples[0].items()
             if torch.is_tensor(value)}
    for pixels, latents in (("video", "latents"), ("hint", "hint_latents")):
        if pixels in batch:
            batch[latents] = tokenizer.encode_views(batch.pop(pixels))
    return batch | {"hint": batch.pop("hint_latents")}


def draw_noise(cfg: Config, step, micro, device):
    """The random draws of this replica's samples in one forward pass of a step."""
    first = (micro * tp.dp_size() + tp.dp_rank()) * cfg.data.batch_size
    return m.draw_noise(cfg.model, cfg.latent_shape, cfg.trainer.seed, step,
                        range(first, first + cfg.data.batch_size), device)


# ---- the run -----------------------------------------------------------------------------------------------------------

def say(message):
    if tp.world_rank() == 0:
        tqdm.write(message)


def train(cfg: Config, clips, tokenizer, model, flat, base, step, position):
    """Train from `step` and data position to max_iter or a signal. What is trained depends on neither tp nor dp."""
    device, t, accum = flat.master.device, cfg.trainer, cfg.trainer.grad_accum
    reader = data.prefetch(lambda numbers: [clips.sample(n) for n in numbers], read_numbers(cfg, position),
                           cfg.data.num_workers)
    stop, log = stop_signals(), Log(cfg, clips, step)
    batches, saved = [], None

    while step < t.max_iter and not any(tp.from_all(bool(stop))):
        loss, lr = torch.zeros((), device=device), learning_rate(step, cfg.optimizer)
        for micro in range(accum):
            if not batches:  # every rank of the group reads and encodes one of its next tp batches
                samples = next(reader)
                log.lap("data")
                batches = tp.exchange(encode(samples, tokenizer, device))
            batch = batches.pop(0)
            latents, cond, noise = batch.pop("latents"), m.Condition(**batch), draw_noise(cfg, step, micro, device)
            log.lap("encode")
            part = m.training_loss(model, latents, cond, noise)
            log.lap("forward")
            part.backward()
            flat.take_gradients(1 / accum)
            loss += part.detach() / accum
            log.lap("backward")
        norm = flat.sync_gradients()
        log.lap("sync")
        if norm.isfinite():
            flat.grad.mul_((cfg.optimizer.clip_norm / norm).clamp(max=1.0))
            flat.optimizer.param_groups[0]["lr"] = lr
            flat.optimizer.step()
            flat.ema.lerp_(flat.master, 1 - ema_beta(step, cfg.optimizer.ema_rate))
            flat.write("master")
        else:
            log.skipped += 1
            say(f"step {step + 1}: the gradient norm is {norm.item()}, so this step changes nothing ({log.skipped} so far)")
        flat.grad.zero_()
        log.lap("optimizer")
        step, position = step + 1, position + accum * tp.dp_size() * cfg.data.batch_size
        log.step(step, loss, norm, lr)

        if t.check_drift and step % t.logging_iter == 0:
            flat.check_drift()
        if t.sample_iter and step % t.sample_iter == 0 and tokenizer:
            flat.write("ema")
            write_sample(cfg, model, tokenizer, latents, cond._replace(known=noise.known), step)
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
    missing = [f"{key} {path}" for key, path in paths(cfg).items() if not Path(path).exists()]
    need(not missing, f"not there: {', '.join(missing)}; README's first steps say where to get them")
    device = tp.init(cfg.parallel.tp, cfg.model.num_heads, cfg.parallel.timeout_s)
    dtype = getattr(torch, cfg.trainer.precision)
    tp.from_rank0(lambda: open_run(cfg, allow_change, argv))
    clips = open_clips(cfg)
    shapes = m.build(cfg.model, "meta", dtype)
    base = load_weights(cfg, shapes)  # checks names and shapes, before any memory is allocated
    model = m.build(cfg.model, device, dtype)
    model.recompute = choose_recompute(cfg, shapes)
    tp.init_weights(model, cfg.trainer.seed)
    load_weights(cfg, model)
    opt = cfg.optimizer
    flat = tp.FlatParams([(name, p) for name, p in model.named_parameters() if p.requires_grad], lr=opt.lr,
                         betas=tuple(opt.betas), eps=opt.eps, weight_decay=opt.weight_decay)
    step, position = resume(cfg, flat, base)
    encodes = cfg.data.root != "random" and (cfg.trainer.sample_iter or not cfg.data.cache)
    tokenizer = load_tokenizer(cfg.tokenizer.path, device, dtype) if encodes else None
    say(f"{tp.dp_size()} x {tp.size()} ranks (dp x tp) on {device.type}, {cfg.trainer.precision}, attention kernel "
        f"{model.attention}, recompute {model.recompute}, {clips}")
    return cfg, clips, tokenizer, model, flat, base, step, position


def load_weights(cfg: Config, model):
    """Base and control weights as job.stage wants them; returns the base's identity. A model on meta is only checked."""
    path = cfg.checkpoint.base_path
    identity = {"file": path, "size": 0, "digest": f"seed {cfg.trainer.seed}"}
    if path != "random":
        convert.load(model.base, path, "base")
        convert.load(model.logvar, path, "logvar")
        identity = convert.base_identity(path)
    if cfg.checkpoint.load_path:
        convert.load(model.control, cfg.checkpoint.load_path, "control")
    elif not model.logvar.weight.is_meta:
        copy_base_to_control(model)
        say(f"base: {'RANDOM weights' if path == 'random' else path}; control: a copy of it, hint and zero linears new")
    return identity


@torch.no_grad()
def copy_base_to_control(model):
    """Start the control branch from the base: every parameter that they have in common."""
    base = dict(model.base.named_parameters())
    for name, parameter in model.control.named_parameters():
        if name in base:
            parameter.copy_(base[name])


def open_run(cfg: Config, allow_change, argv):
    """Make the run's folder and note config, command, commit and versions; refuse a config that trains something else."""
    path = cfg.run_dir / "config.yaml"
    if path.is_file() and not allow_change:
        old = read_yaml(path)
        changes = [f"{key}: {old.get(key)!r} -> {value!r}" for key, value in relevant(cfg).items() if old.get(key) != value]
        need(not changes, f"{cfg.run_dir} holds a run with another config ({'; '.join(changes)}); give this run its own "
             "job.name, or start it with --allow-config-change")
    try:
        (cfg.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
    except OSError as error:
        raise ValueError(f"cannot write the run's folder {cfg.run_dir}: {error.strerror}; set OUTPUT_ROOT") from None
    commit = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True)
    with open(cfg.run_dir / "starts.jsonl", "a") as f:
        f.write(json.dumps({"command": argv, "commit": commit.stdout.decode().strip(), "python": sys.version.split()[0],
                            "torch": torch.__version__, "numpy": np.__version__, "time": time.ctime()}) + "\n")


def relevant(cfg: Config):
    """The values of a config without those that change neither what is trained nor the model."""
    harmless = ("trainer.", "parallel.", "checkpoint.save_iter", "checkpoint.keep_", "data.num_workers")
    return {key: value for key, value in cfg.flat().items() if not key.startswith(harmless)}


def save(cfg: Config, model, flat, step, position, base, previous):
    """Write checkpoint `step` in the background: control branch, logvar, EMA, optimizer; not the frozen base."""
    weights = {f"control.{k}": v.detach() for k, v in model.control.named_parameters()}
    weights |= {f"logvar.{k}": v.detach() for k, v in model.logvar.state_dict().items()}
    state = {"model": weights, **{kind: flat.views(kind) for kind in ("ema", "master", "exp_avg", "exp_avg_sq")}}
    size, config = cfg.model, json.dumps(relevant(cfg), sort_keys=True)
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
    buffers = {kind: flat.views(kind) for kind in ("ema", "master", "exp_avg", "exp_avg_sq")}
    meta = convert.resume(path, buffers)
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


def write_sample(cfg: Config, model, tokenizer, x0, cond, step):
    """Denoise with this batch's control and write control | sample | real, a row a view, as an mp4 beside the metrics."""
    rng = torch.Generator(x0.device).manual_seed(tp.seed_of(cfg.trainer.seed, step))
    latents = m.sample(model, x0.shape, cond, rng, cfg.trainer.guidance, cfg.trainer.sample_steps, x0.float())
    if tp.world_rank() == 0:
        rows = [tokenizer.decode_views(x[:1], cfg.data.views)[0] for x in (cond.hint, latents, x0)]  # (V, 3, F, H, W)
        frames = rearrange(torch.stack(rows).cpu(), "n v c f h w -> f (v h) (n w) c").numpy()
        path = cfg.run_dir / "samples" / f"iter_{step:09d}.mp4"
        data.write_video(path, frames, float(cond.fps[0]))
        say(f"sample: {path}")


# ---- logging -----------------------------------------------------------------------------------------------------------

def tflop_per_sample(cfg: m.ModelConfig, tokens: int) -> float:
    """Model TFLOP of one training step on one sample: attention backward counts as 2x forward (no recomputation),
    frozen weights have no weight gradient, base block 0 no backward."""
    linears = 28 * tokens * cfg.model_channels**2
    attention = 4 * tokens * (tokens + cfg.text_tokens) * cfg.model_channels
    base = cfg.num_blocks * (linears + attention) + (cfg.num_blocks - 1) * (linears + 2 * attention)
    return (base + 3 * cfg.num_control_blocks * (linears + attention)) / 1e12


PEAK_TFLOPS = 989.0  # dense bfloat16 of an H100 or H200 (NVIDIA's datasheets)
PARTS = ("data", "encode", "forward", "backward", "sync", "optimizer", "save")


class Log:
    """Clock, progress bar, metrics.jsonl and the closing lines; only world rank 0 writes."""

    def __init__(self, cfg, clips, start):
        self.cfg, self.clips, self.path = cfg, clips, cfg.run_dir / "metrics.jsonl"
        self.tflop = tflop_per_sample(cfg.model, cfg.tokens) * cfg.trainer.grad_accum * cfg.data.batch_size / tp.size()
        self.warm, self.losses, self.skipped = start + 3, [], 0  # the first steps compile
        self.rows = deque(maxlen=100 * tp.size())  # seconds of the parts of recent steps
        self.parts, self.last = dict.fromkeys(PARTS, 0.0), time.perf_counter()
        self.bar = tqdm(total=cfg.trainer.max_iter, initial=start, disable=tp.world_rank() != 0,
                        mininterval=1 if sys.stderr.isatty() else 30)

    def lap(self, part):
        """Add the seconds since the last lap, work queued on the GPU included, to a part of the step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[part] += now - self.last
        self.last = now

    def speed(self, seconds):
        """{name: value} to log for the seconds that the parts of a step took."""
        total = sum(seconds)
        values = {"seconds": total, **{f"{part}_s": s for part, s in zip(PARTS, seconds)}, "tflops": self.tflop / total}
        if torch.cuda.is_available():
            values |= {"mfu": values["tflops"] / PEAK_TFLOPS, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        return values

    def step(self, step, loss, norm, lr):
        seconds, self.parts = [*self.parts.values()], dict.fromkeys(PARTS, 0.0)
        if step > self.warm:
            self.rows.append(seconds)
        self.losses.append(tp.mean_over_replicas(loss))
        self.bar.update()
        if step % self.cfg.trainer.logging_iter and step != self.cfg.trainer.max_iter:
            return
        line = {"step": step, "loss": self.losses[-1].item(), "loss_mean": torch.stack(self.losses).mean().item(),
                "lr": lr, "grad_norm": norm.item(), **self.speed(seconds), "skipped_steps": self.skipped,
                "bad_clips": len(self.clips.bad)}
        self.losses = []
        if tp.world_rank() == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")
        shown = {"loss": "loss_mean", "lr": "lr", "norm": "grad_norm", "s/it": "seconds", "data": "data_s",
                 "GiB": "peak_gib"}
        self.bar.set_postfix({name: f"{line.get(key, 0):.3g}" for name, key in shown.items()}, refresh=False)

    def close(self, step):
        """How the run ended, and the seconds of a step: the median of tp-step rounds, in which every rank reads once."""
        self.bar.close()
        if self.rows:
            size = min(tp.size(), len(self.rows))
            rounds = np.array(self.rows)[: len(self.rows) // size * size].reshape(-1, size, len(PARTS)).mean(axis=1)
            table = self.speed(np.median(rounds, axis=0))
            say("median step: " + ", ".join(f"{key} {value:.3f}" for key, value in table.items()))
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
    kept = {"none": 16 * blocks + 26 * control, "attention_saved": 2 * (blocks + control), "full": blocks + control}
    stream = cfg.data.batch_size * cfg.tokens * cfg.model.model_channels * word / ranks
    parts = {"base weights": local(shapes.base) * word, "control weights": local(shapes.control) * word,
             "masters and moments": 12 * trained, "EMA": 4 * trained, "gradients": (4 + word) * trained,
             f"activations ({recompute})": (kept[recompute] + LIVE_STREAMS) * stream,
             "tokenizer": 0.2e9 if cfg.data.root != "random" and not cfg.data.cache else 0.0}
    return {part: size / 2**30 for part, size in parts.items()}


def gpu_memory():
    """GiB of this machine's GPU, or None."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None


def choose_recompute(cfg: Config, shapes):
    """parallel.recompute, or for auto the first policy whose estimate fits into the GPU (of 79 GiB) with 6% to spare."""
    if cfg.parallel.recompute != "auto":
        return cfg.parallel.recompute
    memory = gpu_memory() or 79
    for policy in ("none", "attention_saved", "full"):
        needed = sum(estimate(cfg, shapes, policy).values())
        if needed < 0.94 * memory:
            return policy
    raise ValueError(f"even with full recomputation this needs about {needed:.0f} GiB a GPU of {memory:.0f}; use more GPUs "
                     "with a larger parallel.tp")


def paths(cfg: Config):
    """{config key: path} of everything the run reads."""
    keys = ["data.root", "data.cache", "checkpoint.base_path", "checkpoint.load_path"]
    keys += ["tokenizer.path"] if cfg.data.root != "random" else []
    return {key: cfg.flat()[key] for key in keys if cfg.flat()[key] not in (None, "random", "synthetic")}


def dryrun(cfg: Config):
    """Print the resolved config, what it needs and what is missing, from the config alone."""
    world, word = int(os.environ.get("WORLD_SIZE", cfg.parallel.tp)), 2 if cfg.trainer.precision == "bfloat16" else 4
    tp.check_mesh(world, cfg.parallel.tp, cfg.model.num_heads)
    shapes = m.build(cfg.model, "meta", getattr(torch, cfg.trainer.precision))
    count = lambda params: sum(p.numel() for p in params)
    params, control = list(shapes.parameters()), count(shapes.control.parameters())
    trained, sharded = count(p for p in params if p.requires_grad), count(p for p in params if hasattr(p, "tp_dim"))
    parts = estimate(cfg, shapes, choose_recompute(cfg, shapes))
    rows = {"run": cfg.run_dir, "mesh": f"{world} ranks = dp {world // cfg.parallel.tp} x tp {cfg.parallel.tp}",
            "parameters: base": f"{count(shapes.base.parameters()):,}", "parameters: control": f"{control:,}",
            "parameters: trained": f"{trained:,}",
            "parameters: sharded, replicated": f"{sharded:,}, {count(params) - sharded:,}",
            "tokens a sample": f"{cfg.tokens:,}", "latents": " x ".join(map(str, cfg.latent_shape)),
            "sigma multiplier": f"{math.sqrt(cfg.latent_shape[1] / cfg.data.views):.3f}",
            "TFLOP a sample and step": f"{tflop_per_sample(cfg.model, cfg.tokens):,.0f}",
            **{f"GiB a GPU: {part}": f"{size:.2f}" for part, size in parts.items()},
            "GiB a GPU: total": f"{sum(parts.values()):.2f}" + (f" of {gpu_memory():.1f}" if gpu_memory() else ""),
            "GiB a checkpoint": f"{(control * word + 16 * trained) / 2**30:.2f}",
            **{f"path: {key}": f"{path}{'' if Path(path).exists() else '   MISSING'}" for key, path in paths(cfg).items()}}
    print(yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
    print("\n".join(f"{name:<39} {value}" for name, value in rows.items()))


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
