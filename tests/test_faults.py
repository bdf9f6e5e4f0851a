"""Faults while a run starts, trains and ends: nothing is lost, nothing is trained by mistake.

Those of files are in test_checkpoint.py and test_convert.py, those of clips in test_data.py.
"""

import errno
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_train import ROOT, TINY, checkpoint, metrics, wait_for_step

import convert
import data
import tp
import train
from configs import binding, check, files, guard, log
from configs.random_clips import RandomClips
from configs.schema import load_config
from configs.smoke_drive import write_drive

SMALL = ["model.num_blocks=1", "model.num_control_blocks=1", "checkpoint.save_iter=1000"]
FOLDER = Path("smoke/smoke/smoke")  # of the runs here, below OUTPUT_ROOT


def main(out, *words):
    """Exit status of train.py in this process, which saves after the last step only."""
    os.environ["OUTPUT_ROOT"] = str(out)
    status = train.main([*TINY, *SMALL, *words])
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()  # a save, for which a process waits before it ends
    return status


def at_step(monkeypatch, number, act):
    """Have `act()` called at the end of a step."""
    healthy = log.Log.step

    def step(self, done, *args):
        healthy(self, done, *args)
        if done == number:
            act()

    monkeypatch.setattr(log.Log, "step", step)


def saved_steps(out):
    return [int(path.stem[5:]) for path in sorted((out / FOLDER / "checkpoints").glob(
        convert.METADATA))]


# ---- signals -------------------------------------------------------------------------------------

@pytest.fixture
def no_nohup():
    """Under nohup, which these tests may run under, a hangup is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("numbers", [
    [signal.SIGHUP], [signal.SIGUSR1], [signal.SIGTERM, signal.SIGTERM],
    [signal.SIGINT, signal.SIGTERM],
], ids=lambda numbers: "_".join(number.name for number in numbers))
def test_every_stop_signal_saves_and_a_second_one_too(numbers, no_nohup, tmp_path, monkeypatch,
                                                      capsys):
    at_step(monkeypatch, 2, lambda: [os.kill(os.getpid(), number) for number in numbers])
    before = signal.getsignal(numbers[0])
    assert main(tmp_path, "trainer.max_iter=50") == 0
    assert saved_steps(tmp_path) == [2] and "stopped after step 2" in capsys.readouterr().out
    assert signal.getsignal(numbers[0]) is before


def test_a_stop_without_checkpoints_says_that_nothing_is_saved(tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(tmp_path, "trainer.max_iter=50", "checkpoint.save_iter=0") == 0
    said = capsys.readouterr().out
    assert "stopped after step 2, NOT SAVED, as checkpoint.save_iter is 0" in said
    assert "rerun" not in said and not saved_steps(tmp_path)


def test_a_later_second_signal_ends_the_process(monkeypatch):
    sent = []
    monkeypatch.setattr(guard.os, "kill", lambda pid, number: sent.append(number))
    stop = guard.Stop()
    try:
        stop.running = True
        stop._note(signal.SIGTERM, None)
        stop._note(signal.SIGTERM, None)
        assert not sent
        stop.since -= stop.PATIENCE + 1
        stop._note(signal.SIGTERM, None)
        assert sent == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        stop.close()


def test_a_signal_before_the_first_step_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "open_model", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert main(tmp_path) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM before the first step" in capsys.readouterr().err
    assert not (tmp_path / FOLDER / "lock.json").exists()


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = guard.Stop()
    try:
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        stop.close()
        signal.signal(signal.SIGHUP, before)


def test_a_stop_is_heard_while_waiting_for_data(tmp_path, monkeypatch):
    healthy = RandomClips.sample

    def slow(self, n):  # the batch of step 3 takes its time
        if n == 4:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(3)
        return healthy(self, n)

    monkeypatch.setattr(RandomClips, "sample", slow)
    assert main(tmp_path, "trainer.max_iter=50", "data.num_workers=1") == 0
    assert saved_steps(tmp_path) == [2]


def launch_and_wait(out, *words):
    """As torchrun does: start a rank, say which process it is, wait for it."""
    rank = os.fork()
    if rank == 0:
        os._exit(main(out, *words))
    (out / "rank").write_text(str(rank))
    os.waitpid(rank, 0)


def test_an_orphan_saves_and_ends(tmp_path):
    """torchrun was killed: what it started must not train on."""
    words = "trainer.max_iter=100000", "checkpoint.save_iter=100000"
    launcher = ranks.start(tmp_path / "printed", launch_and_wait, tmp_path, *words,
                           TORCHELASTIC_RUN_ID="test")
    wait_for_step(tmp_path, 2)
    pid = int((tmp_path / "rank").read_text())
    launcher.kill()
    deadline = time.monotonic() + 60
    while guard.process_start(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert guard.process_start(pid) is None
    assert saved_steps(tmp_path) == [max(metrics(tmp_path))]


def test_a_terminal_that_is_closed_costs_no_step(tmp_path):
    """It is gone when the signal comes: nothing can be printed any more."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "train.py"), *TINY, *SMALL, "trainer.max_iter=100000"]
    launcher, terminal = pty.fork()
    if launcher == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # unless under nohup
        os.execve(command[0], command, {**os.environ, "OUTPUT_ROOT": str(tmp_path)})
    printed = b""
    while b"step 3 " not in printed:
        printed += os.read(terminal, 4096)
    os.close(terminal)
    os.waitpid(launcher, 0)
    assert saved_steps(tmp_path) == [max(metrics(tmp_path))]


def test_a_full_disk_of_the_log_is_no_error():
    with open("/dev/full", "w", buffering=1) as full:
        stream = log.Unbroken(full)
        print("lost", file=stream, flush=True)
        assert not stream.isatty() and stream.fileno() == full.fileno()
        print("nobody hears", file=log.Unbroken(None), flush=True)  # closed before the start
        full.close = lambda: None  # which would flush, too


# ---- what ends a run, and what does not ----------------------------------------------------------

def test_no_more_data_saves_first_and_ends_with_the_sentence(tmp_path, monkeypatch, capsys):
    healthy = RandomClips.sample

    def gone(self, n):
        if n >= 6:
            raise data.BadClip("none of 3 clips is usable")
        return healthy(self, n)

    monkeypatch.setattr(RandomClips, "sample", gone)
    assert main(tmp_path, "trainer.max_iter=50") == 2
    assert saved_steps(tmp_path) == [3]
    assert "error: none of 3 clips is usable" in capsys.readouterr().err


def sicken(monkeypatch, after):
    """Every loss but those of the first steps is NaN."""
    healthy, calls = train.m.training_loss, []

    def sick(model, *args):
        calls.append(None)
        return healthy(model, *args) * (float("nan") if len(calls) > after else 1.0)

    monkeypatch.setattr(train.m, "training_loss", sick)


def test_nan_for_too_long_ends_at_the_last_good_step(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as sickness:
        sicken(sickness, after=2)
        sickness.setattr(RandomClips, "sample", lambda self, n, draw=RandomClips.sample:
                         draw(self, n) | {"clip": f"clip_{n}"})
        assert main(tmp_path, "trainer.max_iter=50", "trainer.max_skipped=3") == 2
    assert saved_steps(tmp_path) == [2]
    captured = capsys.readouterr()
    assert "3 steps in a row had no finite gradients" in captured.err
    assert "its clips: clip_4, clip_5" in captured.out  # of step 3, two a step
    bare = (tmp_path / FOLDER / "metrics.jsonl").read_text()
    assert "NaN" not in bare and json.loads(bare.splitlines()[-1])["loss"] is None
    assert main(tmp_path, "trainer.max_iter=3") == 0  # another start, that is well
    assert main(tmp_path / "straight", "trainer.max_iter=3") == 0
    assert metrics(tmp_path)[3] == metrics(tmp_path / "straight")[3]


@pytest.mark.parametrize("every, newest", [(1, 5), (3, 3), (50, 2)])
def test_a_save_among_skipped_steps_is_the_one_that_is_named(every, newest, tmp_path, monkeypatch,
                                                             capsys):
    sicken(monkeypatch, after=2)  # steps 3, 4 and 5 are skipped
    words = "trainer.max_iter=50", "trainer.max_skipped=3", f"checkpoint.save_iter={every}"
    assert main(tmp_path, *words) == 2
    assert saved_steps(tmp_path)[-1] == newest
    said = capsys.readouterr()
    assert f"stopped after step {newest}, saved" in said.out
    assert f"iter_{newest:09d}.pt, rerun" in said.out and "weights are from before them" in said.err


def test_a_run_may_be_renamed_but_not_parted_from_its_config(tmp_path, capsys):
    assert main(tmp_path, "trainer.max_iter=1") == 0
    (tmp_path / FOLDER).rename(tmp_path / FOLDER.with_name("other"))
    words = "job.name=other", "trainer.max_iter=2"
    config = tmp_path / FOLDER.with_name("other") / "config.yaml"
    kept = config.read_text()
    for empty in (False, True):
        config.unlink()
        if empty:
            config.touch()
        assert main(tmp_path, *words) == 2
        assert "config.yaml is missing or empty" in capsys.readouterr().err
        config.write_text(kept)
    assert main(tmp_path, *words) == 0
    assert "resuming at step 1" in capsys.readouterr().out
    config.unlink()
    assert main(tmp_path, "job.name=other", "trainer.max_iter=3", "--allow-config-change") == 0


def told(tp_size):
    """Which of four items a rank gets; the second rank is to stop after two of them."""
    tp.init(tp_size, num_heads=4)
    stop = []  # false until something is in it

    def items():
        for i in range(4):
            if i == 2 and dist.get_rank() == 1:
                stop.append(1)
            yield i

    found = list(guard.until(stop, items(), "cpu"))
    tp.shutdown()
    return found


@pytest.mark.parametrize("tp_size, found", [(2, [[0, 1]] * 2), (1, [[0, 1, 2, 3], [0, 1]])])
def test_a_whole_group_leaves_a_validation_when_one_rank_is_to_stop(tp_size, found):
    assert run_ranks(2, told, tp_size) == found


def test_a_disk_that_refuses_the_cache_costs_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    root = write_drive(tmp_path / "drive", clips=2, frames=17, height=48, width=80, views=1)
    drive = [f"data.root={root}", f"data.cache={tmp_path / 'file' / 'cache'}"]
    tokenizer = ROOT / "configs/smoke_tokenizer.safetensors"
    words = [*TINY, *SMALL, *drive, f"tokenizer.path={tokenizer}"]
    assert check.main(["cache", *words]) == 2
    assert re.search(r"^error: .*Not a directory: .*file/cache", capsys.readouterr().err, re.M)


def test_ctrl_c_ends_a_check_without_a_traceback(monkeypatch):
    def interrupted(path, words):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "load_config", interrupted)
    assert check.main(["check", "smoke.yaml"]) == 130


def test_a_full_disk_of_a_cache_names_the_entry(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="a_window0.safetensors could not be written .No space left "):
        files.write_entry(tmp_path / "a_window0.safetensors", {"x": torch.ones(2)}, "identity")
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_past_its_last_step_says_so(tmp_path, capsys):
    assert main(tmp_path, "trainer.max_iter=2") == 0
    capsys.readouterr()
    assert main(tmp_path, "trainer.max_iter=1") == 0
    assert "nothing was trained: the run was at step 2, and trainer.max_iter, which counts from " \
           "its first start, is 1" in capsys.readouterr().out


def test_a_copy_of_a_machine_is_another_one():
    """Two of one name and one space of processes: what tells them apart is when they started."""
    assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() in guard.machine()


def test_the_folder_goes_while_training(tmp_path, monkeypatch):
    at_step(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / FOLDER))
    assert main(tmp_path, "trainer.max_iter=4") == 0
    assert saved_steps(tmp_path) == [4] and convert.damage(
        tmp_path / FOLDER / "checkpoints/iter_000000004.pt") is None


@pytest.mark.parametrize("failures, every", [(2, 2), (99, 2), (99, 6)])
def test_a_full_disk_is_told_and_survived_or_ends_with_a_save(failures, every, tmp_path,
                                                              monkeypatch, capsys):
    healthy, tried = convert.write, []

    def full(path, content):
        tried.append(path)
        if len(tried) <= failures:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return healthy(path, content)

    monkeypatch.setattr(convert, "write", full)
    monkeypatch.setattr(convert, "RETRY_S", 0.01)
    status = main(tmp_path, "trainer.max_iter=6", f"checkpoint.save_iter={every}")
    captured = capsys.readouterr()
    assert "No space left on device" in captured.out + captured.err
    if failures == 2:
        assert status == 0 and saved_steps(tmp_path) == [2, 4, 6]
    else:
        assert status == 2 and "earlier checkpoints are intact" in captured.err
        ended = "checkpoint NOT WRITTEN, metrics" if every == 6 else "NOT SAVED, rerun"
        assert ended in captured.out


def test_a_save_given_up_while_the_next_one_waits_for_it_ends_the_run(tmp_path, monkeypatch,
                                                                       capsys):
    healthy = convert.write

    def full(path, content):
        if "000000001" in path.name:
            time.sleep(0.5)  # the next steps take less
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return healthy(path, content)

    monkeypatch.setattr(convert, "write", full)
    words = "trainer.max_iter=50", "checkpoint.save_iter=1", "checkpoint.retries=0"
    with pytest.warns(UserWarning, match="the save of step 1 still runs; waiting"):
        assert main(tmp_path, *words) == 2
    said = capsys.readouterr()
    assert "No space left on device); earlier checkpoints are intact" in said.err
    assert saved_steps(tmp_path) == [2]


def test_the_others_are_told_what_a_rank_was_doing(tmp_path, monkeypatch):
    seen, evaluate, fetch = [], train.evaluate, guard.fetch
    monkeypatch.setattr(train, "evaluate",
                        lambda *args: seen.append(tp.place.name) or evaluate(*args))
    monkeypatch.setattr(guard, "fetch", lambda *args: seen.append(tp.place.name) or fetch(*args))
    assert main(tmp_path, "trainer.max_iter=3") == 0
    assert seen[2:] == ["validation and samples of step 1", "data of step 2",
                        "validation and samples of step 2", "data of step 3",
                        "validation and samples of step 3"]


def test_a_rank_that_says_nothing_is_late_wherever_the_others_wait():
    watch = guard.Watch()
    watch.timeout_s, watch.seen = 60, {0: (beat(9, "x"), "1", 100.0), 1: (beat(9, "x"), "1", 39.0)}
    assert watch._silent(101.0) and not watch._silent(98.0)
    watch.seen[1] = beat(9, "x", ""), "1", 39.0  # it has ended well
    assert not watch._silent(101.0)


def test_no_git_and_no_file_for_the_start_are_no_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(tmp_path, "trainer.max_iter=1") == 0
    starts = tmp_path / FOLDER / "starts.jsonl"
    assert json.loads(starts.read_text())["commit"] == ""
    starts.unlink()
    starts.mkdir()
    assert main(tmp_path, "trainer.max_iter=2") == 0
    assert "starts.jsonl cannot be written: Is a directory" in capsys.readouterr().out


# ---- trained by mistake --------------------------------------------------------------------------

@pytest.fixture
def alive():
    process = subprocess.Popen(["sleep", "100"])
    yield process.pid
    process.kill()
    process.wait()


def holder(folder, **changes):
    folder.mkdir(exist_ok=True)
    values = {"machine": guard.machine(), "pid": 1, "started": 1, "since": "today"} | changes
    (folder / "lock.json").write_text(json.dumps(values))
    return folder


def test_a_second_start_says_who_trains_the_run(alive, tmp_path, monkeypatch, capsys):
    started = guard.process_start(alive)
    (tmp_path / FOLDER).mkdir(parents=True)
    holder(tmp_path / FOLDER, pid=alive, started=started)
    assert main(tmp_path, "trainer.max_iter=1") == 2
    assert f"is being trained by process {alive}" in capsys.readouterr().err
    assert not (tmp_path / FOLDER / "starts.jsonl").exists()
    monkeypatch.setattr(guard, "BEAT_S", 0.05)
    # what a killed process left, one whose number another has now, and a full disk
    for torn, changes in ((False, {"pid": 2**22 + 1}),
                          (False, {"pid": alive, "started": started + 1}),
                          (True, {}), (False, {"machine": "another"})):
        folder = holder(tmp_path / "stale", **changes)
        if torn:
            (folder / "lock.json").write_text("{")
        lock = guard.Lock()
        lock.take(folder)
        lock.release()
        assert not (folder / "lock.json").exists()
    # another machine, which goes on touching it
    folder, done = holder(tmp_path / "far", machine="another", pid=77), threading.Event()

    def touch():
        while not done.wait(0.02):
            os.utime(folder / "lock.json")

    threading.Thread(target=touch, daemon=True).start()
    with pytest.raises(ValueError, match="trained by process 77 on another"):
        guard.Lock().take(folder)
    done.set()


def test_a_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "BEAT_S", 0.02)
    lock = guard.Lock()
    lock.take(tmp_path)
    os.utime(tmp_path / "lock.json", (1, 1))
    time.sleep(0.5)
    assert (tmp_path / "lock.json").stat().st_mtime > 1
    lock.release()


SRUN, ENVIRONMENT = "srun --ntasks-per-node=1 torchrun", "torchrun sets both"


@pytest.mark.parametrize("variables, refused", [
    ({"SLURM_NTASKS": "8"}, SRUN), ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}, SRUN),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, SRUN),
    ({"RANK": "0"}, ENVIRONMENT), ({"WORLD_SIZE": "2"}, ENVIRONMENT),
    ({"RANK": "2", "WORLD_SIZE": "2"}, ENVIRONMENT),
    ({"RANK": "a", "WORLD_SIZE": "2"}, ENVIRONMENT),
    ({"SLURM_NTASKS": "8", "RANK": "0", "WORLD_SIZE": "8"}, ""), ({"SLURM_NTASKS": "1"}, ""),
    ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, ""), ({}, ""),
])
def test_tasks_that_do_not_know_of_each_other_are_refused(variables, refused, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "RANK",
                 "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(ValueError, match=refused):
            guard.check_launch()
    else:
        guard.check_launch()


@pytest.mark.parametrize("rank, address", [(0, "127.0.0.1"), (1, "127.0.0.1"), (1, "no.such.host")],
                         ids=["the port is taken", "nobody listens", "an unknown machine"])
def test_a_rank_that_cannot_meet_the_others_says_where(rank, address, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        if rank == 0:
            taken.listen()
        where = ranks.rank_of(rank, 2, taken.getsockname()[1]) | {"MASTER_ADDR": address}
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"rank {rank} .* at MASTER_ADDR and MASTER_PORT.*"
                                             f"{where['MASTER_PORT']}"):
            tp.init(1, num_heads=4, timeout_s=-29)


def test_a_config_binds_from_the_first_checkpoint_on(tmp_path, capsys):
    """Dry run, mend, dry run, launch; and what a dry run wrote binds no one."""
    config = tmp_path / FOLDER / "config.yaml"
    for words in (["trainer.seed=1"], ["trainer.seed=2"]):
        assert main(tmp_path, "--dryrun", *words) == 0
        assert f"seed: {words[0][-1]}" in config.read_text()
    assert sorted(path.name for path in config.parent.iterdir()) == ["config.yaml"]
    assert main(tmp_path, "trainer.max_iter=1", "checkpoint.save_iter=0") == 0
    assert main(tmp_path, "trainer.max_iter=1", "trainer.seed=3") == 0  # this one saves
    written = config.read_text()
    live = tmp_path / FOLDER.with_name("live") / "config.yaml"
    assert main(tmp_path, "--dryrun", "job.name=live", "trainer.seed=3") == 0
    (live.parent / "lock.json").touch()  # it trains, and has saved nothing yet
    assert main(tmp_path, "--dryrun", "job.name=live", "trainer.seed=4") == 0
    assert "seed: 3" in live.read_text()
    assert main(tmp_path, "--dryrun", "trainer.seed=4") == 2
    assert "trainer.seed: 3 -> 4" in capsys.readouterr().err
    assert main(tmp_path, "--dryrun", "trainer.seed=3", "trainer.logging_iter=7") == 0
    assert config.read_text() == written


def test_a_resume_may_change_only_what_changes_nothing(tmp_path, capsys):
    assert main(tmp_path, "trainer.max_iter=1") == 0
    refused = ("trainer.seed=1", "trainer.grad_accum=2", "data.batch_size=1", "optimizer.lr=0.1",
               "optimizer.warmup_steps=5", "model.rope_t_ratio=1", "data.val_clips=1",
               "data.hint=hdmap", "trainer.precision=bfloat16", "data.trim=true")
    for word in refused:
        assert main(tmp_path, "trainer.max_iter=2", word) == 2, word
        key = word.split("=")[0]
        error = capsys.readouterr().err
        assert "--allow-config-change" in error
        assert key in error, error
    # one batch of two clips, or two of one: the same step
    assert main(tmp_path, "trainer.max_iter=2", "data.batch_size=1", "trainer.grad_accum=2") == 0
    assert main(tmp_path, "trainer.max_iter=3", "data.num_workers=1", "trainer.logging_iter=2",
                "checkpoint.keep_last=1", "trainer.check_every=1") == 0
    assert main(tmp_path, "trainer.max_iter=4", "trainer.seed=1", "--allow-config-change") == 2
    assert "was trained on the base" in capsys.readouterr().err  # a random one follows the seed


def test_clips_and_files_are_part_of_a_run_but_not_where_they_are():
    files = {"encoder.jit": "a", "mean_std.pt": "b"}
    was = {"clips": ["a", "b", "c"], "tokenizer": files, "batch": [1, 1, 8],
           "control": {"file": "here", "sha256": "1"}, "position": 8}
    assert binding.differences(was, was | {"control": {"file": "there", "sha256": "1"}}) == []
    assert binding.differences(was, was | {"batch": [1, 1, 4]}) == []  # fewer GPUs: as README says
    assert binding.differences(was, was | {"batch": [1, 2, 4]}) == []
    for change, said in (({"clips": ["a", "c", "d"]}, "1 clips gone: b; 1 clips added: d"),
                         ({"tokenizer": files | {"mean_std.pt": "c"}}, "tokenizer"),
                         ({"control": {"file": "here", "sha256": "2"}}, "control checkpoint"),
                         ({"batch": [2, 1, 8]}, "clips a step 8 -> 16")):
        assert said in "; ".join(binding.differences(was, was | change))
    cfg = load_config(TINY[0])
    cfg.data.root, moved = "drive", load_config(TINY[0])
    moved.data.root, moved.tokenizer.path, moved.checkpoint.base_path = "there", "t", "b"
    assert binding.relevant(cfg.flat()) == binding.relevant(moved.flat())


# ---- weights in memory ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["base.blocks.0.mlp.up.weight", "logvar.weight"])
def test_a_flipped_bit_of_the_frozen_base_is_found_at_the_next_check(name, tmp_path, monkeypatch,
                                                                     capsys):
    models, build = [], train.m.build
    monkeypatch.setattr(train.m, "build", lambda *args: models.append(build(*args)) or models[-1])

    def flip():
        tensor = {**dict(models[-1].named_parameters()), **dict(models[-1].named_buffers())}[name]
        tensor.data.view(torch.int32).view(-1)[-1] ^= 1  # the last bit of the mantissa

    at_step(monkeypatch, 3, flip)
    assert main(tmp_path, "trainer.max_iter=9", "checkpoint.save_iter=3") == 2
    assert saved_steps(tmp_path) == [3]
    assert f"damaged at step 6 ({name} has changed on rank 0)" in capsys.readouterr().err


# ---- several ranks -------------------------------------------------------------------------------

def beat(count, place, end=None, pid=None, host="far"):
    return guard.Beat(host, pid or os.getpid(), guard.process_start(os.getpid()), count, place, end)


def test_the_late_rank_is_named():
    seen = {0: (beat(9, "sync of step 3"), "1", 100.0), 1: (beat(8, "data of step 3"), "1", 100.0)}
    late = guard._late(seen, 2, 60, 101.0)
    assert late.startswith("rank 1 ") and "data of step 3" in late and "rank 0" not in late
    assert "did not arrive at sync of step 3 within 60 s" in late
    seen[0] = beat(7, "encode of step 3"), "1", 40.0  # stopped: nothing has been heard of it
    assert guard._late(seen, 2, 60, 101.0).startswith("rank 0 ")
    assert guard._late({1: seen[1]}, 2, 60, 101.0).startswith("rank 0, never seen")
    seen[0] = beat(8, "data of step 3"), "1", 100.0
    assert "all others have been at data of step 3" in guard._late(seen, 2, 60, 101.0)
    seen[0] = beat(8, "data of step 3"), "1", 97.5  # stopped where the other waits
    assert guard._late(seen, 2, 4, 101.0).startswith("rank 0 ")


def test_the_dead_rank_is_named_and_one_that_ended_well_is_not():
    here = guard.machine()
    assert guard._gone({1: (beat(1, "x", host=here), "1", 0.0)}, 0) is None
    dead = {1: (beat(1, "data of step 3", host=here, pid=2**22 + 1), "1", 0.0)}
    assert "rank 1 (process 4194305) died at data of step 3" in guard._gone(dead, 0)
    done = {1: (beat(1, "x", "", host=here, pid=2**22 + 1), "1", 0.0)}
    assert guard._gone(done, 0) is None
    wrong = {1: (beat(1, "x", "out of memory"), "1", 0.0)}
    assert guard._gone(wrong, 0) == "rank 1 ended: out of memory"


def one_rank_is_sick(out):
    """Two replicas: rank 1 has infinite gradients in step 2, and no data for step 4."""
    healthy, sample, calls = train.m.training_loss, RandomClips.sample, []

    def sick(model, *args):
        calls.append(None)
        return healthy(model, *args) * (float("inf") if len(calls) == 2 else 1.0)

    def gone(self, n):
        if n >= 12:
            raise data.BadClip("no clip is left")
        return sample(self, n)

    if os.environ["RANK"] == "1":
        train.m.training_loss, RandomClips.sample = sick, gone
    sys.stderr = open(out / f"err{os.environ['RANK']}", "w", buffering=1)
    status = main(out, "trainer.max_iter=50", "trainer.check_every=1")
    dist.destroy_process_group()
    return status


def test_what_one_rank_meets_all_ranks_know(tmp_path):
    assert run_ranks(2, one_rank_is_sick, tmp_path) == [2, 2]
    for rank in (0, 1):
        assert "error: rank 1: no clip is left" in (tmp_path / f"err{rank}").read_text()
    assert saved_steps(tmp_path) == [3]
    lines = [json.loads(line) for line in (tmp_path / FOLDER / "metrics.jsonl").read_text(
        ).splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert all(t.isfinite().all() for t in checkpoint(tmp_path, 3).values())


def one_gpu_is_slow(out):
    log.gpu_speed = lambda: (700.0, 150.0)[tp.world_rank()]
    sys.stdout = open(out / f"out{os.environ['RANK']}", "w", buffering=1)
    return main(out, "trainer.max_iter=41", "trainer.logging_iter=50")


def test_the_slow_gpu_is_named_once(tmp_path):
    assert run_ranks(2, one_gpu_is_slow, tmp_path) == [0, 0]
    said = re.findall("warning: rank .*", (tmp_path / "out0").read_text())
    where = f"rank 1, GPU 1 of {socket.gethostname()}, computes at 150 TFLOP/s and another at 700"
    assert len(said) == 1 and where in said[0]
    assert (tmp_path / "out1").read_text() == ""


def killed_at_step_3(out, victim, *words):
    """One of four ranks is killed at the end of step 3; what each says is in err0, err1, ..."""
    healthy, rank = log.Log.step, os.environ["RANK"]

    def step(self, done, *args):
        healthy(self, done, *args)
        if done == 3 and rank == str(victim):
            os.kill(os.getpid(), signal.SIGKILL)

    log.Log.step = step
    return main(out, *words)


@pytest.mark.parametrize("victim", [0, 2])  # rank 0 is the one whose store the ranks talk through
def test_the_rank_that_was_killed_is_named_by_all_others_and_no_other_is(victim, tmp_path):
    words, port = ["parallel.tp=2", "trainer.max_iter=100000"], ranks.free_port()
    started = [ranks.start(tmp_path / f"err{rank}", killed_at_step_3, tmp_path, victim, *words,
                           **ranks.rank_of(rank, 4, port)) for rank in range(4)]
    for process in started:
        process.join(60)
    assert started[victim].exitcode == -signal.SIGKILL
    for rank in {0, 1, 2, 3} - {victim}:
        said = (tmp_path / f"err{rank}").read_text()
        assert started[rank].exitcode == 1, said
        culprits = re.findall(r"error: rank (\d) \(process (\d+)\) (?:died|.*did not arrive)", said)
        assert culprits == [(str(victim), str(started[victim].pid))], said
        assert said.count("error: ") == 1, said


def other_weights(out, tp_size, name):
    """Rank 1 loads another value of one tensor than rank 0."""
    load = train.load_weights

    def misload(cfg, model):
        load(cfg, model)
        if os.environ["RANK"] == "1":
            tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]
            tensor.data.view(-1)[-1] += 1

    train.load_weights = misload
    sys.stderr = open(out / f"err{os.environ['RANK']}", "w", buffering=1)
    return main(out, "trainer.max_iter=2", f"parallel.tp={tp_size}", "parallel.scheme=megatron")


@pytest.mark.parametrize("tp_size, name", [
    (1, "base.blocks.0.mlp.up.weight"), (2, "base.blocks.0.self_attn.q_norm.weight"),
    (2, "logvar.weight"),
], ids=["replicas", "replicated in a group", "a buffer"])
def test_ranks_that_loaded_other_frozen_values_are_refused_at_the_start(tp_size, name, tmp_path):
    assert run_ranks(2, other_weights, tmp_path, tp_size, name) == [2, 2]
    for rank in (0, 1):
        said = (tmp_path / f"err{rank}").read_text()
        assert f"ranks have loaded different values of {name} and " in said
        assert "checkpoint.base_path" in said
    assert not metrics_of_steps(tmp_path) and not saved_steps(tmp_path)


def metrics_of_steps(out):
    path = out / FOLDER / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["step"] > 0]


def undisturbed(out, *words):
    return main(out, *words)


def test_torchrun_restarts_what_was_killed_or_stopped(tmp_path):
    """Rank 1 is killed, then stopped; who that was is said, and nothing is lost."""
    words = ["parallel.tp=2", "trainer.max_iter=16", "checkpoint.save_iter=2"]
    environment = {**os.environ, "OUTPUT_ROOT": str(tmp_path / "a")}
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "--max-restarts=4", str(ROOT / "train.py"), *TINY, *SMALL, *words,
         "parallel.timeout_s=4"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for step, number in ((4, signal.SIGKILL), (10, signal.SIGSTOP)):
        wait_for_step(tmp_path / "a", step)
        victim = rank_one(launcher.pid)
        os.kill(victim, number)
    output = ""
    for line in launcher.stdout:
        output += line
        if f"rank 1 (process {victim} " in line and "did not arrive at" in line:
            os.kill(victim, signal.SIGKILL)  # as torchrun does after 30 s with what is stopped
    assert launcher.wait() == 0, output
    assert "died at" in output and "did not arrive at" in output, output
    assert output.count("error: rank 1 (process ") >= 2, output
    run_ranks(2, undisturbed, tmp_path / "b", *words)
    a, b = checkpoint(tmp_path / "a", 16), checkpoint(tmp_path / "b", 16)
    assert a.keys() == b.keys() and len(a) > 100 and all(torch.equal(a[k], b[k]) for k in a)


def rank_one(parent):
    """Process of rank 1 below torchrun."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if ours and b"\0RANK=1\0" in b"\0" + (folder / "environ").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError("torchrun runs no rank 1")
