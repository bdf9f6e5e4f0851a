"""Clips on disk -> samples: video windows, control videos, text embeddings, latents in a cache (SPEC sections 6 and 7).

    python data.py check CONFIG [key.sub=value ...]     what is in data.root, what is wrong with it
    python data.py cache CONFIG [key.sub=value ...]     encode a few windows of every clip into data.cache

Letters: B batch, V views, F frames, H W pixels, T h w latent frames, height, width, M text tokens per view.
"""
import functools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# Views in the order of the model, and the number that the model knows each by.
VIEWS = {"pinhole_front": 0, "pinhole_front_left": 1, "pinhole_front_right": 2, "pinhole_side_left": 4,
         "pinhole_side_right": 5}
FRONT = "pinhole_front"


class BadClip(ValueError):
    """A file of one clip that cannot be used; the loader goes on with another clip."""


# ---------------------------------------------------------------------------------------------------------- ffmpeg

@functools.lru_cache(maxsize=None)
def ffmpeg():
    """Path of the first usable ffmpeg (5.1 or later): the one on PATH, else the one imageio-ffmpeg carries."""
    found = [shutil.which("ffmpeg")]
    try:
        import imageio_ffmpeg
        found.append(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        pass  # not installed, or installed without its program
    # 5.1 brought -fps_mode, and later releases dropped its predecessor: whoever knows it will do.
    trial = "-v quiet -f lavfi -i color=s=16x16 -frames:v 1 -fps_mode passthrough -f null -".split()
    for program in filter(None, found):
        if subprocess.run([program, *trial], stdin=subprocess.DEVNULL).returncode == 0:
            return program
    raise FileNotFoundError(f"no ffmpeg of release 5.1 or later among {list(filter(None, found))}; "
                            "run 'pip install imageio-ffmpeg' or put one on PATH")


class Probe(NamedTuple):
    frames: int
    fps: float
    width: int
    height: int


def probe(path):
    """Frames, frames per second and size of a video file, remembered as long as the file does not change."""
    path = Path(path)
    if not path.is_file():
        raise BadClip(f"{path} is missing")
    stat = path.stat()
    return _probe(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=None)
def _probe(path, size, mtime):
    """Lists the packets without decoding them: imageio-ffmpeg carries no ffprobe."""
    done = subprocess.run([ffmpeg(), "-v", "error", "-nostdin", "-i", path, "-map", "0:v:0", "-c", "copy",
                           "-f", "framecrc", "-"], capture_output=True, text=True, errors="replace")
    header = dict(re.findall(r"^#(tb|dimensions) 0: (.+)$", done.stdout, re.M))
    # stream, dts, pts, duration, bytes, checksum, flags; 0x4 marks packets that an edit list hides
    packets = [line.split(",") for line in done.stdout.splitlines() if line.startswith("0,")]
    packets = [p for p in packets if not any(int(f, 16) & 4 for f in re.findall(r"F=(0x\w+)", p[-1]))]
    if done.returncode or done.stderr or not packets or len(header) != 2:
        raise BadClip(f"{path} is not a readable video: {(done.stderr.strip() or 'no frames').splitlines()[0]}")
    times = [int(p[2]) for p in packets]  # in decoding order
    ticks = (max(times) - min(times)) / (len(times) - 1) if len(times) > 1 else int(packets[0][3])
    if ticks <= 0:
        raise BadClip(f"{path} has no usable time stamps, so its fps is unknown")
    return Probe(len(times), float(1 / (Fraction(header["tb"]) * Fraction(ticks))),
                 *map(int, header["dimensions"].split("x")))


def decode(path, start, frames):
    """Frames start .. start+frames-1 of a video as ffmpeg's default RGB: uint8 (F, H, W, 3). BadClip on any damage."""
    return decode_together([path], start, frames)[0]


def decode_together(paths, start, frames):
    """The same window of several videos of one size: uint8 (len(paths), F, H, W, 3).

    One process for all: starting one costs more than decoding a small window.
    """
    info = probe(paths[0])
    out = np.empty((len(paths), frames, info.height, info.width, 3), np.uint8)
    inputs, chains, labels = [], [], ""
    for i, path in enumerate(paths):
        if start + frames > probe(path).frames:
            raise BadClip(f"{path} has {probe(path).frames} frames, {start + frames} are needed")
        inputs += ["-threads", "1", "-noautorotate", "-i", path]
        chains.append(f"[{i}:v:0]trim=start_frame={start}:end_frame={start + frames},format=rgb24,setsar=1[v{i}]")
        labels += f"[v{i}]"
    command = [ffmpeg(), "-v", "error", "-nostdin", *inputs, "-filter_complex",
               ";".join([*chains, f"{labels}concat=n={len(paths)}"]), "-fps_mode", "passthrough", "-f", "rawvideo", "-"]
    # Messages go to a file: a full pipe of them would block ffmpeg while we wait for its frames.
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
        size = process.stdout.readinto(memoryview(out).cast("B"))
        process.stdout.close()
        process.wait()
        log.seek(0)
        message = log.read().decode(errors="replace").strip()
    # ffmpeg conceals damage and exits 0; what it made up must not be trained on.
    if process.returncode or message or size != out.nbytes:
        for path in paths if len(paths) > 1 else ():
            decode(path, start, frames)  # names the file that is damaged
        raise BadClip(f"{paths[0]} does not decode: {(message or 'the stream ends early').splitlines()[0]}")
    return out


def write_video(path, frames, fps, crf=18):
    """Writes uint8 (F, H, W, 3) as H.264 yuv420p; H and W must be even."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24",
                           "-s", f"{frames.shape[2]}x{frames.shape[1]}", "-r", str(fps), "-i", "-", "-c:v", "libx264",
                           "-threads", "1", "-preset", "veryfast", "-crf", str(crf), "-pix_fmt", "yuv420p", path],
                          input=np.asarray(frames).tobytes(), capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{ffmpeg()} could not write {path}: {done.stderr.decode(errors='replace').strip()}")


# ---------------------------------------------------------------------------------------------------------- pixels

def fit(frames, height, width):
    """Resizes and pads uint8 (F, H, W, 3) or (F, 3, H, W) to the target size (SPEC section 7).

    Returns (3, F, height, width) uint8, a view where possible, and the padding mask (1, height, width), 1 on padding.
    """
    frames = torch.as_tensor(frames)
    if frames.shape[-1] == 3:
        frames = frames.permute(0, 3, 1, 2)                                            # (F, 3, H, W)
    h, w = frames.shape[2:]
    scale = min(height / h, width / w)
    h, w = math.floor(scale * h + 0.5), math.floor(scale * w + 0.5)
    if (h, w) != tuple(frames.shape[2:]):
        frames = torch.cat([_resize(some, h, w) for some in frames.split(8)])          # float copies stay small
    top, left = (height - h) // 2, (width - w) // 2
    mask = torch.ones(1, height, width)
    mask[:, top:top + h, left:left + w] = 0
    if (h, w) != (height, width):
        reflect = height - h - top < h and width - w - left < w
        rows, columns = _source(h, top, height, reflect), _source(w, left, width, reflect)
        frames = frames.index_select(2, rows).index_select(3, columns)
    return frames.transpose(0, 1), mask                                                # (3, F, H, W)


def _resize(frames, h, w):
    # In float32: torch's uint8 kernel also rounds between its two passes. Contiguous: a third faster, same result.
    frames = nnf.interpolate(frames.contiguous().float(), (h, w), mode="bicubic", align_corners=False, antialias=True)
    return frames.clamp_(0, 255).round_().to(torch.uint8)


def _source(size, before, total, reflect):
    """Which row (or column) of the image each row of the padded image shows."""
    at = torch.arange(total) - before
    if reflect:
        return (size - 1) - ((size - 1) - at.abs()).abs()
    return at.clamp(0, size - 1)


# ------------------------------------------------------------------------------------------------------------ text

def _latin1(text, encoding):
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return text.encode("latin1")


_EMPTY = np.zeros(0)
_ADMITTED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _latin1}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2; the functions are taken from numpy's own pickles
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = _EMPTY.__reduce__()[0]
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = _EMPTY.__reduce_ex__(5)[0]


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only numpy arrays and plain containers may be")
        return _ADMITTED[module, name]


def load_pickle(path):
    """Opens a pickle of numpy arrays and plain containers; anything else is refused (BadClip), nothing of it runs."""
    try:
        with open(path, "rb") as file:
            return _ArraysOnly(file).load()
    except FileNotFoundError:
        raise BadClip(f"{path} is missing") from None
    except Exception as error:  # damaged pickles raise every kind of error
        raise BadClip(f"{path} is not a usable pickle: {error}") from error


def load_text(path, tokens, width):
    """The text embedding in a pickle of any shape of SPEC section 7, cut or zero-padded: float32 (tokens, width)."""
    rows = _text_rows(path, width)[:tokens]
    text = torch.zeros(tokens, width)
    text[:len(rows)] = torch.from_numpy(rows.astype(np.float32))
    return text


def _text_rows(path, width):
    value = load_pickle(path)
    if isinstance(value, dict):
        try:
            value = value["pickle"]["ground_truth"]["embeddings"]["t5_xxl"]
        except (KeyError, TypeError):
            raise BadClip(f"{path} is a dict without pickle/ground_truth/embeddings/t5_xxl") from None
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise BadClip(f"{path} holds {type(value).__name__} where a float array is expected")
    rows = value[0] if value.ndim == 3 and len(value) == 1 else value
    if rows.ndim != 2 or rows.shape[1] != width or not np.isfinite(rows).all():
        raise BadClip(f"{path} holds an array {value.shape}; finite rows of width {width} are expected")
    return rows


# ----------------------------------------------------------------------------------------------------------- clips

class WaymoClips:
    """The clips of a data root in the layout of SPEC section 7; `sample(n)` is a pure function of n and the files.

    Clips that cannot be used are replaced by the next of the epoch's order, named on stderr and kept in `bad`.
    """

    def __init__(self, root, hint, num_frames, views, height, width, seed, text_tokens=512, text_width=1024):
        self.root, self.hint, self.num_frames, self.views = Path(root), hint, num_frames, views
        self.height, self.width, self.seed = height, width, seed
        self.text_tokens, self.text_width = text_tokens, text_width
        self.bad, self.lock = {}, threading.Lock()
        if hint not in ("lidar", "hdmap"):
            raise ValueError(f"data.hint is {hint!r}; it must be lidar or hdmap")
        if not 1 <= views <= len(VIEWS):
            raise ValueError(f"data.views is {views}; it must be 1 to {len(VIEWS)}")
        videos = self.root / "videos" / FRONT
        for folder in (self.root, videos, self.root / hint / FRONT):
            if not folder.is_dir():
                raise FileNotFoundError(f"there is no folder {folder}; set data.root to a Waymo drive")
        self.clips = sorted(path.stem for path in videos.glob("*.mp4"))
        if not self.clips:
            raise FileNotFoundError(f"there are no clips (*.mp4) in {videos}")
        ffmpeg()

    def __len__(self):
        return len(self.clips)

    def sample(self, n):
        """Global sample n -> dict: video and hint uint8 (V,3,F,H,W), text (V*M, width), fps (), padding_mask (1,H,W),
        view_index (V,), clip, start. ValueError with every reason if no clip at all is usable."""
        epoch, index = divmod(n, len(self))
        order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self))
        reasons = {}
        for i in np.roll(order, -index):
            clip = self.clips[i]
            try:
                return self.load(clip, np.random.default_rng([self.seed, epoch, 1 + index]))
            except BadClip as error:
                reasons[clip] = str(error)
                self._note(clip, str(error))
        listed = "\n".join(f"  {clip}: {reason}" for clip, reason in list(reasons.items())[:20])
        raise ValueError(f"none of the {len(self)} clips in {self.root} is usable (at most 20 are listed):\n{listed}")

    def _note(self, clip, reason):
        with self.lock:
            if clip in self.bad:
                return
            self.bad[clip] = reason
        print(f"warning: clip {clip} is skipped: {reason}", file=sys.stderr, flush=True)

    def load(self, clip, rng):
        """One sample of one clip, its views and window drawn from `rng`; BadClip if a file of it is no good."""
        views = self.draw_views(rng)
        start, fps = self.draw_window(clip, views, rng)
        paths = [self.path(kind, view, clip) for kind in ("videos", self.hint) for view in views]
        pairs = [fit(frames, self.height, self.width) for frames in decode_together(paths, start, self.num_frames)]
        video, hint = torch.stack([frames for frames, _ in pairs]).chunk(2)            # (V, 3, F, H, W) each
        return {"video": video, "hint": hint, "text": self.text(clip, views),
                "fps": torch.tensor(fps, dtype=torch.float32), "padding_mask": pairs[0][1],
                "view_index": torch.tensor([VIEWS[view] for view in views]), "clip": clip, "start": start}

    def draw_views(self, rng):
        others = sorted(rng.choice(len(VIEWS) - 1, self.views - 1, replace=False) + 1)
        return [list(VIEWS)[i] for i in (0, *others)]

    def draw_window(self, clip, views, rng):
        """First frame and fps of a window that every view and control video has."""
        paths = [self.path(kind, view, clip) for kind in ("videos", self.hint) for view in views]
        infos = [probe(path) for path in paths]
        for path, info in zip(paths, infos):
            if info[2:] != infos[0][2:]:
                raise BadClip(f"{path} is {info.width}x{info.height}, {paths[0]} {infos[0].width}x{infos[0].height}")
            if info.frames < self.num_frames:
                raise BadClip(f"{path} has {info.frames} frames, data.num_frames is {self.num_frames}")
        start = int(rng.integers(min(info.frames for info in infos) - self.num_frames + 1))
        return start, infos[0].fps

    def path(self, kind, view, clip):
        return self.root / kind / view / f"{clip}.mp4"

    def text_path(self, clip, view):
        """The front view's text is the clip's caption, the others' their view's prefix."""
        captions = [self.root / "t5_xxl" / view / f"{name}.pkl" for name in (re.sub(r"_\d+$", "", clip), clip)]
        prefix = [] if view == FRONT else [self.root / "cache" / f"prefix_{view}.pkl"]
        paths = prefix + captions
        return next((path for path in paths if path.is_file()), paths[0])

    def text(self, clip, views):
        return torch.cat([load_text(self.text_path(clip, view), self.text_tokens, self.text_width)
                          for view in views])                                          # (V*M, width)


def prefetch(fn, numbers, workers=2, depth=None):
    """Yields fn(n) for n in `numbers`, in order, from `workers` threads, at most `depth` samples ahead.

    Threads are enough: ffmpeg, numpy's reads and torch release the interpreter lock. workers=0 calls fn in line.
    """
    if workers == 0:
        yield from map(fn, numbers)
        return

    pool, pending = ThreadPoolExecutor(workers, "prefetch"), deque()
    try:
        for n in numbers:
            pending.append(pool.submit(fn, n))
            if len(pending) >= (depth or workers + 1):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def collate(samples):
    """A list of samples -> a batch: tensors stacked along a new first axis B, everything else in lists."""
    return {key: torch.stack([sample[key] for sample in samples]) if torch.is_tensor(value)
            else [sample[key] for sample in samples] for key, value in samples[0].items()}


# ------------------------------------------------------------------------------------------------------ latent cache

class CachedClips(WaymoClips):
    """The same protocol for windows that `build` stored: a sample holds `latents` and `hint_latents`, bfloat16
    (16, V*T, h, w), in place of pixels. A clip whose entry is missing or stale counts as bad."""

    def __init__(self, folder, windows, tokenizer, **settings):
        super().__init__(**settings)
        self.folder, self.windows, self.tokenizer = Path(folder), windows, _signature(tokenizer)

    def load(self, clip, rng):
        path, views, identity = self.entry(clip, int(rng.integers(self.windows)))
        if not is_fresh(path, identity):
            raise BadClip(f"{path} is {'stale' if path.is_file() else 'missing'}; run: python data.py cache CONFIG")
        with safe_open(path, "pt") as file:
            sample = {key: file.get_tensor(key) for key in file.keys()}
        sample.update(padding_mask=sample["padding_mask"].float(), start=int(sample["start"]))
        return sample | {"text": self.text(clip, views), "clip": clip}

    def entry(self, clip, window):
        """File and views of a stored window, and as JSON everything that its content depends on."""
        rng = self.window_rng(clip, window)
        views = self.draw_views(rng)
        start, _ = self.draw_window(clip, views, rng)
        sources = [_signature(self.path(kind, view, clip)) for kind in ("videos", self.hint) for view in views]
        identity = dict(frames=self.num_frames, size=[self.height, self.width], hint=self.hint, views=views,
                        start=start, seed=self.seed, tokenizer=self.tokenizer, sources=sources)
        return self.folder / f"{clip}_window{window}.safetensors", views, json.dumps(identity)

    def window_rng(self, clip, window):
        return np.random.default_rng([self.seed, zlib.crc32(clip.encode()), window])

    def build(self, encode, workers=2):
        """Stores what is missing or stale; `encode` takes uint8 (B,V,3,F,H,W). Yields (clip, window, outcome)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = [(clip, window) for clip in self.clips for window in range(self.windows)]
        for job, (outcome, path, identity, store) in zip(jobs, prefetch(self.fetch, jobs, workers)):
            if store:
                for pixels, latents in (("video", "latents"), ("hint", "hint_latents")):
                    store[latents] = encode(store.pop(pixels)[None])[0].cpu().contiguous()
                partial = path.with_suffix(".partial")  # an interrupted write leaves no entry
                save_file(store, partial, {"identity": identity})
                os.replace(partial, path)
            yield *job, outcome

    def fetch(self, job):
        """What `build` needs for one (clip, window): outcome, file, identity, tensors if there is work to do."""
        try:
            path, _, identity = self.entry(*job)
            if is_fresh(path, identity):
                return "kept", path, identity, None
            sample = super().load(job[0], self.window_rng(*job))
            store = {key: sample[key] for key in ("video", "hint", "fps", "view_index")}
            store |= {"padding_mask": sample["padding_mask"].bool(), "start": torch.tensor(sample["start"])}
            return "encoded", path, identity, store
        except BadClip as error:
            return f"BAD: {error}", None, None, None


def is_fresh(path, identity):
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() == {"identity": identity}
    except (FileNotFoundError, SafetensorError):  # not there, cut short
        return False


def _signature(path):
    """Names, sizes and modification times by which a changed file (or folder of files) is recognised."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


# ----------------------------------------------------------------------------------------------------- synthetic drive

YAW = dict(zip(VIEWS, (0, -45, 45, -90, 90)))  # degrees to the right of the driving direction
CARS, EGO_SPEED, CAMERA_HEIGHT, FAR = 6, 8.0, 1.6, 75.0  # number, m/s, m, m


def write_drive(root, clips=4, frames=40, height=64, width=96, fps=10, seed=0, text_width=1024):
    """Writes a small made-up drive in the layout of SPEC section 7, unless it is there already.

    A road with lane marks and cars, colours drawn per clip and told by its text; lidar and HD map show the same scene.
    """
    root, settings = Path(root), [clips, frames, height, width, fps, seed, text_width]
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as scratch:  # a broken-off drive never gets the name
            drive = Path(scratch) / "drive"
            for i in range(clips):
                _write_clip(drive, f"synthetic_{i:04d}", settings, np.random.default_rng([seed, i]))
            for i, view in enumerate(VIEWS):
                words = np.random.default_rng([seed, 1, i]).standard_normal((16, text_width), np.float32)
                _write_pickle(drive / "cache" / f"prefix_{view}.pkl", words)
            (drive / "drive.json").write_text(json.dumps(settings))
            try:
                drive.rename(root)
            except OSError:
                if not root.exists():  # else another process finished first
                    raise
    note = root / "drive.json"
    if not note.is_file() or json.loads(note.read_text()) != settings:
        raise ValueError(f"{root} exists and is not the synthetic drive asked for; remove it or set data.root")
    return root


def _write_pickle(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol=4))


def _write_clip(root, name, settings, rng):
    _, frames, height, width, fps, _, text_width = settings
    palette = rng.uniform(0, 255, (5, 3))                                              # sky, grass, road, two cars
    cars = np.stack([rng.choice([-3.6, 0.0, 3.6], CARS), rng.uniform(0, 70, CARS), rng.uniform(4, 14, CARS)], 1)

    def draw_view(view):
        pictures = render(frames, height, width, fps, math.radians(YAW[view]), palette, cars)
        for kind, picture in zip(("videos", "lidar", "hdmap"), pictures):
            write_video(root / kind / view / f"{name}_0.mp4", picture, fps)

    with ThreadPoolExecutor() as pool:
        list(pool.map(draw_view, VIEWS))
    words = np.random.default_rng(0).standard_normal((palette.size, text_width), np.float32)
    told = (palette.reshape(-1, 1) / 127.5 - 1).astype(np.float32) * words            # one row a colour channel
    _write_pickle(root / "t5_xxl" / FRONT / f"{name}.pkl", [told])


def render(frames, height, width, fps, yaw, palette, cars):
    """Ray casts the road scene: camera, lidar and HD-map video, each uint8 (F, H, W, 3)."""
    across, down = [(np.arange(n) - (n - 1) / 2) / (width / 2) for n in (width, height)]
    u, v = np.meshgrid(across, down)
    # x right, y down, z ahead in metres; a ray's part along the camera's axis is 1, so its length is depth.
    rays = np.stack([math.cos(yaw) * u + math.sin(yaw), v, math.cos(yaw) - math.sin(yaw) * u])  # (3, H, W)
    rays = np.where(np.abs(rays) < 1e-6, 1e-6, rays)
    seconds = np.arange(frames)[:, None, None] / fps                                   # (F, 1, 1)
    depth = np.where(rays[1] > CAMERA_HEIGHT / FAR, CAMERA_HEIGHT / rays[1], np.inf) + 0 * seconds  # (F, H, W)
    ground = np.where(depth < FAR, depth, 0)
    x, z = rays[0] * ground, rays[2] * ground + EGO_SPEED * seconds
    edge = np.abs(np.abs(x) - 5.4) < 0.25
    mark = (np.abs(np.abs(x) - 1.8) < 0.2) & (z % 6 < 3)
    thing = np.where(ground == 0, 0, np.where(np.abs(x) < 5.4, 2, 1))                  # a row of the palette
    car = np.zeros(depth.shape, int)                                                   # 0: none
    for i, (lane, ahead, speed) in enumerate(cars):
        depth, car = _park(depth, car, i + 1, rays, lane, (ahead + (speed - EGO_SPEED) * seconds + 10) % 80 - 10)
    thing = np.where(car > 0, 3 + car % 2, thing)
    edge, mark = [line & (ground > 0) & (car == 0) for line in (edge, mark)]
    outline = (car != np.roll(car, 1, 1)) | (car != np.roll(car, 1, 2))
    camera = np.where((edge | mark)[..., None], 240, palette[thing]) * (1 - depth.clip(0, FAR) / FAR / 2)[..., None]
    lidar = np.where(depth <= FAR, 255 * depth.clip(0, FAR) / FAR, 0)[..., None].repeat(3, -1)
    hdmap = np.zeros(camera.shape)
    for line, colour in ((edge, (255, 0, 0)), (mark, (0, 255, 0)), (outline, (0, 128, 255))):
        hdmap[line] = colour
    return [picture.round().astype(np.uint8) for picture in (camera, lidar, hdmap)]


def _park(depth, car, number, rays, x, z):
    """Puts a car, a box around (x, z), in front of what the rays have met so far."""
    near, far = -np.inf, np.inf
    for centre, half, ray in zip((x, CAMERA_HEIGHT - 1.1, z), (0.9, 1.1, 2.2), rays):
        walls = (centre - half) / ray, (centre + half) / ray
        near, far = np.maximum(near, np.minimum(*walls)), np.minimum(far, np.maximum(*walls))
    hit = (near > 0.5) & (near < far) & (near < depth)
    return np.where(hit, near, depth), np.where(hit, number, car)


# ------------------------------------------------------------------------------------------------------------ commands

def freezes(path, least=5):
    """Runs of at least `least` (near) identical frames of a video, as (first frame, length)."""
    frames = decode(path, 0, probe(path).frames)
    # Compression leaves a trace of a grey level in frames that were identical.
    still = [np.abs(a.astype(np.int16) - b).mean() < 0.1 for a, b in zip(frames, frames[1:])]
    runs = "".join("s" if s else "." for s in still)
    return [(run.start(), len(run.group()) + 1) for run in re.finditer("s{%d,}" % (least - 1), runs)]


def inspect(clips, clip):
    """What `check` says of one clip, as lines, and whether it is usable in every view it may be asked for."""
    lines, views = [clip], list(VIEWS) if clips.views > 1 else [FRONT]
    try:
        info = probe(clips.path("videos", FRONT, clip))
        present = sum(clips.path("videos", view, clip).is_file() for view in VIEWS)
        rows = len(_text_rows(clips.text_path(clip, FRONT), clips.text_width))
        lines[0] += (f": {info.frames} frames, {info.fps:g} fps, {info.width}x{info.height}, {present} views, "
                     f"{rows} text rows")
        clips.text(clip, views)
        clips.draw_window(clip, views, np.random.default_rng(0))
        for view in views:
            path = clips.path("videos", view, clip)
            decode(path, 0, probe(path).frames)
            lines += [f"    {clips.hint}/{view} stands still for {length} frames from frame {first} on"
                      for first, length in freezes(clips.path(clips.hint, view, clip))]
    except BadClip as error:
        return [*lines, f"    BAD: {error}"], False
    return lines, True


def check(clips, workers):
    """Prints what is known of every clip; the exit status is 1 if no clip is usable."""
    usable = 0
    for lines, good in prefetch(functools.partial(inspect, clips), clips.clips, workers):
        print(*lines, sep="\n", flush=True)
        usable += good
    print(f"{usable} of {len(clips)} clips usable")
    return 0 if usable else 1


def cache(clips, config):
    """Brings data.cache up to date; the exit status is 1 if nothing could be stored."""
    if not isinstance(clips, CachedClips):
        raise ValueError("data.cache is not set; give the folder to write to, for example data.cache=cache/lidar")
    from tokenizer import load_tokenizer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config.tokenizer.path, device, torch.bfloat16)
    outcomes = set()
    for clip, window, outcome in clips.build(lambda x: tokenizer.encode_views(x.to(device)), config.data.num_workers):
        print(f"{clip} window {window}: {outcome}", flush=True)
        outcomes.add(outcome)
    return 0 if outcomes & {"kept", "encoded"} else 1


def main(arguments):
    """`check` or `cache`, a configuration and overrides; returns the exit status, 2 for a mistake in using it."""
    if len(arguments) < 2 or arguments[0] not in ("check", "cache"):
        print("usage: python data.py check|cache CONFIG [key.sub=value ...]", file=sys.stderr)
        return 2
    from train import load_config, open_clips
    try:
        config = load_config(arguments[1], arguments[2:])
        clips = open_clips(config)
        if clips is None:
            raise ValueError(f"data.root is {config.data.root}, which has no clips")
        return cache(clips, config) if arguments[0] == "cache" else check(clips, config.data.num_workers)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    import data  # under the name that train imports it by, so that there is one BadClip, not two
    sys.exit(data.main(sys.argv[1:]))
