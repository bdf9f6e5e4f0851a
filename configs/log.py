"""What a run says: the header, a line a logged step, metrics.jsonl, curves, the closing lines."""

import contextlib
import itertools
import json
import math
import os
import socket
import sys
import time
from collections import deque

import numpy as np
import torch
from tqdm import tqdm

import tp
from configs import curve
from configs.estimate import (bytes_sent, counts, describe, estimate, gpu_memory, host_bytes,
                              peak_tflops, tflop_per_sample, trained_blocks)
from configs.recompute import host

PARTS = ("data", "encode", "forward", "backward", "sync", "optimizer", "save")  # of a step
WARM = 3  # steps of a start that compile, and count in no mean
COMPARE = 20  # steps from one comparison of the GPUs to the next, which takes milliseconds
SLOW = 0.6  # of the fastest GPU's speed; a hot one was seen at 0.2 of its clock


def say(message):
    if tp.world_rank() == 0:
        tqdm.write(message)


class Unbroken:
    """stdout or stderr of a run. Whoever reads it may be gone first, as `| tee` at Ctrl-C or a
    terminal that is closed, and its disk may be full: what is printed then is lost, not the run."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed before the start
        if hasattr(stream, "reconfigure"):  # not a notebook's
            stream.reconfigure(errors="backslashreplace")  # for what its encoding does not have

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Lines:
    """Where nobody watches, in the log of a job, a progress bar's states are lines of their own."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self):
        sys.stderr.flush()


def progress(total, **options):
    """A progress bar of rank 0, each second, or each half minute where nobody watches."""
    watched = sys.stderr.isatty()
    return tqdm(total=total, disable=tp.world_rank() != 0, mininterval=1 if watched else 30,
                file=sys.stderr if watched else Lines(), position=None if watched else 0,
                **options)  # 0: a bar within a bar does not move the cursor


def span(seconds):
    """A time for people."""
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.2f} h"


def header(cfg, clips, model, plan, device):
    """The first lines of a run: what is trained, on what, from what."""
    size, d = cfg.model, cfg.data

    base, control, trained = counts(model)
    views = f"{d.views} views ({size.conditioning})" if d.views > 1 else "1 view"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    how = describe(plan, tp.size(), trained > 0)
    how += ", tokens copied while others are multiplied" if tp.overlaps else ""
    memory = {}
    if trained:  # what sampling needs is little
        needs = sum(estimate(cfg, model, plan).values())
        total = f" of {gpu_memory():.1f}" if gpu_memory() else ""
        sends = sum(bytes_sent(cfg, model, plan, tp.dp_size()).values()) / 1e9
        away = host_bytes(cfg, plan, trained_blocks(model)) / 2**30
        more = f", and {away:.3g} of {host.room:.3g} GiB of the machine's ({host.bus:.0f} GB/s)"
        memory = {"memory": f"about {needs:.3g} GiB a rank{total}" + more * (host.room > 0),
                  "traffic": f"{sends:.3f} GB that a rank sends in a step, by tp.py's formula"}
    rows = {
        "run": cfg.run_dir,
        "model": f"base {base:,}, control {control:,} parameters; {trained:,} are trained",
        "ranks": f"{tp.dp_size()} x {tp.size()} (dp x tp) on {card}, {cfg.trainer.precision}, "
                 f"attention kernel {model.attention}" + (f", {how}" if how else ""),
        **memory,
        "data": f"{clips}; {d.hint} control, {views}, {d.num_frames} frames of "
                f"{d.height}x{d.width}",
        "held out": ", ".join(clips.held_out) or "none",
    }
    for name, value in rows.items():
        say(f"{name:<9} {value}")


def clock():
    """Now: an event in the GPU's queue, which nothing waits for, or seconds on a CPU."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(a, b):
    """From one clock to a later one; waits until a GPU's queue has reached it."""
    if isinstance(a, float):
        return b - a
    b.synchronize()
    return a.elapsed_time(b) / 1000


def gpu_speed(n=4096, products=20):
    """TFLOP/s of matrix products, as hot as the step before has left the GPU; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0.0
    x = torch.ones(n, n, dtype=torch.bfloat16, device="cuda")
    y = x @ x  # the first of its kind takes longer
    before = clock()
    for _ in range(products):
        torch.mm(x, x, out=y)
    return products * 2 * n**3 / seconds_between(before, clock()) / 1e12


def plain(value):
    """A value as JSON has it: NaN and infinities are null."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float):  # numpy's too
        return float(value) if math.isfinite(value) else None
    return value


class Log:
    """Clock, progress bar, metrics.jsonl, curves and the closing lines; only world rank 0 writes.

    Nothing here is worth a training: what cannot be written is said, counted and left out.
    """

    def __init__(self, cfg, clips, start):
        self.cfg, self.clips, self.start = cfg, clips, start
        self.path, self.began = cfg.run_dir / "metrics.jsonl", time.time()
        clips_a_gpu = cfg.trainer.grad_accum * cfg.data.batch_size / tp.size()
        self.tflop = tflop_per_sample(cfg.model, cfg.tokens) * clips_a_gpu
        self.peak = None  # TFLOP/s of this GPU
        if torch.cuda.is_available():
            self.peak = peak_tflops(torch.cuda.get_device_name())
        self.losses, self.skipped, self.failed = [], 0, 0
        self.done, self.in_a_row = start, 0  # steps; skipped ones since the last that was not
        self.slow = set()  # ranks whose GPU has been named
        self.once = {"resumed_at": start} if start else {}  # for the next line
        self.marks, self.steps = [(None, clock())], []  # (part, its end): this step, those unread
        self.rows = deque(maxlen=100 * tp.size())  # seconds of the parts of recent steps
        self.seconds, self.timed = 0.0, 0  # of those after WARM steps; how many all are
        endless = cfg.trainer.max_iter > 10**8  # the released trainings': until somebody stops it
        total = None if endless else cfg.trainer.max_iter
        self.bar = progress(total, initial=start, unit="step")
        self.board, self.traffic = None, {}  # the latter: of a step, among those of the last line
        tp.traffic.timed = cfg.trainer.logging_iter == 1
        if cfg.trainer.tensorboard and tp.world_rank() == 0:
            with self.attempt("TensorBoard could not be opened"):
                self.board = curve.open_board(cfg.run_dir)

    @contextlib.contextmanager
    def attempt(self, what):
        """For what is only to be looked at: a failure is said and counted, and that is all."""
        try:
            yield
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            self.fail(f"{what}: {error}")

    def fail(self, problem):
        self.failed += 1
        say(f"warning: {problem}; training goes on")

    def lap(self, part):
        """A part of the step ends here. On a GPU its queue says when, and nothing waits for it."""
        self.marks.append((part, clock()))
        following = PARTS[(PARTS.index(part) + 1) % len(PARTS)] if part in PARTS else PARTS[0]
        after = "validation and samples" if part == "save" else following
        tp.arrive(f"{after} of step {self.done + 1}")

    def read_clock(self):
        """Mean seconds of the parts of the steps since the last call; waits for the GPU."""
        sent, waited = tp.traffic.read()
        self.traffic = {"sent_gb": sent / 1e9 / len(self.steps)}
        if tp.traffic.timed:
            self.traffic["communication_s"] = waited / len(self.steps)
        rows = []
        for marks in self.steps:
            parts = dict.fromkeys(PARTS, 0.0)
            for (_, before), (part, after) in itertools.pairwise(marks):
                if part in parts:  # validation and samples are no part of a step
                    parts[part] += seconds_between(before, after)
            rows.append([*parts.values()])
        self.steps = []
        warm = rows[max(0, WARM - self.timed) :]
        self.rows.extend(warm)
        self.seconds += sum(map(sum, warm))
        self.timed += len(rows)
        return np.mean(rows, axis=0)

    def speed(self, seconds):
        """{name: value} to log for the seconds that the parts of a step took."""
        total = sum(seconds)
        values = {"seconds": total, **{f"{part}_s": s for part, s in zip(PARTS, seconds)},
                  **self.traffic, "tflops": self.tflop / total}
        if torch.cuda.is_available():
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.peak:
            values["mfu"] = values["tflops"] / self.peak
        return values

    def skip(self, step, norm, clips):
        """A step without finite gradients was not taken; a sentence if too many in a row were."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        say(f"step {step + 1}: the gradient norm is {norm.item()}, so this step changes nothing "
            f"({self.skipped} so far); its clips: {clips}")
        if self.in_a_row >= self.cfg.trainer.max_skipped:
            return (f"{self.in_a_row} steps in a row had no finite gradients "
                    f"(trainer.max_skipped), the last with the clips {clips}; the checkpoint's "
                    "weights are from before them: look at the clips named, lower optimizer.lr, "
                    "or go back to an earlier checkpoint")

    def validated(self, step, seen, count):
        """Say the validation loss; before the first step, whether the base fits at all."""
        if not seen:
            return  # told to stop meanwhile
        loss, zero = seen["val_loss"], seen["val_zero"]
        which = "held-out clips" if self.clips.held_out else "of the clips trained on"
        say(f"step {step} validation loss {loss:.5f} over {count} {which}; {zero:.5f} if the "
            "network predicts zero")
        if step == 0 and not loss < zero:
            say("warning: the base is no better than predicting zero; do the base, the tokenizer, "
                "its mean_std.pt and model.rope_t_ratio belong together?")

    def sampled(self, step, seen, problems):
        psnr = f", PSNR to the real ones {seen['psnr']:.2f} dB" if "psnr" in seen else ""
        if seen:  # else told to stop before the first was done
            say(f"step {step} samples in {self.cfg.run_dir / 'samples'}{psnr}")
        for problem in problems:
            self.fail(problem)

    def before(self, seen):
        """The validation before the first step, as a line of its own."""
        self.marks = [(None, clock())]
        self.bar.unpause()
        if seen:
            self.write({"step": 0, "loss": seen["val_loss"], **seen})

    def step(self, step, loss, norm, lr, seen):
        """The end of a step; at some, a line in metrics.jsonl with what was `seen` after it."""
        self.done = step
        tp.arrive(f"data of step {step + 1}")
        self.steps.append(self.marks)
        self.marks = [(None, clock())]
        self.losses.append(tp.mean_over_replicas(loss))
        self.bar.update()
        if step % COMPARE == 0:
            self.compare_gpus()
        t = self.cfg.trainer
        if not seen and step % t.logging_iter and step != t.max_iter:
            return
        losses = torch.stack(self.losses)  # of skipped steps they are not finite
        line = {"step": step, "loss": losses[-1].item(),
                "loss_mean": losses[losses.isfinite()].mean().item(), "lr": lr,
                "grad_norm": norm.item(), **self.speed(self.read_clock()),
                "skipped_steps": self.skipped, "bad_clips": len(self.clips.bad), **self.once,
                **seen}
        self.losses, self.once = [], {}
        gpu = f" {line['peak_gib']:.1f} GiB" if "peak_gib" in line else ""
        gpu += f" mfu {line['mfu']:.1%}" if "mfu" in line else ""
        say(f"step {step} loss {line['loss_mean']:.5f} lr {lr:.3g} norm {line['grad_norm']:.3g} "
            f"{line['seconds']:.3g} s/step data {line['data_s']:.3g} s{gpu}")
        self.write(line)

    def compare_gpus(self):
        """Name each GPU, once, that is much slower than another: all ranks wait for it, so that
        their steps take equally long and do not tell."""
        where = f"GPU {os.environ.get('LOCAL_RANK', 0)} of {socket.gethostname()}"
        found = tp.from_all((gpu_speed(), where))
        fastest = max(speed for speed, _ in found)
        for rank, (speed, where) in enumerate(found):
            if speed < SLOW * fastest and rank not in self.slow:
                self.slow.add(rank)
                say(f"warning: rank {rank}, {where}, computes at {speed:.0f} TFLOP/s and another "
                    f"at {fastest:.0f}; all wait for it. nvidia-smi shows its temperature, clock "
                    "and what else runs on it")

    def write(self, line):
        """Append to metrics.jsonl, below whatever a crash or a full disk left of the last line."""
        if tp.world_rank() != 0:
            return
        line = {key: plain(value) for key, value in line.items()}
        with self.attempt(f"{self.path} could not be written"), open(self.path, "a+b") as file:
            torn = False
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
        save_iter = self.cfg.checkpoint.save_iter
        if "val_loss" in line or save_iter and line["step"] % save_iter == 0:
            self.draw()
        if self.board:
            with self.attempt("TensorBoard could not be written"):
                curve.show_on_board(self.board, line, self.cfg.run_dir)

    def draw(self):
        with self.attempt("the curves could not be drawn"):
            curve.draw(self.cfg.run_dir)

    def close(self, step):
        """How the run ended, and the seconds of a step."""
        self.bar.close()
        if self.steps:
            self.read_clock()
        lines = curve.read_metrics(self.path) if tp.world_rank() == 0 else []
        say(self.summary(step, lines))
        if self.rows:
            table = self.speed(self.median())
            say("median step: " + ", ".join(f"{key} {value:.3f}" for key, value in table.items()))
        where = self.cfg.run_dir / "checkpoints" / f"iter_{step:09d}.pt"
        if not self.cfg.checkpoint.save_iter:
            where, kept = ("none, as checkpoint.save_iter is 0",
                           "NOT SAVED, as checkpoint.save_iter is 0")
        elif not where.is_file():
            where, kept = ("NOT WRITTEN",
                           "NOT SAVED, rerun the same command to go on from the checkpoint before")
        else:
            kept = f"saved {where}, rerun the same command to continue"
        if self.start >= self.cfg.trainer.max_iter:
            say(f"nothing was trained: the run was at step {self.start}, and trainer.max_iter, "
                f"which counts from its first start, is {self.cfg.trainer.max_iter}")
        elif step < self.cfg.trainer.max_iter:
            say(f"stopped after step {step}, {kept}")
        elif tp.world_rank() == 0:
            self.draw()
            losses = [loss for number, loss in curve.series(lines, "loss") if number] or [math.nan]
            n = max(1, min(20, len(losses) // 4))
            say(f"loss {np.mean(losses[:n]):.4f} -> {np.mean(losses[-n:]):.4f} (means of {n} "
                f"logged steps), checkpoint {where}, metrics {self.path}, curves in "
                "loss_curve.svg beside it")

    def median(self):
        """Seconds of the parts of a step: the median over rounds of tp steps, in which every rank
        encodes once; that of saves over steps, since a round is not to be one with a save."""
        rows, save = np.array(self.rows), PARTS.index("save")
        rows[:, save] = np.median(rows[:, save])
        size = min(tp.size(), len(rows))
        rounds = rows[: len(rows) // size * size].reshape(-1, size, len(PARTS)).mean(axis=1)
        return np.median(rounds, axis=0)

    def summary(self, step, lines):
        """Steps, clips, hours, mean MFU, what was skipped, the best validation loss."""
        t, d = self.cfg.trainer, self.cfg.data
        steps = step - self.start
        words = [f"{steps:,} steps with {steps * t.grad_accum * d.batch_size * tp.dp_size():,} "
                 f"clips in {span(time.time() - self.began)}"]
        if self.peak and self.timed > WARM:
            mfu = self.tflop * (self.timed - WARM) / self.seconds / self.peak
            words.append(f"mean MFU {mfu:.1%}")
        words.append(f"{self.skipped} steps and {len(self.clips.bad)} clips skipped")
        if losses := curve.series(lines, "val_loss"):
            best = min(losses, key=lambda point: point[1])
            words.append(f"best validation loss {best[1]:.5f} at step {best[0]}")
        if self.failed:
            words.append(f"things to look at that could not be written: {self.failed}")
        return ", ".join(words)
