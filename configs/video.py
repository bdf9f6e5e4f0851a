"""Video files: how ffmpeg is found and run, what a file holds, its frames, the pixels of a model.

Letters: F frames, H W pixels.
"""

import contextlib
import functools
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import namedtuple
from concurrent.futures import CancelledError
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf


class BadClip(ValueError):
    """A file of one clip that cannot be used; the loader goes on with another clip."""


class DataFailure(RuntimeError):
    """What no other clip would mend: the run saves and ends with this sentence."""


class DecoderKilled(DataFailure):
    """A signal ended ffmpeg, twice."""


Probe = namedtuple("Probe", "frames fps width height rotation gap")  # gap: (second, length) or None
Ran = namedtuple("Ran", "output log failure")  # of ffmpeg; failure: its first message, or ""
READER = threading.local()  # .closed(): of the reader whose thread this is; see prefetch


@functools.lru_cache(maxsize=None)
def ffmpeg(encoder=False):
    """Path of an ffmpeg of release 5.1 or later, that has libx264 where an encoder is needed.

    The one on PATH if it will do, else the one that imageio-ffmpeg carries.
    """
    found = [shutil.which("ffmpeg")]
    with contextlib.suppress(ImportError, RuntimeError):  # not installed, or without its program
        import imageio_ffmpeg
        found.append(imageio_ffmpeg.get_ffmpeg_exe())
    found = list(filter(None, found))
    # 5.1 brought -fps_mode, and later releases dropped its predecessor: whoever knows it will do.
    trial = "-v quiet -f lavfi -i color=s=16x16 -frames:v 1 -fps_mode passthrough".split()
    trial += ["-c:v", "libx264"] if encoder else []
    for program in found:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run([program, *trial, "-f", "null", "-"], timeout=30,
                                  stdin=subprocess.DEVNULL, start_new_session=True)
            if done.returncode == 0:
                return program
    raise FileNotFoundError(
        f"no ffmpeg of release 5.1 or later{' with libx264' if encoder else ''} among {found}; "
        "run 'pip install imageio-ffmpeg' or put one on PATH")


def run_ffmpeg(path, seconds, *arguments) -> Ran:
    """Run ffmpeg on a video's first stream; what ends it from outside is tried once more. With
    `file:` a colon in a path names no protocol."""
    command = [ffmpeg(), "-hide_banner", "-nostats", "-nostdin", "-v", "level+info", "-threads",
               "1", "-i", f"file:{path}", "-map", "0:v:0", *arguments, "-"]
    for _ in range(2):
        output, log, status = attempt(command, seconds)
        caught = re.search(r"received signal (\d+)", log)  # ffmpeg's own handler; it then exits
        if status is None:
            error = BadClip(f"{path}: ffmpeg hung and was killed after {seconds:.0f} s, twice; "
                            "data.timeout_s says how long it may take")
        elif status < 0 or caught:
            name = signal.Signals(int(caught[1]) if caught else -status).name
            error = DecoderKilled(f"ffmpeg was killed by {name} while it read {path}, twice; "
                                  "if nobody sent that signal, look at this machine's memory")
        else:
            told = re.findall(r"^(?:\[[^]]*\] )*\[(?:error|fatal|panic)\] (.*)", log, re.M)
            failure = f"ffmpeg exits with {status}" if status else ""
            return Ran(output, log, told[0] if told else failure)
    raise error


def attempt(command, seconds):
    """One run of ffmpeg: (stdout, messages, exit status or None where it took too long).

    In a session of its own: a stop signal to our process group must not end what we wait for.
    """
    output, end = bytearray(), time.monotonic() + seconds
    # Messages go to a file: a full pipe of them would block ffmpeg while we wait for its frames.
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(command, bufsize=0, stdin=subprocess.DEVNULL, stderr=log,
                                       stdout=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            raise DecoderKilled(f"{command[0]} cannot be started: {error.strerror}") from None
        try:
            while time.monotonic() < end:
                if getattr(READER, "closed", bool)():
                    raise CancelledError
                if select.select([process.stdout], [], [], 0.2)[0]:
                    chunk = process.stdout.read(2**20)
                    if not chunk:
                        break
                    output += chunk
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, end - time.monotonic()))
        finally:
            status = process.poll()
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel
                    process.wait(5)
            process.stdout.close()
        log.seek(0)
        return output, log.read().decode(errors="replace"), status


def probe(path, timeout_s=120) -> Probe:
    """What a video file holds, remembered until it changes. BadClip if it is no readable video."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise BadClip(f"{path} is missing: {error.strerror}") from None
    return list_packets(path, timeout_s, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=None)  # some hundred bytes a file
def list_packets(path, timeout_s, *version) -> Probe:
    """A Probe from the packets, without decoding them: imageio-ffmpeg carries no ffprobe."""
    done = run_ffmpeg(path, timeout_s, "-c", "copy", "-f", "framecrc")
    text = done.output.decode(errors="replace")
    header = dict(re.findall(r"^#(tb|dimensions) 0: (.+)$", text, re.M))
    # stream, dts, pts, duration, bytes, checksum, flags; 0x4 marks packets that an edit list hides
    packets = [line.split(",") for line in text.splitlines() if line.startswith("0,")]
    packets = [p for p in packets if not re.search(r"F=0x\w*[4-7c-f]\b", p[-1])]
    if not packets or len(header) != 2:
        raise BadClip(f"{path} is not a readable video: {done.failure or 'no frames'}")
    if done.failure:
        raise BadClip(f"{path} is damaged: {done.failure} ({len(packets)} frames are listed)")
    times = np.sort([int(p[2]) for p in packets])  # packets come in decoding order
    step, gap = pace(times) if len(times) > 1 else (int(packets[0][3]), None)
    if step <= 0:
        raise BadClip(f"{path} has no usable time stamps, so its fps is unknown")
    tick = Fraction(header["tb"])
    width, height = map(int, header["dimensions"].split("x"))
    if not width or not height:
        raise BadClip(f"{path} is damaged: it says that its pictures are {width}x{height}")
    rotation = round(float(([0] + re.findall(r"rotation of (-?[\d.]+)", done.log))[-1])) % 360
    if rotation in (90, 270):  # ffmpeg turns the frames
        width, height = height, width
    if gap:
        gap = tuple(float(part * tick) for part in gap)
    return Probe(len(times), float(1 / tick) / step, width, height, rotation, gap)


def pace(times):
    """(nominal step, None or a gap as (where, length)) of sorted time stamps, in ticks.

    The step is that of most frames, or of the line through uneven stamps, without their gaps: a
    late last stamp does not change it. After a gap stamps stay late, by the medians of nine frames.
    """
    steps = np.diff(times)
    middle = np.median(steps)
    near = abs(steps - middle) <= middle / 10
    if near.mean() >= 0.5:
        step = float(steps[near].mean())
    else:
        usual = np.cumsum([0, *np.where(steps > 2.5 * middle, middle, steps)])
        step = float(np.polyfit(np.arange(len(times)), usual, 1)[0])
    late = times - times[0] - step * np.arange(len(times))
    for i in np.flatnonzero(steps > 1.5 * step):
        before, after = late[max(0, i - 8) : i + 1], late[i + 1 : i + 10]
        if len(after) > 1 and np.median(after) - np.median(before) > 0.8 * step:
            return step, (int(times[i] - times[0]), int(steps[i]))
    if np.ptp(late[:-1]) > 3 * step:  # another pace from somewhere on
        i = np.argmax(abs(late[:-1]))
        return step, (int(times[i] - times[0]), int(steps[i]))
    return step, None


def decode(path, start, frames, timeout_s=120):
    """Frames start .. start+frames-1 of a video as ffmpeg's default RGB: uint8 (F, H, W, 3).

    BadClip on any damage. The whole file is decoded, so that what is bad does not depend on the
    window; the last frame comes too, to see that it is there.
    """
    info = probe(path, timeout_s)
    end, size = start + frames, info.height * info.width * 3
    expected = frames + (end < info.frames)
    wanted = f"select='between(n,{start},{end - 1})+gte(n,{max(end, info.frames - 1)})'"
    growth = max(1, info.frames * size / (121 * 704 * 1280 * 3))
    # Stamps 1000 s apart: the muxer complains of uneven ones that it rounds to the same tick.
    done = run_ffmpeg(path, timeout_s * growth, "-vf", f"{wanted},setpts=N*1000/TB",
                      "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24")
    # ffmpeg conceals damage and exits 0; what it made up must not be trained on.
    if done.failure or len(done.output) != expected * size:
        raise BadClip(f"{path} does not decode: {done.failure or 'frames are lacking'} "
                      f"({len(done.output) // size} of {expected} frames came)")
    return np.frombuffer(done.output, np.uint8, frames * size).reshape(
        frames, info.height, info.width, 3)


def describe(info: Probe):
    turned = f", rotated by {info.rotation} degrees" if info.rotation else ""
    return f"{info.frames} frames, {info.fps:.5g} fps, {info.width}x{info.height}{turned}"


def agree(files, infos, trim):
    """BadClip unless the files show the same moments; with `trim` some may go on longer."""
    for file, info in zip(files, infos):
        if info.gap:
            raise BadClip(f"{file} has a gap of {info.gap[1]:.3g} s in its time stamps at second "
                          f"{info.gap[0]:.3g}, {1 / info.fps:.3g} s being its usual step")
        same = info[2:5] == infos[0][2:5] and abs(info.fps / infos[0].fps - 1) <= 0.01
        if not same or info.frames != infos[0].frames and not trim:
            remedy = "; data.trim=true admits unequal lengths" if same else ""
            raise BadClip(f"{files[0]} has {describe(infos[0])}, but {file} has {describe(info)}: "
                          f"all files of a clip must show the same moments{remedy}")


def write_video(path, frames, fps, crf=18):
    """Writes uint8 (F, H, W, 3) as H.264 yuv420p; H and W must be even."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    program, size = ffmpeg(encoder=True), f"{frames.shape[2]}x{frames.shape[1]}"
    command = [program, "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size,
               "-r", str(fps), "-i", "-", "-c:v", "libx264", "-threads", "1", "-preset",
               "veryfast", "-crf", str(crf), "-pix_fmt", "yuv420p", f"file:{path}"]
    done = subprocess.run(command, input=np.asarray(frames).tobytes(), capture_output=True,
                          start_new_session=True)
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{program} could not write {path}: {message}")


def fit(frames, height, width):
    """Resizes and pads uint8 (F, H, W, 3) or (F, 3, H, W) to the target size.

    Bicubic with antialiasing to the largest size of the same shape, then reflection, or the edge
    where that is too short. Returns (3, F, height, width) uint8, a view where possible, and the
    padding mask (1, height, width), True on pads.
    """
    frames = torch.as_tensor(frames)
    if frames.shape[-1] == 3:
        frames = frames.permute(0, 3, 1, 2)                                # (F, 3, H, W)
    scale = min(height / frames.shape[2], width / frames.shape[3])
    h, w = (int(scale * size + 0.5) for size in frames.shape[2:])
    if (h, w) != frames.shape[2:]:
        # In float32: torch's uint8 kernel also rounds between its two passes. 8 frames at a time:
        # floats are large.
        floats = (nnf.interpolate(some.contiguous().float(), (h, w), mode="bicubic",
                                  align_corners=False, antialias=True) for some in frames.split(8))
        frames = torch.cat([some.clamp_(0, 255).round_().to(torch.uint8) for some in floats])
    top, left = (height - h) // 2, (width - w) // 2
    below, right = height - h - top, width - w - left
    inside = torch.zeros(1, h, w, dtype=torch.bool)
    mask = nnf.pad(inside, (left, right, top, below), value=True)
    if mask.any():
        mode = "reflect" if below < h and right < w else "edge"
        pads = ((0, 0), (0, 0), (top, below), (left, right))
        frames = torch.from_numpy(np.pad(frames.numpy(), pads, mode))
    return frames.transpose(0, 1), mask                                    # (3, F, H, W)
