"""Process groups, collectives, sharded linears, gradient sync: all communication of the trainer.

World = dp x tp, tensor-parallel ranks adjacent. Between sublayers the residual stream is sharded
over tokens, each rank holding L_tp of them. Inside a sublayer there are two schemes. With
S = B * L_tp * tp * D elements, a rank sends (tp-1)/tp of what each collective names:

megatron (arXiv 2205.05198): sublayers are sharded over heads or MLP columns and see all tokens.

    forward    3 all-gathers of S (one serves q, k and v) and 3 reduce-scatters of S
    backward   3 reduce-scatters and 3 all-gathers of S, the mirror image; nothing is gathered
               twice, weight gradients read the gathered input that the forward pass kept.
               Recomputation repeats those of what is run again, but the last of a frozen part.
    overlap    where GPUs share memory (torch's symmetric memory) own tokens are multiplied while
               others' are copied, and what others sum before the own; not the sum over q, k, v

ulysses (arXiv 2309.14509): sublayers see this rank's tokens with whole weights, and only attention
over the tokens exchanges heads for tokens.

    forward    4 all-to-alls of S/tp: q, k, v, and back
    backward   4 all-to-alls of S/tp; recomputation repeats the forward ones unless they are kept
    a step     one all-gather of each trained weight, after the optimizer has changed the shards,
               and one reduce-scatter of its gradient in every backward pass

The text is the same on every rank, so no block gathers it. A forward pass adds one gather of the
network's 64-channel output, and every tp-th one `exchange` hands out the batches that the ranks
have read. megatron deals out all tokens in one piece, ulysses each view by itself, so that a rank
has tokens of every view. What tp does not divide is padded with zeros: a gather or an all-to-all
drops the padding before anything reads it, its mirror appends it again, so no result depends on it.

Every replicated parameter works on a rank's own tokens or heads, so its gradient is a partial sum:
`FlatParams.sync_gradients` adds them up in one all-reduce. Sharded parameters carry `p.tp_dim`;
their gradients are complete, files and optimizer know nothing of the scheme.
"""

import contextlib
import datetime
import json
import os
import socket
import time
import uuid
import warnings
import zlib
from collections import namedtuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.distributed.rendezvous import rendezvous

# These were renamed in torch 2.13.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_from = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_tp_group = None  # the ranks that share one sample
_dp_group = None  # the ranks that hold the same shard in every replica
store = None  # what the ranks of this start tell each other without a collective
_scheme = "megatron"  # how the ranks of a tensor-parallel group share a block
overlaps = False  # whether GPUs copy tokens from each other's memory while they multiply others


def use_scheme(name: str, workspace: int = 1):
    """megatron or ulysses, from now on; to be followed by `gather_weights` once there are any. All
    ranks together. Under megatron the GPUs of one machine share `workspace` bytes, if they can."""
    global _scheme, overlaps
    _scheme, overlaps = name, False
    if not (gathers_tokens() and torch.cuda.is_available()):
        return
    hosts = from_all(socket.gethostname())[world_rank() - rank():][:size()]  # of this group
    problem = "they are of several machines" if len(set(hosts)) > 1 else ""
    with at("memory that GPUs share"):
        try:
            if not problem:
                from torch.distributed import _symmetric_memory as symmetric
                symmetric.get_symm_mem_workspace(_tp_group.group_name, workspace)
        except RuntimeError as error:
            problem = str(error).split("\n")[0]
    problems = list(filter(None, from_all(problem)))
    overlaps = not problems
    if problems and world_rank() == 0:
        warnings.warn(f"GPUs share no memory, tokens are gathered before use: {problems[0]}")


def init(tp_size: int, num_heads: int, timeout_s: float = 600) -> torch.device:
    """Build the dp x tp mesh from torchrun's environment (or a single process); this rank's device.
    ValueError on every rank alike, before any communication, if tp_size or the GPUs do not fit."""
    global _tp_group, _dp_group, store
    world = int(os.environ.get("WORLD_SIZE", 1))
    check_mesh(world, tp_size, num_heads)
    # Blocks that are kept whole and blocks that are not leave gaps of many sizes otherwise.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        ours, found = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if ours > found:
            raise ValueError(f"{ours} ranks are started on a machine that shows them {found} GPUs; "
                             f"start torchrun with --nproc_per_node={found}")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        free, whole = torch.cuda.mem_get_info()
        if whole - free > 4 << 30:  # more than this process has taken to start
            warnings.warn(f"other processes hold {(whole - free) / 2**30:.0f} GiB of GPU "
                          f"{device.index}, which a run takes to be free; nvidia-smi names them")
    if world > 1:
        # configs/guard.py ends a run that hangs, with a sentence; this is for when it cannot.
        timeout = datetime.timedelta(seconds=timeout_s + 30)
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")  # end the process
        own, gpu = int(os.environ["RANK"]), device.type == "cuda"
        store = _meet(own, world, timeout)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout, store=store, rank=own,
                                world_size=world, device_id=device if gpu else None)
        # With a world of 4 and tp 2: [[0, 1], [2, 3]], rows share a sample, columns are replicas.
        # Every rank takes part in making every group; a group does not inherit the timeout.
        mesh = torch.arange(world).view(-1, tp_size)  # (dp, tp)
        rows = [dist.new_group(ranks, timeout=timeout) for ranks in mesh.tolist()]
        columns = [dist.new_group(ranks, timeout=timeout) for ranks in mesh.T.tolist()]
        _tp_group, _dp_group = rows[own // tp_size], columns[own % tp_size]
    return device


def _meet(rank, world, timeout):
    """A store that only the ranks of this start use.

    torchrun's outlives a restart (--max-restarts), with the addresses of ranks that are gone. So
    every rank says a name of its own, and rank 0 repeats whom it has heard until all have answered
    under its name, which is the prefix from then on.
    """
    try:
        met, _, _ = next(rendezvous("env://", rank, world, timeout=timeout))
    except dist.DistError as error:
        raise ValueError(f"rank {rank} cannot meet the others at MASTER_ADDR and MASTER_PORT, the "
                         f"machine of rank 0 and a port free there: {error}") from None
    me, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    met.set(f"name{rank}", me)
    while time.monotonic() < deadline:
        if rank == 0:
            names = [met.get(f"name{r}").decode() for r in range(world) if met.check([f"name{r}"])]
            met.set("names", json.dumps(names))
            met.set(f"{me}/{me}", "")
            if len(names) == world and met.check([f"{me}/{name}" for name in names]):
                return dist.PrefixStore(me, met)
        elif met.check(["names"]) and me in (names := json.loads(met.get("names"))):
            met.set(f"{names[0]}/{me}", "")
            return dist.PrefixStore(names[0], met)
        time.sleep(0.05)
    raise ValueError(f"the {world} ranks did not find each other within "
                     f"{timeout.total_seconds():.0f} s; look at what the others print")


def check_mesh(world: int, tp_size: int, num_heads: int):
    """ValueError, with the sizes that would do, unless tp_size divides both heads and world."""
    fits = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    if tp_size not in fits:
        raise ValueError(
            f"num_heads {num_heads} is not divisible by tp {tp_size}; use {_either(fits)}")
    if world % tp_size:
        raise ValueError(
            f"a world of {world} ranks is not divisible by parallel.tp {tp_size}; "
            f"use {_either([n for n in fits if world % n == 0])}, or start torchrun with a "
            f"multiple of {tp_size} ranks")


def _either(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def shutdown(failed: bool = False):
    """Leave the process group, if there is one; after a failure others may hang in it."""
    global _tp_group, _dp_group, store, _scheme, overlaps
    _tp_group = _dp_group = store = None
    _scheme, overlaps = "megatron", False
    if dist.is_initialized() and not failed:
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
    """Wait for every rank of the world, for however long: in the store, as collectives time out."""
    if dist.is_initialized():
        met = -(-store.add("met", 1) // dist.get_world_size()) * dist.get_world_size()
        while store.add("met", 0) < met:
            stay()
            time.sleep(0.1)


# ---- where a rank is, what it sends --------------------------------------------------------------

Place = namedtuple("Place", "count name since")  # since: when its time began; None: no limit
place = Place(0, "the start", None)  # of this rank


def arrive(name: str):
    """Note that this rank now is at `name`: the others say so if they wait for it in vain."""
    global place
    place = Place(place.count + 1, name, time.monotonic())


def stay():
    """Let the time of this place begin anew (parallel.timeout_s): work goes on here, slowly."""
    global place
    place = place._replace(since=place.since and time.monotonic())


@contextlib.contextmanager
def at(name: str):
    """At `name` for a `with` block, then at the place before it again."""
    global place
    before = place
    arrive(f"{name} ({before.name})")
    yield
    place = Place(place.count + 1, before.name, before.since and time.monotonic())


class Traffic:
    """Bytes that this rank has sent; while `timed`, also the spans in which its stream waited."""

    def __init__(self):
        self.timed, self.sent, self.spans = False, 0, []

    def run(self, collective, out, x, group):
        """collective(out, x), of which every rank sends all but its own share."""
        ranks = dist.get_world_size(group)
        whole = max(out.numel(), x.numel()) * x.element_size()
        self.span(lambda: collective(out, x, group=group), whole * (ranks - 1) // ranks)

    def add_up(self, x, group):
        """All-reduce in place: a scatter and a gather."""
        ranks = dist.get_world_size(group)
        self.span(lambda: dist.all_reduce(x, group=group), 2 * x.nbytes * (ranks - 1) // ranks)

    def span(self, communicate, sent):
        self.sent += sent
        if not (self.timed and torch.cuda.is_available()):
            communicate()
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        communicate()
        end.record()
        self.spans.append((start, end))

    def read(self) -> tuple[int, float]:
        """(bytes, seconds) since the last call; waits for the GPU if there is time to be read."""
        if self.spans:
            torch.cuda.synchronize()
        sent, seconds = self.sent, sum(a.elapsed_time(b) for a, b in self.spans) / 1e3
        self.sent, self.spans = 0, []
        return sent, seconds


traffic = Traffic()  # traffic.run(collective, out, x, group) is that collective, counted


# ---- tokens: (B, L, D) on every rank <-> (B, L_tp, D), a slice a rank ----------------------------

def shard(full: torch.Tensor, dim: int | None, rank_: int | None = None, size_: int | None = None):
    """A rank's slice of `full` along dim (None: all of it), a view; by default this rank's."""
    if dim is None:
        return full
    n, r = size_ or size(), rank() if rank_ is None else rank_
    if full.shape[dim] % n:
        raise ValueError(f"dimension {dim} of {tuple(full.shape)} is not divisible by tp {n}")
    return full.chunk(n, dim)[r]


def own_tokens(x: torch.Tensor, views: int = 1) -> torch.Tensor:
    """(B, L, ...) the same on every rank -> this rank's (B, L_tp, ...), zero-padded. Sends nothing.

    Tokens 0-3 | 4-7 of two views: rank 0 of two gets 0 1 2 3 (megatron) or 0 1 4 5 (ulysses).
    The gradient of whatever made x is *partial*, until `FlatParams.sync_gradients` completes it.
    """
    if size() == 1:
        return x
    x = _pad(x.unflatten(1, (_pieces(views), -1)))  # (B, P, tp*l, ...)
    return x.chunk(size(), dim=2)[rank()].flatten(1, 2).contiguous()


def _pieces(views):
    """How many pieces of the tokens are dealt out each by itself: the views, or all as one."""
    return views if _scheme == "ulysses" else 1


def _pad(x):  # (B, P, L/P, ...) -> (B, P, tp*l, ...)
    missing = -x.shape[2] % size()
    return F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing)) if missing else x


def _all_gather(x, length, views=1):  # (B, L_tp, D) -> (B, L, D)
    out = x.new_empty(size() * x.shape[0], *x.shape[1:])
    traffic.run(_gather_into, out, x.contiguous(), _tp_group)
    pieces = _pieces(views)
    out = rearrange(out, "(r b) (p l) d -> b p (r l) d", r=size(), p=pieces)
    return out[:, :, : length // pieces].flatten(1, 2)  # a view when B and P are 1


def _reduce_scatter(x):  # (B, L, D) -> (B, L_tp, D)
    x = rearrange(_pad(x[:, None])[:, 0], "b (r l) d -> (r b) l d", r=size()).contiguous()
    out = x.new_empty(x.shape[0] // size(), *x.shape[1:])
    traffic.run(_scatter_from, out, x, _tp_group)
    return out


class _GatherOutput(torch.autograd.Function):
    """forward: all-gather over tokens, backward: this rank's tokens, as all compute one loss."""

    @staticmethod
    def forward(ctx, x, length, views):
        ctx.views = views
        return _all_gather(x, length, views)

    @staticmethod
    def backward(ctx, grad):
        return own_tokens(grad, ctx.views), None, None


def gather_output(x: torch.Tensor, length: int, views: int = 1) -> torch.Tensor:
    """(B, L_tp, D) -> (B, L=length, D), to be used in the same way on every rank."""
    return x if size() == 1 else _GatherOutput.apply(x, length, views)


# ---- heads: all of them for this rank's tokens <-> this rank's for all tokens --------------------

def exchanges_heads() -> bool:
    """Whether sublayers work on this rank's tokens, and attention on its heads (ulysses)."""
    return size() > 1 and _scheme == "ulysses"


def gathers_tokens() -> bool:
    """Whether sublayers work on all tokens, and this rank's heads or columns (megatron)."""
    return size() > 1 and _scheme == "megatron"


@torch.library.custom_op("tp::all_to_all", mutates_args=())  # a name that checkpointing sees
def _all_to_all(x: torch.Tensor, kept: bool) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    traffic.run(dist.all_to_all_single, out, x, _tp_group)
    return out


class _AllToAll(torch.autograd.Function):
    """forward: all-to-all of (tp, ...), [r] for rank r, to [r] from rank r, backward: back."""

    @staticmethod
    def forward(ctx, x, kept):
        return _all_to_all(x, kept)

    @staticmethod
    def backward(ctx, grad):
        return _all_to_all(grad, False), None


def _join(x, length, views):  # (tp, B, L_tp, ...) -> (B, L, ...), padding dropped
    if x.shape[0] * x.shape[2] == length:
        return rearrange(x, "r b l ... -> b (r l) ...")  # rank by rank: no mask asks for order
    x = rearrange(x, "r b (v l) ... -> b v (r l) ...", v=views)
    return x[:, :, : length // views].flatten(1, 2)


def _split(x, views):  # the inverse, with zeros for padding
    if x.shape[1] // views % size() == 0:
        return rearrange(x, "b (r l) ... -> r b l ...", r=size())
    x = _pad(x.unflatten(1, (views, -1)))
    return rearrange(x, "b v (r l) ... -> r b (v l) ...", r=size())


def to_heads(x: torch.Tensor, length: int, views: int) -> torch.Tensor:
    """(tp or 1, B, l, N_tp, K), [r] for rank r -> this rank's (B, L, N_tp, K), L in any order."""
    if not exchanges_heads():
        return x.flatten(0, 1)
    return _join(_AllToAll.apply(x, True), length, views)


def to_tokens(x: torch.Tensor, views: int, kept: bool) -> torch.Tensor:
    """(B, L, N_tp*K) -> RowLinear's input: (B, L_tp, N*K) if ulysses; needed backward if kept."""
    if not exchanges_heads():
        return x
    return rearrange(_AllToAll.apply(_split(x, views), kept), "r b l c -> b l (r c)")


# ---- linears, and what parameters start as -------------------------------------------------------

def xavier(weight, rng):
    nn.init.xavier_uniform_(weight, generator=rng)


def zero(weight, rng):
    weight.zero_()


class Linear(nn.Linear):
    """nn.Linear, whole on every rank; `init_weights` or a checkpoint fills it."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True, init=xavier):
        super().__init__(d_in, d_out, bias)
        self.weight.init = init
        if bias:
            self.bias.init = zero

    def reset_parameters(self):
        pass  # nn.Linear draws values here


def _gather_multiply(x, length, matrices, keep=False):
    """(x, [x @ each matrix]) of all tokens, unless `length` is None; x only if `keep`."""
    if length is not None and overlaps:
        traffic.sent += x.nbytes * (size() - 1)
        x, products = torch.ops.symm_mem.fused_all_gather_matmul(
            x.contiguous(), matrices, 1, _tp_group.group_name, return_A=keep)
        return x[:, :length] if keep else None, [y[:, :length] for y in products]
    if length is not None:
        x = _all_gather(x, length)
    return x, [x @ matrix for matrix in matrices]


def _multiply_scatter(xs, matrices, scatters):
    """The sum of the products x @ matrix, reduce-scattered over tokens if `scatters`."""
    if scatters and overlaps and len(xs) == 1:
        out = torch.ops.symm_mem.fused_matmul_reduce_scatter(
            _pad(xs[0][:, None])[:, 0], matrices[0], "sum", 1, _tp_group.group_name)
        traffic.sent += out.nbytes * (size() - 1)
        return out
    total = xs[0].flatten(0, -2) @ matrices[0]
    for x, matrix in zip(xs[1:], matrices[1:]):
        total.addmm_(x.flatten(0, -2), matrix)
    total = total.unflatten(0, xs[0].shape[:-1])
    return _reduce_scatter(total) if scatters else total


class _ColumnLinears(torch.autograd.Function):
    """forward: all-gather over tokens, products; backward: their sum, reduce-scatter over tokens.

    Without a length the tokens are at hand already. Weights are kept where checkpointing does not
    see them, tokens for a trained weight alone: in a frozen block nothing is left to be restored
    behind what its GELU reads, so its recomputation ends there.
    """

    @staticmethod
    def forward(ctx, x, length, *weights):
        ctx.weights, ctx.scatters = weights, length is not None
        trained = any(ctx.needs_input_grad[2:])
        x, products = _gather_multiply(x, length, [weight.t() for weight in weights], trained)
        if trained:
            ctx.save_for_backward(x)
        return tuple(products)

    @staticmethod
    def backward(ctx, *grads):
        of_x, of_weights, saved = None, [None] * len(grads), ctx.saved_tensors
        if saved:
            x = saved[0].flatten(0, -2)
            of_weights = [grad.flatten(0, -2).t() @ x if needed else None
                          for grad, needed in zip(grads, ctx.needs_input_grad[2:])]
        if ctx.needs_input_grad[0]:
            of_x = _multiply_scatter(grads, ctx.weights, ctx.scatters)
        return of_x, None, *of_weights


class _RowLinear(torch.autograd.Function):
    """forward: product, reduce-scatter over tokens; backward: all-gather over tokens, product."""

    @staticmethod
    def forward(ctx, x, weight, scatters):
        ctx.weight, ctx.length = weight, x.shape[1] if scatters else None
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(x)
        return _multiply_scatter([x], [weight.t()], scatters)

    @staticmethod
    def backward(ctx, grad):
        of_weight, saved = None, ctx.saved_tensors
        grad, (of_x,) = _gather_multiply(grad, ctx.length, [ctx.weight], bool(saved))
        if saved:
            of_weight = grad.flatten(0, -2).t() @ saved[0].flatten(0, -2)
        return of_x, of_weight, None


class ColumnLinear(Linear):
    """Output features are sharded, weight split on dim 0; no bias. See `linears`."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out // size(), bias=False)
        self.weight.tp_dim = 0

    def forward(self, x, length=None):
        return linears(x, length, self)[0]


def linears(x: torch.Tensor, length: int | None, *layers: ColumnLinear) -> tuple[torch.Tensor, ...]:
    """What each layer makes of this rank's tokens (B, L_tp, d_in), or of x as it is: length None.
    megatron: all tokens (B, L=length, d_out/tp). ulysses: the same tokens, (B, L_tp, d_out)."""
    weights = [whole_weight(layer.weight) for layer in layers]
    return _ColumnLinears.apply(x, length if gathers_tokens() else None, *weights)


class RowLinear(Linear):
    """Input features are sharded, weight on dim 1, no bias; gives this rank's (B, L_tp, d_out)."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in // size(), d_out, bias=False)
        self.weight.tp_dim = 1

    def forward(self, x):
        return _RowLinear.apply(x, whole_weight(self.weight), gathers_tokens())


class _WholeWeight(torch.autograd.Function):
    """forward: the gathered copy of a sharded weight, backward: reduce-scatter to the shard."""

    @staticmethod
    def forward(ctx, p):
        ctx.dim = p.tp_dim
        return p.whole.detach()

    @staticmethod
    def backward(ctx, grad):
        grad = torch.cat(grad.chunk(size(), ctx.dim))  # (tp * rows, columns) of the shards
        out = grad.new_empty(grad.shape[0] // size(), *grad.shape[1:])
        traffic.run(_scatter_from, out, grad, _tp_group)
        return out


def whole_weight(p: nn.Parameter) -> torch.Tensor:
    """What a sharded linear computes with: its shard, or under ulysses the whole weight."""
    return _WholeWeight.apply(p) if exchanges_heads() else p


@torch.no_grad()
def gather_weights(params):
    """ulysses: bring the whole copies of sharded parameters up to date, after every change of them.
    The parameter becomes a view of its part of the copy, so that nothing is kept twice."""
    for p in params:
        dim = getattr(p, "tp_dim", None)
        if dim is None or not exchanges_heads():
            continue
        parts = p.new_empty(size() * p.shape[0], *p.shape[1:])  # shards, one below the other
        traffic.run(_gather_into, parts, p.contiguous(), _tp_group)
        if hasattr(p, "whole"):
            torch.cat(parts.chunk(size()), dim, out=p.whole)
        else:  # the first time
            p.whole = parts if dim == 0 else torch.cat(parts.chunk(size()), dim)
            p.data = shard(p.whole, dim)


def seed_of(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@torch.no_grad()
def init_weights(module: nn.Module, seed: int):
    """Fill each tensor by its `init(whole tensor, generator)`, declared where it is made; norms
    keep torch's ones. Values depend on seed and name alone: a rank draws all, keeps its shard."""
    for name, p in [*module.named_parameters(), *module.named_buffers()]:
        if hasattr(p, "init"):
            rng = torch.Generator(p.device).manual_seed(seed_of(seed, zlib.crc32(name.encode())))
            dim = getattr(p, "tp_dim", None)
            shape = [n * (size() if i == dim else 1) for i, n in enumerate(p.shape)]
            full = torch.empty(shape, dtype=torch.float32, device=p.device)
            p.init(full, rng)
            p.copy_(shard(full, dim))


# ---- gradients, batches, checks ------------------------------------------------------------------

class FlatParams:
    """Trained parameters, (name, p) pairs, as flat float32 buffers: master, grad, moments, ema.

    Replicated parameters come first, so that every sync, clip and optimizer step is a call or two.
    """

    def __init__(self, named, **adamw):
        named = dict(named)
        replicated = {name: p for name, p in named.items() if getattr(p, "tp_dim", None) is None}
        self.params = replicated | named  # name -> parameter, the replicated ones first
        self.replicated = sum(p.numel() for p in replicated.values())  # elements
        self.master = torch.cat([p.detach().float().flatten() for p in self.params.values()])
        self.grad, self.ema = torch.zeros_like(self.master), self.master.clone()
        self.optimizer = torch.optim.AdamW([self.master], fused=True, **adamw)
        self.master.grad = self.grad

    def state(self) -> dict[str, torch.Tensor]:
        """What the optimizer keeps for each element of the master, once it has made a step."""
        return {name: value for name, value in self.optimizer.state[self.master].items()
                if torch.is_tensor(value) and value.shape == self.master.shape}

    def views(self, kind: str) -> dict[str, torch.Tensor]:
        """name -> its part of a buffer (master, grad, ema, the optimizer's), in its own shape."""
        buffer = self.state()[kind] if kind in self.state() else getattr(self, kind)
        parts = buffer.split([p.numel() for p in self.params.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(self.params.items(), parts)}

    @torch.no_grad()
    def take_gradients(self, scale: float):
        """Add scale * gradient to the flat buffer and free it. ValueError if there is none."""
        for name, part in self.views("grad").items():
            if self.params[name].grad is None:
                raise ValueError(f"{name} is trained, but not used for the loss; freeze it")
            part.add_(self.params[name].grad, alpha=scale)
            self.params[name].grad = None

    def write(self, kind: str):
        """Round a buffer ("master" or "ema") into the model's weights."""
        own = [p.data for p in self.params.values()]
        torch._foreach_copy_(own, list(self.views(kind).values()))
        gather_weights(self.params.values())

    @contextlib.contextmanager
    def swapped(self, kind: str):
        """The model with another buffer's weights, for a `with` block; then the master's again."""
        self.write(kind)
        try:
            yield
        finally:
            self.write("master")

    def sync_gradients(self) -> torch.Tensor:
        """Complete the gradients: replicated ones summed over the tp group, all averaged over dp.

        Returns their L2 norm over the whole model, each parameter counted once. It comes after the
        backward pass: only the control blocks' share could overlap, and all of it is 1% of a step.
        """
        if size() > 1:
            traffic.add_up(self.grad[: self.replicated], _tp_group)
        if dp_size() > 1:
            traffic.add_up(self.grad, _dp_group)
            self.grad.div_(dp_size())
        sharded = self.grad[self.replicated:].norm().square()
        if size() > 1:
            dist.all_reduce(sharded, group=_tp_group)
        return (self.grad[: self.replicated].norm().square() + sharded).sqrt()


def differ(values: torch.Tensor, over: str) -> torch.Tensor:
    """Which of the int64 values are not the same on all ranks of the group, "tp" or "dp"."""
    group = _tp_group if over == "tp" else _dp_group
    lowest, highest = values.clone(), values.clone()
    if group is not None:
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=group)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    return lowest != highest


def exchange(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The batches of all tensor-parallel ranks, in rank order, on each; equal shapes and dtypes."""
    if size() == 1:
        return [batch]
    gathered = {}
    for key, value in sorted(batch.items()):
        whole = value.new_empty(size() * len(value), *value.shape[1:])
        _gather_into(whole, value.contiguous(), group=_tp_group)
        gathered[key] = whole.chunk(size())
    return [{key: parts[r] for key, parts in gathered.items()} for r in range(size())]


def from_rank0(fn):
    """fn() of world rank 0 on every rank: its value, or its ValueError, OSError, RuntimeError."""
    result = None
    if world_rank() == 0:
        try:
            result = fn()
        except (ValueError, OSError, RuntimeError) as error:
            result = error
    box = [result]
    if dist.is_initialized():
        with at("what rank 0 finds out"):
            dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def from_all(value) -> list:
    """A small picklable value of every rank of the world, in rank order."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        with at("what all ranks report"):
            dist.all_gather_object(values, value)
    return values


def mean_over_replicas(value: torch.Tensor) -> torch.Tensor:
    """Average of a tensor over the data-parallel replicas, for logging."""
    if dp_size() > 1:
        value = value / dp_size()  # a copy: the caller's stays as it is
        dist.all_reduce(value, group=_dp_group)
    return value
