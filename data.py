"""Clips on disk -> samples: video windows, control videos, text embeddings, latents in a cache (SPEC sections 6 and 7).

    python data.py check CONFIG [key.sub=value ...]     what is in data.root, what is wrong with it
    python data.py cache CONFIG [key.sub=value ...]     encode a few windows of every clip into data.cache

Letters: B batch, V views, F frames, H W pixels, T h w latent frames, height, width, M text tokens per view.
"""
import contextlib
import functools
import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from configs.schema import HELP, Config, load_config

# Views in the order of the model, and the number that the model knows each by.
VIEWS = {"pinhole_front": 0, "pinhole_front_left": 1, "pinhole_front_right": 2, "pinhole_side_left": 4,
         "pinhole_side_right": 5}
FRONT = "pinhole_front"
Probe = namedtuple("Probe", "frames fps width height")  # of a video file


class BadClip(ValueError):
    """A file of one clip that cannot be used; the loader goes on with another clip."""


# ---- video -----------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def ffmpeg():
    """Path of the first usable ffmpeg (5.1 or later): the one on PATH, else the one imageio-ffmpeg carries."""
    found = [shutil.which("ffmpeg")]
    with contextlib.suppress(ImportError, RuntimeError):  # not installed, or installed without its program
        import imageio_ffmpeg
        found.append(imageio_ffmpeg.get_ffmpeg_exe())
    # 5.1 brought -fps_mode, and later releases dropped its predecessor: whoever knows it will do.
    trial = "-v quiet -f lavfi -i color=s=16x16 -frames:v 1 -fps_mode passthrough -f null -".split()
    for program in filter(None, found):
        if subprocess.run([program, *trial], stdin=subprocess.DEVNULL).returncode == 0:
            return program
    raise FileNotFoundError(f"no ffmpeg of release 5.1 or later among {list(filter(None, found))}; "
                            "run 'pip install imageio-ffmpeg' or put one on PATH")


@functools.lru_cache(maxsize=None)
def probe(path):
    """The Probe of a video file, fps in frames per second, remembered by its path. BadClip if it is no readable video.
    It lists the packets without decoding them: imageio-ffmpeg carries no ffprobe."""
    if not Path(path).is_file():
        raise BadClip(f"{path} is missing")
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
    return Probe(len(times), float(1 / Fraction(header["tb"]) / ticks), *map(int, header["dimensions"].split("x")))


def decode(path, start, frames):
    """Frames start .. start+frames-1 of a video as ffmpeg's default RGB: uint8 (F, H, W, 3). BadClip on any damage."""
    info = probe(path)
    out = np.empty((frames, info.height, info.width, 3), np.uint8)
    command = [ffmpeg(), "-v", "error", "-nostdin", "-threads", "1", "-noautorotate", "-i", path, "-map", "0:v:0",
               "-vf", f"trim=start_frame={start}:end_frame={start + frames}", "-fps_mode", "passthrough",
               "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    # Messages go to a file: a full pipe of them would block ffmpeg while we wait for its frames.
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
            size = process.stdout.readinto(memoryview(out).cast("B"))
        log.seek(0)
        message = log.read().decode(errors="replace").strip()
    # ffmpeg conceals damage and exits 0; what it made up must not be trained on.
    if process.returncode or message or size != out.nbytes:
        raise BadClip(f"{path} does not decode: {(message or 'the stream ends early').splitlines()[0]}")
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


def fit(frames, height, width):
    """Resizes and pads uint8 (F, H, W, 3) or (F, 3, H, W) to the target size (SPEC section 7).
    Returns (3, F, height, width) uint8, a view where possible, and the padding mask (1, height, width), True on pads."""
    frames = torch.as_tensor(frames)
    if frames.shape[-1] == 3:
        frames = frames.permute(0, 3, 1, 2)                                            # (F, 3, H, W)
    scale = min(height / frames.shape[2], width / frames.shape[3])
    h, w = (int(scale * size + 0.5) for size in frames.shape[2:])
    if (h, w) != frames.shape[2:]:
        # In float32: torch's uint8 kernel also rounds between its two passes. 8 frames at a time: floats are large.
        floats = (nnf.interpolate(some.contiguous().float(), (h, w), mode="bicubic", align_corners=False,
                                  antialias=True) for some in frames.split(8))
        frames = torch.cat([some.clamp_(0, 255).round_().to(torch.uint8) for some in floats])
    (top, below), (left, right) = [(spare // 2, spare - spare // 2) for spare in (height - h, width - w)]
    mask = nnf.pad(torch.zeros(1, h, w, dtype=torch.bool), (left, right, top, below), value=True)
    if mask.any():
        mode = "reflect" if below < h and right < w else "edge"
        frames = torch.from_numpy(np.pad(frames.numpy(), ((0, 0), (0, 0), (top, below), (left, right)), mode))
    return frames.transpose(0, 1), mask                                                # (3, F, H, W)


# ---- text ------------------------------------------------------------------------------------------------------------

class _ArraysOnly(pickle.Unpickler):
    admitted = {  # what numpy's pickles ask for; numpy 2 says numpy._core where numpy 1 said numpy.core
        "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype,
        "numpy.core.multiarray._reconstruct": np.zeros(0).__reduce__()[0],
        "numpy.core.numeric._frombuffer": np.zeros(0).__reduce_ex__(5)[0],
        "_codecs.encode": lambda text, encoding: text.encode("latin1")}  # the only encoding

    def find_class(self, module, name):
        key = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if key not in self.admitted:
            raise pickle.UnpicklingError(f"it asks for {key}; only numpy arrays and plain containers are admitted")
        return self.admitted[key]


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
    value = load_pickle(path)
    for key in ("pickle", "ground_truth", "embeddings", "t5_xxl"):
        value = value.get(key) if isinstance(value, dict) else value
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise BadClip(f"{path} holds no float array as such, in a list or in pickle/ground_truth/embeddings/t5_xxl")
    rows = value[0] if value.ndim == 3 and len(value) == 1 else value
    if rows.ndim != 2 or rows.shape[1] != width or not np.isfinite(rows).all():
        raise BadClip(f"{path} holds an array {value.shape}; finite rows of width {width} are expected")
    return nnf.pad(torch.from_numpy(rows.astype(np.float32)), (0, 0, 0, tokens - len(rows)))  # a negative pad cuts


# ---- clips -----------------------------------------------------------------------------------------------------------

class WaymoClips:
    """The clips of a data root in the layout of SPEC section 7; `sample(n)` is a pure function of n and the files.
    Clips that cannot be used are replaced by the next of the epoch's order, named on stderr and kept in `bad`."""

    def __init__(self, root, hint, num_frames, views, height, width, seed, text_tokens=512, text_width=1024):
        self.root, self.hint, self.num_frames, self.views = Path(root), hint, num_frames, views
        self.height, self.width, self.seed = height, width, seed
        self.text_tokens, self.text_width = text_tokens, text_width
        self.bad = {}
        if not 1 <= views <= len(VIEWS):
            raise ValueError(f"data.views is {views}; it must be 1 to {len(VIEWS)}")
        videos = self.root / "videos" / FRONT
        for folder in (videos, self.root / hint / FRONT):
            if not folder.is_dir():
                raise FileNotFoundError(f"there is no folder {folder}; set data.root to a Waymo drive with {hint!r}")
        self.clips = sorted(path.stem for path in videos.glob("*.mp4"))
        if not self.clips:
            raise FileNotFoundError(f"there are no clips (*.mp4) in {videos}; set data.root to a Waymo drive")
        ffmpeg()

    def __len__(self):
        return len(self.clips)

    def __str__(self):
        return f"{len(self)} clips in {self.root}"

    def sample(self, n):
        """Global sample n -> dict: video and hint uint8 (V,3,F,H,W), text (V*M, width), fps (), padding_mask (1,H,W),
        view_index (V,), clip, start, files. BadClip with the reasons if no clip at all is usable."""
        epoch, index = divmod(n, len(self))
        order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self))
        for i in np.roll(order, -index):
            clip = self.clips[i]
            try:
                return self.load(clip, np.random.default_rng([self.seed, epoch, 1 + index]))
            except BadClip as error:
                reason = str(error)
                if self.bad.setdefault(clip, reason) is reason:  # atomic: one thread warns, once
                    print(f"warning: clip {clip} is skipped: {reason}", file=sys.stderr, flush=True)
        listed = "\n".join(f"  {clip}: {reason}" for clip, reason in list(self.bad.items())[:20])
        raise BadClip(f"none of the {len(self)} clips in {self.root} is usable (at most 20 are listed):\n{listed}")

    def load(self, clip, rng):
        """One sample of one clip, its views and window drawn from `rng`; BadClip if a file of it is no good."""
        sample = self.draw(clip, rng)
        return sample | self.pixels(sample)

    def draw(self, clip, rng):
        """Draws views and a window that all their files have: the sample but for its pixels.
        Its `files` are those of the videos, then those of the control videos."""
        others = sorted(rng.choice(len(VIEWS) - 1, self.views - 1, replace=False) + 1)
        views = [list(VIEWS)[i] for i in (0, *others)]
        files = [self.path(kind, view, clip) for kind in ("videos", self.hint) for view in views]
        infos = [probe(file) for file in files]
        for file, info in zip(files, infos):
            if info[2:] != infos[0][2:]:
                raise BadClip(f"{file} is {info.width}x{info.height}, {files[0]} {infos[0].width}x{infos[0].height}")
            if info.frames < self.num_frames:
                raise BadClip(f"{file} has {info.frames} frames, data.num_frames is {self.num_frames}")
        start = int(rng.integers(min(info.frames for info in infos) - self.num_frames + 1))
        text = [load_text(self.text_path(clip, view), self.text_tokens, self.text_width) for view in views]
        return {"text": torch.cat(text), "fps": torch.tensor(infos[0].fps), "clip": clip, "start": start,
                "view_index": torch.tensor([VIEWS[view] for view in views]), "files": files}

    def pixels(self, sample):  # of what `draw` drew
        videos = [decode(file, sample["start"], self.num_frames) for file in sample["files"]]
        fitted, masks = zip(*[fit(video, self.height, self.width) for video in videos])
        video, hint = torch.stack(fitted).chunk(2)                                     # (V, 3, F, H, W) each
        return {"video": video, "hint": hint, "padding_mask": masks[0]}

    def path(self, kind, view, clip):
        return self.root / kind / view / f"{clip}.mp4"

    def text_path(self, clip, view):
        """The front view's text is the clip's caption, the others' their view's prefix."""
        paths = [self.root / "t5_xxl" / view / f"{name}.pkl" for name in (re.sub(r"_\d+$", "", clip), clip)]
        if view != FRONT:
            paths.insert(0, self.root / "cache" / f"prefix_{view}.pkl")
        return next(filter(Path.is_file, paths), paths[0])


class CachedClips(WaymoClips):
    """The same protocol for windows that `build` stored: a sample holds `latents` and `hint_latents`, bfloat16
    (16, V*T, h, w), in place of pixels. A clip whose entry is missing or stale counts as bad."""

    def __init__(self, folder, windows, tokenizer, **settings):
        super().__init__(**settings)
        self.folder, self.windows = Path(folder), windows
        if not Path(tokenizer).exists():
            raise FileNotFoundError(f"there is no {tokenizer}; set tokenizer.path to the released folder or a file")
        self.tokenizer = sorted(Path(tokenizer).glob("*")) or [Path(tokenizer)]

    def load(self, clip, rng):
        path, identity, sample = self.entry(clip, int(rng.integers(self.windows)))
        if not is_fresh(path, identity):
            raise BadClip(f"{path} is {'stale' if path.is_file() else 'missing'}; run: python data.py cache CONFIG")
        return sample | load_file(path)

    def entry(self, clip, number):
        """A stored window's file, as JSON everything that its content depends on, and what `draw` says of it."""
        sample = self.draw(clip, np.random.default_rng([self.seed, *clip.encode(), number]))
        sources = self.tokenizer + sample["files"]
        identity = dict(frames=self.num_frames, size=[self.height, self.width], hint=self.hint, start=sample["start"],
                        views=sample["view_index"].tolist(),
                        sources=[[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sources])
        return self.folder / f"{clip}_window{number}.safetensors", json.dumps(identity), sample

    def build(self, encode, workers=2):
        """Stores what is missing or stale; `encode` takes uint8 (B,V,3,F,H,W). Yields (clip, window, outcome)."""
        lock = threading.Lock()

        def store(job):
            try:
                path, identity, sample = self.entry(*job)
                if is_fresh(path, identity):
                    return "kept"
                pixels = self.pixels(sample)
            except BadClip as error:
                self.bad[job[0]] = str(error)
                return f"BAD: {error}"
            with lock:  # one at a time: the tokenizer needs gigabytes
                latents, hint_latents = [encode(pixels[key][None])[0].cpu().contiguous() for key in ("video", "hint")]
            partial = path.with_suffix(".partial")  # an interrupted write leaves no entry
            save_file({"latents": latents, "hint_latents": hint_latents, "padding_mask": pixels["padding_mask"]},
                      partial, {"identity": identity})
            partial.replace(path)
            return "encoded"

        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = [(clip, number) for clip in self.clips for number in range(self.windows)]
        yield from ((*job, outcome) for job, outcome in zip(jobs, prefetch(store, jobs, workers)))


class RandomClips:
    """Noise in the form of CachedClips' samples, for benchmarks and tests."""

    def __init__(self, hint, num_frames, views, height, width, seed, text_tokens, text_width):
        latents = (16, views * ((num_frames - 1) // 8 + 1), height // 8, width // 8)
        self.seed, self.bad = seed, {}
        self.noise = {"latents": latents, "hint_latents": latents,
                      "text": (views * text_tokens, text_width)}
        self.fixed = {"fps": torch.tensor(10.0),
                      "padding_mask": torch.zeros(1, height, width, dtype=torch.bool),
                      "view_index": torch.tensor(list(VIEWS.values())[:views])}

    def __str__(self):
        return "random latents"

    def sample(self, n):
        """A function of the seed and n: latents and hint_latents (16, V*T, h, w), text, ..."""
        rng = np.random.default_rng([self.seed, n])
        drawn = {key: torch.from_numpy(rng.standard_normal(shape, np.float32))
                 for key, shape in self.noise.items()}
        return drawn | self.fixed


def open_clips(cfg: Config):
    """The clips of data.root, whose `sample(n)` is a function of n.

    Writes the synthetic drive first if asked for; of several ranks one is first.
    """
    d, size = cfg.data, cfg.model
    settings = dict(hint=d.hint, num_frames=d.num_frames, views=d.views, height=d.height,
                    width=d.width, seed=cfg.trainer.seed, text_tokens=size.text_tokens,
                    text_width=size.crossattn_emb_channels)
    if d.root == "random":
        return RandomClips(**settings)
    settings["root"] = Path(d.root)
    if d.root == "synthetic":
        from configs.smoke_drive import write_drive  # it imports this file
        settings["root"] = Path(f"datasets/synthetic_drive_{d.height}x{d.width}")
        write_drive(settings["root"], clips=8, frames=max(40, d.num_frames), height=d.height,
                    width=d.width, text_width=size.crossattn_emb_channels)
    if d.cache:
        return CachedClips(d.cache, d.cache_windows, cfg.tokenizer.path, **settings)
    return WaymoClips(**settings)


def is_fresh(path, identity):
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() == {"identity": identity}
    except (FileNotFoundError, SafetensorError):  # not there, cut short
        return False


def prefetch(fn, numbers, workers=2, depth=None):
    """Yields fn(n) for n in `numbers`, in order, from `workers` threads, at most `depth` samples ahead.
    Threads are enough: ffmpeg, numpy's reads and torch release the interpreter lock. workers=0 calls fn in line."""
    if workers == 0:
        yield from map(fn, numbers)
        return
    pool = ThreadPoolExecutor(workers, "prefetch")
    started = (pool.submit(fn, n) for n in numbers)
    try:
        pending = deque(islice(started, depth or workers + 1))
        while pending:
            yield pending.popleft().result()
            pending.extend(islice(started, 1))
    finally:
        pool.shutdown(cancel_futures=True)


# ---- commands --------------------------------------------------------------------------------------------------------

def freezes(frames, least=5):
    """Runs of at least `least` (near) identical frames, as (first frame, length)."""
    # Compression leaves a trace of a grey level in frames that were identical.
    moves = [np.abs(a.astype(np.int16) - b).mean() >= 0.1 for a, b in pairwise(frames)]
    starts = [0, *np.flatnonzero(moves) + 1, len(frames)]
    return [(start, end - start) for start, end in pairwise(starts) if end - start >= least]


def check(clips, config):
    """Yields what there is to say of each clip: length, rate, size, views, text, standstills, why it cannot be used."""
    clips.views = len(VIEWS) if clips.views > 1 else 1  # any of them may be drawn

    def inspect(clip):
        text = clip
        try:
            info = probe(clips.path("videos", FRONT, clip))
            present = sum(clips.path("videos", view, clip).is_file() for view in VIEWS)
            text += f": {info.frames} frames, {info.fps:g} fps, {info.width}x{info.height}, {present} views"
            sample = clips.draw(clip, np.random.default_rng(0))
            text += f", {sample['text'][:clips.text_tokens].any(1).sum()} text rows"
            for i, file in enumerate(sample["files"]):
                frames = decode(file, 0, probe(file).frames)
                for first, count in freezes(frames) if i >= clips.views else ():  # of the control videos
                    text += f"\n    {clips.hint}/{file.parent.name} stands still for {count} frames from frame {first} on"
        except BadClip as error:
            clips.bad[clip] = str(error)
            text += f"\n    BAD: {error}"
        return text

    yield from prefetch(inspect, clips.clips, config.data.num_workers)


def cache(clips, config):
    """Brings data.cache up to date; yields what was done about each window. A clip with a bad one goes to clips.bad."""
    if not isinstance(clips, CachedClips):
        raise ValueError("data.cache is not set; give the folder to write to, for example data.cache=cache/lidar")
    from tokenizer import load_tokenizer
    tokenizer = load_tokenizer(config.tokenizer.path, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    for clip, window, outcome in clips.build(tokenizer.encode_views, config.data.num_workers):
        yield f"{clip} window {window}: {outcome}"


def main(arguments):
    """`check` or `cache`, a configuration and overrides. Exit status: 0, 1 if no clip is usable, 2 for a mistake."""
    commands = {"check": check, "cache": cache}
    if {"-h", "--help"} & {*arguments}:
        print(__doc__, HELP, sep="\n")
        return 0
    try:
        if len(arguments) < 2 or arguments[0] not in commands:
            raise ValueError("usage: python data.py check|cache CONFIG [key.sub=value ...]")
        config = load_config(arguments[1], arguments[2:])
        clips = open_clips(config)
        if not isinstance(clips, WaymoClips):
            raise ValueError(f"data.root is {config.data.root}, which has no clips")
        for line in commands[arguments[0]](clips, config):
            print(line, flush=True)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    usable = len(clips) - len(clips.bad)
    print(f"{usable} of {len(clips)} clips usable")
    return 0 if usable else 1


if __name__ == "__main__":
    import data  # under the name that smoke_drive imports it by, so that there is one BadClip
    sys.exit(data.main(sys.argv[1:]))
