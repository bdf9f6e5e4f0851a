"""A run's checkpoints: exact over any change of tp, merged under released names, never lost."""

import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from test_convert import FAMILIES, GOLDEN, ROOT, pretend, read, same, sizes, stems, tensors_of

import convert
import model as m
import tp

KINDS = ("ema", "master", "exp_avg", "exp_avg_sq")
SHAPES = {
    "control.patch_embed.weight": (16, 68), "control.zero_linears.0.bias": (16, ),
    "control.blocks.0.self_attn.q.weight": (16, 12), "control.blocks.0.mlp.down.weight": (12, 64),
    "control.blocks.1.mlp.up.weight": (64, 12), "logvar.weight": (1, 128)
}
DIMS = {name: convert.tp_dim_of(convert.to_nvidia(name)) for name in SHAPES}
META = {"config_digest": "c0ffee", "seq_length": 16, "position": 3}


def full_state(step, scale=1):
    """The training state of every parameter at a step, a function of the step alone."""
    rng = torch.Generator().manual_seed(step)
    new = {
        kind: {
            name: torch.randn(scale * n, k[0], generator=rng) if k else torch.randn(scale * n,
                                                                                    generator=rng)
            for name, (n, *k) in SHAPES.items()
        }
        for kind in KINDS
    }
    return {"model": {name: t.bfloat16() for name, t in new["master"].items()}, **new}


def sharded(state, rank, size):
    return {kind: {name: tp.shard(t, DIMS[name], rank, size) for name, t in tensors.items()}
            for kind, tensors in state.items()}


def save_all(monkeypatch, run, step, size=2, scale=1, **options):
    """Save as every rank in turn: rank 0's background thread waits for the files of the others."""
    saves = []
    for rank in range(size):
        pretend(monkeypatch, rank, size)
        saves.append(convert.save(run, step, sharded(full_state(step, scale), rank, size),
                                  META | {"position": 3 * step}, **options))
    for save in saves:
        save.wait()
    pretend(monkeypatch, 0, 1)
    return saves


def resumed(path, step, rank=0, size=1, scale=1):
    """Whether rank's state, filled from the checkpoint, is bit for bit that of the step."""
    wanted = sharded(full_state(step, scale), rank, size)
    into = {
        kind: {name: torch.full_like(t, torch.nan)
               for name, t in wanted[kind].items()}
        for kind in KINDS
    }
    meta = convert.resume(path, into)
    return meta["position"] == 3 * step and all(same(into[kind], wanted[kind]) for kind in KINDS)


# ---- exact state, released names -----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_state_is_exact_from_any_tp_to_any_tp(size, tmp_path, monkeypatch):
    save_all(monkeypatch, tmp_path, 7, size)
    step, path = convert.find_resume(tmp_path)
    assert (step, path.name) == (7, "iter_000000007.pt")
    assert sorted(os.listdir(path.parent)) == sorted(  # no temporary file is left
        ["iter_000000007.pt", "latest_checkpoint.txt"]
        + [f"iter_000000007_{kind}_mp_{r}.pt" for kind in ("model", "optim") for r in range(size)])
    record = torch.load(path, weights_only=True)
    assert (record["iteration"], record["tp_size"], record["config_digest"]) == (7, size, "c0ffee")
    for new_size in (1, 2, 4):
        for rank in range(new_size):
            pretend(monkeypatch, rank, new_size)
            assert resumed(path, 7, rank, new_size)


def test_resume_is_strict(tmp_path, monkeypatch):
    save_all(monkeypatch, tmp_path, 7)
    path = convert.find_resume(tmp_path)[1]
    into = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    into["control.blocks.1.mlp.down.weight"] = into.pop("control.blocks.0.mlp.down.weight")
    into["control.zero_linears.0.bias"] = torch.zeros(15)
    with pytest.raises(
            ValueError,
            match="exp_avg of .* missing 1: net.blocks.block1.*; unexpected 1: .*; misshapen 1: "
            r"net.zero_blocks.block0.bias \(16,\), expected \(15,\)"):
        convert.resume(path, {"exp_avg": into})


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.5, centered=True),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.1),
}


def flat_of(make, seed):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(16, generator=rng))
    flat = tp.FlatParams([("control.zero_linears.0.bias", weight)], lr=0.1)
    flat.optimizer = make([flat.master])
    flat._check_optimizer()
    return flat


def steps_of(flat, start, stop):
    for i in range(start, stop):
        flat.grad.copy_(torch.sin(torch.arange(16.0) + i))
        flat.optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whatever_an_optimizer_keeps_is_resumed(name, tmp_path):
    flat = flat_of(OPTIMIZERS[name], 1)
    steps_of(flat, 0, 3)
    state = {kind: flat.views(kind) for kind in ("ema", "master", *flat.state())}
    state["model"] = flat.views("master")
    meta = META | {"optimizer": flat.scalars()}
    convert.save(tmp_path, 3, state, meta).wait()
    path = convert.find_resume(tmp_path)[1]

    again = flat_of(OPTIMIZERS[name], 2)
    kinds, meta = convert.optimizer_state(path)
    again.make_state(kinds, meta["optimizer"])
    convert.resume(path, {kind: again.views(kind) for kind in ("ema", "master", *kinds)})
    for each in (flat, again):
        steps_of(each, 3, 6)
    assert torch.equal(flat.master, again.master)
    with pytest.raises(ValueError, match="optimizer is .*, this run's is Rprop"):
        flat_of(torch.optim.Rprop, 1).make_state(kinds, meta["optimizer"])


def test_an_optimizer_that_cannot_be_resumed_is_refused_at_the_start():
    with pytest.raises(ValueError, match="LBFGS cannot be saved and resumed"):
        flat_of(torch.optim.LBFGS, 1)


def test_a_run_from_before_other_optimizers_were_saved_is_resumed(tmp_path):
    state = full_state(3)
    convert.save(tmp_path, 3, state, META | {"optimizer_steps": 3}).wait()
    kinds, meta = convert.optimizer_state(convert.find_resume(tmp_path)[1])
    assert kinds == ["exp_avg", "exp_avg_sq"]
    assert meta["optimizer"] == {"optimizer": "AdamW", "step": 3.0}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_merged_run_has_released_names_and_starts_a_posttraining(path, suffix, tmp_path,
                                                                 monkeypatch):
    golden, size = load_file(path), 2
    base = {
        name.removeprefix("base_model."): t.bfloat16()
        for name, t in stems(golden, "base_model.").items()
    }
    torch.save(base, tmp_path / "base.pt")
    full = {
        name: golden[convert.to_nvidia(name)]
        for name in tensors_of(m.build(sizes(path), "meta", torch.float32))
        if not name.startswith("base.")
    }
    trained = {
        n: t
        for n, t in full.items() if n.startswith("control.") and not n.startswith("control.head.")
    }
    state = {"model": {n: t if n.startswith("logvar.") else t.bfloat16() for n, t in full.items()}}
    state |= {kind: {name: t + i for name, t in trained.items()} for i, kind in enumerate(KINDS)}
    dims = {name: convert.tp_dim_of(convert.to_nvidia(name)) for name in full}
    meta = META | {"base": convert.base_identity(tmp_path / "base.pt")}
    for rank in range(size):
        pretend(monkeypatch, rank, size)
        local = {
            k: {n: tp.shard(t, dims[n], rank, size)
                for n, t in ts.items()}
            for k, ts in state.items()
        }
        last = convert.save(tmp_path, 100, local, meta)
    last.wait()
    pretend(monkeypatch, 0, 1)
    metadata = tmp_path / "checkpoints" / "iter_000000100.pt"
    while not metadata.exists():
        time.sleep(0.01)
    for options in ([], ["--include-base-model", "--output-directory",
                         str(tmp_path / "with_base")]):
        assert convert.main(["merge", str(metadata), "--format", suffix, *options]) == 0
    released = {
        n: t if n.startswith("logvar.") or n.endswith(".seq") else t.bfloat16()
        for n, t in golden.items() if not n.startswith("base_model.")
    }
    regular = read(tmp_path / "fsdp_checkpoints" / f"iter_000000100_reg_model.{suffix}")
    assert same(regular, released)
    averaged = read(tmp_path / "fsdp_checkpoints" / f"iter_000000100_ema_model.{suffix}")
    assert same(averaged,
                released | {convert.to_nvidia(name): t
                            for name, t in state["ema"].items()})
    for kind, without in (("reg", regular), ("ema", averaged)):
        complete = read(tmp_path / "with_base" / f"iter_000000100_{kind}_model.{suffix}")
        assert same(complete, without | {f"base_model.{name}": t for name, t in base.items()})
        assert complete.keys() == golden.keys()
    for file, ema, source in ((f"fsdp_checkpoints/iter_000000100_reg_model.{suffix}", False,
                               regular), (f"fsdp_checkpoints/iter_000000100_ema_model.{suffix}",
                                          False, averaged), ("checkpoints/iter_000000100.pt", False,
                                                             regular),
                              ("checkpoints/iter_000000100.pt", True, averaged)):
        control = m.build(sizes(path), torch.device("cpu"), torch.float32).control
        convert.load(control, tmp_path / file, "control", ema)
        for name, tensor in control.state_dict().items():
            assert torch.equal(tensor,
                               source[convert.to_nvidia(f"control.{name}")].float()), (file, name)
    torch.save({name: t + 1 for name, t in base.items()}, tmp_path / "base.pt")
    with pytest.raises(ValueError, match="was trained on the base"):
        convert.merge(metadata, include_base_model=True)


def test_identity_of_the_base(tmp_path):
    golden = load_file(GOLDEN[0])
    base = {name.removeprefix("base_model."): t for name, t in stems(golden, "base_model.").items()}
    torch.save(base, tmp_path / "base.pt")
    convert.split(tmp_path / "base.pt", 4)
    known = convert.base_identity(GOLDEN[0])
    for same_base in (tmp_path / "base.pt", tmp_path / "checkpoints_tp" / "base.pt"):
        convert.check_base(known, convert.base_identity(same_base))
    for name, change in (("net.blocks.block2.blocks.0.block.attn.to_k.0.weight",
                          lambda t: t * 1.01), ("net.affline_norm.weight", lambda t: t.half()),
                         ("net.x_embedder.proj.1.weight", lambda t: t.T)):
        torch.save(base | {name: change(base[name])}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="other.pt .* set checkpoint.base_path"):
            convert.check_base(known, convert.base_identity(tmp_path / "other.pt"))


# ---- the background thread -----------------------------------------------------------------------


def test_the_state_may_change_right_after_save(tmp_path, monkeypatch):
    state = full_state(1, scale=64)
    flat = torch.zeros(10**6)
    # a view must not drag its whole buffer into the file
    state["ema"]["control.zero_linears.0.bias"] = flat[:16]
    previous = None
    warnings.simplefilter("ignore")  # whether a save is waited for is a matter of the disk here
    for step in (1, 2, 3):
        for tensors in state.values():
            for t in tensors.values():
                t.fill_(step)
        previous = convert.save(tmp_path, step, state, META | {"position": step}, previous=previous)
        for tensors in state.values():
            for t in tensors.values():
                t.fill_(-1)
    previous.wait()
    assert previous.stall > 0
    for step in (1, 2, 3):
        weights = convert.open_weights(tmp_path / "checkpoints" / f"iter_{step:09d}.pt")
        assert all(
            (t.read() == step).all() for name, t in weights.items() if not name.endswith("seq"))
    expected = sum(t.nbytes for kind in ("model", "ema") for t in state[kind].values())
    assert (tmp_path / "checkpoints" /
            "iter_000000001_model_mp_0.pt").stat().st_size < expected + 20_000


def test_a_save_that_still_runs_is_waited_for(tmp_path, monkeypatch):
    done = []
    slow = convert.Save(
        1, future=ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.3), done.append(1))))
    with pytest.warns(UserWarning, match="the save of step 1 is still running"):
        convert.save(tmp_path, 2, full_state(2), META, previous=slow)
    assert done


def test_only_replica_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(tp, "dp_rank", lambda: 1)
    convert.save(tmp_path, 2, full_state(2), META).wait()
    assert os.listdir(tmp_path / "checkpoints") == [] and convert.find_resume(tmp_path) is None


def test_meta_that_could_not_be_read_back(tmp_path):
    with pytest.raises(TypeError):
        convert.save(tmp_path, 2, full_state(2), META | {"what": object()})
    with pytest.raises(KeyError, match="seq_length"):
        convert.save(tmp_path, 2, full_state(2), {"config_digest": ""})


def test_pruning(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" /
     "iter_000000003_optim_mp_0.pt.tmp").write_text("of a save that was killed")
    (tmp_path / "checkpoints" / "notes.txt").write_text("not ours")
    for step in (1, 2, 4, 5, 6, 7, 8, 9):
        save_all(monkeypatch, tmp_path, step, keep_last=2, keep_every=4)
    assert (tmp_path / "checkpoints" / "notes.txt").exists()
    left = sorted({int(path.name[5:14]) for path in (tmp_path / "checkpoints").glob("iter_*")})
    assert left == [4, 8, 9]
    save_all(monkeypatch, tmp_path, 6,
             keep_last=1)  # a run that went back: what is newer is not this run's to remove
    assert resumed(tmp_path / "checkpoints" / "iter_000000006.pt", 6)
    assert not (tmp_path / "checkpoints" /
                "iter_000000004.pt").exists() and find_quietly(tmp_path)[0][0] == 9


# ---- faults --------------------------------------------------------------------------------------

TABLE = {}  # case -> outcomes


@pytest.fixture(scope="module", autouse=True)
def table(request):
    yield
    lines = [
        f"  {case:<50} tried {len(outcomes):>3}  survived {sum(outcomes):>3}"
        for case, outcomes in TABLE.items()
    ]
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("\n" + "\n".join(lines))


def damage_file(path, how):
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped byte":
        content[content.find(b"c0ffee") if b"c0ffee" in content else len(content) // 2] ^= 0x10
        path.write_bytes(content)


def find_quietly(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return convert.find_resume(run), " ".join(str(w.message) for w in caught)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped byte"])
@pytest.mark.parametrize("part", ["_model_mp_1", "_optim_mp_0", ""])
def test_damaged_file_falls_back_to_the_checkpoint_before(part, how, tmp_path, monkeypatch):
    for step in (1, 2):
        save_all(monkeypatch, tmp_path, step)
    name = f"iter_000000002{part}.pt"
    damage_file(tmp_path / "checkpoints" / name, how)
    (step, path), warned = find_quietly(tmp_path)
    ok = step == 1 and name in warned and resumed(path, 1)
    if part != "_optim_mp_0" and not (part == "" and how == "missing"):
        with pytest.raises(ValueError, match=name):
            convert.open_weights(tmp_path / "checkpoints" / "iter_000000002.pt")
    save_all(monkeypatch, tmp_path, 2)  # the next time training comes by, the step is written anew
    ok &= find_quietly(tmp_path) == ((2, tmp_path / "checkpoints" / "iter_000000002.pt"), "")
    damage_file(tmp_path / "checkpoints" / name, how)
    damage_file(tmp_path / "checkpoints" / "iter_000000001_model_mp_0.pt", how)
    with pytest.raises(ValueError,
                       match="no intact checkpoint is left .*iter_000000001_model_mp_0"):
        find_quietly(tmp_path)  # not a silent start from nothing
    TABLE.setdefault(f"{how}: {part or 'metadata'}", []).append(ok)
    assert ok


def test_every_flipped_byte_of_the_metadata_is_noticed_or_harmless(tmp_path, monkeypatch):
    save_all(monkeypatch, tmp_path, 1)
    path = tmp_path / "checkpoints" / "iter_000000001.pt"
    good, survived = path.read_bytes(), []
    record = torch.load(path, weights_only=True)
    for i in range(0, len(good), 3):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1:])
        survived.append(
            convert.damage(path) is not None or torch.load(path, weights_only=True) == record)
    TABLE["flipped byte anywhere in the metadata"] = survived
    assert all(survived)


@pytest.mark.parametrize(
    "text", [b"\xff\x00 garbage", b"iter_000000009.pt", b"", b"iter_000000001.pt\n", None])
def test_latest_checkpoint_txt_does_not_decide(text, tmp_path, monkeypatch):
    for step in (1, 2):
        save_all(monkeypatch, tmp_path, step)
    latest = tmp_path / "checkpoints" / "latest_checkpoint.txt"
    assert latest.read_text() == "iter_000000002.pt" and find_quietly(tmp_path)[1] == ""
    latest.unlink() if text is None else latest.write_bytes(text)
    (step, path), warned = find_quietly(tmp_path)
    ok = step == 2 and resumed(path, 2) and "latest_checkpoint.txt" in warned
    TABLE.setdefault("latest_checkpoint.txt garbage, stale or gone", []).append(ok)
    assert ok
    for file in path.parent.glob("iter_*"):
        file.unlink()
    if text is not None:
        with pytest.raises(ValueError, match="no intact checkpoint"):
            find_quietly(tmp_path)


def test_a_rank_that_never_arrives_is_no_hang(tmp_path, monkeypatch):
    save_all(monkeypatch, tmp_path, 1)
    monkeypatch.setattr(convert, "RANK_TIMEOUT", 0.2)
    pretend(monkeypatch, 0, 2)
    with pytest.raises(RuntimeError,
                       match="step 2 could not be written .*no iter_000000002_model_mp_1.pt after"):
        convert.save(tmp_path, 2, sharded(full_state(2), 0, 2), META).wait()
    pretend(monkeypatch, 0, 1)
    (step, path), _ = find_quietly(tmp_path)
    TABLE["a rank never arrives"] = [step == 1 and resumed(path, 1)]
    assert TABLE["a rank never arrives"][0]


def save_limited(run, limit, queue):
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    failed = convert.save(run, 2, full_state(2, scale=8), META)
    try:
        convert.save(run, 3, full_state(3, scale=8), META,
                     previous=failed)  # where training would hear of it
    except RuntimeError as error:
        queue.put(str(error))


@pytest.fixture(scope="module")
def processes():
    """Starts processes from one that has imported everything and run nothing."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_checkpoint"])
    yield context
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.mark.parametrize("disk", ["tmpfs", "quota"])
@pytest.mark.parametrize("limit", [5_000, 60_000, 200_000])
def test_full_disk(disk, limit, tmp_path, monkeypatch, processes):
    run = tmp_path / "run"
    run.mkdir()
    save_all(monkeypatch, run, 1, 1, scale=8)
    mounted = False
    if disk == "tmpfs":
        small = tmp_path / "small"
        small.mkdir()
        total = sum(f.stat().st_size + 4096 for f in run.rglob("*"))
        mounted = not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={total + limit}", "tmpfs", small],
            capture_output=True).returncode
        if not mounted:
            pytest.skip("mounting a tmpfs needs privileges")
        run = shutil.copytree(run, small / "run")
    try:
        queue = processes.Queue()
        child = processes.Process(target=save_limited, args=(run, 0 if mounted else limit, queue))
        child.start()
        message = queue.get(timeout=60)
        child.join()
        (step, path), _ = find_quietly(run)
        ok = step == 1 and resumed(path, 1, scale=8) and not list(path.parent.glob("*.tmp"))
        ok &= "step 2 could not be written" in message and "\n" not in message
    finally:
        if mounted:
            subprocess.run(["umount", small], check=True)
    TABLE.setdefault(f"full disk ({disk})", []).append(ok)
    assert ok


def save_until_killed(run, rank, barrier):
    torch.set_num_threads(1)
    tp.rank = tp.world_rank = lambda: rank
    tp.size, tp.barrier = lambda: 2, lambda: barrier.wait(10)
    found = find_quietly(run)[0]
    step, save = found[0] if found else 0, None
    while True:
        step += 1
        save = convert.save(run,
                            step,
                            sharded(full_state(step, 8), rank, 2),
                            META | {"position": 3 * step},
                            keep_last=2,
                            previous=save)


@pytest.mark.parametrize("victims", ["one", "all"])
def test_sigkill_during_saves(victims, tmp_path, monkeypatch, processes):
    dice, best = random.Random(victims), 0
    for _ in range(15):
        barrier = processes.Barrier(2)
        ranks = [
            processes.Process(target=save_until_killed, args=(tmp_path, r, barrier))
            for r in range(2)
        ]
        for process in ranks:
            process.start()
        time.sleep(0.15 + dice.random() * 0.4)
        if victims == "one":
            ranks[dice.randrange(2)].kill()
            time.sleep(0.1)  # what the launcher needs to notice
        for process in ranks:
            process.kill()
            process.join()
        found, warned = find_quietly(tmp_path)
        step = found[0] if found else 0
        ok = step >= best and "passing over" not in warned and (step == 0
                                                                or resumed(found[1], step, scale=8))
        assert ok, (step, best, warned)
        TABLE.setdefault(f"SIGKILL of {victims} during saves", []).append(ok)
        best = step
    assert best >= 3  # saves did happen in between
    print(f"reached step {best}")
