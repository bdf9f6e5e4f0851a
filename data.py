"""Clips on disk -> batches: windows of video and control video, text embeddings, cached latents.

    python data.py check CONFIG [key.sub=value ...]    what data.root holds, what is wrong with it
    python data.py cache CONFIG [key.sub=value ...]    encode windows of every clip to data.cache

Letters: B batch, V views, F frames, H W pixels; T h w latent frames, height, width (T H W in
model.py); M text tokens per view. README shows the layout of a data root.
"""

import contextlib
import json
import math
import os
import re
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path

import configs  # first: it says so where Python is too old

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from configs.files import tokenizer_files, write_entry
from configs.schema import Config
from configs.text import HOW, load_text, text_rows
from configs.video import READER, BadClip, DataFailure, agree, decode, ffmpeg, fit, probe

# Views in the order of the model, and the number that the model knows each by.
VIEWS = {"pinhole_front": 0, "pinhole_front_left": 1, "pinhole_front_right": 2,
         "pinhole_side_left": 4, "pinhole_side_right": 5}
FRONT = "pinhole_front"


# ---- clips ---------------------------------------------------------------------------------------

class Clips:
    """Which clip is sample n, clips that turn out bad being passed over.

    `sample(n)` is a pure function of n and the files. A subclass says in `choose` what is taken of
    a clip (views, or the number of a cached window), in `draw` everything of a sample but its
    pixels, and in `pixels` those. A clip is good or bad for a choice, whichever window is drawn:
    that is remembered, and makes no difference to what is trained on.

    With ten clips, sample 13 is the fourth of the second epoch's order, or, where that is bad, the
    next in this order that is not.
    """

    def __init__(self, names, seed, val_clips=0):
        count = min(val_clips, len(names) // 4)
        self.asked, self.seed = val_clips, seed
        self.clips, self.held_out = names[: len(names) - count], names[len(names) - count :]
        self.bad = {}  # clip -> why
        self.refused = {}  # (clip, choice) -> why

    def __len__(self):
        return len(self.clips)

    def sample(self, n):
        """Global sample n -> dict: video and hint uint8 (V,3,F,H,W), text (V*M, width), fps (),
        padding_mask (1,H,W), view_index (V,), clip, start, files. BadClip if no clip is usable."""
        epoch, index = divmod(n, len(self))
        order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self))
        for i in np.roll(order, -index):
            with contextlib.suppress(BadClip):
                return self.take(self.clips[i], [self.seed, epoch, 1 + index])  # 0 is for the order
        listed = [f"  {clip}: {reason}" for clip, reason in islice(self.bad.items(), 20)]
        raise BadClip(f"none of {self} is usable (at most 20 are listed):\n" + "\n".join(listed))

    def held(self, i):
        """Held-out clip i, always the same window of it; one of the others if none is held out."""
        names = self.held_out or self.clips
        return self.take(names[i % len(names)], [i])

    def shown(self, i):
        """The same with its pixels, to be looked at."""
        return self.held(i)

    def take(self, clip, seed):
        """A sample of this clip, what is drawn of it being a function of `seed`."""
        rng = np.random.default_rng(seed)
        choice = self.choose(rng)
        if (clip, choice) in self.refused:
            raise BadClip(self.refused[clip, choice])
        try:
            sample = self.draw(clip, choice, rng)
            return sample | self.pixels(sample)
        except BadClip as error:
            self.refused[clip, choice] = reason = str(error)
            if self.bad.setdefault(clip, reason) is reason:  # atomic: one thread warns, once
                print(f"warning: clip {clip} is skipped: {reason}", file=sys.stderr, flush=True)
            raise

    def survey(self, max_bad, most=64):
        """ValueError if more than this part of the clips is bad, from a look at `most` of them."""
        def problem(clip):
            rng = np.random.default_rng(0)
            try:
                self.draw(clip, self.choose(rng), rng)
            except BadClip as error:
                return f"{clip}: {error}"

        names = self.clips[:: math.ceil(len(self) / most)]
        with ThreadPoolExecutor(8) as pool:
            problems = list(filter(None, pool.map(problem, names)))
        if len(problems) > max_bad * len(names):
            usable = len(names) - len(problems)
            raise ValueError(f"{usable or 'none'} of {len(names)} clips that were looked at can be "
                             f"used, and data.max_bad is {max_bad}; 'python data.py check CONFIG' "
                             f"says all. {problems[0]}")


class WaymoClips(Clips):
    """The clips of a data root in the layout that README shows.

    Without `videos` a clip needs no camera video (of several views, only the front's), and the
    pixels of those that it lacks are black; a single view's sample then has no `video`.
    """

    def __init__(self, root, hint, num_frames, views, height, width, seed, text_tokens=512,
                 text_width=1024, val_clips=0, trim=False, timeout_s=120, videos=True):
        self.root, self.hint, self.num_frames, self.views = Path(root), hint, num_frames, views
        self.height, self.width, self.trim = height, width, trim
        self.text_tokens, self.text_width = text_tokens, text_width
        self.timeout_s, self.videos, self.listings = timeout_s, videos, {}
        if not 1 <= views <= len(VIEWS):
            raise ValueError(f"data.views is {views}; it must be 1 to {len(VIEWS)}")
        ffmpeg()
        names = sorted(self.list_clips())
        if not names:
            raise FileNotFoundError(f"there are no clips ({FRONT}/*.mp4) in {root}; set data.root")
        super().__init__(names, seed, val_clips)

    def __str__(self):
        held = f", {len(self.held_out)} more held out" if self.asked else ""
        if len(self.held_out) < self.asked:
            held += f" of the {self.asked} asked for: at most a quarter"
        return f"{len(self)} clips in {self.root}{held}"

    def list_clips(self):
        """The names of all clips; FileNotFoundError if a folder for them is missing."""
        kinds = ("videos", self.hint) if self.videos or self.views > 1 else (self.hint,)
        for folder in [self.root / kind / FRONT for kind in kinds]:
            if not folder.is_dir():
                raise FileNotFoundError(f"there is no folder {folder}; set data.root to a Waymo "
                                        f"drive with {self.hint!r}")
        return self.files(kinds[0], FRONT)

    def files(self, kind, view, suffix=".mp4"):
        """{name: path} of a folder's files with that suffix, in upper or lower case; read once."""
        if (kind, view) not in self.listings:
            folder = self.root / kind / view
            paths = sorted(folder.glob("[!.]*")) if folder.is_dir() else []
            self.listings[kind, view] = {p.stem: p for p in paths if p.suffix.lower() == suffix}
        return self.listings[kind, view]

    def path(self, kind, view, clip):
        """Of a video; kind: videos or a hint."""
        return self.files(kind, view).get(clip) or self.root / kind / view / f"{clip}.mp4"

    def text(self, clip, view):
        """Float32 (M, width): the clip's caption, of other views than the front their prefix.

        The last part of a clip's name is the number of its chunk, which captions are named with or
        without: for drive_3 the first of drive.pkl, drive_3.pkl, drive_0.pkl that is there counts.
        """
        texts, drive = self.files("t5_xxl", view, ".pkl"), re.sub(r"_\d+$", "", clip)
        chunks = (texts[name] for name in texts if re.sub(r"_\d+$", "", name) == drive)
        path = texts.get(drive) or texts.get(clip) or next(chunks, None)
        wanted = self.root / "t5_xxl" / view / f"{drive}.pkl"
        if view != FRONT:
            path = self.files("cache", "", ".pkl").get(f"prefix_{view}", path)
            wanted = self.root / "cache" / f"prefix_{view}.pkl"
        if path is None:
            beside = sorted(p.name for p in wanted.parent.glob("*")
                            if p.name.startswith(wanted.stem))
            found = f"beside it there is {', '.join(beside[:5])}; " if beside else ""
            raise BadClip(f"{wanted} is missing; {found}{HOW}")
        return load_text(path, self.text_tokens, self.text_width)

    def choose(self, rng):
        """The views of a sample, the front and some others, in the order of the model."""
        others = sorted(rng.choice(len(VIEWS) - 1, self.views - 1, replace=False) + 1)
        return tuple(list(VIEWS)[i] for i in (0, *others))

    def draw(self, clip, views, rng):
        """A window that all files of the views have, and their text: a sample but for its pixels.

        Its `files` are those of the videos, None where one may be missing, then of the controls.
        """
        videos = [self.path("videos", view, clip) for view in views]
        if not self.videos:
            first = int(self.views > 1)  # the first that may be missing: of several not the front
            videos[first:] = [file if file.is_file() else None for file in videos[first:]]
        files = videos + [self.path(self.hint, view, clip) for view in views]
        there = list(filter(None, files))
        infos = [probe(file, self.timeout_s) for file in there]
        agree(there, infos, self.trim)
        frames = min(info.frames for info in infos)
        if frames < self.num_frames:
            raise BadClip(f"{there[0]} has {frames} frames, data.num_frames is {self.num_frames}")
        start = int(rng.integers(frames - self.num_frames + 1))
        text = torch.cat([self.text(clip, view) for view in views])        # (V*M, width)
        return {"text": text, "fps": torch.tensor(infos[0].fps), "clip": clip, "start": start,
                "view_index": torch.tensor([VIEWS[view] for view in views]), "files": files}

    def pixels(self, sample):
        """Of what was drawn: video and hint, uint8 (V, 3, F, H, W), and the padding mask."""
        files, fitted = sample["files"], {}
        for file in filter(None, files):
            frames = decode(file, sample["start"], self.num_frames, self.timeout_s)
            fitted[file], mask = fit(frames, self.height, self.width)      # (3, F, H, W)
        black = torch.zeros_like(fitted[file])
        frames = [fitted.get(file, black) for file in files]
        video, hint = torch.stack(frames).chunk(2)                         # (V, 3, F, H, W) each
        found = {"hint": hint, "padding_mask": mask}
        if files[0]:
            found["video"] = video
        return found


class CachedClips(Clips):
    """Windows of other clips that `build` stored as latents, in place of pixels.

    A sample holds `latents` and `hint_latents`, (16, V*T, h, w) in `precision`. `source` is any
    Clips with num_frames, height, width and hint. A missing or stale entry is a bad clip.
    """

    def __init__(self, source, folder, windows, tokenizer, precision="bfloat16"):
        self.source, self.folder, self.windows = source, Path(folder), windows
        self.precision = precision
        if not Path(tokenizer).exists():
            raise FileNotFoundError(f"there is no {tokenizer}; set tokenizer.path to the released "
                                    "folder or a file")
        self.tokenizer = tokenizer_files(tokenizer)
        super().__init__(source.clips + source.held_out, source.seed, source.asked)

    def __str__(self):
        return f"{self.source}, latents in {self.folder}"

    def choose(self, rng):
        return int(rng.integers(self.windows))

    def draw(self, clip, number, rng=None):
        path, identity, sample = self.entry(clip, number)
        if not is_fresh(path, identity):
            state = "stale" if path.is_file() else "missing"
            raise BadClip(f"{path} is {state}; run: python data.py cache CONFIG")
        return sample | {"entry": path}

    def pixels(self, sample):
        stored = load_file(sample["entry"])
        must_be_finite(stored, sample["entry"])
        return stored

    def shown(self, i):
        sample = self.held(i)
        return sample | self.source.pixels(sample)

    def entry(self, clip, number):
        """A stored window's file, as JSON all that its content depends on, and what was drawn."""
        source, rng = self.source, np.random.default_rng([self.seed, *os.fsencode(clip), number])
        sample = source.draw(clip, source.choose(rng), rng)
        files = [(file.name, file) for file in self.tokenizer]
        files += [(os.path.abspath(file), file) for file in sample["files"]]
        sources = [[name, file.stat().st_size, file.stat().st_mtime_ns] for name, file in files]
        identity = dict(frames=source.num_frames, size=[source.height, source.width],
                        hint=source.hint, start=sample["start"], precision=self.precision,
                        views=sample["view_index"].tolist(), sources=sources)
        return self.folder / f"{clip}_window{number}.safetensors", json.dumps(identity), sample

    def build(self, encode, workers=2, part=0, parts=1):
        """Store what is missing or stale; yield (clip, window, "kept", "encoded" or "BAD: why").

        `encode` takes uint8 (B, V, 3, F, H, W). Of several ranks each does its part of the clips,
        so that one alone reads a clip's files.
        """
        lock = threading.Lock()

        def store(job):
            try:
                path, identity, sample = self.entry(*job)
                if is_fresh(path, identity):
                    return "kept"
                pixels = self.source.pixels(sample)
            except BadClip as error:
                self.bad[job[0]] = str(error)
                return f"BAD: {error}"
            with lock:  # one at a time: the tokenizer needs gigabytes
                latents, hint_latents = [encode(pixels[key][None])[0].cpu().contiguous()
                                         for key in ("video", "hint")]
            stored = {"latents": latents, "hint_latents": hint_latents,
                      "padding_mask": pixels["padding_mask"]}
            must_be_finite(stored, f"what the tokenizer makes of {job[0]}")
            write_entry(path, stored, identity)
            return "encoded"

        self.folder.mkdir(parents=True, exist_ok=True)
        names = sorted(self.clips + self.held_out)[part::parts]
        jobs = [(clip, number) for clip in names for number in range(self.windows)]
        for job, outcome in zip(jobs, prefetch(store, jobs, workers)):
            yield *job, outcome


def is_fresh(path, identity):
    if path.is_file() and not os.access(path, os.R_OK):
        raise DataFailure(f"{path} may not be read by this user; change its mode")
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() == {"identity": identity}
    except (FileNotFoundError, SafetensorError):  # not there, cut short
        return False


def must_be_finite(tensors, name):
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise DataFailure(f"{name} holds {key} that are not finite; remove it and run: "
                              "python data.py cache CONFIG")


def open_clips(cfg: Config, videos=True):
    """The clips of data.root, whose `sample(n)` is a function of n.

    Writes the synthetic drive first if asked for; of several ranks one is first. Without `videos`
    clips need no camera video, and the cache is not looked at: this is for sampling.
    """
    d, size = cfg.data, cfg.model
    settings = dict(hint=d.hint, num_frames=d.num_frames, views=d.views, height=d.height,
                    width=d.width, seed=cfg.trainer.seed, text_tokens=size.text_tokens,
                    text_width=size.crossattn_emb_channels)
    if d.root == "random":
        from configs.random_clips import RandomClips  # it imports this file
        return RandomClips(**settings)
    root = Path(d.root)
    if d.root == "synthetic":
        from configs.smoke_drive import drive_for  # it imports this file
        root = drive_for(cfg)
    clips = WaymoClips(root, **settings, val_clips=d.val_clips, trim=d.trim,
                       timeout_s=d.timeout_s, videos=videos)
    if d.cache and videos:
        auto = f"latents_{d.hint}_{d.num_frames}x{d.height}x{d.width}_{d.views}_views"
        path = root / auto if d.cache == "auto" else d.cache
        return CachedClips(clips, path, d.cache_windows, cfg.tokenizer.path, cfg.trainer.precision)
    return clips


# ---- batches -------------------------------------------------------------------------------------

def collate(samples):
    """Samples -> a batch: tensors stacked, in pinned memory where there is a GPU; else lists."""
    batch = {}
    for key, value in samples[0].items():
        batch[key] = [sample[key] for sample in samples]
        if torch.is_tensor(value):
            batch[key] = torch.stack(batch[key])                           # (B, ...)
            if torch.cuda.is_available():
                batch[key] = batch[key].pin_memory()
    return batch


def prefetch(fn, numbers, workers=2, depth=None, stop=None):
    """Yields fn(n) for n in `numbers`, in order, from threads that are at most `depth` ahead.

    Threads are enough: ffmpeg, numpy's reads and torch release the interpreter lock. workers=0
    does nothing ahead. It yields None while it waits if `stop()`. Closing it ends its decoders.
    """
    closed = threading.Event()
    # Each thread notes how to ask whether this is closed: `decode` in it looks while ffmpeg runs.
    pool = ThreadPoolExecutor(max(1, workers), "prefetch", setattr,
                              (READER, "closed", closed.is_set))
    started = (pool.submit(fn, n) for n in numbers)
    try:
        pending = deque(islice(started, depth or workers + 1))
        while pending:
            while not wait([pending[0]], 0.1 if stop else None).done:
                if stop():
                    yield None
            yield pending.popleft().result()
            pending.extend(islice(started, 1))
    finally:
        closed.set()
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    from configs.check import main  # it imports this file
    sys.exit(main(sys.argv[1:]))
