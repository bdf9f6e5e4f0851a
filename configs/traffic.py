"""What this rank sends, and how long its GPU waits for it."""

import torch
import torch.distributed as dist


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
        whole = x.numel() * x.element_size()
        self.span(lambda: dist.all_reduce(x, group=group), 2 * whole * (ranks - 1) // ranks)

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
