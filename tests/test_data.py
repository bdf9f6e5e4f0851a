"""The loader: windows, pixels, text, bad clips, the latent cache and the commands."""
import io
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from configs import binding, check, pictures, smoke_drive, video
from configs.schema import load_config
from configs.text import load_pickle
from configs.video import write_video

WIDTH = 8  # of the text embeddings here


def programs():
    """Every ffmpeg there is: the one on PATH and the one that imageio-ffmpeg carries."""
    import imageio_ffmpeg
    found = {shutil.which("ffmpeg"), imageio_ffmpeg.get_ffmpeg_exe()}
    return sorted(filter(None, found))


@pytest.fixture(params=programs())
def program(request, monkeypatch):
    monkeypatch.setattr(video, "ffmpeg", lambda encoder=False: request.param)
    video.list_packets.cache_clear()
    return request.param


def numbered(frames, height=32, width=48, offset=0):
    """A video whose frame number can be read back from its mean grey level."""
    levels = (np.arange(frames) * 6 + 16 + offset).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3))


def numbers(frames, offset=0):  # (3, F, H, W) -> (F,)
    return ((frames.float().mean((0, 2, 3)) - 16 - offset) / 6).round().int().tolist()


def write_root(root, clips, views=tuple(data.VIEWS), size=(32, 48), fps=10):
    """A drive of numbered clips, {name: frames}; control videos are a little brighter."""
    rng = np.random.default_rng(0)
    for name, frames in clips.items():
        for kind, offset in (("videos", 0), ("lidar", 2)):
            write_video(root / f"{name}.mp4", numbered(frames, *size, offset), fps, crf=0)
            for view in views:
                (root / kind / view).mkdir(parents=True, exist_ok=True)
                shutil.copy(root / f"{name}.mp4", root / kind / view / f"{name}_0.mp4")
        caption = root / "t5_xxl" / data.FRONT / f"{name}.pkl"
        smoke_drive.write_pickle(caption, [rng.random((5, WIDTH), np.float32)])
    for view in views:
        prefix = root / "cache" / f"prefix_{view}.pkl"
        smoke_drive.write_pickle(prefix, rng.random((3, WIDTH), np.float32))
    return root


def open_clips(root, frames=9, views=1, size=(32, 48), **other):
    settings = dict(root=root, hint="lidar", num_frames=frames, views=views, height=size[0],
                    width=size[1], seed=0, text_tokens=6, text_width=WIDTH)
    return data.WaymoClips(**settings | other)


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    return write_root(tmp_path_factory.mktemp("drive"), {"a": 20, "b": 30, "c": 24})


@pytest.fixture
def copy(drive, tmp_path):
    return Path(shutil.copytree(drive, tmp_path / "copy"))


# ---- ffmpeg --------------------------------------------------------------------------------------

def test_probe_with_b_frames_and_odd_rate(tmp_path, program):
    path = tmp_path / "x.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (23, 32, 48, 3), np.uint8)
    command = [program, "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "48x32",
               "-r", "30000/1001", "-i", "-", "-c:v", "libx264", "-bf", "3", "-b_strategy", "0",
               "-pix_fmt", "yuv420p", path]
    subprocess.run(command, input=noise.tobytes(), check=True)
    info = data.probe(path)
    assert (info.frames, info.width, info.height) == (23, 48, 32)
    assert info.fps == pytest.approx(30000 / 1001, rel=1e-4)


def whole_video(program, path, shape):
    """All frames, as ffmpeg decodes them by default."""
    command = [program, "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    frames = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(frames, np.uint8).reshape(shape)


def test_decode_equals_ffmpegs_own_frames(drive, program):
    for kind in ("videos", "lidar"):
        path = drive / kind / data.FRONT / "b_0.mp4"
        whole = whole_video(program, path, (30, 32, 48, 3))
        for start, frames in ((0, 30), (7, 9), (5, 11), (29, 1), (13, 17)):
            assert np.array_equal(data.decode(path, start, frames), whole[start:start + frames])


def test_frames_of_moving_pictures_equal_ffmpegs_own(tmp_path, program):
    path = tmp_path / "x.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (12, 46, 50, 3), np.uint8)
    write_video(path, noise, 10)
    assert np.array_equal(data.decode(path, 3, 9), whole_video(program, path, noise.shape)[3:])


def test_ffmpeg_is_found_on_path_or_in_the_package(monkeypatch, tmp_path):
    import imageio_ffmpeg
    data.ffmpeg.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        assert data.ffmpeg() == imageio_ffmpeg.get_ffmpeg_exe()
        data.ffmpeg.cache_clear()
        old = tmp_path / "ffmpeg"
        old.write_text("#!/bin/sh\nexit 1\n")  # as a release without -fps_mode would
        old.chmod(0o755)
        assert data.ffmpeg() == imageio_ffmpeg.get_ffmpeg_exe()
        data.ffmpeg.cache_clear()
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
        with pytest.raises(FileNotFoundError, match="pip install imageio-ffmpeg"):
            data.ffmpeg()
    finally:
        data.ffmpeg.cache_clear()


# ---- pixels --------------------------------------------------------------------------------------

def cubic(x):
    """Keys' kernel with a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_matrix(old, new):
    """(new, old) weights in float64, summing to 1: the kernel is stretched when shrinking."""
    scale = old / new
    stretch = max(scale, 1.0)
    weights = np.zeros((new, old))
    for i in range(new):
        weights[i] = [cubic((j + 0.5 - (i + 0.5) * scale) / stretch) for j in range(old)]
    return weights / weights.sum(1, keepdims=True)


def fit_by_hand(frames, height, width):
    """(F, H, W, 3) -> (F, height, width, 3) in float64 before rounding, and the mask."""
    h, w = frames.shape[1:3]
    scale = min(height / h, width / w)
    new_h, new_w = math.floor(scale * h + 0.5), math.floor(scale * w + 0.5)
    down, across = resize_matrix(h, new_h), resize_matrix(w, new_w)
    image = np.einsum("ih,fhwc,jw->fijc", down, frames.astype(np.float64), across, optimize=True)
    image = image.clip(0, 255)
    top, left = (height - new_h) // 2, (width - new_w) // 2
    pads = ((0, 0), (top, height - new_h - top), (left, width - new_w - left), (0, 0))
    mode = "edge" if max(pads[1]) >= new_h or max(pads[2]) >= new_w else "reflect"
    mask = np.pad(np.zeros((new_h, new_w)), pads[1:3], constant_values=1)
    return np.pad(image, pads, mode=mode), mask


@pytest.mark.parametrize("size, target", [
    ((37, 51), (64, 96)),     # smaller, odd, odd padding at the left and right
    ((90, 131), (48, 64)),    # larger, odd
    ((64, 100), (64, 96)),    # shrinks by little, pads above and below
    ((33, 96), (64, 96)),     # right width, nothing to resize, odd padding
    ((8, 96), (64, 96)),      # padding larger than the image: edges
    ((60, 7), (64, 96)),      # the same along the other axis
])
def test_fit_equals_float64_bicubic(size, target):
    frames = np.random.default_rng(0).integers(0, 256, (10, *size, 3), np.uint8)
    expected, mask = fit_by_hand(frames, *target)
    got, got_mask = data.fit(frames, *target)
    assert got.shape == (3, 10, *target) and got.dtype == torch.uint8
    assert got_mask.shape == (1, *target)
    assert np.array_equal(got_mask[0].numpy(), mask)
    error = np.abs(got.permute(1, 2, 3, 0).numpy() - expected)
    assert error.max() < 0.5 + 1e-3  # the nearest integer, ties aside
    assert torch.equal(data.fit(frames.transpose(0, 3, 1, 2).copy(), *target)[0], got)


def test_fit_leaves_the_target_size_untouched():
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), np.uint8)
    got, mask = data.fit(frames, 64, 96)
    assert np.array_equal(got.permute(1, 2, 3, 0).numpy(), frames) and mask.sum() == 0


def test_fit_scales_full_frames():
    got, mask = data.fit(np.full((1, 1280, 1920, 3), 200, np.uint8), 704, 1280)
    assert got.shape == (3, 1, 704, 1280) and (got == 200).all()
    assert mask.sum() == 704 * (1280 - 1056) and mask[0, 0, 111] == 1 and mask[0, 0, 112] == 0


# ---- text ----------------------------------------------------------------------------------------

ROWS = np.random.default_rng(1).standard_normal((5, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("value", [
    [ROWS], [ROWS[None]], ROWS, ROWS[None],
    [ROWS.astype(np.float16)], [ROWS[None].astype(np.float16)],
    {"pickle": {"ground_truth": {"embeddings": {"t5_xxl": ROWS}}}},
    {"pickle": {"ground_truth": {"embeddings": {"t5_xxl": [ROWS[None]]}}}},
    np.asfortranarray(ROWS),
], ids=["list", "list3d", "array", "array3d", "half", "half3d", "dict", "dictlist", "fortran"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_text_shapes(tmp_path, value, protocol):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    for tokens in (4, 7):
        text = data.load_text(path, tokens, WIDTH)
        kept = min(tokens, 5)
        assert text.shape == (tokens, WIDTH) and text.dtype == torch.float32
        assert text[kept:].abs().sum() == 0
        assert np.allclose(text[:kept], ROWS[:kept], atol=2e-3)


@pytest.mark.parametrize("name", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("protocol, module", [(2, b"multiarray"), (5, b"numeric")])
def test_pickles_of_either_numpy(tmp_path, name, protocol, module):
    path = tmp_path / "x.pkl"
    # protocol 5 without its frame: the lengths in it would not match after the exchange
    blob = pickle.dumps([ROWS], protocol)
    blob = blob.replace(b"\x95" + blob[3:11], b"", 1)
    own = re.search(rb"numpy\._?core\." + module, blob).group()
    other = name + b"." + module
    if protocol == 5:  # a length byte precedes the name
        own, other = bytes([len(own)]) + own, bytes([len(other)]) + other
    path.write_bytes(blob.replace(own, other))
    assert np.array_equal(data.load_text(path, 5, WIDTH), ROWS)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("wrap", [
    lambda x: x, lambda x: [ROWS, x], lambda x: np.array([x], object)])
def test_malicious_pickle_is_refused_and_does_not_run(tmp_path, wrap):
    path, evidence = tmp_path / "x.pkl", tmp_path / "ran"
    path.write_bytes(pickle.dumps(wrap(Touch(evidence))))
    with pytest.raises(data.BadClip, match="x.pkl.*system"):
        load_pickle(path)
    assert not evidence.exists()
    pickle.loads(path.read_bytes())
    assert evidence.exists()  # the pickle does what it threatens


def test_an_altered_array_type_does_not_crash_the_process(tmp_path):
    blob = pickle.dumps([ROWS], 4)
    assert blob.count(b"NNNJ") == 1  # of its state: subtype, names, fields, size
    (tmp_path / "x.pkl").write_bytes(blob.replace(b"NNNJ", b"NNN\x87J"))  # numpy itself: SIGSEGV
    assert np.array_equal(data.load_text(tmp_path / "x.pkl", 5, WIDTH), ROWS)


def test_an_absurd_index_takes_no_memory(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02]r\xf0\xff\xff\xff.")  # 64 GB in the unpickler in C
    with pytest.raises(data.BadClip, match="x.pkl"):
        data.load_text(tmp_path / "x.pkl", 5, WIDTH)


@pytest.mark.parametrize("value", [
    b"", b"\x80\x04garbage", {"a": ROWS}, [], 0 * ROWS, ROWS[:, :-1], ROWS.astype(int), "text",
    np.full_like(ROWS, np.nan), ROWS.astype(np.float64) * 1e300], ids=str)
def test_unusable_text_is_a_bad_clip(tmp_path, value):
    content = value if isinstance(value, bytes) else pickle.dumps(value)
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(data.BadClip, match="x.pkl"):
        data.load_text(tmp_path / "x.pkl", 6, WIDTH)


def test_text_of_each_view(copy):
    def text():
        clips = open_clips(copy, views=5)
        sample = clips.draw("a_0", tuple(data.VIEWS), np.random.default_rng(0))
        return sample["text"].unflatten(0, (5, 6))
    caption = data.load_text(copy / "t5_xxl" / data.FRONT / "a.pkl", 6, WIDTH)
    prefixes = [data.load_text(copy / "cache" / f"prefix_{view}.pkl", 6, WIDTH)
                for view in list(data.VIEWS)[1:]]
    assert torch.equal(text(), torch.stack([caption, *prefixes]))
    (copy / "t5_xxl" / data.FRONT / "a.pkl").rename(copy / "t5_xxl" / data.FRONT / "a_0.pkl")
    own = copy / "t5_xxl" / "pinhole_side_left"
    own.mkdir()
    (copy / "cache" / "prefix_pinhole_side_left.pkl").rename(own / "a.pkl")
    assert torch.equal(text(), torch.stack([caption, *prefixes]))


# ---- clips ---------------------------------------------------------------------------------------

def test_sample_of_three_views(drive, program):
    clips = open_clips(drive, views=3, size=(40, 48))
    seen = set()
    for n in range(7):
        sample = clips.sample(n)
        assert sample["video"].shape == sample["hint"].shape == (3, 3, 9, 40, 48)
        assert sample["video"].dtype == sample["hint"].dtype == torch.uint8
        assert sample["text"].shape == (18, WIDTH)
        assert sample["fps"] == 10 and sample["fps"].shape == ()
        assert sample["padding_mask"].shape == (1, 40, 48)
        assert sample["padding_mask"].sum() == 8 * 48
        window = list(range(sample["start"], sample["start"] + 9))
        for view in range(3):  # one window for every view and control video
            assert numbers(sample["video"][view]) == window
            assert numbers(sample["hint"][view], 2) == window
        index = sample["view_index"].tolist()
        assert index[0] == 0 and index == sorted(set(index)) and set(index) <= {0, 1, 2, 4, 5}
        seen.add(tuple(index))
    assert len(seen) > 2


def test_each_epoch_is_a_permutation_with_new_windows(drive):
    clips = open_clips(drive)
    assert str(clips) == f"3 clips in {drive}"
    samples = [clips.sample(n) for n in range(12)]
    orders = [tuple(s["clip"] for s in samples[i:i + 3]) for i in range(0, 12, 3)]
    assert all(sorted(order) == ["a_0", "b_0", "c_0"] for order in orders) and len(set(orders)) > 1
    assert len({s["start"] for s in samples if s["clip"] == "b_0"}) > 1
    again = open_clips(drive, seed=1)
    assert [s["start"] for s in samples] != [again.sample(n)["start"] for n in range(12)]


def test_draws_do_not_depend_on_the_worker(drive):
    def draws(workers, order):
        clips = open_clips(drive, views=3)
        return {n: (s["clip"], s["start"], tuple(s["view_index"].tolist()), s["video"].sum().item())
                for n, s in zip(order, data.prefetch(clips.sample, order, workers))}
    alone = draws(0, range(6))
    assert alone == draws(3, range(6)) == draws(2, [5, 0, 3, 1, 2, 4])


def cut(path):
    path.write_bytes(path.read_bytes()[:300])


def damage(path):
    blob = bytearray(path.read_bytes())
    at = blob.index(b"mdat") + 800  # behind the encoder's own message
    blob[at:at + 200] = bytes(200)
    path.write_bytes(blob)


def shorten(path):
    write_video(path, numbered(8), 10)


def shrink(path):
    write_video(path, numbered(20, 32, 40), 10)


def narrow(path):
    path.write_bytes(pickle.dumps([ROWS[:, :-1]]))


@pytest.mark.parametrize("where, spoil", [
    ("videos/pinhole_front/a_0.mp4", cut), ("lidar/pinhole_front/a_0.mp4", cut),
    ("videos/pinhole_front/a_0.mp4", shorten), ("lidar/pinhole_front/a_0.mp4", shorten),
    ("lidar/pinhole_front/a_0.mp4", shrink), ("lidar/pinhole_front/a_0.mp4", os.remove),
    ("t5_xxl/pinhole_front/a.pkl", os.remove), ("t5_xxl/pinhole_front/a.pkl", narrow),
    ("t5_xxl/pinhole_front/a.pkl", cut)])
def test_bad_clip_is_skipped_with_one_warning(copy, capsys, where, spoil):
    spoil(copy / where)
    clips = open_clips(copy)
    names = [clips.sample(n)["clip"] for n in range(6)]
    assert set(names) == {"b_0", "c_0"}
    warnings = [line for line in capsys.readouterr().err.splitlines() if "a_0" in line]
    assert len(warnings) == 1 and str(copy / where) in warnings[0]
    assert list(clips.bad) == ["a_0"]
    # what replaces it does not depend on what was loaded before
    assert [open_clips(copy).sample(n)["clip"] for n in (5, 2)] == [names[5], names[2]]


def test_damaged_stream_is_noticed(tmp_path, program):
    path = tmp_path / "x.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 255, (20, 64, 96, 3), np.uint8), 10)
    assert data.decode(path, 0, 20).shape == (20, 64, 96, 3)
    blob = path.read_bytes()
    for at in (0.2, 0.5, 0.8):
        spoilt = bytearray(blob)
        spoilt[int(at * len(blob)):int(at * len(blob)) + 5000] = bytes(5000)
        path.write_bytes(spoilt)
        with pytest.raises(data.BadClip, match="x.mp4 "):
            data.decode(path, 0, 20)


def test_pictures_of_no_size_are_a_bad_clip(tmp_path):
    path = tmp_path / "x.mp4"
    write_video(path, np.zeros((5, 64, 96, 3), np.uint8), 10)
    blob = bytearray(path.read_bytes())
    entry = blob.index(b"avc1", blob.index(b"stsd"))
    blob[entry:entry + 4] = b"xxxx"  # a codec that nobody knows, so that only this says the size
    blob[entry + 28:entry + 32] = bytes(4)
    path.write_bytes(blob)
    with pytest.raises(data.BadClip, match="x.mp4 is damaged"):
        data.decode(path, 0, 5)


def test_the_damaged_file_of_several_is_named(copy):
    damage(copy / "lidar" / "pinhole_side_left" / "a_0.mp4")
    clips = open_clips(copy, frames=20, views=5)
    with pytest.raises(data.BadClip, match="lidar/pinhole_side_left/a_0.mp4 "):
        clips.take("a_0", [0])


def test_all_clips_bad_is_one_error_with_the_reasons(copy):
    for name in "abc":
        os.remove(copy / "lidar" / data.FRONT / f"{name}_0.mp4")
    clips = open_clips(copy)
    with pytest.raises(ValueError) as error:
        clips.sample(0)
    for name in "abc":
        assert f"{copy}/lidar/{data.FRONT}/{name}_0.mp4 is missing" in str(error.value)
    assert len(clips.bad) == 3


def test_roots_without_clips(tmp_path, copy):
    (tmp_path / "videos" / data.FRONT).mkdir(parents=True)
    (tmp_path / "lidar" / data.FRONT).mkdir(parents=True)
    for wrong, text in ((dict(root=tmp_path / "nowhere"), "nowhere"),
                        (dict(root=tmp_path), "no clips"), (dict(hint="hdmap"), "hdmap"),
                        (dict(hint="seg"), "'seg'"), (dict(views=6), "data.views is 6")):
        with pytest.raises((ValueError, FileNotFoundError), match=text) as error:
            open_clips(**(dict(root=copy) | wrong))
        assert "\n" not in str(error.value)


def test_a_forks_own_listing_that_finds_nothing_is_a_sentence(drive, monkeypatch):
    monkeypatch.setattr(data.WaymoClips, "list_clips", lambda self: [])
    with pytest.raises(FileNotFoundError, match="there are no clips .* in .*; set data.root"):
        open_clips(drive)


def test_the_last_clips_are_held_out_and_never_trained_on(tmp_path):
    names = {f"c{i}": 9 for i in range(8)}
    root = write_root(tmp_path, names, [data.FRONT])
    clips = open_clips(root, val_clips=1)
    assert clips.held_out == ["c7_0"] and {clips.sample(n)["clip"] for n in range(14)} == {
        f"c{i}_0" for i in range(7)}
    clips = open_clips(root, val_clips=4)
    assert clips.held_out == ["c6_0", "c7_0"] and str(clips) == (
        f"6 clips in {root}, 2 more held out of the 4 asked for: at most a quarter")
    assert [clips.held(i)["clip"] for i in range(2)] == ["c6_0", "c7_0"]
    again, other = open_clips(root, val_clips=4), open_clips(root, val_clips=4, seed=5)
    for i in range(2):  # always the same window, whatever was read before
        assert clips.held(i)["start"] == again.held(i)["start"] == other.held(i)["start"]
    for name in range(3, 8):
        os.remove(root / "videos" / data.FRONT / f"c{name}_0.mp4")
    clips = open_clips(root, val_clips=4)
    assert clips.held_out == [] and clips.held(1)["clip"] == "c1_0"


@pytest.mark.parametrize("views", [1, 3])
def test_without_videos_a_control_is_enough(copy, views):
    for view in data.VIEWS:
        if views == 1 or view != data.FRONT:
            os.remove(copy / "videos" / view / "a_0.mp4")
    with pytest.raises(data.BadClip, match=r"videos/pinhole_\w+/a_0.mp4 is missing"):
        open_clips(copy, views=views).take("a_0", [0])
    clips = open_clips(copy, views=views, videos=False)
    assert clips.clips == ["a_0", "b_0", "c_0"]
    sample, whole = clips.held(0), clips.held(1)
    assert sample["clip"] == "a_0" and sample["hint"].shape == (views, 3, 9, 32, 48)
    assert whole["video"].shape == (views, 3, 9, 32, 48) and whole["video"][-1].any()
    assert ("video" in sample) == (views > 1)
    if views > 1:  # the front view is what a multi-view model is given
        assert sample["video"][0].any() and not sample["video"][1:].any()
        os.remove(copy / "videos" / data.FRONT / "a_0.mp4")
        assert open_clips(copy, views=views, videos=False).clips == ["b_0", "c_0"]


def test_collate_stacks_tensors_and_lists_the_rest(drive):
    clips = open_clips(drive, views=3)
    samples = [clips.sample(n) for n in range(2)]
    batch = data.collate(samples)
    for key, value in samples[0].items():
        if torch.is_tensor(value):
            assert torch.equal(batch[key], torch.stack([sample[key] for sample in samples]))
        else:
            assert batch[key] == [sample[key] for sample in samples]
    assert batch["video"].shape == (2, 3, 3, 9, 32, 48) and batch["video"].is_contiguous()
    assert batch["fps"].shape == (2,) and batch["view_index"].shape == (2, 3)


# ---- prefetch ------------------------------------------------------------------------------------

def test_prefetch_keeps_order_and_bounds_the_work_ahead():
    started = []

    def slow_when_even(n):
        started.append(n)
        time.sleep(0.02 * (n % 2 == 0))
        return n * n
    stream = data.prefetch(slow_when_even, iter(range(1000)), workers=3, depth=4)
    assert [next(stream) for _ in range(8)] == [n * n for n in range(8)]
    time.sleep(0.1)
    assert max(started) <= 8 + 4
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
    assert list(data.prefetch(slow_when_even, range(7), workers=2)) == [n * n for n in range(7)]


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_passes_errors_on(workers):
    def fail_at_three(n):
        if n == 3:
            raise ValueError("three")
        return n
    stream = data.prefetch(fail_at_three, range(10), workers)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_hears_a_stop_while_it_waits(workers):
    goes, asked = threading.Event(), []

    def wait_for_it(n):
        goes.wait(10)
        return n
    stream = data.prefetch(wait_for_it, range(3), workers, stop=lambda: asked)
    threading.Timer(0.3, asked.append, [1]).start()
    began = time.monotonic()
    assert next(stream) is None and time.monotonic() - began < 2
    goes.set()
    asked.clear()
    assert list(stream) == [0, 1, 2]  # nothing is lost


def test_prefetch_does_not_hold_up_the_exit():
    program = ("import itertools, time, data\n"
               "slow = lambda n: time.sleep(0.5) or n\n"
               "stream = data.prefetch(slow, itertools.count(), workers=2)\n"
               "print(next(stream))\n")  # the stream stays open
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          timeout=60, cwd=Path(data.__file__).parent)
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


# ---- cache ---------------------------------------------------------------------------------------

def encode(video):  # (B, V, 3, F, H, W) -> (B, 16, V*T, h, w), tells the windows apart
    b, v, _, f, h, w = video.shape
    means = video[:, :, :, ::8].float().mean(2)[..., ::8, ::8].flatten(1, 2)
    return means[:, None].expand(b, 16, *means.shape[1:]).to(torch.bfloat16)


def open_cache(root, folder, tokenizer, precision="bfloat16", **other):
    clips = open_clips(root, **({"views": 3} | other))
    return data.CachedClips(clips, folder, 2, tokenizer, precision)


def test_what_a_download_leaves_beside_a_tokenizer_is_no_part_of_it(tmp_path):
    for name in ("encoder.jit", "decoder.jit", "mean_std.pt"):
        (tmp_path / name).write_text(name)
    clips = types.SimpleNamespace(clips=["a"])
    cfg = load_config(Path(data.__file__).parent / "configs/smoke.yaml")
    cfg.tokenizer.path = str(tmp_path)
    identities = [binding.identify(cfg, clips, {})]
    assert [*identities[0]["tokenizer"]] == ["encoder.jit", "mean_std.pt"]
    files = data.tokenizer_files(tmp_path)
    (tmp_path / ".cache/huggingface").mkdir(parents=True)  # hf download --local-dir
    (tmp_path / ".DS_Store").touch()
    assert binding.identify(cfg, clips, {}) == identities[0]
    assert data.tokenizer_files(tmp_path) == files and len(files) == 3
    assert data.tokenizer_files(files[0]) == [files[0]]


def test_cache_round_trip_and_staleness(copy, tmp_path, capsys):
    folder, tokenizer = tmp_path / "cache", tmp_path / "tokenizer.safetensors"
    tokenizer.write_bytes(b"weights")
    cached = open_cache(copy, folder, tokenizer)
    with pytest.raises(ValueError, match="missing; run: python data.py cache"):
        cached.sample(0)
    outcomes = list(open_cache(copy, folder, tokenizer).build(encode))
    assert outcomes == [(f"{c}_0", w, "encoded") for c in "abc" for w in (0, 1)]
    cached = open_cache(copy, folder, tokenizer)
    pixels = open_clips(copy, views=3)
    for n in range(6):
        sample = cached.sample(n)
        assert sample["latents"].shape == (16, 6, 4, 6)
        assert sample["latents"].dtype == torch.bfloat16
        start = sample["start"]
        levels = [6 * frame + 16 for frame in (start, start + 8)] * 3
        assert (sample["latents"][0, :, 0, 0].float() - torch.tensor(levels)).abs().max() < 2
        assert (sample["hint_latents"] != sample["latents"]).any()
        other = pixels.sample(n)
        assert sample["clip"] == other["clip"] and sample["fps"] == 10
        for key in ("text", "fps", "padding_mask", "view_index"):
            assert sample[key].shape == other[key].shape and sample[key].dtype == other[key].dtype
    outcomes = {outcome for *_, outcome in open_cache(copy, folder, tokenizer).build(encode)}
    assert outcomes == {"kept"}
    # a changed source makes its clip stale, a changed setting or tokenizer makes all of them stale
    write_video(copy / "lidar" / data.FRONT / "a_0.mp4", numbered(20, offset=9), 10)
    stale = open_cache(copy, folder, tokenizer)
    assert {stale.sample(n)["clip"] for n in range(6)} == {"b_0", "c_0"}
    assert "stale" in stale.bad["a_0"]
    assert capsys.readouterr().err.count("a_0_window") == 2  # here and before the cache was built
    with pytest.raises(ValueError, match="stale"):
        open_cache(copy, folder, tokenizer, height=40).sample(0)
    with pytest.raises(ValueError, match="stale"):
        open_cache(copy, folder, tokenizer, "float32").sample(0)
    outcomes = [outcome for *_, outcome in open_cache(copy, folder, tokenizer).build(encode)]
    assert outcomes == ["encoded"] * 2 + ["kept"] * 4
    tokenizer.write_bytes(b"other weights")
    with pytest.raises(ValueError, match="stale"):
        open_cache(copy, folder, tokenizer).sample(0)
    with pytest.raises(FileNotFoundError, match="there is no .*nothing; set tokenizer.path"):
        open_cache(copy, folder, tmp_path / "nothing")


def test_cache_entry_cut_short_is_stale(copy, tmp_path):
    tokenizer = tmp_path / "t"
    tokenizer.write_bytes(b"weights")
    clips = open_cache(copy, tmp_path / "cache", tokenizer)
    list(clips.build(encode))
    for path in (tmp_path / "cache").glob("a_0*"):
        path.write_bytes(path.read_bytes()[:-10])
    again = open_cache(copy, tmp_path / "cache", tokenizer)
    assert {again.sample(n)["clip"] for n in range(3)} == {"b_0", "c_0"}
    assert [outcome for *_, outcome in clips.build(encode)] == ["encoded"] * 2 + ["kept"] * 4


# ---- commands and drive --------------------------------------------------------------------------

@pytest.fixture
def config(copy, tmp_path, monkeypatch):
    """Stands in for configs and tokenizer.py, which have tests of their own."""
    space = types.SimpleNamespace
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    made = space(data=space(root=copy, num_frames=9, cache=None, num_workers=2),
                 tokenizer=space(path=weights), trainer=space(device="cpu", precision="float32"))

    def opened(config):
        if config.data.root == "random":
            return space()  # RandomClips, which are no WaymoClips
        if config.data.cache:
            return open_cache(config.data.root, config.data.cache, weights, views=1)
        return open_clips(config.data.root, config.data.num_frames)
    monkeypatch.setattr(check, "load_config", lambda path, overrides: made)
    monkeypatch.setattr(data, "open_clips", opened)

    def load_tokenizer(path, device, dtype, decoder):
        assert path == weights and dtype == torch.float32 and not decoder
        return space(encode_views=lambda video: encode(video.cpu()))
    monkeypatch.setitem(sys.modules, "tokenizer", space(load_tokenizer=load_tokenizer))
    return made


def test_check_reports_frozen_control_and_bad_clips(config, copy, capsys):
    moving = np.random.default_rng(0).integers(0, 255, (30, 32, 48, 3), np.uint8)
    moving[12:] = moving[11]  # stands still from frame 11 to 29
    write_video(copy / "lidar" / data.FRONT / "b_0.mp4", moving, 10)
    cut(copy / "videos" / data.FRONT / "c_0.mp4")
    assert check.main(["check", "smoke.yaml"]) == 1
    printed = capsys.readouterr().out
    assert "a_0: 20 frames, 10 fps, 48x32, 5 views, 5 text rows" in printed
    assert "lidar/pinhole_front stands still for 19 frames from frame 11 on" in printed
    assert printed.count("stands still") == 1
    assert re.search(r"BAD: \S+videos/pinhole_front/c_0.mp4 is not a readable video", printed)
    assert printed.endswith("2 of 3 clips usable\n")


def test_exit_status(config, copy, capsys):
    assert check.main(["check", "smoke.yaml"]) == 0
    config.data.num_frames = 33
    capsys.readouterr()
    assert check.main(["check", "smoke.yaml"]) == 1
    assert "0 of 3 clips usable" in capsys.readouterr().out
    assert check.main(["chekc", "smoke.yaml"]) == 2
    assert check.main(["cache", "smoke.yaml"]) == 2  # data.cache is not set
    config.data.root = copy / "nowhere"
    assert check.main(["check", "smoke.yaml"]) == 2
    assert "nowhere" in capsys.readouterr().err
    config.data.root = "random"
    assert check.main(["check", "smoke.yaml"]) == check.main(["cache", "smoke.yaml"]) == 2
    assert capsys.readouterr().err.count("error: data.root is random, which has no clips\n") == 2


def test_a_check_ends_quietly_when_nobody_reads_it(config, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)  # as of `check | head`, when head has its lines
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert check.main(["check", "smoke.yaml"]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_a_colon_in_a_path_and_a_name_outside_the_encoding(config, copy, tmp_path, monkeypatch):
    """`a:b` would be a protocol to ffmpeg; a job's stdout may be ASCII."""
    monkeypatch.chdir(tmp_path)
    for file in [*copy.rglob("a_0.mp4"), *copy.rglob("a.pkl")]:
        file.rename(file.with_name(file.name.replace("a", "\xe4", 1)))
    config.data.root = copy.rename(tmp_path / "a:b").relative_to(tmp_path)
    printed = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", printed)
    status = check.main(["check", "smoke.yaml"])
    printed.seek(0)
    text = printed.read()
    assert status == 0 and "\\xe4_0: 20 frames, 10 fps" in text, text

    picture = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    pictures.write_png("a:b/x.png", picture)
    assert np.array_equal(pictures.read_png("a:b/x.png"), picture)


def test_cache_command(config, tmp_path, monkeypatch, capsys):
    config.data.cache = tmp_path / "latents"
    before = os.umask(0o002)  # a group shares it
    assert check.main(["cache", "smoke.yaml"]) == 0
    os.umask(before)
    assert capsys.readouterr().out.count("encoded") == 6
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "latents").iterdir()} == {0o664}
    with monkeypatch.context() as patch:  # another user's, whom the advice to encode would mislead
        patch.setattr(os, "access", lambda path, mode: False)
        assert check.main(["cache", "smoke.yaml"]) == 2
    assert "_0_window0.safetensors may not be read by this user" in capsys.readouterr().err
    assert check.main(["cache", "smoke.yaml"]) == 0
    assert capsys.readouterr().out.count("kept") == 6
    cut(config.data.root / "lidar" / data.FRONT / "c_0.mp4")
    assert check.main(["cache", "smoke.yaml"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("kept") == 4 and printed.count("BAD: ") == 2
    assert printed.endswith("2 of 3 clips usable\n")


def test_synthetic_drive(tmp_path):
    settings = dict(clips=2, frames=12, height=48, width=80, text_width=WIDTH)
    root = smoke_drive.write_drive(tmp_path / "drive", **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drive"]
    stamp = (root / "drive.json").stat().st_mtime_ns
    assert smoke_drive.write_drive(root, **settings) == root
    assert (root / "drive.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="remove it or set data.root"):
        smoke_drive.write_drive(root, clips=3)
    for hint in ("lidar", "hdmap"):
        clips = data.WaymoClips(root, hint, 9, 5, 48, 80, seed=0, text_tokens=16, text_width=WIDTH)
        sample = clips.sample(0)
        assert sample["video"].shape == (5, 3, 9, 48, 80) and not clips.bad
        moved = sample["video"][0, :, 0].int() - sample["video"][0, :, 8].int()
        assert moved.abs().float().mean() > 1
        assert sample["hint"].float().std() > 5
    captions = [data.load_text(path, 16, WIDTH)
                for path in sorted((root / "t5_xxl" / data.FRONT).iterdir())]
    assert len(captions) == 2 and not torch.equal(*captions)


def test_control_of_the_drive_is_a_function_of_its_scene():
    palette = np.random.default_rng(0).uniform(50, 255, (7, 3))
    car = smoke_drive.Car(lane=1.8, ahead=12.0, speed=8.0, size=(1.9, 1.6, 4.4))
    scene = smoke_drive.Scene(palette, [car], houses=np.zeros((2, 1)))  # we go at 8 m/s in its lane
    camera, lidar, hdmap = smoke_drive.render(scene, 20, 48, 80, 10)
    assert camera.shape == lidar.shape == hdmap.shape == (20, 48, 80, 3)
    body = slice(28, 30), slice(38, 42)  # below its rear window
    depth = 12 - 2.2  # of its back
    assert np.abs(lidar[:, *body] - 255 * depth / smoke_drive.FAR).max() < 1
    assert (lidar[:, 0] == 0).all()  # the sky gives no return
    colour = palette[smoke_drive.CAR] / palette[smoke_drive.CAR].sum()
    seen = camera[:, *body] / camera[:, *body].sum(-1, keepdims=True)
    assert np.abs(seen - colour).max() < 0.02
    assert (hdmap[..., 1] == 255).any((1, 2)).all() and (hdmap[..., 0] == 255).any((1, 2)).all()


def test_text_tells_colours_and_control_tells_what_text_does_not():
    scenes = [smoke_drive.draw_scene(np.random.default_rng([0, i])) for i in range(2)]
    first, second = [smoke_drive.render(scene, 1, 48, 80, 10) for scene in scenes]
    scenes[1].palette = scenes[0].palette
    assert np.array_equal(*[smoke_drive.tell(scene.palette, WIDTH) for scene in scenes])
    painted = smoke_drive.render(scenes[1], 1, 48, 80, 10)
    assert np.array_equal(painted[1], second[1]) and np.array_equal(painted[2], second[2])
    assert not np.array_equal(painted[0], second[0])
    assert np.abs(painted[0].astype(float) - first[0]).mean() > 10  # the scene is not in the text
