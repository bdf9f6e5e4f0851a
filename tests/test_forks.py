"""Forks lose nothing: README's recipes, applied to a copy and run; whatever trainer.train names."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_data import numbered
from test_tp import gathered
from test_train import ROOT, TINY, checkpoint, metrics

import convert
import data
import model as m
import tp
import train
from configs import guard, smoke_drive
from configs.video import write_video

RECIPES = ["A control type", "A dataset", "What is trained", "An optimizer or a schedule"]
STEPS = "trainer.max_iter=4"
SMALL = ["model.max_img_h=32", "model.max_img_w=32", "model.max_frames=8", "model.num_heads=4",
         "model.adaln_lora_dim=16", "trainer.precision=float32", "parallel.tp=1",
         "trainer.logging_iter=1", "trainer.val_iter=0", *TINY[2:],
         "data.num_frames=9", "data.height=32", "data.width=48", "data.batch_size=1",
         f"tokenizer.path={ROOT}/configs/smoke_tokenizer.safetensors"]


# ---- README's recipes ----------------------------------------------------------------------------
# The functions that end in _fork run in the fork, in a process of its own.

def recipe(title):
    """The diff below a heading of README."""
    readme = (ROOT / "README.md").read_text()
    return re.search(rf"\n### {title}\n.*?```diff\n(.*?)```", readme, re.S)[1]


def apply(folder, *titles):
    """Apply recipes as a reader would, from a file: lines may have moved, but not changed."""
    for title in titles:
        (folder / "fork.diff").write_text(recipe(title))
        tool = ["git", "apply"] if shutil.which("git") else ["patch", "-p1", "-F0", "-i"]
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
        done = subprocess.run([*tool, "fork.diff"], cwd=folder, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, f"{title}: {done.stdout}{done.stderr}"
        (folder / "fork.diff").unlink()


@pytest.fixture
def fork(tmp_path):
    """fork(title): a copy of the repository with a recipe; fork(): without."""
    folder = tmp_path / "fork"

    def make(*titles):
        left_out = shutil.ignore_patterns("__pycache__", "golden", "checkpoints", "datasets", ".*")
        shutil.copytree(ROOT, folder, ignore=left_out)
        apply(folder, *titles)
        return folder

    return make


def python(folder, *words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_in(folder, name, out):
    """Call a function of this file with the fork's modules."""
    paths = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(folder / 'tests')!r}]; "
    call = f"import pathlib, test_forks; test_forks.{name}(pathlib.Path({str(out)!r}))"
    return python(folder, "-c", paths + call)


def test_all_recipes_apply_together(fork):
    folder = fork(*RECIPES)
    for file in ("data.py", "model.py", "train.py", "tp.py", "convert.py"):
        compile((folder / file).read_text(), file, "exec")
    for title in RECIPES:  # each once: nothing applies to what it has changed
        with pytest.raises(AssertionError, match=title):
            apply(folder, title)


def start(out, *words, stop=None):
    """A run; `stop`: the step in which it gets a SIGTERM."""
    os.environ["OUTPUT_ROOT"], calls = str(out), []

    class Stopped(tp.FlatParams):
        def sync_gradients(self):
            calls.append(None)
            if len(calls) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().sync_gradients()

    whole, tp.FlatParams = tp.FlatParams, Stopped
    try:
        assert train.main([*words]) == 0
    finally:
        tp.FlatParams = whole


def exact(out, *words):
    """The metadata file of a run's step 4, to which a run that is stopped and resumed is equal."""
    start(out / "straight", *words, STEPS)
    start(out / "stopped", *words, STEPS, stop=2)
    assert max(metrics(out / "stopped")) == 2
    start(out / "stopped", *words, STEPS)
    straight, stopped = checkpoint(out / "straight", 4), checkpoint(out / "stopped", 4)
    assert straight.keys() == stopped.keys() and len(straight) > 50
    assert all(torch.equal(straight[key], stopped[key]) for key in straight)
    assert metrics(out / "straight") == metrics(out / "stopped")
    return next((out / "straight").rglob("iter_000000004.pt"))


def read(path):
    return {name: tensor.read() for name, tensor in convert.open_weights(path).items()}


def merged(metadata, *words):
    """(regular, averaged) weights that a merge of a run writes, by NVIDIA's names."""
    assert convert.main(["merge", str(metadata), *words]) == 0
    folder = metadata.parent.parent / "fsdp_checkpoints"
    return [read(folder / f"{metadata.stem}_{kind}_model.pt") for kind in ("reg", "ema")]


def same(a, b):
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def merge_holds_the_checkpoint(metadata):
    regular, averaged = merged(metadata)
    groups = torch.load(metadata.with_stem(f"{metadata.stem}_model_mp_0"), weights_only=True)
    same(regular, groups["model"])
    ema = {name.replace("-", "."): value for name, value in groups["ema"].items()}
    same(averaged, groups["model"] | ema)
    assert not torch.equal(regular["net.zero_blocks.block0.weight"],
                           averaged["net.zero_blocks.block0.weight"])


def command(*words):
    """Exit status of `python data.py ...`."""
    sys.argv = ["data.py", *words]
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("data.py", run_name="__main__")
    return ended.value.code


def checked_cached_trained(out, root, config, *words, clips):
    """`check` and `cache` find every clip usable; a run on pixels and one on the cache."""
    words = [config, *SMALL, f"data.root={root}", *words]
    assert command("check", *words) == 0
    cache = f"data.cache={root / 'latents'}", "data.cache_windows=1"
    assert command("cache", *words, *cache) == 0
    assert len(list((root / "latents").glob("*.safetensors"))) == clips
    start(out / "cached", *words, *cache, "trainer.max_iter=1")
    merge_holds_the_checkpoint(exact(out, *words))


def video(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, numbered(9, offset=level), 10, crf=0)


def depth_fork(out):
    root, rows = out / "root", np.ones((5, 32), np.float32)
    for i, name in enumerate("abcd"):
        for kind in ("videos", "depth"):
            video(root / kind / data.FRONT / f"{name}_0.mp4", 9 * i)
        smoke_drive.write_pickle(root / "t5_xxl" / data.FRONT / f"{name}.pkl", [rows])
    checked_cached_trained(out, root, "configs/depth.yaml", clips=4)
    assert list(out.rglob("*_control_input_depth_block2_pretrain"))


def test_a_control_type_trains_and_no_test_of_the_configs_breaks(fork, tmp_path):
    folder = fork("A control type")
    printed = run_in(folder, "depth_fork", tmp_path / "out")
    assert "4 of 4 clips usable" in printed and "depth control" in printed
    python(folder, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_configs.py",
           "-k", "complete or every_config or mistakes_cost or twins")


def dataset_fork(out):
    root = out / "root"
    for i, name in enumerate("abcd"):
        for kind in ("videos", "hdmap"):
            video(root / name / f"{kind}.mp4", 9 * i)
        np.save(root / name / "caption.npy", np.full((5, 32), i + 1, np.float32))
    words = ["configs/hdmap.yaml", *SMALL, f"data.root={root}"]
    clips = data.open_clips(train.load_config(words[0], words[1:]))
    assert type(clips).__name__ == "FolderClips" and clips.held_out == ["d"]
    found = {sample["clip"]: sample for sample in map(clips.sample, range(3))}
    assert found.keys() == set("abc") and found["c"]["hint"].shape == (1, 3, 9, 32, 48)
    assert (found["c"]["text"][:5] == 3).all() and not found["c"]["text"][5:].any()
    checked_cached_trained(out, root, "configs/hdmap.yaml", clips=4)
    (root / "b" / "caption.npy").unlink()
    assert command("check", *words) == 1


def test_a_dataset_is_checked_cached_and_trained_on(fork, tmp_path):
    printed = run_in(fork("A dataset"), "dataset_fork", tmp_path / "out")
    assert "4 of 4 clips usable" in printed and "3 of 4 clips usable" in printed
    assert f"{tmp_path}/out/root/b/caption.npy is missing" in printed


def adapters_fork(out):
    words = [*TINY, "data.batch_size=1", "checkpoint.save_iter=4"]
    metadata = exact(out / "all", *words)
    merge_holds_the_checkpoint(metadata)
    regular, _ = merged(metadata)
    new = {name: value for name, value in regular.items() if name.startswith("net.adapters.")}
    assert len(new) == 2 * 3 and all(value.any() for value in new.values())

    # two ranks of a group train the same
    run_ranks(2, start, out / "two", *words, STEPS, "parallel.tp=2")
    for step, values in metrics(out / "two").items():
        assert values == pytest.approx(metrics(out / "all" / "straight")[step], rel=1e-4)

    # alone, and new, beside a control branch that has none
    torch.save({name: value for name, value in regular.items() if name not in new},
               out / "released.pt")
    start(out / "alone", *words, "trainer.max_iter=1", "checkpoint.save_iter=1",
          "job.stage=posttrain", f"checkpoint.load_path={out}/released.pt",
          "trainer.train=[control.adapters]", "optimizer.warmup_steps=0")
    after, averaged = merged(next((out / "alone").rglob("iter_000000001.pt")))
    differing = {name for name in after if not torch.equal(after[name], regular[name])}
    assert differing == new.keys() == {n for n in averaged if n.startswith("net.adapters.")}
    start(out / "again", *words, "trainer.max_iter=1", "job.stage=posttrain", "optimizer.lr=1e-9",
          f"checkpoint.load_path={next((out / 'all').rglob('*_reg_model.pt'))}")
    again = checkpoint(out / "again", 1)
    for name, value in new.items():  # loaded from a merged file
        assert torch.allclose(again[f"_model_mp_0/model/{name}"], value, atol=1e-6)


def test_new_parameters_are_trained_saved_merged_and_loaded(fork, tmp_path):
    printed = run_in(fork("What is trained"), "adapters_fork", tmp_path / "out")
    assert "it lacks 6 tensors, among them net.adapters.block0.0.weight" in printed


def schedule_fork(out):
    words = [*TINY, "data.batch_size=1", "checkpoint.save_iter=4", "optimizer.warmup_steps=1"]
    metadata = exact(out, *words)
    merge_holds_the_checkpoint(metadata)
    kept = torch.load(metadata, weights_only=True)["extra"]["optimizer"]
    assert kept["optimizer"] == "NAdam" and 0 < kept["mu_product"] < 1
    lines = next((out / "straight").rglob("metrics.jsonl")).read_text()
    rates = [float(rate) for rate in re.findall(r'"lr": ([\d.e-]+)', lines)]
    assert rates == pytest.approx([1e-9, 1e-3, 0.75e-3, 0.25e-3])
    assert train.main([*words, "trainer.max_iter=9"]) == 2


def test_a_schedule_binds_max_iter_and_another_optimizer_is_resumed(fork, tmp_path):
    folder = fork("An optimizer or a schedule")
    run_in(folder, "schedule_fork", tmp_path / "out")


# ---- what trainer.train names --------------------------------------------------------------------

def two_runs(out, ranks, *words):
    """Four steps, and four that are resumed after two: [{kind: whole tensors in memory} of each].

    One process group serves all: it is left at the end.
    """
    os.environ["OUTPUT_ROOT"] = str(out)
    idle = SimpleNamespace(start=lambda seconds: None, take=lambda folder: None)
    device, init, found = tp.init(ranks, 4), tp.init, []
    tp.init = lambda *sizes: device
    for name, steps in (("straight", 4), ("resumed", 2), ("resumed", 4)):
        last = f"job.name={name}", f"trainer.max_iter={steps}", f"parallel.tp={ranks}"
        cfg, stop = train.load_config(TINY[0], [*TINY[1:], *words, *last]), guard.Stop()
        run = train.prepare(cfg, idle, idle, False, [])
        train.train(run, stop)
        stop.close()
        model = dict(run.model.named_parameters())
        kept = {n: p for n, p in model.items() if n.startswith("control.") or n in run.flat.params}
        average = run.flat.views("ema")
        found.append({"model": {n: gathered(p, p.detach()) for n, p in kept.items()},
                      "ema": {n: gathered(model[n], t) for n, t in average.items()}})
    tp.shutdown()
    tp.init = init
    return found[::2]


def write_base(path):
    """A base with its logvar, bfloat16, under NVIDIA's names."""
    cfg = train.load_config(TINY[0], TINY[1:])
    net = m.build(cfg.model, "cpu", torch.bfloat16)
    tp.init_weights(net, 5)
    names = [name for name in net.state_dict() if not name.startswith("control.")]
    tensors = {convert.to_nvidia(name).removeprefix("base_model."): net.state_dict()[name]
               for name in names}
    torch.save(tensors, path)
    return tensors


@pytest.mark.parametrize("ranks, scheme, prefixes", [
    (1, "megatron", "[control, base.blocks.1]"), (2, "ulysses", "[control, base]"),
    (2, "megatron", "[control.blocks.1, control.zero_linears, base.blocks.1]"),
])
def test_what_is_trained_is_saved_resumed_and_merged_to_the_bit(tmp_path, ranks, scheme, prefixes):
    base = write_base(tmp_path / "base.pt")
    words = [tmp_path, ranks, f"trainer.train={prefixes}", f"parallel.scheme={scheme}",
             "trainer.precision=bfloat16", "data.batch_size=1", "checkpoint.save_iter=2",
             "optimizer.warmup_steps=0", f"checkpoint.base_path={tmp_path}/base.pt"]
    everyone = run_ranks(ranks, two_runs, *words) if ranks > 1 else [two_runs(*words)]
    [straight, resumed] = everyone[0]
    for memory in straight, resumed, *[run for runs in everyone for run in runs]:
        for kind in ("model", "ema"):
            same(memory[kind], straight[kind])

    trained = tuple(f"{prefix}." for prefix in prefixes.strip("[]").split(", "))
    wanted = {name for name in straight["model"]
              if name.startswith(trained) and not name.startswith("control.head.")}
    assert straight["ema"].keys() == wanted and any(n.startswith("base.") for n in wanted)

    theirs = {kind: {convert.to_nvidia(name): value for name, value in straight[kind].items()}
              for kind in ("model", "ema")}
    logvar = {name: value for name, value in base.items() if name.startswith("logvar.")}
    whole = logvar | {f"base_model.{name}": value for name, value in base.items()}
    for run in ("straight", "resumed"):
        metadata = next(path for path in tmp_path.rglob("iter_000000004.pt") if run in path.parts)
        for flag, below in (([], logvar), (["--include-base-model"], whole)):
            regular, averaged = merged(metadata, *flag)
            for weights in regular, averaged:
                weights.pop(convert.SEQ)
            same(regular, below | theirs["model"])
            same(averaged, below | theirs["model"] | theirs["ema"])
        below = [name for name in theirs["ema"] if name.startswith("base_model.")]
        changed = [name for name in below
                   if not torch.equal(regular[name], base[name.removeprefix("base_model.")])]
        assert len(changed) > len(below) / 2  # to bfloat16, a few steps are not seen everywhere


def test_the_dry_run_counts_what_is_trained_of_the_base(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = str(ROOT / "configs/lidar.yaml")
    with torch.device("meta"):
        net = m.build(train.load_config(config).model, "meta", torch.bfloat16)

    def rows(prefixes):
        words = [f"trainer.train={prefixes}", "parallel.recompute=full"]
        assert train.main([config, "--dryrun", *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        return {line[:39].strip(): line[39:].split()[0] for line in lines if len(line) > 40}

    for prefixes in ("[control]", "[control, base]", "[control, base.blocks.27]"):
        names = tuple(f"{prefix}." for prefix in prefixes.strip("[]").split(", "))
        trained = {n: p for n, p in net.named_parameters() if n.startswith(names)
                   and not n.startswith("control.head.")}
        count = sum(p.numel() for p in trained.values())
        own = sum(p.numel() / (8 if hasattr(p, "tp_dim") else 1) for p in trained.values())
        written = sum(p.numel() * (1 if hasattr(p, "tp_dim") else 8)
                      for n, p in net.named_parameters()
                      if n.startswith("control.") or n in trained)
        found = rows(prefixes)
        assert found["parameters: trained"] == f"{count:,}"
        for row, size in (("GiB a GPU: masters and moments", 12 * own), ("GiB a GPU: EMA", 4 * own),
                          ("GiB a GPU: gradients", 4 * own),
                          ("GiB a checkpoint", 2 * written + 4 * 8 * own + 12 * count)):
            assert float(found[row]) == pytest.approx(size / 2**30, abs=0.006), (prefixes, row)


# ---- Python --------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", ["train.py", "data.py check x", "convert.py split x",
                                   "-m configs.estimate x", "-m configs.rehearsal x"])
def test_a_python_that_is_too_old_is_told_before_a_package_is_missed(words):
    kind, name = ("module", words.split()[1]) if words[0] == "-" else ("path", words.split()[0])
    code = ("import runpy, sys; sys.modules |= dict.fromkeys(('torch', 'numpy', 'safetensors')); "
            "sys.version_info, sys.version = (3, 10, 4), '3.10.4 (main)'; sys.path[:0] = ['.']; "
            f"runpy.run_{kind}({name!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "error: this needs Python 3.11 or later, not 3.10.4\n"
    assert done.returncode == 1
