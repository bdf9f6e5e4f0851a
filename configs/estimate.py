"""What a run will need, from its config alone: TFLOP of a step, memory of a GPU."""

import torch

import tp
from configs.schema import Config
from model import ModelConfig

PEAK_TFLOPS = 989.0  # dense bfloat16 of an H100 or H200 (NVIDIA's datasheets)

# Activations alive at once while one block is run backward, with positions and residuals, in
# residual streams of L x D elements: fitted to peaks measured on one H100 at 57 and 121 frames.
LIVE_STREAMS = 27


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


def estimate(cfg: Config, shapes, recompute: str) -> dict[str, float]:
    """GiB a GPU by part; `shapes` is the model on meta."""
    ranks, word = cfg.parallel.tp, 2 if cfg.trainer.precision == "bfloat16" else 4

    def local(part):  # elements of a module on one rank; on meta it may be whole or a shard
        return sum(p.numel() / (ranks // tp.size() if hasattr(p, "tp_dim") else 1)
                   for p in part.parameters())

    trained = local(shapes.control) - local(shapes.control.head)
    blocks, control = cfg.model.num_blocks - 1, cfg.model.num_control_blocks
    kept = {"none": 16 * blocks + 26 * control, "attention_saved": 2 * (blocks + control),
            "full": blocks + control}
    stream = cfg.data.batch_size * cfg.tokens * cfg.model.model_channels * word / ranks
    encodes = cfg.data.root != "random" and not cfg.data.cache
    parts = {"base weights": local(shapes.base) * word,
             "control weights": local(shapes.control) * word,
             "masters and moments": 12 * trained,
             "EMA": 4 * trained,
             "gradients": (4 + word) * trained,
             f"activations ({recompute})": (kept[recompute] + LIVE_STREAMS) * stream,
             "tokenizer": 0.2e9 if encodes else 0.0}
    return {part: size / 2**30 for part, size in parts.items()}


def gpu_memory():
    """GiB of this machine's GPU, or None."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def choose_recompute(cfg: Config, shapes):
    """parallel.recompute; for auto the first policy that fits the GPU (of 79 GiB), 6% to spare."""
    if cfg.parallel.recompute != "auto":
        return cfg.parallel.recompute
    memory = gpu_memory() or 79
    for policy in ("none", "attention_saved", "full"):
        needed = sum(estimate(cfg, shapes, policy).values())
        if needed < 0.94 * memory:
            return policy
    raise ValueError(f"even with full recomputation this needs about {needed:.0f} GiB a GPU of "
                     f"{memory:.0f}; use more GPUs with a larger parallel.tp")
