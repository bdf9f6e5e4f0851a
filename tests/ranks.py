"""Run a function in processes of its own, or on several gloo ranks, and collect what they return.

All are forked from one process that has imported everything and run nothing: importing torch takes
three seconds of a processor, and making the first optimizer two more.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import torch
import torch.multiprocessing as mp

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
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def rank_of(rank, world, port):
    """What torchrun tells a rank in its environment."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _rank(rank, world, port, folder, environment, fn, args):
    _enter({**environment, **rank_of(rank, world, port)})
    torch.save(fn(*args), f"{folder}/{rank}.pt")
    sys.stdout.flush()
    os._exit(0)  # a group that has lost a rank may abort the process while Python takes it down


def run_ranks(world, fn, *args):
    """[fn(*args) of rank 0, 1, ...], or the first error raised.

    fn is a function of a module, and calls tp.init itself.
    """
    processes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = world, free_port(), folder, dict(os.environ), fn, args
        try:
            mp.start_processes(_rank, arguments, nprocs=world, start_method="forkserver")
        except mp.ProcessRaisedException as error:
            raise AssertionError(str(error)) from None
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]
