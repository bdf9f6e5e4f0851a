"""What the backward pass of a block finds kept, runs again, or fetches from host memory.

A block runs backward a good while after it ran forward, so what it keeps may wait elsewhere: with
parallel.host_gib its tensors leave for pinned host memory as soon as they are made, beside the
computation, and come back while the block after it runs backward (as in vDNN, arXiv 1602.08124).
"""

import contextlib
import mmap
import weakref
from collections import defaultdict

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
    """Sees the operators of a part of a block; `kept`: the results that are kept, in order."""

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
        self.since = 0  # blocks that ran forward after the last of these
        self.leaving, self.before = [], []  # (tensor, copied) of this block and of the one before

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
        buffers = self.free[size]
        away = Away(x, buffers.pop() if buffers else pinned(size, x.is_cuda), self.block)
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


def pinned(size, for_gpu):
    """Bytes of host memory. torch's own pinned ones would be rounded up to a power of two."""
    if not for_gpu:
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer to pin, where they are to be had
    buffer, cuda = torch.frombuffer(pages, dtype=torch.uint8), torch.cuda.cudart()
    error = cuda.cudaHostRegister(buffer.data_ptr(), size, 0)
    if error != cuda.cudaError.success:
        raise ValueError(f"CUDA pins no {size / 2**30:.2f} GiB more of host memory ({error}); "
                         "lower parallel.host_gib, 0 for none")
    return buffer


host = Host()
