"""Pictures that a person compares: labelled videos and contact sheets of samples, uint8 arrays.

`write_sample` and `write_sheet` are what a run calls; the rest is what they are made of.

Letters: F frames, H W pixels of a tile (one view of one video at the size it is shown).
"""

import math
import subprocess
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf

from configs.video import ffmpeg, write_video

VIDEO_TILE, SHEET_TILE = 640, 208  # widths that make a video of 1920 and a sheet of 1944 pixels
GAP = 4  # pixels between the tiles of a sheet; even, as H.264 wants

# Letters of 5 x 7 pixels, a number a row, its bits the pixels from left to right.
FONT = {"A": (14, 17, 17, 31, 17, 17, 17), "C": (14, 17, 16, 16, 16, 17, 14),
        "E": (31, 16, 16, 30, 16, 16, 31), "L": (16, 16, 16, 16, 16, 16, 31),
        "M": (17, 27, 21, 21, 17, 17, 17), "N": (17, 25, 21, 19, 17, 17, 17),
        "O": (14, 17, 17, 17, 17, 17, 14), "P": (30, 17, 17, 30, 16, 16, 16),
        "R": (30, 17, 17, 30, 20, 18, 17), "S": (15, 16, 16, 14, 1, 1, 30),
        "T": (31, 4, 4, 4, 4, 4, 4)}


def tile_size(height, width, wanted):
    """(height, width), even, of a picture shown at most `wanted` wide; small ones grow by whole
    factors, so that their pixels stay what they are."""
    if width <= wanted:
        factor = wanted // width
        return factor * height // 2 * 2, factor * width // 2 * 2
    return round(height * wanted / width / 2) * 2, wanted


def tiles(video, wanted):
    """uint8 (3, F, H, W) -> (F, h, w, 3) at the size of `tile_size`."""
    size = tile_size(*video.shape[2:], wanted)
    shrinks = size[1] < video.shape[3]
    resize = dict(mode="bilinear", antialias=True) if shrinks else dict(mode="nearest")
    parts = [nnf.interpolate(frames.float(), size, **resize)
             for frames in video.transpose(0, 1).split(8)]  # a few at a time: floats are large
    frames = torch.cat([part.round().to(torch.uint8).cpu() for part in parts])
    return frames.permute(0, 2, 3, 1).numpy()


def label(frames, text):
    """Writes a text of FONT's letters into the upper left corner of (F, H, W, 3), in place."""
    rows = np.zeros((9, 6 * len(text) + 1), bool)
    for i, letter in enumerate(text.upper()):
        for y, bits in enumerate(FONT[letter]):
            for x in range(5):
                rows[y + 1, 6 * i + x + 1] = bits >> (4 - x) & 1
    scale = max(1, frames.shape[2] // 160)
    rows = rows.repeat(scale, 0).repeat(scale, 1)[: frames.shape[1], : frames.shape[2]]
    corner = frames[:, : rows.shape[0], : rows.shape[1]]
    corner[:] = np.where(rows[..., None], 255, corner // 4)  # white on what was there, darkened


def beside(columns):
    """{label: (F, h, w, 3) tiles} -> one video (F, h, sum of w, 3)."""
    columns = {name: frames.copy() for name, frames in columns.items()}
    for name, frames in columns.items():
        label(frames, name)
    return np.concatenate([*columns.values()], axis=2)


def sheet_row(columns, moments=3):
    """{label: (F, h, w, 3)} -> (h, W, 3): the columns at the first, middle and last moment."""
    length = len(next(iter(columns.values())))
    rows = []
    for frame in np.linspace(0, length - 1, moments).round().astype(int):
        picture = beside({name: frames[frame : frame + 1] for name, frames in columns.items()})[0]
        rows.append(np.pad(picture, ((0, GAP), (0, 2 * GAP), (0, 0)), constant_values=255))
    return np.concatenate(rows, axis=1)


Comparison = namedtuple("Comparison", "video row psnr")  # (F, H, W, 3), (H, W, 3), dB or None


def compare(views) -> Comparison:
    """What `views` show, an iterable of {"control" | "sample" | "real": uint8 (3, F, H, W)}.

    One view at a time is held at full size. The first of several views is given to the model as it
    is, so it does not count for the PSNR.
    """
    videos, rows, ratios = [], [], {}
    for columns in views:
        small = {name: tiles(video, SHEET_TILE) for name, video in columns.items()}
        rows.append(sheet_row(small))
        videos.append(beside({name: tiles(v, VIDEO_TILE) for name, v in columns.items()}))
        if "real" in columns and columns["real"].any():  # of a view without video it is black
            ratios[len(rows)] = psnr(columns["sample"], columns["real"])
    made = [ratio for view, ratio in ratios.items() if view > 1 or len(rows) == 1]
    mean = sum(made) / len(made) if made else None
    return Comparison(np.concatenate(videos, axis=1), np.concatenate(rows), mean)


def decoded(tokenizer, clip, hint, out, latents):
    """View after view {"control" | "sample" | "real": uint8 (3, F, H, W)}, for `compare`.

    A sample `clip` of data.py may hold pixels; what it has none of is decoded from the latents
    (1, 16, V*T, H, W): the control's, the sample's, the real ones or None.
    """
    views = len(clip["view_index"])

    def decode(x, view):
        return tokenizer.decode_views(x.unflatten(2, (views, -1))[:, :, view], 1)[0, 0].cpu()

    for view in range(views):
        columns = {"control": clip["hint"][view] if "hint" in clip else decode(hint, view),
                   "sample": decode(out, view)}
        if latents is not None:
            columns["real"] = clip["video"][view] if "video" in clip else decode(latents, view)
        yield columns


Shown = namedtuple("Shown", "row psnr problem")  # as in Comparison; why nothing could be written


def write_sample(stem, clips, i, tokenizer, hint, out, latents) -> Shown:
    """{stem}_{clip}.mp4 of held-out clip i: control | sample | real, a row a view."""
    try:
        clip = clips.shown(i)
        shown = compare(decoded(tokenizer, clip, hint, out, latents))
        write_video(f"{stem}_{clip.get('clip', i)}.mp4", shown.video, float(clip["fps"]), crf=23)
        return Shown(shown.row, shown.psnr, None)
    except (OSError, RuntimeError, ValueError) as error:
        return Shown(None, None, f"the sample of clip {i} could not be written: {error}")


def write_sheet(path, shown) -> list[str]:
    """One picture of all `Shown`; what could not be written, in sentences."""
    rows = [one.row for one in shown if one.row is not None]
    try:
        if rows:
            write_png(path, np.concatenate(rows))
    except (OSError, RuntimeError) as error:
        return [f"the contact sheet could not be written: {error}"]
    return []


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two uint8 tensors (3, F, H, W); equal ones give 100."""
    parts = zip(a.split(8, 1), b.to(a.device).split(8, 1))  # a few frames at a time
    error = sum((x.double() - y.double()).square().sum().item() for x, y in parts) / a.numel()
    return 100.0 if error == 0 else 10 * math.log10(255**2 / error)


def write_png(path, picture):
    """Writes uint8 (H, W, 3)."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([ffmpeg(), "-v", "error", "-y", "-f", "rawvideo",
                           "-pix_fmt", "rgb24", "-s", f"{picture.shape[1]}x{picture.shape[0]}",
                           "-i", "-", "-frames:v", "1", "-update", "1", f"file:{path}"],
                          input=np.ascontiguousarray(picture).tobytes(), capture_output=True)
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{ffmpeg()} could not write {path}: {message}")


def read_png(path):
    """uint8 (H, W, 3)."""
    width, height = (int.from_bytes(Path(path).read_bytes()[i : i + 4], "big") for i in (16, 20))
    done = subprocess.run([ffmpeg(), "-v", "error", "-i", f"file:{path}", "-f", "rawvideo",
                           "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(height, width, 3)
