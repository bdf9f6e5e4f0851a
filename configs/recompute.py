"""What the backward pass of a block finds kept, runs again, or fetches from host memory.

A block runs backward a good while after it ran forward, so what it keeps may wait elsewhere: with
parallel.host_gib its tensors leave for pinned host memory as soon as they are made, beside the
computation, and come back while the block after it runs backward (as in vDNN, arXiv 1602.08124).
"""

import contextlib
import mmap
import os
import weakref
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def keeps(policy, op, args) -> bool:
    """Whether an operator's result is kept: what self-attention gives (cross-attention's few keys
    are cheaper to go over again) and, from residual_saved on, what the ranks exchange for it."""
    if policy != "attention_saved" and op is torch.ops.tp.all_to_all.default:
        return args[1]
    return "scaled_dot_product" in str(op) and args[0].shape[-2] == args[1].shape[-2]


class _Operators(TorchDispatchMode):
    """Sees the operators of a part of a block; `kept`: the results that are kept, in order.

    As torch's selective checkpointing does, which has no place to send them away from the GPU.
    """

    def __init__(self, policy, kept):
        super().__init__()
        self.policy, self.kept = policy, kept

    @classmethod
    def ignore_compile_internals(cls):  # else torch.compile would leave its functions uncompiled
        return True


class _Keep(_Operators):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if keeps(self.policy, op, args):
            self.kept.append(tree_map_only(torch.Tensor, host.put, out))
        return out


class _Restore(_Operators):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if keeps(self.policy, op, args):
            return tree_map_only((torch.Tensor, Away), host.take, self.kept.pop(0))
        return op(*args, **(kwargs or {}))


def rerun(part, x, ctx, policy):
    """part(x, ctx), run again backward: not at all (none), wholly (full), but for what `keeps`."""
    if policy == "none":
        return part(x, ctx)

    def modes():
        kept = []
        return _Keep(policy, kept), _Restore(policy, kept)

    context = checkpoint.noop_context_fn if policy == "full" else modes
    return checkpoint.checkpoint(part, x, ctx, use_reentrant=False, preserve_rng_state=False,
                                 context_fn=context)


# ---- host memory ---------------------------------------------------------------------------------

class Away:
    """A tensor that is in host memory; its buffer is free for another when this is dropped."""

    def __init__(self, x, buffer, block):
        self.form = x.storage_offset(), x.shape, x.stride()
        self.options = {"dtype": x.dtype, "device": x.device}
        self.buffer, self.block = buffer, block
        self.copy = self.arrived = None  # the tensor again, from when it is asked for
        self.taken = lambda: None  # the same, as long as somebody else has it

    def __del__(self):
        if self.copy is not None:  # it came in vain: its memory is not free before the copy is done
            host.wait(self.arrived)
        host.free[self.buffer.nbytes].append(self.buffer)


class Host:
    """Pinned memory, and the stream that copies to and from it. On a CPU: copies alone."""

    def __init__(self):
        self.free = defaultdict(list)  # bytes -> buffers
        self.stream = None
        self.blocks = []  # the tensors of each block that has run forward and not yet backward
        self.block = None  # that of the block which runs forward now, if its tensors go away
        self.least = 0  # bytes of a tensor that does
        self.room, self.bus = 0.0, 0.0  # GiB of it that a run may take, GB/s to it, as found
        self.region, self.used = None, 0  # pinned before the first step; bytes of it in buffers
        self.since = 0  # blocks that ran forward after the last of these
        self.leaving, self.before = [], []  # (tensor, copied) of this block and of the one before

    def reserve(self, size: float, for_gpu=True) -> str:
        """Pin so many bytes for buffers instead of those before; what prevents it, or ""."""
        if self.region is not None:
            unpin(self.region)
        self.free.clear()
        self.region, self.used = None, 0
        try:
            self.region = pinned(int(size), for_gpu) if size else None
        except ValueError as error:
            return str(error)
        return ""

    def lend(self, size: int, for_gpu) -> torch.Tensor:
        """A buffer: one that is free, or else new in the region, or beyond it."""
        if self.free[size]:
            return self.free[size].pop()
        start, end = self.used, self.used + -(-size // 4096) * 4096
        if self.region is None or end > len(self.region):
            return pinned(size, for_gpu)
        self.used = end
        return self.region[start:start + size]

    def begin(self):
        """A forward pass begins; what an abandoned one has left is dropped."""
        for block in self.blocks:
            block.clear()
        self.blocks.clear()

    @contextlib.contextmanager
    def holds(self, x, needed):
        """While a block runs forward on x: if `needed`, what it keeps goes to host memory."""
        self.let_go()
        self.since = 0 if needed else self.since + 1
        if not needed:
            if self.since == 2 and self.blocks and x.requires_grad:
                # has its gradient when the first of these blocks begins to run backward: in time
                x.register_hook(lambda grad: self.bring())
            yield
            return
        self.block, self.least = [], x.nbytes // 2  # x may be padded
        self.blocks.append(self.block)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.put, self.take):
                yield
        finally:
            self.block = None

    def let_go(self):
        """Give up the tensors of the block before the last: they have been copied, or else the GPU
        waits for it. So what is under way is bounded, on whatever bus."""
        for _, copied in self.before:
            self.wait(copied)
        self.before, self.leaving = self.leaving, []

    def put(self, x: torch.Tensor):
        """x, or an Away of it: in a block whose tensors go away, if x is about as large as its
        input."""
        x = x.detach()  # so that no graph is kept by what it keeps
        size = x.untyped_storage().nbytes()  # more than x, if that has been rid of padding
        if self.block is None or x.nbytes < self.least or size > 1.5 * x.nbytes:
            return x
        away = Away(x, self.lend(size, x.is_cuda), self.block)
        self.leaving.append((x, self.send(away.buffer, storage(x))))
        self.block.append(away)
        return away

    def take(self, x):
        """The tensor that `put` was given; the others of its block, and of the next to run
        backward, are on their way from now on."""
        if not isinstance(x, Away):
            return x
        if self.blocks and x.block is self.blocks[-1]:
            self.let_go()
            self.let_go()  # of the last block, too
            self.bring()
            self.blocks.pop().clear()
            self.bring()
        there = x.taken()
        if there is None:
            self.fetch(x)
            self.wait(x.arrived)
            there, x.copy = x.copy, None
            x.taken = weakref.ref(there)
        return there

    def bring(self):
        """Fetch what the block has that runs backward next of all."""
        for away in reversed(self.blocks[-1] if self.blocks else []):  # as it will be asked for
            self.fetch(away)

    def fetch(self, away):
        if away.copy is None and away.taken() is None:
            raw = torch.empty_like(away.buffer, device=away.options["device"])
            away.arrived = self.send(raw, away.buffer)
            away.copy = torch.empty(0, **away.options).set_(raw.untyped_storage(), *away.form)

    def send(self, target, source):
        """Copy beside what the GPU was told to do, after what it was told so far; when it ends."""
        if not (source.is_cuda or target.is_cuda):
            target.copy_(source)
            return None
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event):
        if event is not None:
            torch.cuda.current_stream().wait_event(event)


def storage(x):
    """The bytes that x lies in."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


host = Host()


# ---- pinned memory -------------------------------------------------------------------------------

def free_memory() -> float | None:
    """GiB that this process may still take, of its machine and its cgroups; None if not said."""
    def read(path):
        with contextlib.suppress(OSError):
            return Path(path).read_text().splitlines()
        return []

    lines = read("/proc/meminfo")
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    for line in read("/proc/self/cgroup"):  # 0::/a/b, or in version 1 8:memory:/a/b
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        group = Path("/sys/fs/cgroup", "memory" if kinds else "", path[1:])
        names = ["limit_in_bytes", "usage_in_bytes"] if kinds else ["max", "current"]
        prefix = "total_" if kinds else ""
        for folder in (group, *group.parents):  # a container may see its own as the topmost
            limit, used = (read(folder / f"memory.{name}") for name in names)
            kept = dict(line.split() for line in read(folder / "memory.stat"))
            if limit and used and limit[0] != "max":
                files = (int(kept.get(f"{prefix}{age}_file", 0)) for age in ("active", "inactive"))
                found.append(int(limit[0]) - int(used[0]) + sum(files))  # which are let go
    return min(found) / 2**30 if found else None


def pinned(size: int, for_gpu=True) -> torch.Tensor:
    """Bytes of host memory that a GPU copies to and from by itself; ValueError if there are none.

    torch's own would be rounded up to a power of two.
    """
    if not for_gpu:
        return torch.empty(size, dtype=torch.uint8)
    free, remedy = free_memory(), "give less in parallel.host_gib, 0 for none"
    if free is not None and size > 0.95 * free * 2**30:
        raise ValueError(f"{size / 2**30:.1f} GiB of host memory are wanted, of which "
                         f"{free:.1f} are free; {remedy}")
    try:
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ValueError(f"the system gives no {size / 2**30:.1f} GiB more of host memory "
                         f"({error.strerror}); {remedy}") from None
    # 512 times fewer pages, where they are to be had; none copied for processes that are forked
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with contextlib.suppress(OSError):
            pages.madvise(advice)
    buffer, cuda = torch.frombuffer(pages, dtype=torch.uint8), torch.cuda.cudart()
    error = cuda.cudaHostRegister(buffer.data_ptr(), size, 0)
    if error != cuda.cudaError.success:
        with contextlib.suppress(RuntimeError):  # the next kernel would be blamed for it
            torch.ones(1, device="cuda")
        raise ValueError(f"CUDA pins no {size / 2**30:.1f} GiB more of host memory "
                         f"({cuda.cudaGetErrorString(error)}); {remedy}")
    return buffer


def unpin(buffer):
    if buffer.is_pinned():
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def host_room(asked: float | None, saved: float) -> float:
    """GiB of this machine's memory in which each of its ranks may keep what its blocks compute.

    Those asked for, ValueError if they are not there beside the `saved` GiB of a checkpoint; of
    None, a GPU's share of half of what is free, so that other runs on the machine find theirs.
    """
    ranks, free = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), free_memory()
    if free is None:
        return asked or 0
    spare = max(0.0, 0.95 * free - saved)
    if asked is None:
        gpus = Path("/proc/driver/nvidia/gpus")
        gpus = len(list(gpus.iterdir())) if gpus.exists() else torch.cuda.device_count()
        return min(spare, free / 2) / max(ranks, gpus, 1)
    if asked * ranks > spare:
        raise ValueError(f"parallel.host_gib {asked:g} for {ranks} ranks is more than the "
                         f"{spare:.1f} GiB that this machine has to spare: {free:.1f} are free, "
                         f"of which a checkpoint needs {saved:.1f} and a twentieth is left; give "
                         f"{int(spare / ranks)} or less, 0 for none")
    return asked


def bus_speed() -> float:
    """GB/s at which this GPU copies to host memory, while those of other ranks do, too."""
    x, buffer = torch.empty(2**28, dtype=torch.uint8, device="cuda"), pinned(2**28)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    copies = 32
    for i in range(copies + 1):
        if i == 1:
            start.record()
        buffer.copy_(x, non_blocking=True)
    end.record()
    end.synchronize()
    unpin(buffer)
    return copies * x.nbytes / 1e6 / start.elapsed_time(end)
