"""What the backward pass of a block finds kept, runs again, or fetches from host memory.

A block runs backward a good while after it ran forward, so what it keeps may wait elsewhere: with
parallel.host_gib its tensors leave for pinned host memory as soon as they are made, beside the
computation, and come back while the block after it runs backward (as in vDNN, arXiv 1602.08124).
"""

import contextlib
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
        self.form = x.shape, x.stride()
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
        self.leaving, self.before = [], []  # (tensor, copied) of this block and of the one before

    def begin(self):
        """A forward pass begins; what an abandoned one has left is dropped."""
        for block in self.blocks:
            block.clear()
        self.blocks.clear()

    @contextlib.contextmanager
    def holds(self, x, needed):
        """While a block runs forward on x: if `needed`, what it keeps goes to host memory.

        Tensors are given up one block later, when they have been copied or the GPU waits for it:
        so what is under way is bounded, on whatever bus.
        """
        for _, copied in self.before:
            self.wait(copied)
        self.before, self.leaving = self.leaving, []
        if not needed:
            yield
            return
        self.block, self.least = [], x.nbytes
        self.blocks.append(self.block)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.put, self.take):
                yield
        finally:
            self.block = None

    def put(self, x: torch.Tensor):
        """x, or an Away of it: in a block whose tensors go away, if x is as large as its input."""
        x = x.detach()  # of the graph that keeps it
        whole = x.untyped_storage().nbytes() == x.nbytes  # so it is dense, in some order
        if self.block is None or x.nbytes < self.least or not whole:
            return x
        buffers = self.free[x.nbytes]
        away = Away(x, buffers.pop() if buffers else pinned(x), self.block)
        self.leaving.append((x, self.send(away.buffer, flat(x))))
        self.block.append(away)
        return away

    def take(self, x):
        """The tensor that `put` was given; the others of its block, and of the next to run
        backward, are on their way from now on."""
        if not isinstance(x, Away):
            return x
        if self.blocks and x.block is self.blocks[-1]:
            self.blocks.pop()
            for away in [*x.block, *(self.blocks[-1] if self.blocks else [])]:
                self.fetch(away)
            x.block.clear()
        there = x.taken()
        if there is None:
            self.fetch(x)
            self.wait(x.arrived)
            there, x.copy = x.copy, None
            x.taken = weakref.ref(there)
        return there

    def fetch(self, away):
        if away.copy is None and away.taken() is None:
            away.copy = torch.empty_strided(*away.form, **away.options)
            away.arrived = self.send(flat(away.copy), away.buffer)

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


def flat(x):
    """The bytes of a dense tensor."""
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


def pinned(x):
    """As much host memory as x has. torch's own pinned memory would be rounded to a power of 2."""
    buffer = torch.empty(x.nbytes, dtype=torch.uint8)
    if x.is_cuda:
        error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
        torch.cuda.check_error(error)
    return buffer


host = Host()
