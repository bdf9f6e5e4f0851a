"""Which files a clip may be made of: moments that agree, text in all its forms, what check says."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
from configs import video
from configs.video import DecoderKilled, write_video
from test_data import ROWS, WIDTH, cut, numbered, numbers, open_clips, whole_video

FRAMES = 40
TEXT = pickle.dumps([ROWS])


def stamped(path, seconds="N/10", frames=FRAMES, size=(32, 48), *options):
    """Numbered frames (see test_data) at the times of an expression in N, the frame's number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [data.ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24",
               "-s", f"{size[1]}x{size[0]}", "-r", "10", "-i", "-",
               "-vf", f"settb=1/90000,setpts='({seconds})/TB'", "-fps_mode", "passthrough",
               "-enc_time_base", "1:90000", "-c:v", "libx264", "-crf", "0", "-pix_fmt", "yuv420p",
               *options, path]
    subprocess.run(command, input=numbered(frames, *size).tobytes(), check=True)
    return path


def remuxed(path, source, before=(), after=()):
    """The same packets, options standing before or after the input."""
    subprocess.run([data.ffmpeg(), "-v", "error", "-y", *before, "-i", source, "-c", "copy",
                    *after, path], check=True)
    return path


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    return stamped(tmp_path_factory.mktemp("steady") / "x.mp4")


def front(root, camera, control, name="a"):
    """A root, or one more clip in it, of a front camera and a lidar video."""
    for kind, video in (("videos", camera), ("lidar", control)):
        target = root / kind / data.FRONT / f"{name}_0.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, target)
    text = root / "t5_xxl" / data.FRONT / f"{name}.pkl"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_bytes(TEXT)
    return root


def reason(clips, clip="a_0"):
    with pytest.raises(data.BadClip) as error:
        clips.take(clip, [0])
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- moments -------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds, fps", [
    ("(N+0.45*sin(N*37))/10", 10),         # uneven around a steady pace
    ("N/10+if(eq(N,39),3,0)", 10),         # a late last stamp
    ("N/10+if(eq(N,20),0.0999,0)", 10),    # one late stamp in between
    ("(N+3)/10", 10),                      # starts late, as without an edit list for B-frames
    ("round(N*1001/30)/1000", 29.97),      # in milliseconds
    ("N*2", 0.5),
])
def test_uneven_stamps_around_a_steady_pace_are_used(tmp_path, seconds, fps):
    video = stamped(tmp_path / "x.mp4", seconds)
    clips = open_clips(front(tmp_path / "root", video, video), FRAMES)
    sample = clips.sample(0)
    assert numbers(sample["video"][0]) == list(range(FRAMES)) and not clips.bad
    assert sample["fps"].item() == pytest.approx(fps, rel=2e-3)


def test_b_frames_edit_lists_and_other_time_bases_agree_with_plain_files(tmp_path, steady):
    b_frames = stamped(tmp_path / "b.mp4", "N/10", FRAMES, (32, 48), "-bf", "3", "-b_strategy", "0")
    base = remuxed(tmp_path / "base.mp4", steady, after=["-video_track_timescale", "12345"])
    no_list = remuxed(tmp_path / "n.mp4", b_frames, after=["-use_editlist", "0"])
    for i, video in enumerate((b_frames, base, no_list)):
        sample = open_clips(front(tmp_path / f"{i}", steady, video), FRAMES).sample(0)
        assert numbers(sample["video"][0]) == numbers(sample["hint"][0]) == list(range(FRAMES))
    # an edit list hides frames 0 to 5 without removing their packets
    hidden = remuxed(tmp_path / "h.mp4", steady, before=["-ss", "0.55"])
    info = data.probe(hidden)
    assert numbers(data.fit(data.decode(hidden, 0, info.frames), 32, 48)[0]) == list(
        range(FRAMES - info.frames, FRAMES)) and info.frames == FRAMES - 6


REFUSED = {
    "rate": ("N/30", r"40 frames, 10 fps.* 40 frames, 30 fps"),
    "nearly the rate": ("N/10.2", r"10 fps.* 10.2 fps"),
    "hole": ("(N+if(gte(N,20),20,0))/10", r"gap of 2.1 s in its time stamps at second 1.9"),
    "two holes": ("(N+if(gte(N,10),10,0)+if(gte(N,30),10,0))/10", r"gap of 1.1 s .* second 0.9"),
    "one frame": ("(N+if(gte(N,20),1,0))/10", r"gap of 0.2 s .* second 1.9, 0.1 s"),
    "hole before the last two": ("(N+if(gte(N,38),9,0))/10", r"gap of 1 s .* second 3.7"),
    "half as fast": ("if(lt(N,20),N,2*N-20)/10", r"gap of 0.2 s .* second 2"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("where", ["control", "camera"])
def test_other_moments_are_refused_with_files_and_values(tmp_path, steady, where, case):
    seconds, expected = REFUSED[case]
    other = stamped(tmp_path / "x.mp4", seconds)
    root = front(tmp_path / "root", *((steady, other) if where == "control" else (other, steady)))
    text = reason(open_clips(root))
    camera, control = (root / kind / data.FRONT / "a_0.mp4" for kind in ("videos", "lidar"))
    if "gap" in expected:
        assert str(control if where == "control" else camera) in text
        assert re.search(expected, text), text
    else:
        assert str(camera) in text and str(control) in text
        for value in re.findall(r"[\d.]+ fps", expected):
            assert value in text


def test_lengths_must_be_equal_unless_trimmed(tmp_path, steady):
    short = stamped(tmp_path / "x.mp4", frames=37)
    root = front(tmp_path / "root", steady, short)
    text = reason(open_clips(root))
    assert "40 frames" in text and "37 frames" in text and "data.trim=true" in text
    clips = open_clips(root, trim=True)
    starts = [clips.take("a_0", [i])["start"] for i in range(40)]
    assert max(starts) <= 37 - 9 and len(set(starts)) > 9
    sample = clips.take("a_0", [1])
    assert numbers(sample["video"][0]) == numbers(sample["hint"][0])


def test_every_view_that_may_be_drawn_is_compared(tmp_path, steady):
    root = front(tmp_path, steady, steady)
    for kind in ("videos", "lidar"):
        for view in list(data.VIEWS)[1:]:
            (root / kind / view).mkdir()
            shutil.copy(steady, root / kind / view / "a_0.mp4")
    (root / "cache").mkdir()
    for view in data.VIEWS:
        (root / "cache" / f"prefix_{view}.pkl").write_bytes(TEXT)
    assert not open_clips(root, views=5).sample(0)["video"].eq(0).all()
    stamped(root / "lidar" / "pinhole_side_left" / "a_0.mp4", "N/20")
    text = reason(open_clips(root, views=5))
    assert "lidar/pinhole_side_left/a_0.mp4 has 40 frames, 20 fps" in text
    assert open_clips(root).sample(0)["clip"] == "a_0"  # a single view does not look there
    clips = open_clips(root, views=2)
    for n in range(12):  # whether a draw is good does not depend on what was drawn before
        for each in (clips, open_clips(root, views=2)):
            views = each.choose(np.random.default_rng([n]))
            try:
                each.take("a_0", [n])
                assert "pinhole_side_left" not in views
            except data.BadClip:
                assert "pinhole_side_left" in views


def test_a_rotation_is_applied_where_all_files_share_it(tmp_path, steady):
    frames = np.zeros((12, 32, 48, 3), np.uint8)
    frames[:, :8], frames[:, :, :8] = 200, 90  # told apart from every side
    flat = tmp_path / "flat.mp4"
    write_video(flat, frames, 10, crf=0)
    turned = remuxed(tmp_path / "turned.mp4", flat, before=["-display_rotation", "90"])
    whole = whole_video(data.ffmpeg(), turned, (12, 48, 32, 3))
    assert np.array_equal(data.decode(turned, 2, 9), whole[2:11])  # as ffmpeg shows it
    clips = open_clips(front(tmp_path / "both", turned, turned), size=(48, 32))
    assert clips.sample(0)["video"].shape == (1, 3, 9, 48, 32)
    text = reason(open_clips(front(tmp_path / "one", flat, turned)))
    assert "48x32," in text and "32x48, rotated by 90 degrees" in text
    upside = remuxed(tmp_path / "upside.mp4", flat, before=["-display_rotation", "180"])
    assert "rotated by 180 degrees" in reason(open_clips(front(tmp_path / "up", upside, flat)))


def test_surplus_and_lacking_frames_are_noticed_in_any_window(tmp_path, steady, monkeypatch):
    info = data.probe(steady)
    for told in (FRAMES - 2, FRAMES + 2):  # as a file whose packets are not its frames
        monkeypatch.setattr(video, "probe", lambda *_, n=told: info._replace(frames=n))
        for start in (0, 20, FRAMES - 12):
            with pytest.raises(data.BadClip, match=r"frames are lacking|\d+ of \d+ frames came"):
                data.decode(steady, start, 9)


# ---- names and text ------------------------------------------------------------------------------

def test_suffixes_count_in_any_case(tmp_path, steady):
    for i, suffix in enumerate((".MP4", ".Mp4", ".mp4")):
        root = front(tmp_path / "root", steady, steady, f"c{i}")
        for kind in ("videos", "lidar"):
            video = root / kind / data.FRONT / f"c{i}_0.mp4"
            video.rename(video.with_suffix(suffix))
    text = root / "t5_xxl" / data.FRONT / "c1.pkl"
    text.rename(text.with_suffix(".PKL"))
    clips = open_clips(root)
    assert clips.clips == ["c0_0", "c1_0", "c2_0"]
    assert {clips.sample(n)["clip"] for n in range(3)} == set(clips.clips) and not clips.bad


def test_which_text_is_a_clips_caption(tmp_path, steady):
    root = front(tmp_path, steady, steady)
    for kind in ("videos", "lidar"):
        folder = root / kind / data.FRONT
        for k in (1, 2):
            shutil.copy(folder / "a_0.mp4", folder / f"a_{k}.mp4")
    texts = root / "t5_xxl" / data.FRONT
    for value, name in enumerate(("a", "a_1", "a_2", "ab_1"), 1):
        (texts / f"{name}.pkl").write_bytes(pickle.dumps([value * np.ones((1, WIDTH), "f4")]))

    def found():
        clips = open_clips(root)
        return [clips.text(f"a_{k}", data.FRONT)[0, 0].item() for k in range(3)]
    assert found() == [1, 1, 1]  # without the chunk's number
    os.remove(texts / "a.pkl")
    assert found() == [2, 2, 3]  # its own, or that of another chunk
    os.remove(texts / "a_1.pkl")
    assert found() == [3, 3, 3]
    os.remove(texts / "a_2.pkl")
    with pytest.raises(data.BadClip, match=r"a.pkl is missing.* ab_1.pkl; write texts with pickle"):
        found()


@pytest.mark.parametrize("value", [
    [ROWS, 2 * ROWS], (ROWS[None], ROWS[:2]), np.stack([ROWS, 2 * ROWS]),
    {"pickle": {"ground_truth": {"embeddings": {"t5_xxl": [ROWS, 2 * ROWS]}}}}])
def test_of_several_captions_the_first_counts(tmp_path, value):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
    assert np.array_equal(data.load_text(tmp_path / "x.pkl", 5, WIDTH), ROWS)


def saved(write):
    def to_bytes(folder):
        write(folder / "made")
        return next(folder.glob("made*")).read_bytes()
    return to_bytes


@pytest.mark.parametrize("content, told", [
    (saved(lambda path: torch.save(torch.ones(2, WIDTH), path)), "zip archive, as torch.save"),
    (saved(lambda path: torch.save([ROWS], path, _use_new_zipfile_serialization=False)),
     "old torch.save"),
    (saved(lambda path: np.savez(path, ROWS)), "zip archive, as torch.save and numpy.savez"),
    (saved(lambda path: np.save(path, ROWS)), "a .npy array"),
    (lambda _: b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    (lambda _: b"<!DOCTYPE html><html>", "web page"),
    (lambda _: pickle.dumps([torch.ones(2, WIDTH)]), "asks for torch"),
    (lambda _: pickle.dumps([np.zeros((4, WIDTH), "f4")]), "only zeros, which is no caption"),
    (lambda _: pickle.dumps([np.concatenate([np.zeros((9, WIDTH)), ROWS])]), "only zeros"),
    (lambda _: pickle.dumps([]), "no float array"),
], ids="torch old_torch npz npy lfs html tensors zeros zeros_first empty".split())
def test_text_that_is_none_is_refused_with_what_it_is(tmp_path, steady, content, told):
    root = front(tmp_path / "root", steady, steady)
    (root / "t5_xxl" / data.FRONT / "a.pkl").write_bytes(content(tmp_path))
    clips = open_clips(root)
    text = reason(clips)
    assert f"{root}/t5_xxl/{data.FRONT}/a.pkl " in text and told in text
    assert "pickle.dump([array], file)" in text or "zeros" in told


@pytest.mark.parametrize("name", ["a.pickle", "a.npy", "a.pt", "a_0.pkl.gz"])
def test_missing_text_says_what_is_there(tmp_path, steady, name):
    root = front(tmp_path / "root", steady, steady)
    text = root / "t5_xxl" / data.FRONT / "a.pkl"
    text.rename(text.with_name(name))
    said = reason(open_clips(root))
    assert f"a.pkl is missing; beside it there is {name}; write texts with pickle.dump" in said


# ---- check ---------------------------------------------------------------------------------------

@pytest.fixture
def check(tmp_path, capsys):
    """Runs `data.py check` on a root; returns exit status and what it printed."""
    from configs.check import main  # a test puts another in its place
    def run(root, *overrides):
        config = tmp_path / "c.yaml"
        config.write_text(f"data: {{root: {root}, hint: lidar, num_frames: 9, height: 32, "
                          "width: 48}\nmodel: {text_tokens: 6, crossattn_emb_channels: "
                          f"{WIDTH}}}\ncheckpoint: {{base_path: random}}\n")
        status = main(["check", str(config), *overrides])
        return status, capsys.readouterr().out
    return run


def test_check_lists_the_files_that_differ_and_ends_with_1(tmp_path, steady, check):
    other = stamped(tmp_path / "x.mp4", "N/30", 36)
    for name in "abcd":
        root = front(tmp_path / "root", steady, steady, name)
    assert check(root)[0] == 0
    front(root, steady, other, "b")
    status, printed = check(root)
    assert status == 1
    assert f"{root}/videos/{data.FRONT}/b_0.mp4: 40 frames, 10 fps, 48x32\n" in printed
    assert f"{root}/lidar/{data.FRONT}/b_0.mp4: 36 frames, 30 fps, 48x32\n" in printed
    assert printed.count("frames, 30 fps") == 2  # once more in the reason
    assert "trained on: 2 clips, 9 consecutive frames of each at a time; held out: d_0" in printed
    assert printed.endswith("3 of 4 clips usable\n")
    # unequal lengths that data.trim admits are told too, and are no fault
    front(root, steady, stamped(tmp_path / "y.mp4", frames=30), "b")
    status, printed = check(root, "data.trim=true")
    assert status == 0 and "lidar/pinhole_front/b_0.mp4: 30 frames" in printed


def moving(frames, still_from=None, seed=0):
    """A soft pattern that drifts slowly, over noise that compression leaves traces of."""
    y, x = np.mgrid[:64, :96]
    rng = np.random.default_rng(seed)
    grain = rng.normal(0, 6, (64, 96))
    times = np.minimum(np.arange(frames), frames if still_from is None else still_from)
    video = [127 + 90 * np.sin((x + 0.2 * t) / 9) * np.cos(y / 7) + grain for t in times]
    return np.repeat(np.stack(video).clip(0, 255).astype(np.uint8)[..., None], 3, -1)


def test_only_a_control_that_freezes_while_the_camera_moves_stands_still(tmp_path, check):
    def root(name, camera, control):
        for kind, frames in (("camera", camera), ("control", control)):
            write_video(tmp_path / f"{kind}.mp4", frames, 10, crf=23)
        return front(tmp_path / name, tmp_path / "camera.mp4", tmp_path / "control.mp4")
    slow, frozen = moving(FRAMES), moving(FRAMES, 25)
    assert "stands still" not in check(root("slow", slow, slow))[1]
    assert "stands still" not in check(root("parked", frozen, frozen))[1]  # so does the camera
    printed = check(root("frozen", slow, frozen))[1]
    assert re.search(r"lidar/pinhole_front stands still for 1[0-6] frames from frame (2[4-9])",
                     printed), printed


def test_damaged_files_are_told_with_the_frames_that_came(tmp_path, steady, check, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (FRAMES, 32, 48, 3), np.uint8)
    write_video(tmp_path / "x.mp4", noise, 10)
    blob = bytearray((tmp_path / "x.mp4").read_bytes())
    blob[len(blob) // 2 : len(blob) // 2 + 4000] = bytes(4000)
    (tmp_path / "x.mp4").write_bytes(blob)
    root = front(tmp_path / "root", tmp_path / "x.mp4", steady)
    status, printed = check(root)
    assert status == 1 and re.search(r"BAD: \S+ is damaged: .* \(40 frames are listed\)", printed)
    with pytest.raises(data.BadClip, match=r"x.mp4 does not decode: .* \([\d]+ of 9 frames came"):
        monkeypatch.setattr(video, "probe", lambda *_: video.Probe(40, 10.0, 48, 32, 0, None))
        data.decode(tmp_path / "x.mp4", 31, 9)
    monkeypatch.undo()
    cut(root / "videos" / data.FRONT / "a_0.mp4")
    assert "a_0: unreadable" in check(root)[1]


# ---- decoders that die or hang, clips that turn out bad ------------------------------------------

@pytest.fixture
def stub(tmp_path, monkeypatch):
    """stub(commands): a shell script stands in for ffmpeg; $@ are the arguments, $real ffmpeg."""
    real = data.ffmpeg()

    def install(commands):
        script = tmp_path / "ffmpeg"
        script.write_text(f"#!/bin/sh\nreal={real}\ncd {tmp_path}\n{commands}\n")
        script.chmod(0o755)
        monkeypatch.setattr(video, "ffmpeg", lambda encoder=False: str(script))
        video.list_packets.cache_clear()
    yield install
    video.list_packets.cache_clear()


ONCE = 'if [ ! -e tried ]; then touch tried; {}; fi; exec $real "$@"'


@pytest.mark.parametrize("death, name", [
    ("kill -9 $$", "SIGKILL"), ("kill -BUS $$", "SIGBUS"),
    # what ffmpeg's own handler does
    ("echo '[info] Exiting normally, received signal 15.' >&2; exit 255", "SIGTERM")])
def test_a_killed_decoder_is_tried_again_and_then_names_the_signal(tmp_path, steady, stub, death,
                                                                   name):
    clips = open_clips(front(tmp_path / "root", steady, steady))
    stub(ONCE.format(death))
    assert clips.sample(0)["clip"] == "a_0" and (tmp_path / "tried").exists()
    stub(death)
    with pytest.raises(DecoderKilled, match=f"{name} while it read .*a_0.mp4, twice"):
        clips.sample(1)
    assert not clips.bad


def gone(pid):
    """Whether a process has ended, waiting a little."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_decoder_that_hangs_is_killed_and_its_clip_bad(tmp_path, steady, stub):
    root = front(tmp_path / "root", steady, steady)
    front(root, steady, steady, "b")
    clips = open_clips(root, timeout_s=1)
    stub('case "$*" in *a_0*rawvideo*) echo $$ >> pids; sleep 100;; esac; exec $real "$@"')
    began = time.monotonic()
    assert {clips.sample(n)["clip"] for n in range(4)} == {"b_0"}
    assert time.monotonic() - began < 20
    assert re.search(r"a_0.mp4: ffmpeg hung and was killed after 1 s, twice; data.timeout_s",
                     clips.bad["a_0"])
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2 and all(gone(int(pid)) for pid in pids)  # and not tried for each sample


def test_closing_the_reader_ends_its_decoders_which_no_signal_to_us_reaches(tmp_path, steady, stub):
    clips = open_clips(front(tmp_path / "root", steady, steady))
    stub("echo $$ >> pids; sleep 100")
    stream = data.prefetch(clips.sample, range(9), workers=2, stop=(tmp_path / "pids").exists)
    assert next(stream) is None  # heard while the decoders hang
    time.sleep(0.3)
    pids = list(map(int, (tmp_path / "pids").read_text().split()))
    assert all(os.getsid(pid) == pid != os.getsid(0) for pid in pids)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 5 and all(map(gone, pids)) and not clips.bad
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
    assert not os.path.exists(f"/proc/{pids[0]}")  # no zombie


def test_what_is_bad_is_tried_once(tmp_path, steady, monkeypatch):
    for i in range(12):
        root = front(tmp_path / "root", steady, steady, f"c{i:02}")
    for i in range(1, 12):
        os.remove(root / "lidar" / data.FRONT / f"c{i:02}_0.mp4")
    clips, drawn = open_clips(root), []
    draw = clips.draw
    monkeypatch.setattr(clips, "draw", lambda clip, *more: drawn.append(clip) or draw(clip, *more))
    starts = {n: clips.sample(n)["start"] for n in range(12)}
    assert len(drawn) == 11 + 12 and len(clips.bad) == 11
    assert open_clips(root).sample(7)["start"] == starts[7]
    shutil.rmtree(root)  # while running
    with pytest.raises(data.BadClip, match="none of 12 clips in .* is usable .*\n  c"):
        clips.sample(3)


def test_the_start_refuses_a_folder_of_mostly_bad_clips(tmp_path, steady):
    for name in "abcd":
        root = front(tmp_path / "root", steady, steady, name)
    for name in "ab":
        os.remove(root / "t5_xxl" / data.FRONT / f"{name}.pkl")
    open_clips(root).survey(0.5)
    os.remove(root / "lidar" / data.FRONT / "c_0.mp4")
    with pytest.raises(ValueError, match=r"1 of 4 clips .* data.max_bad is 0.5; .*a_0: .*a.pkl"):
        open_clips(root).survey(0.5)
    open_clips(root).survey(0.75)
    clips = open_clips(root)
    clips.survey(1.0, most=2)
    assert not clips.bad  # a survey is no training


def test_samples_need_libx264_and_the_start_says_so(monkeypatch, tmp_path):
    import imageio_ffmpeg
    lame = tmp_path / "ffmpeg"
    lame.write_text(f'#!/bin/sh\ncase "$*" in *libx264*) exit 1;; esac; '
                    f'exec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"\n')
    lame.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    data.ffmpeg.cache_clear()
    try:
        assert data.ffmpeg() == str(lame)
        assert data.ffmpeg(encoder=True) == imageio_ffmpeg.get_ffmpeg_exe()
        data.ffmpeg.cache_clear()
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
        with pytest.raises(FileNotFoundError, match="no ffmpeg .* with libx264 among"):
            data.ffmpeg(encoder=True)
    finally:
        data.ffmpeg.cache_clear()


def test_values_that_are_not_finite_in_the_cache_are_an_error(tmp_path, steady):
    clips = open_clips(front(tmp_path / "root", steady, steady))
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    cached = data.CachedClips(clips, tmp_path / "cache", 1, weights)
    list(cached.build(lambda video: torch.ones(1, 16, 2, 4, 6, dtype=torch.bfloat16)))
    [path] = (tmp_path / "cache").iterdir()
    with safe_open(path, "pt") as file:
        identity = file.metadata()
    for value in (float("nan"), float("inf")):
        stored = load_file(path)
        stored["hint_latents"][3, 1, 2, 2] = value
        save_file(stored, path, identity)
        with pytest.raises(data.DataFailure, match="a_0_window0.safetensors holds hint_latents"):
            cached.sample(0)
    with pytest.raises(data.DataFailure, match="what the tokenizer makes of a_0"):
        path.unlink()
        list(cached.build(lambda video: torch.full((1, 16, 2, 4, 6), float("nan"))))
    assert not path.exists()


def test_a_cache_belongs_to_its_root(tmp_path, steady):
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    roots = [front(tmp_path / name, steady, steady) for name in ("one", "two")]
    for root in roots:  # the same names, sizes and times
        for kind in ("videos", "lidar"):
            os.utime(root / kind / data.FRONT / "a_0.mp4", (1, 1))

    def build(root):
        cached = data.CachedClips(open_clips(root), tmp_path / "cache", 1, weights)
        made = cached.build(lambda video: torch.ones(1, 16, 2, 4, 6, dtype=torch.bfloat16))
        return [outcome for *_, outcome in made]
    assert build(roots[0]) == ["encoded"] and build(roots[0]) == ["kept"]
    assert build(roots[1]) == ["encoded"]


# ---- a dataset of one's own ----------------------------------------------------------------------

def test_sources_that_are_no_videos_need_two_methods(tmp_path):
    class Arrays(data.WaymoClips):
        def list_clips(self):
            return [path.stem for path in self.root.glob("*.npy")]

        def draw(self, clip, views, rng):
            return {"clip": clip, "start": int(rng.integers(5)), "fps": torch.tensor(10.0),
                    "text": torch.ones(6, WIDTH), "view_index": torch.tensor([0]),
                    "files": [self.root / f"{clip}.npy"]}

        def pixels(self, sample):
            whole = np.load(sample["files"][0])
            frames = whole[sample["start"] : sample["start"] + self.num_frames]
            video, mask = data.fit(frames, self.height, self.width)
            return {"video": video[None], "hint": 255 - video[None], "padding_mask": mask}

    for name in "ab":
        np.save(tmp_path / f"{name}.npy", numbered(20))
    clips = Arrays(tmp_path, "lidar", 9, 1, 32, 48, 0, 6, WIDTH)
    clips.survey(0.5)
    sample = clips.sample(3)
    assert numbers(sample["video"][0]) == list(range(sample["start"], sample["start"] + 9))
    cached = data.CachedClips(clips, tmp_path / "cache", 2, tmp_path / "a.npy")


    def encode(video):  # (1, 1, 3, F, H, W)
        return video[:, 0, :1, ::8, ::8, ::8].expand(1, 16, 2, 4, 6).bfloat16()
    made = cached.build(encode)
    assert [outcome for *_, outcome in made] == ["encoded"] * 4
    assert cached.sample(3)["latents"].shape == (16, 2, 4, 6)
