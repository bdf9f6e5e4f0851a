"""Rehearse a launch before any download: made-up files in the place of all that a config reads.

    python -m configs.rehearsal CONFIG [--clips 6] [key.sub=value ...]     write what is missing
    python -m configs.rehearsal CONFIG --remove [key.sub=value ...]        take it away again

Base and control checkpoint, tokenizer and clips come to the paths that the config names, with the
released names, shapes and layouts and with random values. A file that is there and that this
command did not write is never touched: a REHEARSAL.txt beside its own lists their sizes and times.
"""

import argparse
import functools
import json
import math
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import time
import warnings
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import convert
import data
import model as m
import tokenizer as tk
from configs.schema import load_config, need

NOTE = "REHEARSAL.txt"
WEIGHTS = (".pt", ".safetensors", ".jit")
CHANNELS = 128  # base channels of the released tokenizer
STATISTICS = 16  # latent frames that its mean_std.pt knows
HALF_TOKENIZER = 130e6  # bytes of decoder.jit, the larger half
BYTES_A_PIXEL = 0.06  # of a clip's file, more than any was measured to need

# A file that shall be there. home: the folder whose note lists it. recipe: what its contents
# depend on. size: bytes, about. write: a function of the path to write to.
Item = namedtuple("Item", "path home recipe size write")


# ---- weights -----------------------------------------------------------------------------------

def draw_weights(named):
    """{name: random tensor} for (name, tensor on meta) pairs, of the model's own initial scale.

    What starts at zero gets small values instead: nothing may be idle in a rehearsal.
    """
    def draw(item):
        name, wanted = item
        rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        full = torch.ones(wanted.shape, dtype=torch.float32)  # what a norm starts with
        if hasattr(wanted, "init"):
            wanted.init(full, rng)
        if not full.any():
            full.normal_(std=0.2 / math.sqrt(full.shape[-1]), generator=rng)
        return name, full.to(wanted.dtype)

    # torch draws a tensor in one thread; eight float32 tensors at once stay small beside a base.
    with torch.no_grad(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(pool.map(draw, named))


def checkpoint_item(path, cfg, shapes, part):
    """A flat file of shapes.base or shapes.control (`part`) and logvar, as the released ones."""
    tensors = {**dict(shapes.named_parameters()), **dict(shapes.named_buffers())}
    named = [(convert.to_nvidia(name).removeprefix("base_model."), tensor)
             for name, tensor in tensors.items() if name.startswith((f"{part}.", "logvar."))]
    positions = max(cfg.model.max_img_h // 2, cfg.model.max_img_w // 2, cfg.model.max_frames)

    def write(target):
        drawn = draw_weights(named)
        drawn[convert.SEQ] = torch.arange(positions, dtype=torch.float32)
        save = save_file if path.suffix == ".safetensors" else torch.save
        save(drawn, target)

    recipe = [part, sorted([name, list(tensor.shape)] for name, tensor in named)]
    checksum = zlib.crc32(json.dumps(recipe).encode())
    return Item(path, path.parent, checksum, sum(t.nbytes for _, t in named), write)


# ---- tokenizer ---------------------------------------------------------------------------------

@functools.cache
def draw_tokenizer(columns):
    """{file name: content} of the tokenizer's folder; mean and std are those of its own latents.

    The modules of the idle levels are identities without weights, as most probably in the release.
    """
    torch.manual_seed(0)
    net = tk.Tokenizer(CHANNELS).requires_grad_(False)
    net.encoder.down[1].downsample = torch.nn.Identity()
    net.decoder.up.get_submodule("2").upsample = torch.nn.Identity()
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    latent = net.encode(video)                                             # (1, 16, 2, 4, 4)
    statistics = torch.std_mean(latent, dim=(0, 2, 3, 4))                  # (16,) twice
    std, mean = [s[:, None].repeat(1, columns).flatten().bfloat16() for s in statistics]
    halves = {"encoder.jit": (video, ["encoder", "quant_conv"]),
              "decoder.jit": (latent, ["post_quant_conv", "decoder"])}
    contents = {"mean_std.pt": (mean, std)}
    for file, (example, names) in halves.items():
        half = tk.named(**{name: getattr(net, name) for name in names})
        # Nobody calls the archive, its tensors are read: the trace need not fit other sizes.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(half, example[:, :, :1, :16, :16], check_trace=False)
        contents[file] = traced.bfloat16()
    return contents


def tokenizer_items(folder, cfg):
    columns = max(STATISTICS, (cfg.data.num_frames - 1) // 8 + 1)

    def write(name, target):
        content = draw_tokenizer(columns)[name]
        if isinstance(content, torch.jit.ScriptModule):
            content.save(str(target))
        else:
            torch.save(content, target)

    for name in ("mean_std.pt", "encoder.jit", "decoder.jit"):
        yield Item(folder / name, folder, [CHANNELS, columns], HALF_TOKENIZER,
                   functools.partial(write, name))


# ---- clips -------------------------------------------------------------------------------------

RATE = 10  # frames a second, as the real ones have

# Filters over ffmpeg's test picture, which moves all the time: `data.py check` names what stands
# still. Grain gives the camera a bit rate like that of a real one.
LOOKS = {"videos": "noise=alls=6:allf=t", "lidar": "hue=s=0", "hdmap": "negate"}


def draw_video(kind, number, frames, height, width, target):
    # setpts loses the rate in some releases of ffmpeg, which then write 25 frames a second
    looks = (f"trim=start_frame={7 * number},setpts=PTS-STARTPTS,{LOOKS.get(kind, 'null')},"
             f"fps={RATE}")
    command = ["-v", "error", "-y", "-nostdin",
               "-f", "lavfi", "-i", f"testsrc2=size={width}x{height}:rate={RATE}",
               "-frames:v", str(frames), "-vf", looks,
               "-c:v", "libx264", "-threads", "1", "-preset", "ultrafast", "-crf", "28",
               "-pix_fmt", "yuv420p", "-f", "mp4", f"file:{target}"]
    done = subprocess.run([data.ffmpeg(), *command], capture_output=True, text=True,
                          errors="replace")
    need(done.returncode == 0, f"{data.ffmpeg()} could not write {target}: {done.stderr.strip()}")


# The forms of text embeddings, in turn: those of captions and those of the views' prefixes.
CAPTIONS = (lambda rows: [rows],
            lambda rows: {"pickle": {"ground_truth": {"embeddings": {"t5_xxl": rows[None]}}}},
            lambda rows: [rows[None].astype(np.float16)])
PREFIXES = (lambda rows: rows, lambda rows: rows[None])


def draw_text(number, width, form, target):
    rows = np.random.default_rng(number).standard_normal((60, width), np.float32)
    target.write_bytes(pickle.dumps(form(rows), protocol=4))


def clip_items(root, cfg, clips):
    """Videos, control videos and text of some clips, for every view that the config may draw."""
    d, width = cfg.data, cfg.model.crossattn_emb_channels
    views = list(data.VIEWS)[: len(data.VIEWS) if d.views > 1 else 1]
    frames = d.num_frames + 9  # so that there is more than one window
    settings = [frames, d.height, d.width]
    video_size = 5e4 + BYTES_A_PIXEL * math.prod(settings)

    def item(path, recipe, size, draw, *arguments):
        return Item(root / path, root, recipe, size, functools.partial(draw, *arguments))

    for i in range(clips):
        name = f"rehearsal_{i:04d}"
        for kind in ("videos", d.hint):
            for j, view in enumerate(views):
                path = f"{kind}/{view}/{name}_0.mp4"
                yield item(path, settings, video_size, draw_video, kind, i + 2 * j, *settings)
        form = CAPTIONS[i % len(CAPTIONS)]
        yield item(f"t5_xxl/{data.FRONT}/{name}.pkl", width, 1e6, draw_text, i, width, form)
    for i, view in enumerate(views[1:]):
        form = PREFIXES[i % len(PREFIXES)]
        yield item(f"cache/prefix_{view}.pkl", width, 1e6, draw_text, clips + i, width, form)


# ---- what is there, and what may be written ------------------------------------------------------

def stamp(path):
    """Tells a file that this command wrote from another that took its place."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def read_note(home):
    """{file below `home`: [stamp, recipe]} of what this command wrote there."""
    try:
        return json.loads((home / NOTE).read_text().partition("\n\n")[2])
    except (OSError, ValueError):
        return {}


def write_note(home, entries):
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    (home / NOTE).write_text(
        "Made-up files to rehearse a launch with; what is trained on them is of no use.\n"
        "`python -m configs.rehearsal CONFIG --remove` deletes those that nobody has replaced.\n\n"
        "{" + ",\n ".join(lines) + "}\n")


def state_of(item):
    """missing, ours, stale (ours, made for another config) or foreign."""
    if not item.path.exists():
        return "missing"
    written, recipe = read_note(item.home).get(str(item.path.relative_to(item.home)), (None, None))
    if written != stamp(item.path):
        return "foreign"
    return "ours" if recipe == item.recipe else "stale"


def items_of(cfg, clips):
    """Every file that a run of this config reads and that can be made up."""
    shapes = m.build(cfg.model, "meta", torch.bfloat16)  # as released, whatever the run computes in
    items, folder = [], Path(cfg.tokenizer.path)
    for key, part in (("base_path", "base"), ("load_path", "control")):
        path = getattr(cfg.checkpoint, key)
        if path not in (None, "random"):
            items.append(checkpoint_item(Path(path), cfg, shapes, part))
    if cfg.data.root != "random" and not folder.is_file():
        need(not folder.suffix, f"tokenizer.path is {folder}, a file that is not there; give a "
             "folder, and the tokenizer is written to it")
        items += tokenizer_items(folder, cfg)
    if cfg.data.root not in ("random", "synthetic"):
        items += clip_items(Path(cfg.data.root), cfg, clips)
    return items


def check_disk(items):
    """ValueError unless every disk has room for the items that it is to hold."""
    wanted = {}
    for item in items:
        folder = next(parent for parent in item.path.absolute().parents if parent.is_dir())
        disk = os.stat(folder).st_dev
        wanted[disk] = (folder, wanted.get(disk, (None, 0))[1] + item.size)
    for folder, size in wanted.values():
        free = shutil.disk_usage(folder).free
        need(size < free, f"the disk of {folder} has {free / 1e9:.1f} GB free, and "
             f"{size / 1e9:.1f} GB are to be written there; make room, or name paths on another "
             "disk, such as data.root=/scratch/drive")


# ---- the command -------------------------------------------------------------------------------

def write(item):
    """Under another name, then renamed: what is broken off leaves no half file that counts."""
    item.path.parent.mkdir(parents=True, exist_ok=True)
    partial = item.path.with_name(item.path.name + ".partial")
    try:
        item.write(partial)
        partial.replace(item.path)
    finally:
        partial.unlink(missing_ok=True)


def make(items):
    """Write items, note and say what was written: weights one by one, clips all at once."""
    groups = {}
    for item in items:
        groups.setdefault(item.path if item.path.suffix in WEIGHTS else item.home, []).append(item)
    for path, group in groups.items():
        began, home = time.perf_counter(), group[0].home
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(write, group))
        written = {str(item.path.relative_to(home)): [stamp(item.path), item.recipe]
                   for item in group}
        write_note(home, read_note(home) | written)
        size = sum(item.path.stat().st_size for item in group)
        files = f"{len(group)} files, " if len(group) > 1 else ""
        seconds = time.perf_counter() - began
        print(f"wrote {path}: {files}{size:,} bytes, {seconds:.1f} s", flush=True)


def clear_leftovers(items):
    """Delete our videos that this config does not list: its `check` would call the clips bad."""
    wanted = {item.path for item in items}
    for home in {item.home for item in items}:
        for name, (written, _) in read_note(home).items():
            path = home / name
            if name.startswith("videos/") and path not in wanted and path.exists():
                if stamp(path) == written:
                    path.unlink()


def remove(items):
    """Delete what the notes beside the items list, but for files that somebody has replaced."""
    for home in sorted({item.home for item in items}):
        note = read_note(home)
        there = [home / name for name in note if (home / name).exists()]
        ours = [path for path in there if stamp(path) == note[str(path.relative_to(home))][0]]
        replaced = [str(path) for path in there if path not in ours]
        for path in [*ours, home / NOTE]:
            path.unlink(missing_ok=True)
        below = {parent for name in note for parent in (home / name).parents}
        for folder in sorted(below, reverse=True):  # the deepest first
            if folder.is_relative_to(home) and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        rest = f"; replaced since, and left alone: {', '.join(replaced)}" if replaced else ""
        print(f"removed {len(ours)} files of {home}{rest}")


def next_steps(words, ranks):
    """The commands of a rehearsal, in order; `words` are the config and its overrides."""
    define, run = "", shlex.join(words)
    if len(words) > 1:
        define, run = f"\n    RUN=({run})", '"${RUN[@]}"'
    return f"""
next:{define}
    python train.py {run} --dryrun
    python data.py check {run}
    torchrun --nproc_per_node={ranks} train.py {run} \\
        trainer.max_iter=20 trainer.logging_iter=1 checkpoint.save_iter=10
at the end:
    python -m configs.rehearsal {run} --remove"""


def main(argv):
    """Exit status: 0, or 2 for a mistake that a sentence on stderr explains."""
    parser = argparse.ArgumentParser(prog="python -m configs.rehearsal",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--remove", action="store_true", help="delete what this command wrote")
    options = parser.parse_intermixed_args(argv)
    try:
        cfg = load_config(options.config, options.overrides)
        need(options.clips > 0, f"--clips is {options.clips}; it must be positive")
        items = items_of(cfg, options.clips)
        if options.remove:
            remove(items)
            return 0
        states = [(state_of(item), item) for item in items]
        todo = [item for state, item in states if state in ("missing", "stale")]
        check_disk(todo)
        clear_leftovers(items)
        make(todo)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for state, meaning in (("ours", "there already"), ("foreign", "NOT made up, left alone")):
        paths = [str(item.path) for s, item in states if s == state]
        if paths:
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            print(f"{meaning}: {', '.join(paths[:3])}{more}")
    print(next_steps([options.config, *options.overrides], cfg.parallel.tp))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
