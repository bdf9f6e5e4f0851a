"""Train the control branch of a Cosmos-Transfer1-Sample-AV model: the step, the run around it.

    python train.py CONFIG [--dryrun | --sample] [--allow-config-change] [key.sub=value ...]
    torchrun --nproc_per_node=8 train.py CONFIG ...
"""

import hashlib
import itertools
import json
import math
import sys
import warnings
from collections import deque, namedtuple
from pathlib import Path
from statistics import NormalDist

import configs  # first: it says so where Python is too old

import numpy as np
import torch

import convert
import data
import model as m
import tp
from configs import guard, moments, pictures
from configs.binding import check_same_run, identify, open_run, relevant
from configs.estimate import agree_on_plan, copied_bytes, dryrun, encodes
from configs.kernels import check_compiler, choose_attention
from configs.log import Log, Unbroken, clock, header, progress, say, seconds_between
from configs.schema import HELP, Config, Optimizer, check_trained, load_config, need
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
    """A batch of data.py -> {"latents", and what m.Condition holds of it}, pixels encoded."""
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()
             if torch.is_tensor(value)}
    for pixels, latents in (("video", "latents"), ("hint", "hint_latents")):
        if pixels in batch:
            batch[latents] = tokenizer.encode_views(batch.pop(pixels))
    return batch | {"hint": batch.pop("hint_latents")}  # the pop comes first


def draw_noise(cfg: Config, step, micro, device):
    """The random draws of this replica's samples in one forward pass of a step."""
    first = (micro * tp.dp_size() + tp.dp_rank()) * cfg.data.batch_size
    return m.draw_noise(cfg.model, cfg.latent_shape, cfg.trainer.seed, step,
                        range(first, first + cfg.data.batch_size), device)


# ---- the run -------------------------------------------------------------------------------------

# Everything of a run before its first step. flat: a tp.FlatParams, what is trained as flat buffers
# (master, grad, ema); identity: what the run is bound to; position: in the sequence of samples.
Run = namedtuple("Run", "cfg clips tokenizer model flat identity step position")


def train(run: Run, stop: guard.Stop):
    """Train to max_iter or a signal. With equal clips a step, dp and tp change rounding alone."""
    cfg, clips, model, flat = run.cfg, run.clips, run.model, run.flat
    step, position = run.step, run.position
    device, t, accum = flat.master.device, cfg.trainer, cfg.trainer.grad_accum
    clips_a_step = accum * tp.dp_size() * cfg.data.batch_size
    save_iter = cfg.checkpoint.save_iter
    stop.running = True  # from now on a signal ends the run between two steps

    # threads read this rank's clips ahead
    reader = data.prefetch(lambda numbers: data.collate([clips.sample(n) for n in numbers]),
                           read_numbers(cfg, position), cfg.data.num_workers,
                           stop=lambda: bool(stop))
    batches = []  # encoded ones of the whole group that no step has used yet
    read = deque(maxlen=accum + tp.size())  # names of clips, to tell which step they were in
    saved = None  # the last convert.Save

    log, at_start = Log(cfg, clips, step), guard.checksums_at_start(model)
    held = hold(cfg, clips, run.tokenizer, device) if t.val_iter or t.sample_iter else {}
    if step == 0:
        log.before(evaluate(run, held, log, step, stop))

    # all ranks leave the loop at the same step: before each, every one hears from every other
    while step < t.max_iter and not any(tp.from_all(bool(stop))):
        loss, lr = torch.zeros((), device=device), learning_rate(step, cfg.optimizer)

        for micro in range(accum):
            # fetch and encode: every rank of the group one of its next tp batches
            if not batches:
                own = guard.fetch(reader, stop, clips.bad, read)
                if own is None:
                    break
                log.lap("data")
                batches = tp.exchange(encode(own, run.tokenizer, device))
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

        if own is None:  # a rank was told to stop, or cannot read on
            break

        # sync, clip, step, EMA
        norm = flat.sync_gradients()
        log.lap("sync")
        if norm.isfinite():  # here the host waits for the GPU
            flat.grad.mul_((cfg.optimizer.clip_norm / norm).clamp(max=1.0))
            flat.optimizer.param_groups[0]["lr"] = lr
            flat.optimizer.step()
            flat.ema.lerp_(flat.master, 1 - ema_beta(step, cfg.optimizer.ema_rate))
            flat.write("master")
            log.in_a_row = 0
        else:
            names = guard.clips_of_step(read, len(batches), accum)
            stop.problem = log.skip(step, norm, names) or stop.problem
        flat.grad.zero_()
        log.lap("optimizer")
        step, position = step + 1, position + clips_a_step

        # once in a while: check, save, validate, sample
        due = save_iter and (step % save_iter == 0 or step == t.max_iter)
        if t.check_every and (due or step % t.check_every == 0):
            guard.check_memory(at_start, model, flat, step)
        previous = saved
        if due:
            saved = save(run, step, position, previous)
        guard.follow(previous, stop)
        log.lap("save")
        seen = evaluate(run, held, log, step, stop)
        log.step(step, loss, norm, lr, seen)

    # the end, or before it a stop: save what is not saved
    reader.close()
    if log.in_a_row >= t.max_skipped:  # they changed nothing: back before them, or to a save
        back = min(log.in_a_row, step - (saved.step if saved else 0))
        step, position = step - back, position - back * clips_a_step
    tp.arrive(f"save of step {step}")
    unsaved = saved is None or saved.step < step or saved.failed
    if save_iter and step < t.max_iter and unsaved:
        if t.check_every:
            guard.check_memory(at_start, model, flat, step)
        saved = save(run, step, position, saved)
    guard.follow(saved, stop, to_the_end=True)
    log.close(step)
    need(not stop.problem, stop.problem)


# ---- before the first step -----------------------------------------------------------------------

def prepare(cfg: Config, watch, lock, allow_change, argv) -> Run:
    """Everything of a run before its first step, cheapest checks first."""
    need_files(cfg)
    device = tp.init(cfg.parallel.tp, cfg.model.num_heads, cfg.parallel.timeout_s)
    check_compiler(device)
    watch.start(cfg.parallel.timeout_s)
    tp.from_rank0(lambda: lock.take(cfg.run_dir))
    tp.from_rank0(lambda: open_run(cfg, allow_change, argv))

    # clips, and what encodes them
    tp.from_rank0(lambda: bool(data.open_clips(cfg)))  # one rank first, for it may write them
    clips = data.open_clips(cfg)
    if cfg.trainer.sample_iter:
        data.ffmpeg(encoder=True)
    tokenizer = None
    if encodes(cfg):
        tokenizer = open_tokenizer(cfg, device)
        if cfg.data.cache == "auto":
            fill_cache(cfg, clips, tokenizer)
    tp.from_rank0(lambda: clips.survey(cfg.data.max_bad))

    # the model, what is trained of it, and where its training stands
    model, identity, plan = open_model(cfg, device)
    opt = cfg.optimizer
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    flat = tp.FlatParams(trained, lr=opt.lr, betas=tuple(opt.betas), eps=opt.eps,
                         weight_decay=opt.weight_decay)
    moments.check(flat)
    identity = identify(cfg, clips, identity)
    step, position = resume(cfg, flat, identity, allow_change)
    header(cfg, clips, model, plan, device)
    return Run(cfg, clips, tokenizer, model, flat, identity, step, position)


def fill_cache(cfg: Config, clips, tokenizer):
    """Latents of what the cache in the data root lacks, each rank its part; others need no work."""
    jobs = clips.build(tokenizer.encode_views, cfg.data.num_workers, tp.world_rank(),
                       tp.size() * tp.dp_size())
    for clip, window, outcome in jobs:
        if outcome.startswith("BAD"):
            print(f"warning: {clip} window {window}: {outcome}", file=sys.stderr, flush=True)
    tp.barrier()


def need_files(cfg: Config):
    missing = [f"{key} {path}" for key, path in cfg.paths().items() if not Path(path).exists()]
    need(not missing, f"not there: {', '.join(missing)}; README, Four steps: where to get them, "
         "and how data.py cache makes a data.cache")
    guard.need_gpu(cfg)


def open_model(cfg: Config, device):
    """The model with its weights, the identity of the base's, and the plan of how to compute."""
    shapes = build(cfg, "meta")
    identity = check_weights(cfg, shapes)  # before any memory is allocated
    model, plan = build(cfg, device), agree_on_plan(cfg, shapes)
    head_dim = cfg.model.model_channels // cfg.model.num_heads
    dtype = getattr(torch, cfg.trainer.precision)
    model.attention = choose_attention(m.attend, device, dtype, head_dim)
    model.keep, model.on_host = plan.keep[::-1], plan.host  # in the order of the forward pass
    tp.use_scheme(plan.scheme, copied_bytes(cfg, plan))
    tp.init_weights(model, cfg.trainer.seed)
    load_weights(cfg, model)
    tp.gather_weights(model.parameters())
    return model, identity, plan


def build(cfg: Config, device):
    """The model of a config without its weights; device "meta": without memory either."""
    model = m.build(cfg.model, device, getattr(torch, cfg.trainer.precision))
    return choose_trained(model, cfg.trainer.train)


def choose_trained(model, prefixes):
    """The model with gradients for the parameters below these names, but for what never has any."""
    check_trained(prefixes, [name for name, _ in model.named_parameters()])
    for name, parameter in model.named_parameters():
        convert.to_nvidia(name)  # ValueError for a name that no checkpoint could hold
        chosen = any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)
        without = name.startswith(("control.head.", "logvar."))  # not computed with; constant
        parameter.requires_grad_(chosen and not without)
    need(any(parameter.requires_grad for parameter in model.parameters()),
         f"trainer.train is {prefixes}, which nothing is computed with or is constant; add control")
    return model


def open_tokenizer(cfg: Config, device):
    """The tokenizer, which has to know as many frames as a clip has."""
    tokenizer = load_tokenizer(cfg.tokenizer.path, device, getattr(torch, cfg.trainer.precision),
                               frames=cfg.latent_shape[1] // cfg.data.views)
    say(f"{'tokenizer':<9} {tokenizer.description}")
    return tokenizer


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
    """Check the files against the model on meta, then all their bytes; {part: identity}."""
    files, memory = weight_files(cfg), cfg.run_dir / "base_digests.json"
    for part, path in files.items():
        convert.check_fits(shapes, path, part)
    identities = {part: tp.from_rank0(lambda: convert.identify_weights(path, part, memory))
                  for part, path in files.items() if part != "logvar"}
    random = {"file": "random", "size": 0, "sha256": f"seed {cfg.trainer.seed}"}
    return {"base": random, **identities}


def load_weights(cfg: Config, model):
    """Fill the model from its files; a control branch without one starts as a copy of the base."""
    files = weight_files(cfg)
    for part, path in files.items():
        convert.load(model, path, part)
    if "control" not in files:
        copy_base_to_control(model)
        say(f"base: {files.get('base', 'RANDOM weights')}; control: starts as a copy of it, hint "
            "and zero linears new")


@torch.no_grad()
def copy_base_to_control(model):
    """Start the control branch from the base: every parameter that they have in common."""
    base = dict(model.base.named_parameters())
    for name, parameter in model.control.named_parameters():
        if name in base:
            parameter.copy_(base[name])


# ---- save and resume -----------------------------------------------------------------------------

def save(run: Run, step, position, previous):
    """Write checkpoint `step` in the background; of the base only what is trained of it."""
    cfg, model, flat = run.cfg, run.model, run.flat
    weights = {f"control.{k}": v.detach() for k, v in model.control.named_parameters()}
    weights |= {name: p.detach() for name, p in flat.params.items()}  # of the base, if trained
    weights |= {f"logvar.{k}": v.detach() for k, v in model.logvar.state_dict().items()}
    kinds = ("ema", "master", *flat.state())
    state = {"model": weights, **{kind: flat.views(kind) for kind in kinds}}
    size, config = cfg.model, json.dumps(relevant(cfg.flat()), sort_keys=True)
    meta = {"config_digest": hashlib.sha256(config.encode()).hexdigest(), "position": position,
            **run.identity, "optimizer": moments.scalars(flat),
            "seq_length": max(size.max_img_h // 2, size.max_img_w // 2, size.max_frames)}
    saved = convert.save(cfg.run_dir, step, state, meta, cfg.checkpoint.keep_last,
                         cfg.checkpoint.keep_every, cfg.checkpoint.retries, previous)
    say(f"step {step}: checkpoint stall {saved.stall:.1f} s")
    return saved


def resume(cfg: Config, flat, identity, allow_change):
    """(step, data position) of this run's newest intact checkpoint, loaded in place, or (0, 0)."""
    found = tp.from_rank0(lambda: convert.find_resume(cfg.run_dir))
    if found is None:
        return 0, 0
    step, path = found
    kinds, meta = convert.optimizer_state(path)
    check_same_run(cfg, meta, identity, allow_change)
    moments.restore(flat, kinds, meta["optimizer"])
    convert.resume(path, {kind: flat.views(kind) for kind in ("ema", "master", *kinds)})
    flat.write("master")
    say(f"resuming at step {step} from {path}")
    return step, meta["position"]


# ---- what a person looks at: validation and samples ----------------------------------------------

NO_STEP = 10**12  # validation and samples draw their noise as a step that never comes would
NOISE_LEVELS = 8  # of the validation loss


def of_all_ranks(own: dict, count=0) -> dict:
    """What all have found, {clip's number: it}, in order; {} if fewer than `count`. All wait."""
    tp.barrier()
    found = {number: one for part in tp.from_all(own) for number, one in part.items()}
    return dict(sorted(found.items())) if len(found) >= count else {}


def hold(cfg: Config, clips, tokenizer, device):
    """{number: batch of one} of the clips to validate on and to sample, as latents on the host: the
    held-out ones or, if there are none, the first. A rank encodes some and gets all."""
    if cfg.data.root == "random":
        return {}
    count = len(clips.held_out) or min(max(1, cfg.data.val_clips), len(clips))
    own = {}
    for i in range(tp.world_rank(), count, tp.dp_size() * tp.size()):
        try:
            clip = clips.held(i)
            batch = encode(data.collate([clip]), tokenizer, device)
            own[i] = {key: value.cpu() for key, value in batch.items()}
            if cfg.data.views > 1:  # for samples, views but the front may have no camera video
                files = clip.get("files", [""])[: cfg.data.views]
                own[i]["there"] = torch.tensor([file is not None for file in files])
        except (data.BadClip, data.DataFailure) as error:
            own[i] = error
    held = of_all_ranks(own)
    for i, found in list(held.items()):
        if isinstance(found, data.DataFailure):
            raise found  # on every rank, so that none waits for another
        if isinstance(found, data.BadClip):
            say(f"warning: clip {i} of {count} is not validated on: {found}")
            del held[i]
    return held


def own_share(cfg: Config, held, device):
    """This replica's clips: (number, latents or None, condition, noise), on the device."""
    for i in list(held)[tp.dp_rank() :: tp.dp_size()]:
        tp.stay()
        batch = {key: value.to(device) for key, value in held[i].items()}
        noise = m.draw_noise(cfg.model, cfg.latent_shape, cfg.trainer.seed, NO_STEP, [i], device)
        noise = noise._replace(keep_text=torch.ones_like(noise.keep_text))
        if noise.known is not None:  # what is not there cannot be given
            known = noise.known.unflatten(2, (cfg.data.views, -1))         # (1, 1, V, T, 1, 1)
            known = known * batch.pop("there").view(1, 1, -1, 1, 1, 1)
            noise = noise._replace(known=known.flatten(2, 3))
        yield i, batch.pop("latents", None), m.Condition(**batch), noise


class Silent:
    """A network whose output is zero: the best guess about latents of which only the variance is
    known. Any base that belongs to these latents is below its loss, which without logvar is 1."""

    def __init__(self, model):
        self.logvar = model.logvar

    def __call__(self, x, c_noise, cond):
        return torch.zeros_like(x)


@torch.no_grad()
def validate(cfg: Config, model, held, device, stop=None):
    """The loss over the held clips, overall and at each of a fixed grid of sigmas.

    Every clip alone, with noise that follows from the seed and its number, summed in their order:
    the same on every mesh and for every batch size. The grid is the quantiles of what training
    draws. Known latents of several views are drawn as in training, too. Nothing if told to stop.
    """
    frames = cfg.latent_shape[1] // cfg.data.views
    quantiles = [(i + 0.5) / NOISE_LEVELS for i in range(NOISE_LEVELS)]
    sigmas = [math.exp(NormalDist().inv_cdf(q)) * math.sqrt(frames) for q in quantiles]
    own = {}
    for i, latents, cond, noise in guard.until(stop, own_share(cfg, held, device), device):
        at = [noise._replace(sigma=torch.full_like(noise.sigma, sigma)) for sigma in sigmas]
        own[i] = [[m.training_loss(net, latents, cond, noise).item() for noise in at]
                  for net in (model, Silent(model))]
    rows = of_all_ranks(own, len(held))                                    # (2, NOISE_LEVELS) each
    if not rows:
        return {}
    losses, silent = np.mean([*rows.values()], axis=0)                     # (NOISE_LEVELS,) each
    return {"val_loss": losses.mean(), "val_zero": silent.mean(), "val_sigmas": sigmas,
            "val_losses": losses.tolist()}


def write_samples(cfg: Config, model, tokenizer, clips, held, device, name, stop=None):
    """Denoise the held clips, from the same noise every time, and write what came out.

    In {run}/samples: {name}_{clip}.mp4, control | sample | real, a row a view, and {name}.png, a
    contact sheet of them all. Replicas share the clips; rank 0 of each decodes and writes. Returns
    {"psnr": mean in dB, "solver_s": seconds a solver step}, if any, and a sentence a failed write.
    """
    t, stem = cfg.trainer, cfg.run_dir / "samples" / name
    share = -(-len(held) // tp.dp_size())  # clips of this replica, at most
    calls = (t.sample_steps + 1) * (2 if t.guidance else 1)  # of the network, a clip
    bar = progress(share * calls, desc=f"sampling {share} clips", unit="pass", leave=False)

    def counted(*args):  # the model, each of its calls being a sign of life
        tp.stay()
        bar.update()
        return model(*args)

    own, seconds, count = {}, 0.0, 0
    for i, latents, cond, noise in guard.until(stop, own_share(cfg, held, device), device):
        rng = torch.Generator(device).manual_seed(tp.seed_of(t.seed, NO_STEP, i, 1))
        real, before = None if latents is None else latents.float(), clock()
        out = m.sample(counted, (1, *cfg.latent_shape), cond._replace(known=noise.known), rng,
                       t.guidance, t.sample_steps, real)
        seconds, count = seconds + seconds_between(before, clock()), count + 1
        if tp.rank() == 0:
            own[i] = pictures.write_sample(stem, clips, i, tokenizer, cond.hint, out, latents)
    bar.close()

    # what all have written, as one picture and in numbers
    found, shown = {}, of_all_ranks(own, len(held)).values()  # of a part no mean and no picture
    problems = [one.problem for one in shown if one.problem]
    if tp.world_rank() == 0:
        problems += pictures.write_sheet(stem.with_name(f"{name}.png"), shown)
    if count:
        found["solver_s"] = seconds / (count * (t.sample_steps + 1))
    if ratios := [one.psnr for one in shown if one.psnr is not None]:
        found["psnr"] = sum(ratios) / len(ratios)
    return found, problems


def evaluate(run: Run, held, log, step, stop):
    """Validate and sample with the EMA weights when it is time; what the metrics say of it."""
    cfg, t, device = run.cfg, run.cfg.trainer, run.flat.master.device

    def due(every):
        return held and every and (step % every == 0 or step == t.max_iter)

    seen, samples = {}, due(t.sample_iter) and step > 0
    if not due(t.val_iter) and not samples:
        return seen
    with run.flat.swapped("ema"):
        if due(t.val_iter):
            seen |= validate(cfg, run.model, held, device, stop)
            log.lap("validate")
            log.validated(step, seen, len(held))
        if samples:
            found, problems = write_samples(cfg, run.model, run.tokenizer, run.clips, held, device,
                                            f"iter_{step:09d}", stop)
            log.lap("sample")
            log.sampled(step, found, problems)
            seen |= found
    return seen


def sample_only(cfg: Config, given):
    """Samples of the held clips with a checkpoint: the one `given` on the command line, else the
    newest of the run, else what a training would start from. EMA weights where there are any."""
    need(cfg.data.root != "random", "data.root is random, of which there is nothing to sample")
    need_files(cfg)
    # nothing runs backward: whatever fits for training or not
    cfg.parallel.recompute, cfg.parallel.host_gib = "full", 0
    device = tp.init(cfg.parallel.tp, cfg.model.num_heads, cfg.parallel.timeout_s)
    check_compiler(device)
    clips = data.open_clips(cfg, videos=False)
    tokenizer = open_tokenizer(cfg, device)
    model, _, plan = open_model(cfg, device)
    found = None if given else tp.from_rank0(lambda: convert.find_resume(cfg.run_dir))
    path = found[1] if found else cfg.checkpoint.load_path
    if found:
        trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        convert.resume(path, {"ema": trained})
    elif path and convert.has_ema(path):
        convert.load(model, path, "control", ema=True)
    model.requires_grad_(False)
    tp.gather_weights(model.parameters())
    header(cfg, clips, model, plan, device)
    say(f"{'sampled':<9} {path or 'the base alone: this run has no checkpoint yet'}")
    held = hold(cfg, clips, tokenizer, device)
    name = Path(path).stem if path else "base"
    seen, problems = write_samples(cfg, model, tokenizer, clips, held, device, name)
    need(held and not problems, "; ".join(problems) or "none of the clips can be used")
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    psnr = f", PSNR to the real ones {seen['psnr']:.2f} dB" if "psnr" in seen else ""
    speed = f", {seen['solver_s']:.3g} s a solver step" if "solver_s" in seen else ""
    say(f"{len(held)} clips as {cfg.run_dir}/samples/{name}*{speed}, peak {peak:.1f} GiB{psnr}")


# ---- command line --------------------------------------------------------------------------------

FLAGS = {"--dryrun", "--sample", "--allow-config-change"}


def main(argv):
    """Exit status: 0 done or stopped on request, 2 a mistake (told on stderr), 128 + signal."""
    flags = {a for a in argv if a.startswith("-")}
    words = [a for a in argv if not a.startswith("-")]
    config = words.pop(0) if words and "=" not in words[0] else "configs/smoke.yaml"
    allow_change = "--allow-config-change" in flags
    if flags & {"-h", "--help"}:
        print(__doc__, HELP, sep="\n")
        return 0
    warnings.formatwarning = lambda text, *source: f"warning: {text}\n"  # a line, as all else
    stop, watch, lock, reason = guard.Stop(), guard.Watch(), guard.Lock(), "an error"
    try:
        need(flags <= FLAGS,
             f"{' '.join(flags - FLAGS)}: the options are {', '.join(sorted(FLAGS))}")
        given = "--sample" in flags and any(w.startswith("checkpoint.load_path=") for w in words)
        cfg = load_config(config, [*words, "job.stage=posttrain"] if given else words)
        guard.hide_gpus(cfg.trainer.device)
        if "--dryrun" in flags:
            open_run(cfg, allow_change, argv, dry=True)
            dryrun(cfg, build(cfg, "meta"))
        elif "--sample" in flags:
            sample_only(cfg, given)
        else:
            guard.check_launch()
            train(prepare(cfg, watch, lock, allow_change, argv), stop)
        reason = ""
    except (ValueError, OSError, data.SafetensorError, data.DataFailure) as error:
        reason = str(error)
        print(f"error: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        doing = "while sampling" if "--sample" in flags else "before the first step"
        reason = f"stopped by {stop.received.name} {doing}: nothing is lost"
        print(f"{reason}, rerun the same command", file=sys.stderr)
        return 128 + stop.received
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        watch.hear()  # if it is since another rank has died, this process ends here, saying so
        raise
    finally:
        watch.close(reason)
        lock.release()
        stop.close()
        tp.shutdown(failed=bool(reason))
    return 0


if __name__ == "__main__":
    sys.stdout, sys.stderr = Unbroken(sys.stdout), Unbroken(sys.stderr)
    warnings.filterwarnings("default", category=UserWarning)  # ours, whatever PYTHONWARNINGS says
    sys.exit(main(sys.argv[1:]))
