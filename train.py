"""Train the control branch of a Cosmos-Transfer1-Sample-AV model: the step, the run around it.

    python train.py CONFIG [--dryrun] [--allow-config-change] [key.sub=value ...]
    torchrun --nproc_per_node=8 train.py CONFIG ...
"""

import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque, namedtuple
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit(f"error: this needs Python 3.11 or later, not {sys.version.split()[0]}")

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

import convert
import data
import model as m
import tp
from configs.estimate import (PEAK_TFLOPS, choose_plan, describe, estimate, gpu_memory,
                              tflop_per_sample)
from configs.schema import HELP, Config, Optimizer, dump, load_config, need, read_yaml
from tokenizer import load_tokenizer

# ---- optimization --------------------------------------------------------------------------------

def learning_rate(step, cfg: Optimizer):
    """Linear warm-up from 1e-6 of lr, then constant."""
    if step >= cfg.warmup_steps:
        return cfg.lr
    return cfg.lr * (1e-6 + (1 - 1e-6) * step / cfg.warmup_steps)


def ema_exponent(rate):
    """Exponent of the power-function EMA whose width is `rate` of the run (arXiv 2312.02696)."""
    roots = np.roots([1, 7, 16 - rate**-2, 12 - rate**-2])
    return float(roots[np.isreal(roots)].real.max())


def ema_beta(i, rate):
    """Weight of the old average at the i-th update, counted from 0."""
    return (1 - 1 / (i + 1)) ** (ema_exponent(rate) + 1) if i else 0.0


# ---- batches -------------------------------------------------------------------------------------

def read_numbers(cfg: Config, position):
    """Numbers of the samples that this rank reads, a batch at a time, from a data position on.

    Each rank of a tensor-parallel group reads every tp-th batch of its replica, so that decoding
    and encoding are shared. With dp = tp = 2 and batches of one, from position 0:

        replica 0   rank 0 reads samples 0, 4, 8 ...   rank 1 reads 2, 6, 10 ...
        replica 1   rank 2 reads samples 1, 5, 9 ...   rank 3 reads 3, 7, 11 ...

    Both ranks of replica 0 then train on 0, 2, 4 ..., and the run's steps on 0 and 1, 2 and 3 ...
    """
    b = cfg.data.batch_size
    for i in itertools.count(tp.rank(), tp.size()):
        start = position + (i * tp.dp_size() + tp.dp_rank()) * b
        yield list(range(start, start + b))


def encode(batch, tokenizer, device):
    """A batch of data.py -> {"latents", and what m.Condition holds of it}, pixels encoded.

    The host does not wait: frames come in pinned memory, 13 ms of copying at 121 frames.
    """
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()
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


# ---- the run -------------------------------------------------------------------------------------

def say(message):
    if tp.world_rank() == 0:
        tqdm.write(message)


# Everything of a run before its first step. identity: of the base's weights; position: in the
# sequence of samples.
Run = namedtuple("Run", "cfg clips tokenizer model flat identity step position")


def train(run: Run):
    """Train from run.step to max_iter or a signal. What is trained depends on neither tp nor dp."""
    cfg, clips, tokenizer, model, flat, identity, step, position = run
    device, t, accum = flat.master.device, cfg.trainer, cfg.trainer.grad_accum
    reader = data.prefetch(lambda numbers: data.collate([clips.sample(n) for n in numbers]),
                           read_numbers(cfg, position), cfg.data.num_workers)
    stop, log = stop_signals(), Log(cfg, clips, step)
    batches, saved = [], None

    while step < t.max_iter and not any(tp.from_all(bool(stop))) and not (saved and saved.failed):
        loss, lr = torch.zeros((), device=device), learning_rate(step, cfg.optimizer)

        for micro in range(accum):
            # fetch and encode: every rank of the group one of its next tp batches
            if not batches:
                own = next(reader)
                log.lap("data")
                batches = tp.exchange(encode(own, tokenizer, device))
            batch = batches.pop(0)
            latents, cond = batch.pop("latents"), m.Condition(**batch)
            noise = draw_noise(cfg, step, micro, device)
            log.lap("encode")

            # forward and backward
            part = m.training_loss(model, latents, cond, noise)
            log.lap("forward")
            part.backward()
            flat.take_gradients(1 / accum)
            loss += part.detach() / accum
            log.lap("backward")

        # sync, clip, step, EMA
        norm = flat.sync_gradients()
        log.lap("sync")
        if norm.isfinite():
            flat.grad.mul_((cfg.optimizer.clip_norm / norm).clamp(max=1.0))
            flat.optimizer.param_groups[0]["lr"] = lr
            flat.optimizer.step()
            flat.ema.lerp_(flat.master, 1 - ema_beta(step, cfg.optimizer.ema_rate))
            flat.write("master")
        else:
            log.skip(step, norm)
        flat.grad.zero_()
        log.lap("optimizer")
        step, position = step + 1, position + accum * tp.dp_size() * cfg.data.batch_size
        log.step(step, loss, norm, lr)

        # once in a while: check, sample, save
        if t.check_drift and step % t.logging_iter == 0:
            flat.check_drift()
        if t.sample_iter and step % t.sample_iter == 0 and tokenizer:
            flat.write("ema")
            write_sample(cfg, model, tokenizer, latents, cond._replace(known=noise.known), step)
            flat.write("master")
        save_iter = cfg.checkpoint.save_iter
        for message in saved.poll() if saved else ():
            say(message)
        if save_iter and (step % save_iter == 0 or step == t.max_iter):
            saved = save(cfg, model, flat, step, position, identity, saved)
        log.lap("save")

    reader.close()
    unsaved = saved is None or saved.step != step or saved.failed
    if cfg.checkpoint.save_iter and step < t.max_iter and unsaved:
        saved = save(cfg, model, flat, step, position, identity, saved)
    if saved is not None:
        saved.wait()
    tp.barrier()
    log.close(step)


# ---- before the first step -----------------------------------------------------------------------

def prepare(cfg: Config, allow_change, argv) -> Run:
    """Everything of a run before its first step, cheapest checks first."""
    missing = [f"{key} {path}" for key, path in paths(cfg).items() if not Path(path).exists()]
    need(not missing,
         f"not there: {', '.join(missing)}; README's first steps say where to get them")
    device = tp.init(cfg.parallel.tp, cfg.model.num_heads, cfg.parallel.timeout_s)
    dtype = getattr(torch, cfg.trainer.precision)
    tp.from_rank0(lambda: open_run(cfg, allow_change, argv))
    tp.from_rank0(lambda: bool(data.open_clips(cfg)))  # one rank first: it may have to write them
    clips = data.open_clips(cfg)

    tokenizer = None
    if cfg.data.root != "random" and (cfg.trainer.sample_iter or not cfg.data.cache):
        frames = cfg.latent_shape[1] // cfg.data.views
        tokenizer = load_tokenizer(cfg.tokenizer.path, device, dtype, frames=frames)
        say(f"tokenizer: {tokenizer.description}")

    # Names and shapes of the weights are checked before any memory is allocated.
    shapes = m.build(cfg.model, "meta", dtype)
    identity = check_weights(cfg, shapes)
    model = m.build(cfg.model, device, dtype)
    plan = choose_plan(cfg, shapes)
    model.recompute, model.whole_blocks = plan.recompute, plan.whole_blocks
    tp.use_scheme(plan.scheme)
    tp.init_weights(model, cfg.trainer.seed)
    load_weights(cfg, model)
    tp.gather_weights(model.parameters())

    opt = cfg.optimizer
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    flat = tp.FlatParams(trained, lr=opt.lr, betas=tuple(opt.betas), eps=opt.eps,
                         weight_decay=opt.weight_decay)
    step, position = resume(cfg, flat, identity)
    say(f"{tp.dp_size()} x {tp.size()} ranks (dp x tp) on {device.type}, {cfg.trainer.precision}, "
        f"attention kernel {model.attention}, {describe(plan, tp.size())}, {clips}")
    return Run(cfg, clips, tokenizer, model, flat, identity, step, position)


def weight_files(cfg: Config) -> dict[str, str]:
    """{part of the model: the file that it is loaded from}, as job.stage wants them."""
    files = {}
    if cfg.checkpoint.base_path != "random":
        files["base"] = cfg.checkpoint.base_path
        if cfg.model.logvar == "from_base":
            files["logvar"] = cfg.checkpoint.base_path
    if cfg.checkpoint.load_path:
        files["control"] = cfg.checkpoint.load_path
    return files


def check_weights(cfg: Config, shapes) -> dict:
    """Check the files against the model on meta, then all their bytes; the base's identity."""
    files, memory = weight_files(cfg), cfg.run_dir / "base_digests.json"
    for part, path in files.items():
        convert.check_fits(shapes, path, part)
    identities = {part: tp.from_rank0(lambda: convert.identify_weights(path, part, memory))
                  for part, path in files.items() if part != "logvar"}
    random = {"file": "random", "size": 0, "sha256": f"seed {cfg.trainer.seed}"}
    return identities.get("base", random)


def load_weights(cfg: Config, model):
    """Fill the model from its files; a control branch without one starts as a copy of the base."""
    files = weight_files(cfg)
    for part, path in files.items():
        convert.load(model, path, part)
    if "control" not in files:
        copy_base_to_control(model)
        say(f"base: {files.get('base', 'RANDOM weights')}; control: a copy of it, hint and zero "
            "linears new")


@torch.no_grad()
def copy_base_to_control(model):
    """Start the control branch from the base: every parameter that they have in common."""
    base = dict(model.base.named_parameters())
    for name, parameter in model.control.named_parameters():
        if name in base:
            parameter.copy_(base[name])


def open_run(cfg: Config, allow_change, argv):
    """Make the run's folder, note config, command, commit and versions.

    ValueError if the folder holds a run that trains something else.
    """
    path = cfg.run_dir / "config.yaml"
    if path.is_file() and not allow_change:
        old = read_yaml(path)
        changes = [f"{key}: {old.get(key)!r} -> {value!r}" for key, value in relevant(cfg).items()
                   if old.get(key) != value]
        need(not changes, f"{cfg.run_dir} holds a run with another config ({'; '.join(changes)}); "
             "give this run its own job.name, or start it with --allow-config-change")
    try:
        (cfg.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        path.write_text(dump(cfg))
    except OSError as error:
        raise ValueError(f"cannot write the run's folder {cfg.run_dir}: {error.strerror}; "
                         "set OUTPUT_ROOT") from None
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True).stdout.decode().strip()
    with open(cfg.run_dir / "starts.jsonl", "a") as f:
        f.write(json.dumps({"command": argv, "commit": commit, "python": sys.version.split()[0],
                            "torch": torch.__version__, "numpy": np.__version__,
                            "time": time.ctime()}) + "\n")


def relevant(cfg: Config):
    """The values of a config without those that change neither what is trained nor the model."""
    harmless = ("trainer.", "parallel.", "checkpoint.save_iter", "checkpoint.keep_",
                "data.num_workers")
    return {key: value for key, value in cfg.flat().items() if not key.startswith(harmless)}


def save(cfg: Config, model, flat, step, position, identity, previous):
    """Write checkpoint `step` in the background: control branch, logvar, EMA, optimizer.

    The frozen base is not written again.
    """
    weights = {f"control.{k}": v.detach() for k, v in model.control.named_parameters()}
    weights |= {name: p.detach() for name, p in flat.params.items()}  # of the base, if trained
    weights |= {f"logvar.{k}": v.detach() for k, v in model.logvar.state_dict().items()}
    kinds = ("ema", "master", *flat.state())
    state = {"model": weights, **{kind: flat.views(kind) for kind in kinds}}
    size, config = cfg.model, json.dumps(relevant(cfg), sort_keys=True)
    meta = {"config_digest": hashlib.sha256(config.encode()).hexdigest(), "position": position,
            "base": identity, "optimizer": flat.scalars(),
            "seq_length": max(size.max_img_h // 2, size.max_img_w // 2, size.max_frames)}
    saved = convert.save(cfg.run_dir, step, state, meta, cfg.checkpoint.keep_last,
                         cfg.checkpoint.keep_every, cfg.checkpoint.retries, previous)
    say(f"step {step}: checkpoint stall {saved.stall:.1f} s")
    return saved


def resume(cfg: Config, flat, identity):
    """(step, data position) of this run's newest intact checkpoint, loaded in place, or (0, 0)."""
    found = tp.from_rank0(lambda: convert.find_resume(cfg.run_dir))
    if found is None:
        return 0, 0
    step, path = found
    kinds, meta = convert.optimizer_state(path)
    convert.check_same_base(meta["base"], identity)
    flat.make_state(kinds, meta["optimizer"])
    convert.resume(path, {kind: flat.views(kind) for kind in ("ema", "master", *kinds)})
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


# ---- samples -------------------------------------------------------------------------------------

def write_sample(cfg: Config, model, tokenizer, x0, cond, step):
    """Denoise with this batch's control; write control | sample | real, a row a view, as an mp4."""
    t = cfg.trainer
    rng = torch.Generator(x0.device).manual_seed(tp.seed_of(t.seed, step))
    latents = m.sample(model, x0.shape, cond, rng, t.guidance, t.sample_steps, x0.float())
    if tp.world_rank() == 0:
        columns = [tokenizer.decode_views(x[:1], cfg.data.views)[0]
                   for x in (cond.hint, latents, x0)]                      # 3 x (V, 3, F, H, W)
        frames = rearrange(torch.stack(columns).cpu(), "n v c f h w -> f (v h) (n w) c").numpy()
        path = cfg.run_dir / "samples" / f"iter_{step:09d}.mp4"
        data.write_video(path, frames, float(cond.fps[0]))
        say(f"sample: {path}")


# ---- logging -------------------------------------------------------------------------------------

PARTS = ("data", "encode", "forward", "backward", "sync", "optimizer", "save")


class Log:
    """Clock, progress bar, metrics.jsonl and the closing lines; only world rank 0 writes."""

    def __init__(self, cfg, clips, start):
        self.cfg, self.clips, self.path = cfg, clips, cfg.run_dir / "metrics.jsonl"
        clips_a_gpu = cfg.trainer.grad_accum * cfg.data.batch_size / tp.size()
        self.tflop = tflop_per_sample(cfg.model, cfg.tokens) * clips_a_gpu
        self.warm, self.losses, self.skipped = start + 3, [], 0  # the first steps compile
        self.rows = deque(maxlen=100 * tp.size())  # seconds of the parts of recent steps
        self.parts, self.last = dict.fromkeys(PARTS, 0.0), time.perf_counter()
        self.bar = tqdm(total=cfg.trainer.max_iter, initial=start, disable=tp.world_rank() != 0,
                        mininterval=1 if sys.stderr.isatty() else 30)

    def lap(self, part):
        """Add the seconds since the last lap, work queued on the GPU included, to a part."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[part] += now - self.last
        self.last = now

    def speed(self, seconds):
        """{name: value} to log for the seconds that the parts of a step took."""
        total = sum(seconds)
        values = {"seconds": total, **{f"{part}_s": s for part, s in zip(PARTS, seconds)},
                  "tflops": self.tflop / total}
        if torch.cuda.is_available():
            values["mfu"] = values["tflops"] / PEAK_TFLOPS
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return values

    def skip(self, step, norm):
        """A step without finite gradients was not taken."""
        self.skipped += 1
        say(f"step {step + 1}: the gradient norm is {norm.item()}, so this step changes nothing "
            f"({self.skipped} so far)")

    def step(self, step, loss, norm, lr):
        seconds, self.parts = [*self.parts.values()], dict.fromkeys(PARTS, 0.0)
        if step > self.warm:
            self.rows.append(seconds)
        self.losses.append(tp.mean_over_replicas(loss))
        self.bar.update()
        if step % self.cfg.trainer.logging_iter and step != self.cfg.trainer.max_iter:
            return
        line = {"step": step, "loss": self.losses[-1].item(),
                "loss_mean": torch.stack(self.losses).mean().item(), "lr": lr,
                "grad_norm": norm.item(), **self.speed(seconds), "skipped_steps": self.skipped,
                "bad_clips": len(self.clips.bad)}
        self.losses = []
        if tp.world_rank() == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")
        shown = {"loss": "loss_mean", "lr": "lr", "norm": "grad_norm", "s/it": "seconds",
                 "data": "data_s", "GiB": "peak_gib"}
        postfix = {name: f"{line.get(key, 0):.3g}" for name, key in shown.items()}
        self.bar.set_postfix(postfix, refresh=False)

    def close(self, step):
        """How the run ended, and the seconds of a step.

        That is the median over rounds of tp steps, in which every rank reads once.
        """
        self.bar.close()
        if self.rows:
            size = min(tp.size(), len(self.rows))
            rounds = np.array(self.rows)[: len(self.rows) // size * size]
            rounds = rounds.reshape(-1, size, len(PARTS)).mean(axis=1)
            table = self.speed(np.median(rounds, axis=0))
            say("median step: " + ", ".join(f"{key} {value:.3f}" for key, value in table.items()))
        where = self.cfg.run_dir / "checkpoints" / f"iter_{step:09d}.pt"
        if not self.cfg.checkpoint.save_iter:
            where = "none, as checkpoint.save_iter is 0"
        if step < self.cfg.trainer.max_iter:
            say(f"stopped after step {step}, saved {where}, rerun the same command to continue")
        elif tp.world_rank() == 0 and self.path.is_file():
            lines = map(json.loads, self.path.read_text().splitlines())
            losses = {line["step"]: line["loss"] for line in lines}
            losses = [losses[i] for i in sorted(losses)]
            n = max(1, min(20, len(losses) // 4))
            say(f"loss {np.mean(losses[:n]):.4f} -> {np.mean(losses[-n:]):.4f} (means of {n} "
                f"logged steps), checkpoint {where}, metrics {self.path}")


# ---- command line --------------------------------------------------------------------------------

def paths(cfg: Config):
    """{config key: path} of everything the run reads."""
    keys = ["data.root", "data.cache", "checkpoint.base_path", "checkpoint.load_path"]
    keys += ["tokenizer.path"] if cfg.data.root != "random" else []
    values = cfg.flat()
    return {key: values[key] for key in keys if values[key] not in (None, "random", "synthetic")}


def dryrun(cfg: Config):
    """Print the resolved config, what it needs and what is missing, from the config alone."""
    world = int(os.environ.get("WORLD_SIZE", cfg.parallel.tp))
    word = 2 if cfg.trainer.precision == "bfloat16" else 4
    tp.check_mesh(world, cfg.parallel.tp, cfg.model.num_heads)
    shapes = m.build(cfg.model, "meta", getattr(torch, cfg.trainer.precision))

    def count(parameters):
        return sum(p.numel() for p in parameters)

    params, control = list(shapes.parameters()), count(shapes.control.parameters())
    trained = count(p for p in params if p.requires_grad)
    sharded = count(p for p in params if hasattr(p, "tp_dim"))
    plan = choose_plan(cfg, shapes)
    parts = estimate(cfg, shapes, plan)
    of_memory = f" of {gpu_memory():.1f}" if gpu_memory() else ""
    rows = {
        "run": cfg.run_dir,
        "mesh": f"{world} ranks = dp {world // cfg.parallel.tp} x tp {cfg.parallel.tp}",
        "parameters: base": f"{count(shapes.base.parameters()):,}",
        "parameters: control": f"{control:,}",
        "parameters: trained": f"{trained:,}",
        "parameters: sharded, replicated": f"{sharded:,}, {count(params) - sharded:,}",
        "tokens a sample": f"{cfg.tokens:,}",
        "latents": " x ".join(map(str, cfg.latent_shape)),
        "sigma multiplier": f"{math.sqrt(cfg.latent_shape[1] / cfg.data.views):.3f}",
        "plan": describe(plan, cfg.parallel.tp),
        "TFLOP a sample and step": f"{tflop_per_sample(cfg.model, cfg.tokens):,.0f}",
        **{f"GiB a GPU: {part}": f"{size:.2f}" for part, size in parts.items()},
        "GiB a GPU: total": f"{sum(parts.values()):.2f}{of_memory}",
        "GiB a checkpoint": f"{(control * word + 16 * trained) / 2**30:.2f}",
        **{f"path: {key}": f"{path}{'' if Path(path).exists() else '   MISSING'}"
           for key, path in paths(cfg).items()}}
    print(dump(cfg))
    print("\n".join(f"{name:<39} {value}" for name, value in rows.items()))


def main(argv):
    """Exit status: 0 done or stopped on request, 2 a mistake that a sentence on stderr explains."""
    flags = {a for a in argv if a.startswith("-")}
    words = [a for a in argv if not a.startswith("-")]
    config = words.pop(0) if words and "=" not in words[0] else "configs/smoke.yaml"
    allow_change = "--allow-config-change" in flags
    if flags & {"-h", "--help"}:
        print(__doc__, HELP, sep="\n")
        return 0
    try:
        need(flags <= {"--dryrun", "--allow-config-change"},
             f"{' '.join(flags)}: the options are --dryrun and --allow-config-change")
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
        train(run)
    except data.BadClip as error:  # no clip is left that could be trained on
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        tp.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
