"""How the ranks of a start find each other, and where each of them is when others wait for it."""

import contextlib
import json
import time
import uuid
from collections import namedtuple

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


def meet(rank, world, timeout):
    """A store that only the ranks of this start use.

    torchrun's outlives a restart (--max-restarts), with the addresses of ranks that are gone. So
    every rank says a name of its own, and rank 0 repeats whom it has heard until all have answered
    under its name, which is the prefix from then on.
    """
    store, _, _ = next(rendezvous("env://", rank, world, timeout=timeout))
    me, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"name/{rank}", me)
    while time.monotonic() < deadline:
        if rank == 0:
            heard = [r for r in range(world) if store.check([f"name/{r}"])]
            names = [store.get(f"name/{r}").decode() for r in heard]
            store.set("names", json.dumps(names))
            store.set(f"{me}/{me}", "")
            if len(names) == world and store.check([f"{me}/{name}" for name in names]):
                return dist.PrefixStore(me, store)
        elif store.check(["names"]) and me in (names := json.loads(store.get("names"))):
            store.set(f"{names[0]}/{me}", "")
            return dist.PrefixStore(names[0], store)
        time.sleep(0.05)
    raise ValueError(f"the {world} ranks did not find each other within "
                     f"{timeout.total_seconds():.0f} s; look at what the others print")


Place = namedtuple("Place", "count name since")  # since: when it got there; None: it may stay

_place = Place(0, "the start", None)  # of this rank


def place() -> Place:
    """Where this rank is."""
    return _place


def arrive(name: str):
    """Note where this rank is: the others name it if they wait for it in vain."""
    global _place
    _place = Place(_place.count + 1, name, time.monotonic())


def stay():
    """Note that this rank is still on its way, in what takes its time."""
    global _place
    _place = _place._replace(since=_place.since and time.monotonic())


@contextlib.contextmanager
def at(name: str):
    """`arrive`, and on leaving the place before."""
    global _place
    before = _place
    arrive(f"{name} ({before.name})")
    yield
    _place = Place(_place.count + 1, before.name, before.since and time.monotonic())
