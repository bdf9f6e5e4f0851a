"""Process groups, collectives, sharded linears, gradient sync: all communication of the trainer.

World = dp x tp, tensor-parallel ranks adjacent. Between sublayers the residual stream is sharded over tokens, each
rank holding L_tp = ceil(L/tp) of them (sequence parallelism, arXiv 2205.05198); inside a sublayer it is sharded over
heads or MLP columns. So a block communicates, with S = B * L_tp * tp * D elements a collective:

    forward    3 all-gathers (one serves q, k and v) and 3 reduce-scatters
    backward   3 reduce-scatters and 3 all-gathers, the mirror image; nothing is gathered twice, weight gradients read
               the gathered input that the forward pass kept. Recomputation repeats the gathers, and every scatter but the last.

The text is the same on every rank and is never gathered; a step adds one gather of the network's 64-channel output.
When tp does not divide L, the last shard is padded with zeros: a gather drops the padding before anything reads it,
a scatter appends it again, so no result depends on it.

Every replicated parameter works on a rank's own tokens or heads, so its gradient is a partial sum: `sync_gradients`
adds them up in one all-reduce. Sharded parameters carry `p.tp_dim`; their gradients are complete.
"""

import datetime
import os

import torch
import torch.distributed as dist
import torch.nn as nn
from einops import rearrange

_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
_scatter_from = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_tp_group = None  # the ranks that share one sample
_dp_group = None  # the ranks that hold the same shard in every replica


def init(tp_size: int, num_heads: int, timeout_s: float = 600) -> torch.device:
    """Build the dp x tp mesh from torchrun's environment (or a single process) and return this rank's device.

    Raises ValueError on every rank alike, before any communication, if tp_size does not fit the heads or the world.
    """
    global _tp_group, _dp_group
    world = int(os.environ.get("WORLD_SIZE", 1))
    check_mesh(world, tp_size, num_heads)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(seconds=timeout_s),
                                device_id=device if device.type == "cuda" else None)
        mesh = torch.arange(world).view(-1, tp_size)  # (dp, tp)
        for ranks, is_tp in [(row, True) for row in mesh.tolist()] + [(col, False) for col in mesh.T.tolist()]:
            group = dist.new_group(ranks)  # every rank must take part in making every group
            if dist.get_rank() in ranks and is_tp:
                _tp_group = group
            elif dist.get_rank() in ranks:
                _dp_group = group
    return device


def check_mesh(world: int, tp_size: int, num_heads: int):
    """ValueError, with the sizes that would do, unless tp_size divides both heads and world."""
    if num_heads % tp_size:
        fits = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(f"num_heads {num_heads} is not divisible by tp {tp_size}; use {_either(fits)}")
    if world % tp_size:
        fits = [n for n in range(1, world + 1) if world % n == 0 and num_heads % n == 0]
        raise ValueError(f"a world of {world} ranks is not divisible by parallel.tp {tp_size}; use {_either(fits)}, "
                         f"or start torchrun with a multiple of {tp_size} ranks")


def _either(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + (" or " if len(numbers) > 1 else "") + str(numbers[-1])


def shutdown():
    """Leave the process group, if there is one."""
    global _tp_group, _dp_group
    _tp_group = _dp_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Rank in the tensor-parallel group."""
    return dist.get_rank(_tp_group) if _tp_group is not None else 0


def size() -> int:
    """Ranks in the tensor-parallel group."""
    return dist.get_world_size(_tp_group) if _tp_group is not None else 1


def dp_rank() -> int:
    """Index of this rank's data-parallel replica."""
    return dist.get_rank(_dp_group) if _dp_group is not None else 0


def dp_size() -> int:
    """Number of data-parallel replicas."""
    return dist.get_world_size(_dp_group) if _dp_group is not None else 1


def world_rank() -> int:
    """Rank in the whole world; 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier():
    """Wait for every rank of the world."""
    if dist.is_initialized():
        dist.barrier()


# ---- tokens: (B, L, D) on every rank <-> (B, L_tp, D), a slice a rank ------------------------------------------------


def shard(full: torch.Tensor, dim: int | None, rank_: int | None = None, size_: int | None = None) -> torch.Tensor:
    """View of one rank's equal slice of `full` along dim; all of it if dim is None. Default: this rank and group."""
    if dim is None:
        return full
    n, r = size_ or size(), rank() if rank_ is None else rank_
    if full.shape[dim] % n:
        raise ValueError(f"dimension {dim} of {tuple(full.shape)} is not divisible by tp {n}")
    return full.chunk(n, dim)[r]


def own_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, L, ...) the same on every rank -> this rank's (B, L_tp, ...), zero-padded. No communication.

    Its backward pass leaves a *partial* gradient for whatever made x, which `sync_gradients` completes.
    """
    if size() == 1:
        return x
    return _pad(x).chunk(size(), dim=1)[rank()].contiguous()


def _pad(x):  # (B, L, ...) -> (B, tp*L_tp, ...)
    missing = -x.shape[1] % size()
    return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1) if missing else x


def _all_gather(x, length):  # (B, L_tp, D) -> (B, L, D)
    out = x.new_empty(size() * x.shape[0], *x.shape[1:])
    _gather_into(out, x.contiguous(), group=_tp_group)
    return rearrange(out, "(r b) l d -> b (r l) d", r=size())[:, :length]  # a view when B = 1


def _reduce_scatter(x):  # (B, L, D) -> (B, L_tp, D)
    x = rearrange(_pad(x), "b (r l) d -> (r b) l d", r=size()).contiguous()
    out = x.new_empty(x.shape[0] // size(), *x.shape[1:])
    _scatter_from(out, x, group=_tp_group)
    return out


class _GatherTokens(torch.autograd.Function):
    """forward: all-gather over tokens, backward: reduce-scatter over tokens."""

    @staticmethod
    def forward(ctx, x, length):
        return _all_gather(x, length)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scatter(grad), None


class _ScatterTokens(torch.autograd.Function):
    """forward: reduce-scatter over tokens, backward: all-gather over tokens."""

    @staticmethod
    def forward(ctx, x):
        ctx.length = x.shape[1]
        return _reduce_scatter(x)

    @staticmethod
    def backward(ctx, grad):
        return _all_gather(grad, ctx.length)


class _GatherOutput(torch.autograd.Function):
    """forward: all-gather over tokens, backward: this rank's tokens (every rank computes the same loss from them)."""

    @staticmethod
    def forward(ctx, x, length):
        return _all_gather(x, length)

    @staticmethod
    def backward(ctx, grad):
        return own_tokens(grad), None


def gather_tokens(x: torch.Tensor, length: int) -> torch.Tensor:
    """(B, L_tp, D) -> (B, L=length, D) for a sublayer that is sharded over heads or columns."""
    return x if size() == 1 else _GatherTokens.apply(x, length)


def scatter_tokens(x: torch.Tensor) -> torch.Tensor:
    """Partial sums (B, L, D) of a RowLinear -> their sum over the group, this rank's (B, L_tp, D)."""
    return x if size() == 1 else _ScatterTokens.apply(x)


def gather_output(x: torch.Tensor, length: int) -> torch.Tensor:
    """(B, L_tp, D) -> (B, L=length, D), to be used in the same way on every rank."""
    return x if size() == 1 else _GatherOutput.apply(x, length)


# ---- linears: uninitialised until `model.init_weights` or a checkpoint fills them -------------------------------------


class Linear(nn.Linear):
    """nn.Linear, whole on every rank."""

    def reset_parameters(self):
        pass


class ColumnLinear(Linear):
    """No bias; the output features are sharded: gathered tokens (B, L, d_in) -> (B, L, d_out/tp). Weight split on dim 0."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out // size(), bias=False)
        self.weight.tp_dim = 0


class RowLinear(Linear):
    """No bias; the input features are sharded: (B, L, d_in/tp) -> *partial sums* (B, L, d_out). Weight split on dim 1."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in // size(), d_out, bias=False)
        self.weight.tp_dim = 1


# ---- gradients, batches, checks --------------------------------------------------------------------------------------


def sync_gradients(flat: torch.Tensor, replicated: int):
    """Complete the gradients in place: sum the first `replicated` elements over the tp group, average all over replicas.

    `flat` holds every trained gradient of this rank, replicated parameters first, so that both are one all-reduce.
    They follow the backward pass: what could overlap is the 3 control blocks' share of it, and the 0.1 to 0.9 G
    elements take about 1% of a step over NVLink.
    """
    if size() > 1:
        dist.all_reduce(flat[:replicated], group=_tp_group)
    if dp_size() > 1:
        dist.all_reduce(flat, group=_dp_group)
        flat.div_(dp_size())


def global_norm(flat: torch.Tensor, replicated: int) -> torch.Tensor:
    """L2 norm over all parameters of the model, each counted once; `flat` laid out as in `sync_gradients`."""
    sharded = flat[replicated:].norm().square()
    if size() > 1:
        dist.all_reduce(sharded, group=_tp_group)
    return (flat[:replicated].norm().square() + sharded).sqrt()


def broadcast(tensors: dict[str, torch.Tensor], src: int):
    """Overwrite the tensors in place with those of tp rank `src`; same shapes and dtypes on every rank."""
    if size() > 1:
        for name in sorted(tensors):
            dist.broadcast(tensors[name], dist.get_global_rank(_tp_group, src), group=_tp_group)


def from_rank0(value):
    """A small picklable value as world rank 0 sees it."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value) -> list:
    """A small picklable value of every rank of the world, in rank order."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def mean_over_replicas(value: torch.Tensor) -> torch.Tensor:
    """Average of a tensor over the data-parallel replicas, for logging."""
    if dp_size() > 1:
        dist.all_reduce(value, group=_dp_group)
        value = value / dp_size()
    return value


def check_drift(flat: torch.Tensor, replicated: int):
    """RuntimeError unless replicated parameters are bit-identical over the tp group, and all over the replicas.

    `flat` float32, laid out as in `sync_gradients`."""
    for part, group, what in ((flat[:replicated], _tp_group, "tensor-parallel group"), (flat, _dp_group, "replicas")):
        if group is None:
            continue
        digest = part.view(torch.int32).sum(dtype=torch.int64)  # of the bit patterns
        highest, lowest = digest.clone(), digest.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=group)
        if highest != lowest:
            raise RuntimeError(f"parameters that must be equal over the {what} have drifted apart; "
                               "restart from the last checkpoint and report this with the run's config.yaml")
