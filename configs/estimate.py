"""What a run will need, from its config alone: TFLOP, memory, traffic and seconds of a step.

    python -m configs.estimate CONFIG [key.sub=value ...]      # one row for each tp and scheme
"""

import itertools
import math
import os
import sys
from collections import namedtuple
from pathlib import Path

import torch

import tp
from configs.schema import Config, dump, load_config
from model import ModelConfig, build

PEAK_TFLOPS = 989.0  # dense bfloat16 of an H100 or H200 (NVIDIA's datasheets)

# How a run computes. scheme: megatron or ulysses; recompute: the policy of the blocks that do not
# keep everything; whole_blocks: how many keep everything, of `blocks` that run backward;
# attention_blocks: how many of the others keep their attention output, where recompute is full.
Plan = namedtuple("Plan", "scheme recompute whole_blocks blocks attention_blocks", defaults=[0])

# Activations, in residual streams (B x L x D elements, divided by tp), fitted to measured peaks.
STREAM_KEPT = {"full": 1, "attention_saved": 2}  # the block's input; and the attention output
WHOLE_FROZEN = 16  # all that a frozen block keeps; a trained one also inputs of its linears, gates
LIVE = 15.3  # alive while a block runs backward, positions, residuals and head included
LIVE_MEGATRON = 5  # more of them for each further rank: gathered gradients are not divided by tp
LIVE_ULYSSES = 2.5  # more of them for more than one rank: what is sent and received

# Measured in whole steps on one, two and four H100s (torch 2.11, NCCL over NVLink): TFLOP/s of
# attention forward and backward and of other matrix products, GB/s of elementwise kernels, GB/s
# sent by a rank.
ATTENTION = {"cudnn": (619, 543), "flash-attn-4": (691, 622)}
CROSS_ATTENTION = (215, 420)  # the same, over the few keys of the text
MATMUL = 740
ELEMENTWISE = 2500
SENDS = {"gather": 240, "scatter": 220, "all_to_all": 190, "all_reduce": 360}


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
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = model.base.parameters(), model.control.parameters(), trained
    return tuple(sum(elements(group)) for group in groups)


def is_trained(module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def backward_blocks(shapes) -> list:
    """The blocks that run backward, in that order.

    A frozen base block 0 does not, since it comes before the first residual.
    """
    first, *others = shapes.base.blocks
    blocks = [*shapes.control.blocks, *others]
    return blocks[::-1] + [first] * is_trained(first)


def trained_blocks(shapes) -> list[bool]:
    """Whether each of them is trained."""
    return [is_trained(block) for block in backward_blocks(shapes)]


def stream_bytes(cfg: Config, plan: Plan) -> float:
    """Bytes of the residual stream on one rank, padding included."""
    pieces = cfg.data.views if plan.scheme == "ulysses" else 1
    tokens = -(-cfg.tokens // pieces // cfg.parallel.tp) * pieces
    return cfg.data.batch_size * tokens * cfg.model.model_channels * word(cfg)


# ---- memory --------------------------------------------------------------------------------------


def kept(cfg: Config, plan: Plan, trained: list[bool]) -> list[tuple[float, float]]:
    """(streams kept by, streams restored for) each block, in the order of the backward pass."""
    ranks = cfg.parallel.tp
    # megatron keeps the gathered inputs of q, of the cross-attention's q and of the MLP whole
    whole_trained = 23 + 3 * ranks if plan.scheme == "megatron" else 26 + (ranks > 1)
    found = []
    for i, trains in enumerate(trained):
        everything = whole_trained if trains else WHOLE_FROZEN
        keeps = everything
        if i >= plan.whole_blocks and plan.recompute != "none":
            attention = i < plan.whole_blocks + plan.attention_blocks
            keeps = STREAM_KEPT["attention_saved" if attention else plan.recompute]
        found.append((keeps, everything - keeps))
    return found


def estimate(cfg: Config, shapes, plan: Plan) -> dict[str, float]:
    """GiB a GPU by part at the peak; `shapes` is the model on meta."""
    ranks = cfg.parallel.tp
    whole = plan.scheme == "ulysses"  # weights; the rest is sharded in both schemes

    def weights(module):
        replicated, sharded = elements(module.parameters())
        return (replicated + sharded / (1 if whole else ranks)) * word(cfg)

    def trained(module):  # elements of a rank
        found = elements((p for p in module.parameters() if p.requires_grad))
        return found[0] + found[1] / ranks

    # While a block runs backward, what the blocks before it in the network keep is alive, and the
    # gradients of those behind it.
    blocks = backward_blocks(shapes)
    keeps = kept(cfg, plan, trained_blocks(shapes))
    live = LIVE + LIVE_MEGATRON * (ranks - 1)
    if plan.scheme == "ulysses":
        live = LIVE + LIVE_ULYSSES
    passed, alive = 0.0, []
    for i, block in enumerate(blocks):
        streams = live + sum(own for own, _ in keeps[i:]) + keeps[i][1]
        alive.append(streams * stream_bytes(cfg, plan) + passed)
        passed += trained(block) * word(cfg)
    encodes = cfg.data.root != "random" and not cfg.data.cache
    parts = {
        "base weights": weights(shapes.base),
        "control weights": weights(shapes.control),
        "masters and moments": 12 * trained(shapes),
        "EMA": 4 * trained(shapes),
        "gradients": 4 * trained(shapes),
        f"activations ({plan.recompute})": max(alive),
        "tokenizer": 0.2e9 if encodes else 0.0,
    }
    return {part: size / 2**30 for part, size in parts.items()}


def checkpoint_bytes(cfg: Config, shapes) -> int:
    """Of all its files: each rank's hold what is replicated, and its part of what is sharded."""
    def on_disk(parameters):
        replicated, sharded = elements(parameters)
        return cfg.parallel.tp * replicated + sharded

    below = (p for p in shapes.base.parameters() if p.requires_grad)
    trained = [p for p in shapes.parameters() if p.requires_grad]
    weights = word(cfg) * (on_disk(shapes.control.parameters()) + on_disk(below))
    return weights + 16 * on_disk(trained)  # average, master and two moments, in float32


def gpu_memory():
    """GiB of this machine's GPU, or None."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def choose_plan(cfg: Config, shapes) -> Plan:
    """parallel.{scheme,recompute,whole_blocks}; what is open is what fits the GPU (of 79 GiB).

    The first of these that fits: ulysses, then megatron, keeping at least the attention output of
    each block, and everything of as many as fit; the same with full recomputation, but then as many
    as fit keep their attention output, the dearest to repeat for its size. The block that runs
    backward first keeps everything at no cost: it would be restored while all others hold theirs.
    """
    asked, blocks = cfg.parallel, len(trained_blocks(shapes))
    limit = 0.95 * (gpu_memory() or 79)  # the rest is CUDA's, NCCL's, and between allocations
    schemes = ["ulysses", "megatron"] if asked.scheme == "auto" else [asked.scheme]
    if asked.tp == 1:
        schemes = ["megatron"]  # one rank shares nothing
    policies = ["attention_saved", "full"] if asked.recompute == "auto" else [asked.recompute]
    counts = list(range(blocks, -1, -1))
    if asked.recompute == "none":
        counts = [blocks]
    elif asked.whole_blocks is not None:
        counts = [min(asked.whole_blocks, blocks)]
    size = lambda plan: sum(estimate(cfg, shapes, plan).values())
    for policy, scheme, count in itertools.product(policies, schemes, counts):
        plan = Plan(scheme, policy, count, blocks)
        needed = size(plan)
        if needed >= limit:
            continue
        if len(policies) == 1 or policy != "full":
            return plan
        whole = min(count, 1) if asked.whole_blocks is None else count
        mixed = (Plan(scheme, policy, whole, blocks, n) for n in range(blocks - whole, -1, -1))
        return next(plan for plan in mixed if size(plan) < limit)
    if asked.recompute != "auto":
        return plan  # asked for by name: tried, whatever the estimate says
    raise ValueError(
        f"even with {policy} recomputation this needs about {needed:.0f} GiB a GPU, of which "
        f"{limit:.0f} are there for it; use more GPUs with a larger parallel.tp"
    )


def describe(plan: Plan, ranks: int, trains: bool = True) -> str:
    """For the first lines of a run; what blocks keep matters to those that train."""
    words = [f"scheme {plan.scheme}"] if ranks > 1 else []
    if trains:
        words.append(f"keeps {plan.whole_blocks} of {plan.blocks} blocks whole")
    if trains and plan.attention_blocks:
        words.append(f"the attention output of {plan.attention_blocks} more")
    if trains and plan.whole_blocks < plan.blocks:
        words.append(f"recompute {plan.recompute} in the others")
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
        **{f"GiB a GPU: {part}": f"{size:.2f}" for part, size in parts.items()},
        "GiB a GPU: total": f"{sum(parts.values()):.2f}{of_memory}",
        "GiB a checkpoint": f"{checkpoint_bytes(cfg, shapes) / 2**30:.2f}",
        **{f"path: {key}": f"{path}{'' if Path(path).exists() else '   MISSING'}"
           for key, path in cfg.paths().items()}}
    print(dump(cfg))
    print("\n".join(f"{name:<39} {value}" for name, value in rows.items()))


# ---- traffic and seconds -------------------------------------------------------------------------


def bytes_sent(cfg: Config, shapes, plan: Plan, replicas: int = 1) -> dict[str, float]:
    """Bytes that a rank sends in a step, by collective: tp.py's formula, without the batches."""
    ranks, accum = cfg.parallel.tp, cfg.trainer.grad_accum
    share = (ranks - 1) / ranks
    stream = stream_bytes(cfg, plan) * ranks  # S
    trained = trained_blocks(shapes)
    again = [trains for trains, (_, restored) in zip(trained, kept(cfg, plan, trained))
             if restored]
    forward = cfg.model.num_blocks + cfg.model.num_control_blocks
    replicated, sharded = elements((p for p in shapes.parameters() if p.requires_grad))
    sent = dict.fromkeys(SENDS, 0.0)
    sent["gather"] = accum * stream * 64 / cfg.model.model_channels  # the output
    passes = forward + len(trained) + len(again)
    if plan.scheme == "ulysses" and ranks > 1:
        sent["all_to_all"] = accum * passes * 4 * stream / ranks
        sent["gather"] += sharded * word(cfg)
        sent["scatter"] = accum * sharded * word(cfg)
    else:
        sent["gather"] += accum * passes * 3 * stream
        sent["scatter"] = accum * (passes * 3 - again.count(False)) * stream
    sent = {kind: share * size for kind, size in sent.items()}
    sent["all_reduce"] = 2 * share * 4 * (replicated + 1)
    local = replicated + sharded / ranks
    sent["all_reduce"] += 2 * (replicas - 1) / replicas * 4 * local
    return sent


def seconds(cfg: Config, shapes, plan: Plan, kernel: str, replicas: int = 1) -> dict[str, float]:
    """Seconds of a step by part, predicted from the constants above."""
    size, ranks = cfg.model, cfg.parallel.tp
    samples = cfg.data.batch_size * cfg.trainer.grad_accum / ranks
    tokens, dim = cfg.tokens, size.model_channels
    trained = trained_blocks(shapes)
    restored = [extra > 0 for _, extra in kept(cfg, plan, trained)]
    forward = size.num_blocks + size.num_control_blocks

    # linears, in units of tokens x D^2 multiply-adds: 28 a block, 8 of them the MLP's last
    linears = 28 * forward + sum(56 if trains else 28 for trains in trained)
    linears += sum((28 if trains else 20) * again for trains, again in zip(trained, restored))
    linears *= tokens * dim**2 * samples / 1e12 / MATMUL

    attention, backward = 0.0, 2.5 * len(trained)  # the backward pass does 2.5 times the work
    full = (sum(restored) - plan.attention_blocks) * (plan.recompute == "full")
    for keys, rates, again in ((tokens, ATTENTION[kernel], full),
                               (size.text_tokens, CROSS_ATTENTION, sum(restored))):
        once = 4 * tokens * keys * dim * samples / 1e12
        attention += (forward + again) * once / rates[0]
        attention += backward * once / rates[1]

    # streams read and written by norms, rotations, gates, GELU; ulysses also copies for layout
    touched = 34 * (forward + sum(restored)) + 56 * len(trained)
    if plan.scheme == "ulysses":
        touched += 8 * (forward + sum(restored) + len(trained))
    touched *= stream_bytes(cfg, plan) * cfg.trainer.grad_accum / 1e9 / ELEMENTWISE

    replicated, sharded = elements((p for p in shapes.parameters() if p.requires_grad))
    optimizer = 60 * (replicated + sharded / ranks) / 1e9 / ELEMENTWISE
    sent = bytes_sent(cfg, shapes, plan, replicas)
    communication = sum(size / 1e9 / SENDS[kind] for kind, size in sent.items())
    return {"linears": linears, "attention": attention, "elementwise": touched,
            "communication": communication, "optimizer": optimizer}


def main(arguments):
    cfg = load_config(arguments[0], arguments[1:])
    shapes = build(cfg.model, "meta", getattr(torch, cfg.trainer.precision))
    tflop = tflop_per_sample(cfg.model, cfg.tokens) * cfg.data.batch_size * cfg.trainer.grad_accum
    print("predicted for H100 80GB; measured constants are named in configs/estimate.py")
    print(f"{'tp scheme    kernel        whole   GiB   sent GB   seconds    MFU   ':<70}parts")
    for ranks in (1, 2, 4, 8):
        for scheme in ("megatron", "ulysses") if ranks > 1 else ("megatron",):
            for kernel in ATTENTION:
                cfg.parallel.tp, cfg.parallel.scheme = ranks, scheme
                try:
                    plan = choose_plan(cfg, shapes)
                except ValueError as error:
                    print(f"{ranks:>2} {scheme:<9} {error}")
                    continue
                parts = seconds(cfg, shapes, plan, kernel)
                total = sum(parts.values())
                sent = sum(bytes_sent(cfg, shapes, plan).values()) / 1e9
                memory = sum(estimate(cfg, shapes, plan).values())
                mfu = tflop / ranks / total / PEAK_TFLOPS
                split = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
                print(f"{ranks:>2} {scheme:<9} {kernel:<13} {plan.whole_blocks:>2}/{plan.blocks} "
                      f"{memory:>6.1f} {sent:>8.1f} {total:>9.2f} {mfu:>7.1%}   {split}")


if __name__ == "__main__":
    main(sys.argv[1:])
