"""What a run will need, from its config alone: TFLOP, memory, traffic and seconds of a step.

    python -m configs.estimate CONFIG [key.sub=value ...]      # one row for each tp and scheme
"""

import bisect
import itertools
import math
import os
import re
import sys
import warnings
from collections import namedtuple
from pathlib import Path

import torch

import tp
from configs.files import expected
from configs.recompute import bus_speed, host, host_room
from configs.schema import Config, dump, load_config
from model import ModelConfig

# Dense bfloat16 TFLOP/s (NVIDIA's datasheets) of the first of these that a card's name contains as
# words; a part of a card (MIG) is not listed.
PEAK_TFLOPS = {"MIG": None, "A100": 312, "A800": 312, "H100 PCIe": 756, "H800 PCIe": 756,
               "NVL": 835, "H100": 989, "H800": 989, "H200": 989, "GH200": 989, "B200": 2250,
               "GB200": 2500}

# How a run computes. scheme: megatron or ulysses; keep: what each block that runs backward keeps
# for it, in that order; host: how many of them, from the last, keep it in host memory.
Plan = namedtuple("Plan", "scheme keep host", defaults=[0])

# What a block may keep (the rest is computed again): its input (full); also what attention gives,
# the dearest to repeat for its size; also the residual behind it and, under ulysses, what the ranks
# have exchanged for it; also all of its MLP; everything (none).
LADDER = ("full", "attention_saved", "residual_saved", "mlp_saved", "none")
# Of blocks trained or frozen as a whole these repeat no all-to-all, frozen ones nor the product
# behind attention. A trained block is spared nothing else by residual_saved.
SENDS_ONCE = LADDER[2:]

# Activations, in residual streams (B x L x D elements, divided by tp), fitted to measured peaks.
KEPT_FROZEN = {"full": 1, "attention_saved": 2, "residual_saved": 3, "mlp_saved": 8, "none": 16}
KEPT_TRAINED = KEPT_FROZEN | {"mlp_saved": 13, "none": 23}  # and inputs, below
LIVE = 15.3  # alive while a block runs backward, positions, residuals and head included
LIVE_MEGATRON = 5  # more of them for each further rank: gathered gradients are not divided by tp
LIVE_ULYSSES = 2.5  # more of them for more than one rank: what is sent and received
LIVE_HOST = 2.1  # more of them with host memory: what is on its way

# Measured in whole steps on one, two and four H100s (torch 2.11, NCCL over NVLink): TFLOP/s of
# attention forward and backward and of other matrix products, GB/s of elementwise kernels, GB/s
# sent by a rank, its waiting for the others included. OVERLAPPED: megatron's gathers and scatters
# where GPUs share memory, as if all of them showed; most run beside the products.
ATTENTION = {"cudnn": (619, 543), "flash-attn-4": (691, 622)}
CROSS_ATTENTION = (215, 420)  # the same, over the few keys of the text
MATMUL = 740
ELEMENTWISE = 2500
OVERLAPPED = 320
HOST = 50  # GB/s to host memory (PCIe 5 x16): 55 beside a step, 40 on four GPUs at once
ROOM = 64  # GiB of host memory a rank, where no run has looked and none is asked for
SENDS = {"gather": 240, "scatter": 220, "all_to_all": 130, "all_reduce": 360}


def peak_tflops(card: str) -> int | None:
    """What MFU is a part of; None of a card that is not listed."""
    names = (name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", card))
    return PEAK_TFLOPS.get(next(names, None))


def tflop_per_sample(cfg: ModelConfig, tokens: int) -> float:
    """Model TFLOP of one training step on one sample.

    Attention backward counts as 2x forward (no recomputation), frozen weights have no weight
    gradient, and base block 0 has no backward.
    """
    linears = 28 * tokens * cfg.model_channels**2
    attention = 4 * tokens * (tokens + cfg.text_tokens) * cfg.model_channels
    forward = cfg.num_blocks * (linears + attention)
    frozen_backward = (cfg.num_blocks - 1) * (linears + 2 * attention)
    trained = 3 * cfg.num_control_blocks * (linears + attention)
    return (forward + frozen_backward + trained) / 1e12


# ---- sizes ---------------------------------------------------------------------------------------


def word(cfg: Config) -> int:
    """Bytes of a weight or an activation."""
    return 2 if cfg.trainer.precision == "bfloat16" else 4


def elements(parameters) -> tuple[int, int]:
    """How many numbers parameters hold on all ranks together, (replicated, sharded)."""
    parameters = list(parameters)
    sharded = sum(p.numel() for p in parameters if hasattr(p, "tp_dim"))
    return sum(p.numel() for p in parameters) - sharded, sharded * tp.size()


def counts(model) -> tuple[int, int, int]:
    """Parameters of the base, of the control branch, and trained ones of either."""
    of = sizes(model)
    return sum(of.base), sum(of.control), sum(of.trained)


def is_trained(module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def backward_blocks(shapes) -> list:
    """The blocks that run backward, in that order.

    A frozen base block 0 does not, since it comes before the first residual.
    """
    first, *others = shapes.base.blocks
    blocks = [*shapes.control.blocks, *others]
    return blocks[::-1] + [first] * is_trained(first)


# Elements, (replicated, sharded), of a model's parts; of what is trained of all of it and of each
# block that runs backward.
Sizes = namedtuple("Sizes", "base control trained blocks")


def sizes(shapes) -> Sizes:
    """Those of a model; or what it has returned, so that much is estimated and counted once."""
    if isinstance(shapes, Sizes):
        return shapes
    trained = lambda module: elements(p for p in module.parameters() if p.requires_grad)
    base, control = (elements(part.parameters()) for part in (shapes.base, shapes.control))
    return Sizes(base, control, trained(shapes), [*map(trained, backward_blocks(shapes))])


def trained_blocks(shapes) -> list[bool]:
    """Whether each block that runs backward is trained."""
    return [sum(block) > 0 for block in sizes(shapes).blocks]


def stream_bytes(cfg: Config, plan: Plan) -> float:
    """Bytes of the residual stream on one rank, padding included."""
    pieces = cfg.data.views if plan.scheme == "ulysses" else 1
    tokens = -(-cfg.tokens // pieces // cfg.parallel.tp) * pieces
    return cfg.data.batch_size * tokens * cfg.model.model_channels * word(cfg)


def copied_bytes(cfg: Config, plan: Plan) -> int:
    """Bytes that a GPU of megatron lets the others of its group read."""
    shared = plan.scheme == "megatron" and cfg.parallel.tp > 1
    return 2 * int(stream_bytes(cfg, plan)) if shared else 0


# ---- memory --------------------------------------------------------------------------------------


def kept(cfg: Config, plan: Plan, trained: list[bool]) -> list[tuple[float, float, float]]:
    """(streams kept by, restored for, in host memory of) each block, in order of the backward pass.
    """
    # A trained block keeps the inputs of q, of the cross-attention's q and of the MLP, too: all
    # tokens under megatron. Under ulysses what attention sends, and any block q, k, v as received.
    ulysses = plan.scheme == "ulysses" and cfg.parallel.tp > 1
    each = cfg.parallel.tp if plan.scheme == "megatron" else 1
    inputs = {"mlp_saved": each, "none": 3 * each}
    found = []
    for i, (policy, trains) in enumerate(zip(plan.keep, trained)):
        streams = dict(KEPT_TRAINED if trains else KEPT_FROZEN)
        for name in LADDER:
            streams[name] += inputs.get(name, 0) * trains
            if ulysses and name in SENDS_ONCE:
                streams[name] += trains + 3 * (name != "none")
        away = i >= len(trained) - plan.host
        here = 0 if away else streams[policy]
        found.append((here, streams["none"] - here, streams[policy] - here))
    return found


def host_bytes(cfg: Config, plan: Plan, trained: list[bool]) -> float:
    """Bytes that a rank's blocks keep in host memory, their inputs included."""
    return sum(away for *_, away in kept(cfg, plan, trained)) * stream_bytes(cfg, plan)


def estimate(cfg: Config, shapes, plan: Plan) -> dict[str, float]:
    """GiB a GPU by part at the peak; `shapes` is the model on meta, or its sizes."""
    ranks, of = cfg.parallel.tp, sizes(shapes)
    whole = plan.scheme == "ulysses"  # weights; the rest is sharded in both schemes
    share = lambda found, ranks: found[0] + found[1] / ranks  # elements of a rank
    weights = lambda found: share(found, 1 if whole else ranks) * word(cfg)
    trained = share(of.trained, ranks)

    # While a block runs backward, what the blocks before it in the network keep is alive, what the
    # next one has in host memory is on its way, and the gradients of those behind it are there.
    keeps = kept(cfg, plan, trained_blocks(of))
    live = LIVE + LIVE_MEGATRON * (ranks - 1)
    if plan.scheme == "ulysses":
        live = LIVE + LIVE_ULYSSES
    live += LIVE_HOST * bool(plan.host)
    passed, alive = 0.0, []
    for i, block in enumerate(of.blocks):
        streams = live + sum(here for here, *_ in keeps[i:]) + keeps[i][1]
        streams += sum(away for *_, away in keeps[i + 1:i + 2])
        alive.append(streams * stream_bytes(cfg, plan) + passed)
        passed += share(block, ranks) * word(cfg)
    parts = {
        "base weights": weights(of.base),
        "control weights": weights(of.control),
        "masters and moments": 12 * trained,
        "EMA": 4 * trained,
        "gradients": 4 * trained,
        "activations": max(alive),
        "tokenizer": 0.2e9 if encodes(cfg) else 0.0,
        "shared with other GPUs": copied_bytes(cfg, plan),
    }
    return {part: size / 2**30 for part, size in parts.items()}


def encodes(cfg: Config) -> bool:
    """Whether a run needs the tokenizer: it makes samples, or there is no finished cache."""
    needed = cfg.trainer.sample_iter or cfg.data.cache in (None, "auto")
    return cfg.data.root != "random" and bool(needed)


def checkpoint_bytes(cfg: Config, shapes) -> int:
    """Of all its files: each rank's model file holds what is replicated, rank 0's optim file alone;
    and each its part of what is sharded."""
    def in_all(parameters):
        replicated, sharded = elements(parameters)
        return cfg.parallel.tp * replicated + sharded

    below = (p for p in shapes.base.parameters() if p.requires_grad)
    trained = [p for p in shapes.parameters() if p.requires_grad]
    weights = word(cfg) * (in_all(shapes.control.parameters()) + in_all(below))
    # in float32: the average; master and two moments
    return weights + 4 * in_all(trained) + 12 * sum(elements(trained))


def gpu_memory():
    """GiB of this machine's GPU, or None."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def choose_plan(cfg: Config, shapes, room=None, bus: float = HOST) -> Plan:
    """parallel.{scheme,recompute,whole_blocks}; what is open is what fits the GPU (of 79 GiB).

    The first of these that fits: ulysses, then megatron, with at least the attention output of each
    block; the same with full recomputation. Then rung by rung of the ladder as many blocks as fit
    keep more; of MLP and all the trained ones, which hold more, last. The block that runs backward
    first keeps everything at no cost: it would be restored while all others hold theirs. Then the
    fastest of this and of plans of its scheme whose first blocks in the network keep a rung in host
    memory, of which a rank has `room` GiB (None: as asked for, or ROOM) at `bus` GB/s.
    """
    asked, shapes = cfg.parallel, sizes(shapes)
    trained = trained_blocks(shapes)
    if room is None:
        room = ROOM if asked.host_gib is None else asked.host_gib
    # Of the smallest GPU: all ranks need one plan. The rest is CUDA's, NCCL's, between allocations.
    limit = 0.95 * min(tp.from_all(gpu_memory() or 79))
    size = lambda plan: sum(estimate(cfg, shapes, plan).values())
    schemes = ["ulysses", "megatron"] if asked.scheme == "auto" else [asked.scheme]
    if asked.tp == 1:
        schemes = ["megatron"]  # one rank shares nothing
    lowest = ["attention_saved", "full"] if asked.recompute == "auto" else [asked.recompute]
    rungs = LADDER[1:] if asked.recompute == "auto" else ["none"]
    whole = 1
    if asked.whole_blocks is not None:
        whole, rungs = asked.whole_blocks, [name for name in rungs if name != "none"]
    steps = [(rung, i) for rung in rungs for i in range(whole, len(trained))]
    steps.sort(key=lambda step: trained[step[1]] and step[0] in ("mlp_saved", "none"))

    def raised(scheme, policy, away, on_host, count):  # the plan after so many steps
        here = len(trained) - away
        keep = (["none"] * whole + [policy] * len(trained))[:here] + [on_host] * away
        for rung, i in [step for step in steps if step[1] < here][:count]:
            if scheme == "ulysses" or not trained[i] or rung != "residual_saved":
                keep[i] = max(keep[i], rung, key=LADDER.index)
        return Plan(scheme, keep, away)

    def fitting(scheme, policies, places):
        """For each policy and (blocks, what they keep) in host memory: with as much as fits."""
        for policy, place in itertools.product(policies, places):
            after = lambda count: raised(scheme, policy, *place, count)
            needed = host_bytes(cfg, after(0), trained) / 2**30
            if needed <= room and size(after(0)) < limit:
                yield after(bisect.bisect_left(range(1, len(steps) + 1), limit,
                                               key=lambda count: size(after(count))))

    def cost(plan):  # pinning memory takes time, too: it has to bring 0.5%
        step = sum(seconds(cfg, shapes, plan, "cudnn", bus=bus).values())
        return step * (1 + 0.005 * bool(plan.host))

    most = len(trained) - whole  # blocks that may keep something in host memory
    places = itertools.product(range(1, most + 1),
                               LADDER[:-1] if asked.recompute == "auto" else lowest)
    places = [*places] if room else []
    plans = [plan for policy, scheme in itertools.product(lowest, schemes)
             for plan in fitting(scheme, [policy], [(0, "none")])][:1]
    for scheme in [plans[0].scheme] if plans else schemes:
        plans += fitting(scheme, lowest, places)
        if plans:
            return min(plans, key=cost)
    least = lambda blocks: raised(schemes[-1], lowest[-1], blocks, lowest[-1], 0)
    if asked.recompute != "auto":
        return least(0)  # asked for by name: tried, whatever the estimate says
    raise ValueError(
        f"even with full recomputation this needs about {size(least(0)):.0f} GiB a GPU, of which "
        f"{limit:.0f} are there for it; use more GPUs with a larger parallel.tp"
        + ", or a smaller parallel.whole_blocks" * bool(asked.whole_blocks)
        + f", or more host memory than {room:.0f} GiB a rank" * (size(least(most)) < limit)
    )


def agree_on_plan(cfg: Config, shapes) -> Plan:
    """The plan of a run, the same on all ranks; the host memory that it needs is pinned.

    ValueError if parallel.host_gib asks for what is not there; by default it does without then.
    """
    def room_and_bus():
        if gpu_memory() is None:
            return 0.0, HOST, ""  # all of a CPU's memory is the machine's
        room = host_room(cfg.parallel.host_gib, checkpoint_bytes(cfg, shapes) / 2**30)
        try:
            return room, bus_speed() if room else HOST, ""
        except ValueError as error:
            return 0.0, HOST, str(error)

    rooms, speeds, problems = zip(*tp.from_all(room_and_bus()))
    host.room, host.bus = min(rooms), min(speeds)
    plan = choose_plan(cfg, shapes, host.room, host.bus)
    size = host_bytes(cfg, plan, trained_blocks(shapes))
    problem = max(problems) or max(tp.from_all(host.reserve(size, gpu_memory() is not None)))
    if not problem:
        return plan
    if cfg.parallel.host_gib:
        raise ValueError(problem)
    if tp.world_rank() == 0:
        warnings.warn(f"blocks keep nothing in host memory: {problem}")
    host.reserve(0)
    host.room = 0.0
    return choose_plan(cfg, shapes, 0)


def describe(plan: Plan, ranks: int, trains: bool = True) -> str:
    """For the first lines of a run; what blocks keep matters to those that train."""
    words = [f"scheme {plan.scheme}"] if ranks > 1 else []
    if trains:
        words.append(f"keeps {plan.keep.count('none')} of {len(plan.keep)} blocks whole")
        parts = {"mlp_saved": "attention and MLP", "residual_saved": "attention",
                 "attention_saved": "attention output", "full": "only the input"}
        words += [f"{part} of {plan.keep.count(name)}" for name, part in parts.items()
                  if name in plan.keep]
        words += [f"{plan.host} of the {len(plan.keep)} in host memory"] * bool(plan.host)
    return ", ".join(words)


def dryrun(cfg: Config, shapes):
    """Print the resolved config, what it needs and what is missing; `shapes`: the model on meta."""
    world = int(os.environ.get("WORLD_SIZE", cfg.parallel.tp))
    tp.check_mesh(world, cfg.parallel.tp, cfg.model.num_heads)

    base, control, trained = counts(shapes)
    replicated, sharded = elements(shapes.parameters())
    plan = choose_plan(cfg, shapes)
    parts = estimate(cfg, shapes, plan)
    of_memory = f" of {gpu_memory():.1f}" if gpu_memory() else ""
    rows = {
        "run": cfg.run_dir,
        "mesh": f"{world} ranks = dp {world // cfg.parallel.tp} x tp {cfg.parallel.tp}",
        "parameters: base": f"{base:,}",
        "parameters: control": f"{control:,}",
        "parameters: trained": f"{trained:,}",
        "parameters: sharded, replicated": f"{sharded:,}, {replicated:,}",
        "tokens a sample": f"{cfg.tokens:,}",
        "latents": " x ".join(map(str, cfg.latent_shape)),
        "sigma multiplier": f"{math.sqrt(cfg.latent_shape[1] / cfg.data.views):.3f}",
        "plan": describe(plan, cfg.parallel.tp),
        "TFLOP a sample and step": f"{tflop_per_sample(cfg.model, cfg.tokens):,.0f}",
        "GiB of host memory a GPU":
            f"{host_bytes(cfg, plan, trained_blocks(shapes)) / 2**30:.2f}"
            + f" if {ROOM} are there for it" * (cfg.parallel.host_gib is None),
        **{f"GiB a GPU: {part}": f"{size:.2f}" for part, size in parts.items()},
        "GiB a GPU: total": f"{sum(parts.values()):.2f}{of_memory}",
        "GiB a checkpoint": f"{checkpoint_bytes(cfg, shapes) / 2**30:.2f}",
        **{f"path: {key}": f"{path}{missing(cfg, key, Path(path))}"
           for key, path in cfg.paths().items()}}
    print(dump(cfg))
    print("\n".join(f"{name:<39} {value}" for name, value in rows.items()))


# ---- traffic and seconds -------------------------------------------------------------------------


def bytes_sent(cfg: Config, shapes, plan: Plan, replicas: int = 1) -> dict[str, float]:
    """Bytes that a rank sends in a step, by collective: tp.py's formula, without the batches.

    For blocks that are trained or frozen as a whole, and run backward.
    """
    ranks, accum = cfg.parallel.tp, cfg.trainer.grad_accum
    share = (ranks - 1) / ranks
    stream = stream_bytes(cfg, plan) * ranks  # S
    trained = trained_blocks(shapes)
    again = [policy != "none" for policy in plan.keep]
    forward = cfg.model.num_blocks + cfg.model.num_control_blocks
    replicated, sharded = sizes(shapes).trained
    sent = dict.fromkeys(SENDS, 0.0)
    sent["gather"] = accum * stream * 64 / cfg.model.model_channels  # the output
    passes = forward + len(trained)
    if plan.scheme == "ulysses" and ranks > 1:
        passes += sum(policy not in SENDS_ONCE for policy in plan.keep)
        sent["all_to_all"] = accum * passes * 4 * stream / ranks
        sent["gather"] += sharded * word(cfg)
        sent["scatter"] = accum * sharded * word(cfg)
    else:
        passes += sum(again)
        mlps = plan.keep.count("mlp_saved")  # neither gathered nor scattered again
        # nor is the last scatter of what is run again of a frozen block, each part by itself
        parts = {"none": 0, "full": 1, "attention_saved": 1, "residual_saved": 2, "mlp_saved": 2}
        last = sum(parts[policy] for policy, trains in zip(plan.keep, trained) if not trains)
        sent["gather"] += accum * (passes * 3 - mlps) * stream
        sent["scatter"] = accum * (passes * 3 - mlps - last) * stream
    sent = {kind: share * size for kind, size in sent.items()}
    sent["all_reduce"] = 2 * share * 4 * (replicated + 1)
    local = replicated + sharded / ranks
    sent["all_reduce"] += 2 * (replicas - 1) / replicas * 4 * local
    return sent


def seconds(cfg: Config, shapes, plan: Plan, kernel: str, replicas: int = 1,
            bus: float = HOST) -> dict[str, float]:
    """Seconds of a step by part, predicted from the constants above."""
    size, ranks = cfg.model, cfg.parallel.tp
    samples = cfg.data.batch_size * cfg.trainer.grad_accum / ranks
    tokens, dim = cfg.tokens, size.model_channels
    trained = trained_blocks(shapes)
    again = [policy for policy in plan.keep if policy != "none"]
    forward = size.num_blocks + size.num_control_blocks

    # linears, in units of tokens x D^2 multiply-adds: 28 a block, 8 of them the MLP's last
    linears = 28 * forward + sum(56 if trains else 28 for trains in trained)
    for policy, trains in zip(plan.keep, trained):
        if policy != "none":
            mlp, parts = policy != "mlp_saved", policy in SENDS_ONCE
            linears += 12 + 16 * mlp if trains else 10 + 10 * mlp - 2 * parts
    linears *= tokens * dim**2 * samples / 1e12 / MATMUL

    attention, backward = 0.0, 2.5 * len(trained)  # the backward pass does 2.5 times the work
    for keys, rates, repeated in ((tokens, ATTENTION[kernel], plan.keep.count("full")),
                                  (size.text_tokens, CROSS_ATTENTION, len(again))):
        once = 4 * tokens * keys * dim * samples / 1e12
        attention += (forward + repeated) * once / rates[0]
        attention += backward * once / rates[1]

    # streams read and written by norms, rotations, gates, GELU; ulysses also copies for layout
    touched = 34 * (forward + len(again)) + 56 * len(trained) - 14 * again.count("mlp_saved")
    if plan.scheme == "ulysses":
        copied = sum(policy not in SENDS_ONCE for policy in again)
        touched += 8 * (forward + copied + len(trained))
    touched *= stream_bytes(cfg, plan) * cfg.trainer.grad_accum / 1e9 / ELEMENTWISE

    replicated, sharded = sizes(shapes).trained
    optimizer = 60 * (replicated + sharded / ranks) / 1e9 / ELEMENTWISE
    rates = SENDS
    if plan.scheme == "megatron":
        rates = SENDS | {"gather": OVERLAPPED, "scatter": OVERLAPPED}
    sent = bytes_sent(cfg, shapes, plan, replicas)
    communication = sum(size / 1e9 / rates[kind] for kind, size in sent.items())
    # to host memory beside the forward pass of these blocks; what comes back has more time
    work = 28 * dim**2 / MATMUL + 4 * tokens * dim / ATTENTION[kernel][0]
    forth = host_bytes(cfg, plan, trained) * cfg.trainer.grad_accum / 1e9 / bus
    shown = max(0.0, forth - plan.host * work * tokens * samples / 1e12)
    return {"linears": linears, "attention": attention, "elementwise": touched,
            "communication": communication, "host memory": shown, "optimizer": optimizer}


def missing(cfg: Config, key, path):
    """A note if there is nothing at the path of a config, or a tokenizer's folder lacks a file."""
    if not path.exists():
        return "   MISSING"
    absent = [file.name for of, file, *_ in expected(cfg) if of == key and not file.exists()]
    return f"   MISSING: {', '.join(absent)}" if absent else ""


def main(arguments):
    from train import build  # it imports this file
    if not arguments or {"-h", "--help"} & {*arguments}:
        sys.exit(__doc__)
    try:
        cfg = load_config(arguments[0], arguments[1:])
        shapes = build(cfg, "meta")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    tflop = tflop_per_sample(cfg.model, cfg.tokens) * cfg.data.batch_size * cfg.trainer.grad_accum
    print(f"predicted for H100 80GB, and {ROOM} GiB of host memory a rank unless parallel.host_gib "
          "says how much; measured constants are named in configs/estimate.py")
    print("blocks keep all/attention and MLP/attention/its output/their input")
    print("tp scheme    kernel        blocks keep     GiB  sent GB  seconds    MFU   parts")
    for ranks in (n for n in (1, 2, 4, 8) if cfg.model.num_heads % n == 0):
        for scheme in ("megatron", "ulysses") if ranks > 1 else ("megatron",):
            name = scheme if ranks > 1 else "-"
            for kernel in ATTENTION:
                cfg.parallel.tp, cfg.parallel.scheme = ranks, scheme
                try:
                    plan = choose_plan(cfg, shapes)
                except ValueError as error:
                    print(f"{ranks:>2} {name:<9} {error}")
                    continue
                parts = seconds(cfg, shapes, plan, kernel)
                total = sum(parts.values())
                sent = sum(bytes_sent(cfg, shapes, plan).values()) / 1e9
                memory = sum(estimate(cfg, shapes, plan).values())
                mfu = tflop / ranks / total / peak_tflops("H100")
                split = ", ".join(f"{part} {value:.2f}" for part, value in parts.items())
                if plan.host:
                    away = host_bytes(cfg, plan, trained_blocks(shapes)) / 2**30
                    split += f"; {plan.host} blocks in {away:.1f} GiB of host memory"
                keeps = "/".join(str(plan.keep.count(kept)) for kept in LADDER[::-1])
                print(f"{ranks:>2} {name:<9} {kernel:<13} {keeps:<13} "
                      f"{memory:>5.1f} {sent:>8.1f} {total:>8.2f} {mfu:>7.1%}   {split}")


if __name__ == "__main__":
    main(sys.argv[1:])
