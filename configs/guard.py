"""What keeps a run from being lost or doubled: its lock, stop signals, ranks that do not come."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import torch

import tp
from configs.log import say

# ---- who may start -------------------------------------------------------------------------------

def check_launch():
    """ValueError if several processes were started that do not know of each other."""
    env = os.environ
    tasks = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS")
                or env.get("OMPI_COMM_WORLD_SIZE") or 1)
    told = [env.get(name, "not set") for name in ("RANK", "WORLD_SIZE")]
    if told != ["not set", "not set"]:
        if not all(value.isdecimal() for value in told) or int(told[0]) >= int(told[1]):
            raise ValueError(f"RANK is {told[0]} and WORLD_SIZE {told[1]} in the environment; "
                             "torchrun sets both, RANK from 0 to WORLD_SIZE - 1; unset them, or "
                             "start the ranks with it")
    elif tasks > 1:
        raise ValueError(
            f"{tasks} tasks were started without torchrun's RANK and WORLD_SIZE, so that each "
            "would be a run of its own; start one task a node, and in it torchrun: srun "
            "--ntasks-per-node=1 torchrun --nnodes=... --nproc_per_node=8 ... (README, Two "
            "nodes); if this is the only process, unset SLURM_NTASKS")


def hide_gpus(device: str):
    """From torch, which has not looked for any yet, if trainer.device is cpu."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def need_gpu(cfg):
    """ValueError if torch sees no GPU and the model is too large for a CPU, unless asked for."""
    if cfg.trainer.device == "cpu" or torch.cuda.is_available():
        return
    if cfg.model.num_blocks * cfg.model.model_channels**2 < 1e8:  # 4.7e8 as released
        return
    try:
        torch.cuda.init()
        reason = "none is there"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0]
    raise ValueError(f"torch {torch.__version__} sees no GPU ({reason}), and a model of this size "
                     "is not for a CPU; nvidia-smi shows GPUs and driver, trainer.device=cpu goes "
                     "on without")


def process_start(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks; None if it has ended (or no Linux)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def machine() -> str:
    """Name of this machine, of this start of it, as copies of one share a name, and of its space of
    processes, which containers number anew."""
    space, start = Path("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id")
    words = [socket.gethostname()]
    if space.exists():
        words.append(os.readlink(space))
    if start.exists():
        words.append(start.read_text().strip())
    return " ".join(words)


@contextlib.contextmanager
def writable(folder: Path):
    """The run's folder, made if need be, for a `with` block; ValueError if the disk refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(f"cannot write the run's folder {folder}: {error.strerror}; set "
                         "OUTPUT_ROOT") from None


BEAT_S = 5  # between signs of life in a lock


class Lock:
    """A file in the run's folder that says which process trains it, and is touched while it does.

    It outlives a process that is killed: whether that still lives is known on the same machine, on
    another one it is the file's time that shows it.
    """

    def __init__(self):
        self.path, self.released = None, threading.Event()

    def take(self, folder: Path):
        """ValueError, naming who holds it, if another process does."""
        path, pid = folder / "lock.json", os.getpid()
        mine = {"machine": machine(), "pid": pid, "started": process_start(pid),
                "since": time.ctime()}
        with writable(folder):
            while self.path is None:
                try:
                    with open(path, "x") as file:
                        json.dump(mine, file)
                    self.path = path
                except FileExistsError:
                    self._check(path)
                    path.unlink(missing_ok=True)
        threading.Thread(target=self._beat, daemon=True).start()

    def _check(self, path):
        time.sleep(0.1)  # it may have been opened this moment, and not be written yet
        try:
            holder = json.loads(path.read_text())
            pid, started, where = holder["pid"], holder["started"], holder["machine"]
        except (OSError, ValueError, KeyError):
            return  # gone, or torn by a full disk
        alive = False
        if where == machine():
            alive = pid != os.getpid() and started and process_start(pid) == started
        else:
            print(f"waiting {4 * BEAT_S} s to see whether {where.split()[0]} trains this run",
                  file=sys.stderr, flush=True)
            with contextlib.suppress(FileNotFoundError):  # it ended while we looked
                before = path.stat().st_mtime
                time.sleep(4 * BEAT_S)
                with open(path) as file:  # opening makes a network file system look again
                    alive = os.fstat(file.fileno()).st_mtime != before
        if alive:
            raise ValueError(f"{path.parent} is being trained by process {pid} on "
                             f"{where.split()[0]} since {holder['since']}; stop that one, or give "
                             "this run its own job.name")

    def _beat(self):
        while not self.released.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self):
        self.released.set()
        if self.path is not None:
            self.path.unlink(missing_ok=True)


# ---- signals -------------------------------------------------------------------------------------

class Stop:
    """True once the run is to stop: a signal has come, or there is a problem to end with.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 are noted while steps run; before the first step they end
    the process with a sentence. Launchers send a second one within seconds, which must not cost
    the save; what comes later than that ends the process as usual.
    """

    PATIENCE = 5.0  # seconds
    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self):
        self.received, self.since, self.running, self.problem = None, 0.0, False, None
        self.told = set()  # clips whose badness all ranks know
        self.before = {number: signal.getsignal(number) for number in self.SIGNALS}
        for number, handler in self.before.items():
            if handler is not signal.SIG_IGN:  # as nohup has it for SIGHUP
                signal.signal(number, self._note)

    def __bool__(self):
        return self.received is not None or self.problem is not None

    def _note(self, number, frame):
        if self.received is None:
            self.received, self.since = signal.Signals(number), time.monotonic()
            if not self.running:
                raise KeyboardInterrupt
        elif time.monotonic() - self.since > self.PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def until(stop, items, device):
    """Items until a rank of the own tensor-parallel group is to stop, which all of it is told."""
    for item in items:
        told = torch.tensor([bool(stop)], dtype=torch.uint8, device=device)
        if any(one["told"].item() for one in tp.exchange({"told": told})):
            return
        yield item


Report = namedtuple("Report", "names problem bad")  # of what a rank has read


def fetch(reader, stop, bad, read):
    """This rank's next batch; None on every rank if one was told to stop or cannot read on.

    Problems and bad clips of every rank are told on all. `read` gets the names of the clips of the
    next tp forward passes: those of a pass were read by one rank of each replica.
    """
    batch, problem = None, None
    try:
        batch = next(reader)  # None: told to stop while waiting
    except (ValueError, RuntimeError, OSError) as error:  # no clip is left, no decoder, no disk
        problem = str(error)
    names = None if batch is None else batch.get("clip", [])
    news = {clip: reason for clip, reason in dict(bad).items() if clip not in stop.told}
    reports = tp.from_all(Report(names, problem, news))
    for r, report in enumerate(reports):
        if report.problem and not stop.problem:
            stop.problem = (f"rank {r}: " if len(reports) > 1 else "") + report.problem
        for clip, reason in report.bad.items():
            bad.setdefault(clip, reason)
            stop.told.add(clip)
    if any(report.names is None for report in reports):
        return None
    for i in range(tp.size()):
        read.append(sum((report.names for report in reports[i :: tp.size()]), []))
    return batch


def clips_of_step(read, ahead, passes):
    """The clips of the step's forward passes, the last of `read` but for those that are ahead."""
    names = sum(list(read)[len(read) - ahead - passes : len(read) - ahead], [])
    return ", ".join(names) or "random"


def follow(saved, stop, to_the_end=False):
    """Say what goes wrong with the write of a checkpoint; one that is given up ends the run."""
    while saved is not None:
        for sentence in saved.poll():
            say(sentence)
        if saved.failed:
            stop.problem = (f"{saved.failed}; earlier checkpoints are intact: make room or mend "
                            "the disk, then rerun the same command")
        if saved.ended or not to_the_end:
            break
        time.sleep(0.02)


# ---- weights in memory ---------------------------------------------------------------------------

@torch.no_grad()
def checksum(tensor) -> torch.Tensor:
    """int64 of all bits and their places: a flipped bit changes it, and so does an exchange."""
    bits, total = tensor.detach().flatten().view(torch.uint8), 0
    if len(bits) % 8 or bits.storage_offset() % 8:  # not to be read as int64 as it is
        bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)])
    for part in bits.view(torch.int64).split(1 << 24):  # 128 MiB
        odd = torch.arange(1, 2 * len(part), 2, device=part.device)  # products keep all bits
        total = (part * odd).sum() + total * 6364136223846793005
    return total


def checksums(tensors) -> torch.Tensor:
    sums = [checksum(tensor) for tensor in tensors]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)                # (n,)


def frozen(model):
    """{name: what is computed with} of all that is not trained."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: getattr(p, "whole", p) for name, p in named if not p.requires_grad}


def checksums_at_start(model):
    """Of what is frozen; ValueError if ranks have loaded different values."""
    still = frozen(model)
    sums = checksums(still.values())
    shared = torch.tensor([not hasattr(p, "tp_dim") or hasattr(p, "whole")
                           for p in map(dict(model.named_parameters()).get, still)],
                          device=sums.device)
    differs = tp.differ(sums * shared, "tp") | tp.differ(sums, "dp")
    wrong = sum(tp.from_all([name for name, bad in zip(still, differs.tolist()) if bad]), [])
    if wrong:
        raise ValueError(f"ranks have loaded different values of {wrong[0]} and {len(wrong) - 1} "
                         "more; their files under checkpoint.base_path are not the same")
    return sums


def check_memory(at_start, model, flat, step):
    """ValueError on every rank unless weights in memory are what they have to be.

    What is frozen: as at the start. Masters, moments and EMA: equal over the replicas, and what is
    replicated equal over the tensor-parallel group. One pass over the memory.
    """
    still = frozen(model)
    now = checksums(still.values())
    wrong = [f"{name} has changed on rank {tp.world_rank()}"
             for name, same in zip(still, (now == at_start).tolist()) if not same]
    kinds = ("master", "ema", *flat.state())
    trained = {f"{kind} of {name}": part for kind in kinds
               for name, part in flat.views(kind).items()}
    sums = checksums(trained.values())
    halves = [getattr(p, "tp_dim", None) is None for p in flat.params.values()] * len(kinds)
    replicated = torch.tensor(halves, device=sums.device)
    for differs, what in ((tp.differ(sums * replicated, "tp"), "tensor-parallel group"),
                          (tp.differ(sums, "dp"), "replicas")):
        wrong += [f"{name} differs over the {what}"
                  for name, bad in zip(trained, differs.tolist()) if bad]
    wrong = sorted(set(sum(tp.from_all(wrong), [])))
    if wrong:
        listed = "; ".join(wrong[:8]) + (f"; {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise ValueError(f"weights in memory are damaged at step {step} ({listed}); nothing of "
                         "this step is saved: rerun the same command to go on from the newest "
                         "checkpoint, and if that happens again, have the memory tested")


# ---- ranks that do not come ----------------------------------------------------------------------

Beat = namedtuple("Beat", "host pid started count place end")  # what a rank says every second
Suspicion = namedtuple("Suspicion", "since sentence")  # that a rank is gone


def _gone(seen, me):
    """A sentence if a rank has died or ended by a mistake, else None.

    seen: {rank: (its last Beat, its last sign of life, when that was heard)}.
    """
    for r, (beat, _, _) in sorted(seen.items(), reverse=True):  # 0 last: the store goes with it
        if beat.end:
            return beat.end if beat.end.startswith("rank ") else f"rank {r} ended: {beat.end}"
        killed = beat.host == machine() and beat.started and beat.end is None
        if r != me and killed and process_start(beat.pid) != beat.started:
            return f"rank {r} (process {beat.pid}) died at {beat.place}"


def _late(seen, world, timeout_s, now):
    """A sentence on the ranks that are silent, or else behind the others."""
    counts = {r: beat.count for r, (beat, _, _) in seen.items()}
    first = max(counts, key=counts.get)
    silent_s = min(5, timeout_s / 2)  # they say something every second
    late = [r for r in range(world) if r not in seen or now - seen[r][2] > silent_s]
    late = late or [r for r in counts if counts[r] < counts[first]]
    where = [f"rank {r}, never seen" for r in late if r not in seen]
    for r in (r for r in late if r in seen):
        beat = seen[r][0]
        where.append(f"rank {r} (process {beat.pid} on {beat.host.split()[0]}), last seen at "
                     f"{beat.place}")
    if not late:
        return (f"rank {first} and all others have been at {seen[first][0].place} for "
                f"{timeout_s:g} s")
    return (f"{' and '.join(where)}, did not arrive at {seen[first][0].place} within "
            f"{timeout_s:g} s (parallel.timeout_s)")


def _beat(end=None):
    pid, where = os.getpid(), tp.place
    return json.dumps([machine(), pid, process_start(pid), where.count, where.name, end])


class Watch:
    """A thread that ends this process if another rank has died or does not come.

    It says who that is, on every rank: a rank that waits in a collective cannot.
    """

    def __init__(self):
        self.store, self.parent, self.orphaned = None, os.getppid(), None
        self.seen, self.suspected, self.quit = {}, None, threading.Event()

    def start(self, timeout_s: float):
        """To be called once the ranks have met."""
        self.timeout_s, self.me = timeout_s, tp.world_rank()
        self.world = tp.size() * tp.dp_size()
        if self.world > 1:
            self.store = tp.store.clone()  # a connection of its own
            met = time.monotonic()
            # Who is who is known before anyone can be lost.
            self.seen = {r: (Beat(*json.loads(beat)), None, met)
                         for r, beat in enumerate(tp.from_all(_beat()))}
        if self.world > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=self._run, daemon=True).start()

    def hear(self):
        """Wait for what may be found out about an error: that another rank has died."""
        if self.store:
            self.quit.wait(6)
        if self.suspected:  # then the thread is about to end this process
            self.quit.wait(10)

    def close(self, reason: str):
        """This rank is done; a reason, if it failed, for the others."""
        self.quit.set()
        self._tell(reason)

    def _run(self):
        while not self.quit.wait(1):
            now, where = time.monotonic(), tp.place
            if os.getppid() != self.parent and self.orphaned is None:
                print("torchrun has ended, so this rank stops", file=sys.stderr, flush=True)
                self.orphaned = now
                os.kill(os.getpid(), signal.SIGTERM)  # as if told to: save, then end
            self._exchange(now)
            gone = _gone(self.seen, self.me)
            first = self.suspected if gone else None  # others end because of that one
            if self.orphaned and now - self.orphaned > self.timeout_s:
                self._end(f"rank {self.me} could not save within {self.timeout_s:g} s")
            elif first and now - first.since > 3:  # time to end by itself
                self._end(first.sentence)
            elif self.store and (where.since and now - where.since > self.timeout_s
                                 or self._silent(now)):
                self._end(_late(self.seen, self.world, self.timeout_s, now))
            self.suspected = first or (Suspicion(now, gone) if gone else None)

    def _silent(self, now):
        """Whether a rank has said nothing for too long, in a place where the others wait long."""
        return not self.orphaned and any(beat.end is None and now - heard > self.timeout_s
                                         for beat, _, heard in self.seen.values())

    def _tell(self, reason=None):
        if self.store and not self.orphaned:  # else it has gone with torchrun
            with contextlib.suppress(RuntimeError):
                self.store.set(f"beat/{self.me}", _beat(reason))

    def _exchange(self, now):
        if self.orphaned or not self.store:
            return
        self._tell()
        with contextlib.suppress(RuntimeError):  # what cannot be heard is silent
            self.store.set(f"alive/{self.me}", str(now))  # changes every time
            for r in range(self.world):
                keys = [f"beat/{r}", f"alive/{r}"]
                if self.store.check(keys):
                    beat, alive = self.store.multi_get(keys)
                    known = r in self.seen and self.seen[r][1] == alive
                    heard = self.seen[r][2] if known else now
                    self.seen[r] = Beat(*json.loads(beat)), alive, heard

    def _end(self, reason):
        """End this process at once, whatever its main thread waits for."""
        print(f"\nerror: {reason}; rerun the same command to go on from the newest checkpoint",
              file=sys.stderr, flush=True)
        self._tell(reason)
        os._exit(1)
