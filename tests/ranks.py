"""Run a function on several gloo ranks of this machine and collect what each returns."""

import os
import socket
import sys
import tempfile

import torch
import torch.multiprocessing as mp


def _main(rank, world, port, folder, fn, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.save(fn(*args), f"{folder}/{rank}.pt")
    sys.stdout.flush()
    os._exit(0)  # a group that has lost a rank may abort the process while the interpreter takes it down


def run_ranks(world, fn, *args):
    """[fn(*args) of rank 0, 1, ...]; fn is a module-level function that calls tp.init itself. Raises the first error."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(_main, (world, port, folder, fn, args), nprocs=world, start_method="spawn")
        except mp.ProcessRaisedException as e:
            raise AssertionError(str(e)) from None
        return [torch.load(f"{folder}/{r}.pt", weights_only=True) for r in range(world)]
