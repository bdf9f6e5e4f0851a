"""Run a function in processes of its own, or on several gloo ranks, and collect what they return.

All are forked from one process that has imported everything and run nothing: importing torch takes
three seconds of a processor, and making the first optimizer two more.
"""

import multiprocessing
import os
import random
import socket
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch.distributed import TCPStore

IMPORTED = ["pytest", "torch._dynamo", "torch.distributed", "train"]
FOLDERS = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]


def processes():
    """multiprocessing, whose Process and Queue belong to processes that are forked so."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = ":".join(FOLDERS)
    forkserver.ensure_running()  # by the first call
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return context


def _enter(environment):
    """The caller's environment, not that of the first caller."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)


def _run(output, environment, fn, args):
    _enter(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.exit(fn(*args))


def start(output, fn, *args, **environment):
    """A process that prints into the file `output` and whose exit status is what fn returns."""
    changed = {**os.environ, **environment}
    process = processes().Process(target=_run, args=(str(output), changed, fn, args))
    process.start()
    return process


def free_port():
    """A port that rank 0 can listen at; none that the system may give away in between."""
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
    raise RuntimeError("no port is free")


def rank_of(rank, world, port):
    """What its environment tells a rank."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _rank(rank, world, port, folder, environment, fn, args):
    launched = {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # the store is the launcher's
    _enter({**environment, **rank_of(rank, world, port), **launched})
    torch.save(fn(*args), f"{folder}/{rank}.pt")
    sys.stdout.flush()
    os._exit(0)  # a group that has lost a rank may abort the process while Python takes it down


def run_ranks(world, fn, *args):
    """[fn(*args) of rank 0, 1, ...], or the first error raised.

    fn is a function of a module, and calls tp.init itself, as often as it likes: the ranks meet at
    a store of this process, as at torchrun's.
    """
    processes()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = world, store.port, folder, dict(os.environ), fn, args
        try:
            mp.start_processes(_rank, arguments, nprocs=world, start_method="forkserver")
        except mp.ProcessRaisedException as error:
            raise AssertionError(str(error)) from None
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]
