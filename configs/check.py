"""The commands of data.py: `check` says what is wrong with each clip, `cache` encodes windows."""

import contextlib
import os
import signal
import sys
from itertools import pairwise

import numpy as np
import torch

import data
from configs.guard import hide_gpus, need_gpu
from configs.kernels import check_compiler
from configs.schema import HELP, load_config
from configs.video import describe


def repeats(file, timeout_s):
    """(F-1,): whether a frame is the one before, but for traces of compression (grey levels)."""
    frames = data.decode(file, 0, data.probe(file, timeout_s).frames, timeout_s)
    return np.array([np.abs(a.astype(np.int16) - b).max() <= 4 for a, b in pairwise(frames)])


def standstills(camera, control, timeout_s, least=10):
    """(first frame, length) of where the control stands still while the camera does not."""
    camera, control = repeats(camera, timeout_s), repeats(control, timeout_s)
    pairs = [control_still & ~still for control_still, still in zip(control, camera)]
    edges = np.flatnonzero(np.diff([False, *pairs, False]))
    runs = [(start, end - start + 1) for start, end in edges.reshape(-1, 2)]
    return [(start, length) for start, length in runs if length >= least]


def check(clips, config):
    """Yields what there is to say of each clip; the reasons of those not usable go to clips.bad."""
    source = getattr(clips, "source", clips)
    views = tuple(data.VIEWS) if source.views > 1 else (data.FRONT,)  # any of several may be drawn

    def inspect(clip):
        files = [source.path(kind, view, clip) for kind in ("videos", source.hint)
                 for view in views]
        infos, notes, rows = {}, [], 0
        for file in files:
            with contextlib.suppress(data.BadClip):  # `draw` will say it again
                infos[file] = describe(data.probe(file, source.timeout_s))
        if len(set(infos.values())) > 1:
            notes = [f"{file}: {info}" for file, info in infos.items()]
        try:
            text = source.draw(clip, views, np.random.default_rng(0))["text"]
            rows = text[: source.text_tokens].any(1).sum()
            for camera, control in zip(files, files[len(views) :]):
                notes += [f"{source.hint}/{control.parent.name} stands still for {length} frames "
                          f"from frame {first} on, the camera does not"
                          for first, length in standstills(camera, control, source.timeout_s)]
        except data.BadClip as error:
            clips.bad[clip] = str(error)
            notes.append(f"BAD: {error}")
        there = sum(source.path("videos", view, clip).is_file() for view in data.VIEWS)
        facts = [infos.get(files[0], "unreadable"), f"{there} view{'s' * (there != 1)}",
                 f"{rows} text rows"]
        return "\n    ".join([f"{clip}: {', '.join(facts)}", *notes])

    names = sorted(source.clips + source.held_out)
    yield from data.prefetch(inspect, names, config.data.num_workers)


def cache(clips, config):
    """Brings data.cache up to date; yields what was done about each window."""
    if not isinstance(clips, data.CachedClips):
        raise ValueError("data.cache is not set; give the folder to write to, for example "
                         "data.cache=latents/lidar")
    from tokenizer import load_tokenizer
    need_gpu(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_compiler(device)
    dtype = getattr(torch, config.trainer.precision)  # as a run encodes
    tokenizer = load_tokenizer(config.tokenizer.path, device, dtype, decoder=False)
    for clip, window, outcome in clips.build(tokenizer.encode_views, config.data.num_workers):
        yield f"{clip} window {window}: {outcome}"


def summary(clips, frames):
    """Print which clips can be used; (how many there are, how many those are)."""
    trained = [clip for clip in clips.clips if clip not in clips.bad]
    held = [clip for clip in clips.held_out if clip not in clips.bad]
    total, usable = len(clips.clips + clips.held_out), len(trained) + len(held)
    print(f"trained on: {len(trained)} clips, {frames} consecutive frames of each at a time; "
          f"held out: {', '.join(held) or 'none'}")
    print(f"{usable} of {total} clips usable", flush=True)
    return total, usable


COMMANDS = {"check": check, "cache": cache}


def main(arguments):
    """`check` or `cache`, a configuration and overrides.

    Exit status: 0; 1 if a clip is not usable, to `cache` if none is; 2 for a mistake.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for what its encoding does not have
    if {"-h", "--help"} & {*arguments}:
        print(data.__doc__, HELP, sep="\n")
        return 0
    try:
        if len(arguments) < 2 or arguments[0] not in COMMANDS:
            raise ValueError("usage: python data.py check|cache CONFIG [key.sub=value ...]")
        config = load_config(arguments[1], arguments[2:])
        hide_gpus(config.trainer.device)
        clips = data.open_clips(config)
        if not isinstance(clips, data.Clips):
            raise ValueError(f"data.root is {config.data.root}, which has no clips")
        for line in COMMANDS[arguments[0]](clips, config):
            print(line, flush=True)
        total, usable = summary(clips, config.data.num_frames)
    except BrokenPipeError:  # `check | head` has seen enough: so ends whatever writes to a pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, data.SafetensorError, data.DataFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return int(usable == 0 or arguments[0] == "check" and usable < total)
