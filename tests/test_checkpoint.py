"""A run's checkpoints: exact over any change of tp, merged under released names, never lost."""

import io
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import warnings

import pytest
import torch
from ranks import processes, run_ranks
from safetensors.torch import load_file
from test_convert import FAMILIES, GOLDEN, ROOT, pretend, read, same, sizes, stems, tensors_of

import convert
import model as m
import tp
from configs import moments

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
    settle_all(monkeypatch, saves)
    assert not any(save.failed for save in saves)
    return saves


def identify(path):
    return convert.identify_weights(path, "base")


def finish(save):
    save.finish()
    if save.failed:
        raise RuntimeError(save.failed)


def settle_all(monkeypatch, saves):
    """Carry the saves of all pretended ranks to their end, as their polls would."""
    while not all(save.ended for save in saves):
        reports = [save.report() for save in saves]
        for rank, save in enumerate(saves):
            pretend(monkeypatch, rank, len(saves))
            save.settle(reports)
        time.sleep(0.002)
    pretend(monkeypatch, 0, 1)


def resumed(path, step, rank=0, size=1, scale=1):
    """Whether rank's state, filled from the checkpoint, is bit for bit that of the step."""
    wanted = sharded(full_state(step, scale), rank, size)
    into = {
        kind: {name: torch.full_like(t, torch.nan)
               for name, t in wanted[kind].items()}
        for kind in KINDS
    }
    convert.resume(path, into)
    meta = convert.read_file(path)["extra"]
    return meta["position"] == 3 * step and all(same(into[kind], wanted[kind]) for kind in KINDS)


# ---- exact state, released names -----------------------------------------------------------------


@pytest.mark.parametrize("everywhere", [False, True], ids=["rank 0's", "all's, as before"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_state_is_exact_from_any_tp_to_any_tp(size, everywhere, tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        if everywhere:
            older.setattr(convert, "IN_ALL", ("model", *KINDS))
        save_all(monkeypatch, tmp_path, 7, size)
    step, path = convert.find_resume(tmp_path)
    assert (step, path.name) == (7, "iter_000000007.pt")
    assert sorted(os.listdir(path.parent)) == sorted(  # no temporary file is left
        ["iter_000000007.pt", "latest_checkpoint.txt"]
        + [f"iter_000000007_{kind}_mp_{r}.pt" for kind in ("model", "optim") for r in range(size)])
    record = torch.load(path, weights_only=True)
    assert (record["iteration"], record["tp_size"], record["config_digest"]) == (7, size, "c0ffee")
    for rank in range(size):
        groups = convert.read_file(path.with_name(f"iter_000000007_optim_mp_{rank}.pt"))
        held = [name for name in SHAPES if everywhere or rank == 0 or DIMS[name] is not None]
        assert all(set(group) == set(map(convert.to_nvidia, held)) for group in groups.values())
    for new_size in (1, 2, 4):
        for rank in range(new_size):
            pretend(monkeypatch, rank, new_size)
            assert resumed(path, 7, rank, new_size)


def test_files_of_ranks_in_another_order_are_refused(tmp_path, monkeypatch):
    """Rank 0's optim file alone holds what is replicated."""
    save_all(monkeypatch, tmp_path, 7)
    path = convert.find_resume(tmp_path)[1]
    first, second = (path.with_name(f"{path.stem}_optim_mp_{rank}.pt") for rank in (0, 1))
    first.rename(tmp_path / "moved")
    second.rename(first)
    (tmp_path / "moved").rename(second)
    into = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match="same named tensors.*_mp_0.pt and .*_mp_1.pt"):
        convert.resume(path, {"exp_avg": into})


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
    moments.check(flat)
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
    meta = META | {"optimizer": moments.scalars(flat)}
    finish(convert.save(tmp_path, 3, state, meta))
    path = convert.find_resume(tmp_path)[1]

    again = flat_of(OPTIMIZERS[name], 2)
    kinds, meta = convert.optimizer_state(path)
    moments.restore(again, kinds, meta["optimizer"])
    convert.resume(path, {kind: again.views(kind) for kind in ("ema", "master", *kinds)})
    for each in (flat, again):
        steps_of(each, 3, 6)
    assert torch.equal(flat.master, again.master)
    with pytest.raises(ValueError, match="optimizer is .*, this run's is Rprop"):
        moments.restore(flat_of(torch.optim.Rprop, 1), kinds, meta["optimizer"])


def test_an_optimizer_that_cannot_be_resumed_is_refused_at_the_start():
    with pytest.raises(ValueError, match="LBFGS cannot be saved and resumed"):
        flat_of(torch.optim.LBFGS, 1)


def test_a_run_from_before_other_optimizers_were_saved_is_resumed(tmp_path):
    state = full_state(3)
    finish(convert.save(tmp_path, 3, state, META | {"optimizer_steps": 3}))
    kinds, meta = convert.optimizer_state(convert.find_resume(tmp_path)[1])
    assert kinds == ["exp_avg", "exp_avg_sq"]
    assert meta["optimizer"] == {"optimizer": "AdamW", "step": 3.0}


def must_load(cfg, file, ema, wanted):
    """A posttraining's control branch starts from the file with the values of a merged one."""
    net = m.build(cfg, torch.device("cpu"), torch.float32)
    convert.load(net, file, "control", ema)
    for name, tensor in net.control.state_dict().items():
        assert torch.equal(tensor, wanted[convert.to_nvidia(f"control.{name}")].float()), name


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
    meta = META | {"base": identify(tmp_path / "base.pt")}
    saves = []
    for rank in range(size):
        pretend(monkeypatch, rank, size)
        local = {
            k: {n: tp.shard(t, dims[n], rank, size)
                for n, t in ts.items()}
            for k, ts in state.items()
        }
        saves.append(convert.save(tmp_path, 100, local, meta))
    settle_all(monkeypatch, saves)
    metadata = tmp_path / "checkpoints" / "iter_000000100.pt"
    for options in ([], ["--include-base-model", "--output-directory",
                         str(tmp_path / "with_base")]):
        assert convert.main(["merge", str(metadata), "--format", suffix, *options]) == 0
    released = {
        n: t if n.startswith("logvar.") or n.endswith(".seq") else t.bfloat16()
        for n, t in golden.items() if not n.startswith("base_model.")
    }
    reg, ema = (tmp_path / "fsdp_checkpoints" / f"iter_000000100_{kind}_model.{suffix}"
                for kind in ("reg", "ema"))
    regular, averaged = read(reg), read(ema)
    assert same(regular, released)
    assert same(averaged, released | {convert.to_nvidia(name): t
                                      for name, t in state["ema"].items()})
    for kind, without in (("reg", regular), ("ema", averaged)):
        complete = read(tmp_path / "with_base" / f"iter_000000100_{kind}_model.{suffix}")
        assert same(complete, without | {f"base_model.{name}": t for name, t in base.items()})
        assert complete.keys() == golden.keys()
    for file, averages, wanted in ((reg, False, regular), (ema, False, averaged),
                                   (metadata, False, regular), (metadata, True, averaged)):
        must_load(sizes(path), file, averages, wanted)
    torch.save({name: t + 1 for name, t in base.items()}, tmp_path / "base.pt")
    with pytest.raises(ValueError, match="was trained on the base"):
        convert.merge(metadata, include_base_model=True)


@pytest.mark.parametrize("size", [1, 2])
def test_trained_base_blocks_and_a_frozen_part_of_the_control_lose_nothing(size, tmp_path,
                                                                           monkeypatch):
    """What is trained is what requires_grad says: file, resume and merges hold it, bit for bit."""
    path = FAMILIES[0]
    golden = load_file(path)
    base = {name.removeprefix("base_model."): t for name, t in stems(golden, "base_model.").items()}
    torch.save(base, tmp_path / "base.pt")
    ours = {convert.from_nvidia(n): t for n, t in golden.items()
            if not n.endswith(".seq") and not n.startswith("logvar.")}
    trained = {n: t + 1 for n, t in ours.items()
               if n.startswith(("base.blocks.2.", "control.blocks.", "control.zero_linears."))}
    whole = {n: t for n, t in ours.items() if not n.startswith("base.")} | trained
    state = {"model": whole, "ema": {n: t + 1 for n, t in trained.items()},
             **{kind: {n: t * 2 for n, t in trained.items()} for kind in ("master", "exp_avg")}}
    meta, saves = META | {"base": identify(tmp_path / "base.pt")}, []
    for rank in range(size):
        pretend(monkeypatch, rank, size)
        mine = {kind: {n: tp.shard(t, convert.tp_dim_of(convert.to_nvidia(n)), rank, size)
                       for n, t in tensors.items()} for kind, tensors in state.items()}
        saves.append(convert.save(tmp_path, 5, mine, meta))
    settle_all(monkeypatch, saves)
    metadata = convert.find_resume(tmp_path)[1]
    for kind in ("ema", "master", "exp_avg"):
        into = {n: torch.zeros_like(t) for n, t in trained.items()}
        convert.resume(metadata, {kind: into})
        assert same(into, state[kind])
    wanted = {convert.to_nvidia(n): t for n, t in whole.items()}
    averaged = wanted | {convert.to_nvidia(n): t for n, t in state["ema"].items()}
    frozen = {f"base_model.{n}": t for n, t in base.items()}
    for flag, below in (([], {}), (["--include-base-model"], frozen)):
        assert convert.main(["merge", str(metadata), *flag]) == 0
        for kind, weights in (("reg", wanted), ("ema", averaged)):
            merged = read(tmp_path / "fsdp_checkpoints" / f"iter_000000005_{kind}_model.pt")
            assert same({n: t for n, t in merged.items() if n != convert.SEQ}, below | weights)


def test_a_run_of_the_reference_trainer_merges_and_starts_a_posttraining(tmp_path):
    """Its model holds base_model.*, its EMA the control branch alone, and it has extra states."""
    path = FAMILIES[0]
    golden = load_file(path)
    dashed = {name.replace(".", "-"): t + 1 for name, t in stems(golden, "net.").items()
              if name != convert.SEQ}
    extras = {"a": None, "b": torch.zeros(3), "c": io.BytesIO(b"abc"), "d": io.BytesIO()}
    extras = {f"net.{name}._extra_state": value for name, value in extras.items()}
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for rank in range(2):
        shard = {group: {n: tp.shard(t, convert.tp_dim_of(n.replace("-", ".")), rank, 2).clone()
                         for n, t in tensors.items()}
                 for group, tensors in (("model", golden), ("ema", dashed))}
        shard["model"] |= extras
        torch.save(shard, folder / f"iter_000000007_model_mp_{rank}.pt")
    metadata = folder / "iter_000000007.pt"
    torch.save({"iteration": 7, "optimizer": {}, "grad_scaler": {}}, metadata)
    assert convert.main(["merge", str(metadata)]) == 0
    control = {name: t for name, t in golden.items() if not name.startswith("base_model.")}
    averaged = control | {name.replace("-", "."): t for name, t in dashed.items()}
    for kind, weights in (("reg", control), ("ema", averaged)):
        merged = tmp_path / "fsdp_checkpoints" / f"iter_000000007_{kind}_model.pt"
        assert same(read(merged), weights)
        for file, ema in ((merged, False), (metadata, kind == "ema")):
            net = m.build(sizes(path), torch.device("cpu"), torch.float32)
            convert.load(net, file, "control", ema)
            assert same(dict(net.control.state_dict()),
                        {n: weights[convert.to_nvidia(f"control.{n}")]
                         for n in net.control.state_dict()})
    convert.load(net, metadata, "base")
    assert torch.equal(net.base.blocks[2].mlp.up.weight,
                       golden[convert.to_nvidia("base.blocks.2.mlp.up.weight")])
    assert convert.main(["merge", str(metadata), "--include-base-model"]) == 0
    assert same(read(tmp_path / "fsdp_checkpoints" / "iter_000000007_reg_model.pt"), golden)


def test_identity_of_the_base(tmp_path):
    golden = load_file(GOLDEN[0])
    base = {name.removeprefix("base_model."): t for name, t in stems(golden, "base_model.").items()}
    torch.save(base, tmp_path / "base.pt")
    convert.split(tmp_path / "base.pt", 4)
    known = identify(GOLDEN[0])
    for same_base in (tmp_path / "base.pt", tmp_path / "checkpoints_tp" / "base.pt"):
        convert.check_same_base(known, identify(same_base))
    changes = (("net.blocks.block2.blocks.0.block.attn.to_k.0.weight", lambda t: t * 1.01),
               ("net.affline_norm.weight", lambda t: t.half()),
               ("net.x_embedder.proj.1.weight", lambda t: t.T),
               ("net.blocks.block1.blocks.2.block.layer1.weight", lambda t: t.clone().index_fill_(
                   0, torch.tensor([5]), 0.25)))  # one row in the middle
    for name, change in changes:
        torch.save(base | {name: change(base[name])}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="other.pt .* set checkpoint.base_path"):
            convert.check_same_base(known, identify(tmp_path / "other.pt"))
    convert.check_same_base({"file": "b", "size": known["size"], "digest": "of an older run"},
                            known)


def test_a_flipped_bit_or_a_value_that_is_not_finite_in_a_base_is_found_at_the_start(tmp_path):
    path, memory = tmp_path / "base.pt", tmp_path / "run" / "base_digests.json"
    base = {"net.a.weight": torch.randn(64, 64), "net.b.weight": torch.randn(64).bfloat16()}
    torch.save(base, path)
    known = convert.identify_weights(path, "base", memory)
    content = bytearray(path.read_bytes())
    content[content.find(base["net.a.weight"].numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="base.pt was damaged after it was written .*Bad CRC-32"):
        convert.identify_weights(path, "base", memory)
    for value in (torch.inf, -torch.inf, torch.nan):
        base["net.b.weight"][3] = value
        torch.save(base, path)
        with pytest.raises(ValueError, match=r"not finite, in 1 tensors \(net.b.weight\)"):
            convert.identify_weights(path, "base", memory)
    base["net.b.weight"][3] = 0
    torch.save(base, path)
    found = convert.identify_weights(path, "base", memory)
    with pytest.raises(ValueError, match="was trained on the base"):
        convert.check_same_base(known, found)


def test_the_bytes_of_a_base_are_read_once(tmp_path, monkeypatch):
    path, memory = tmp_path / "base.pt", tmp_path / "base_digests.json"
    torch.save({"net.a.weight": torch.randn(64, 64)}, path)
    known = convert.identify_weights(path, "base", memory)
    monkeypatch.setattr(convert.DiskTensor, "read", lambda *_: 1 / 0)
    assert convert.identify_weights(path, "base", memory) == known
    os.utime(path, ns=(1, 1))  # written to, for all that is known
    with pytest.raises(ZeroDivisionError):
        convert.identify_weights(path, "base", memory)
    memory.write_text('{"cut sho')
    with pytest.raises(ZeroDivisionError):
        convert.identify_weights(path, "base", memory)


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
    finish(previous)
    assert previous.stall > 0
    for step in (1, 2, 3):
        weights = convert.open_weights(tmp_path / "checkpoints" / f"iter_{step:09d}.pt")
        assert all(
            (t.read() == step).all() for name, t in weights.items() if not name.endswith("seq"))
    expected = sum(t.nbytes for kind in ("model", "ema") for t in state[kind].values())
    assert (tmp_path / "checkpoints" /
            "iter_000000001_model_mp_0.pt").stat().st_size < expected + 20_000


def test_a_save_that_still_runs_is_waited_for(tmp_path, monkeypatch):
    write, pace = convert.write, [0.3]
    monkeypatch.setattr(convert, "write", lambda *a: time.sleep(pace[0]) or write(*a))
    slow = convert.save(tmp_path, 1, full_state(1), META)
    with pytest.warns(UserWarning, match="the save of step 1 still runs"):
        finish(convert.save(tmp_path, 2, full_state(2), META, previous=slow))
    assert slow.ended and (tmp_path / "checkpoints" / "iter_000000001.pt").exists()


def test_the_memory_of_the_save_before_is_used_again(tmp_path):
    """Pinned memory for 16 GB takes seconds to get: it is had once."""
    first = convert.save(tmp_path, 1, full_state(1), META)
    finish(first)
    held = {t.data_ptr() for tensors in first.host.values() for t in tensors.values()}
    second = convert.save(tmp_path, 2, full_state(2), META, previous=first)
    finish(second)
    again = {name: t.data_ptr() for kind in KINDS for name, t in second.host[kind].items()}
    assert set(again.values()) <= held
    into = {"ema": {name: torch.zeros(shape) for name, shape in SHAPES.items()}}
    for step in (1, 2):
        convert.resume(tmp_path / "checkpoints" / f"iter_{step:09d}.pt", into)
        assert same(into["ema"], full_state(step)["ema"])


def test_only_replica_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(tp, "dp_rank", lambda: 1)
    monkeypatch.setattr(tp, "world_rank", lambda: 1)
    finish(convert.save(tmp_path, 2, full_state(2), META))
    assert os.listdir(tmp_path) == [] and convert.find_resume(tmp_path) is None


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


def lose_a_rank(run):
    tp.init(2, 2, 60)
    if tp.rank() == 1:
        convert.write = lambda *_: time.sleep(60)
    save = convert.save(run, 2, sharded(full_state(2), tp.rank(), 2), META)
    if tp.rank() == 1:
        return 0  # and the process is gone
    while len(list(run.glob("checkpoints/iter_000000002_*_mp_0.pt"))) < 2:
        time.sleep(0.01)  # the own files are there before the loss is noticed
    began = time.monotonic()
    try:
        finish(save)
    except RuntimeError:
        return time.monotonic() - began


def test_a_rank_lost_while_its_file_is_awaited_is_noticed_in_seconds(tmp_path, monkeypatch):
    save_all(monkeypatch, tmp_path, 1)
    seconds = run_ranks(2, lose_a_rank, tmp_path)[0]
    (step, path), warned = find_quietly(tmp_path)
    ok = step == 1 and resumed(path, 1) and seconds < 20
    TABLE["a rank is lost before its file is there"] = [ok]
    assert ok, (seconds, step)
    assert "iter_000000002*: 2 whole files of a save that ended before its metadata" in warned


def test_an_unfinished_save_is_said_at_the_start_and_when_it_goes(tmp_path, monkeypatch):
    save_all(monkeypatch, tmp_path, 1)
    save_all(monkeypatch, tmp_path, 2)
    folder = tmp_path / "checkpoints"
    (folder / "iter_000000002.pt").unlink()  # as if killed between the files and it
    (step, path), warned = find_quietly(tmp_path)
    assert step == 1 and f"{folder}/iter_000000002*: 4 whole files" in warned
    assert len(list(folder.glob("iter_000000002_*"))) == 4
    pretend(monkeypatch, 0, 2)
    with pytest.warns(UserWarning, match="saved anew in place of 4 files"):
        saves = [convert.save(tmp_path, 2, sharded(full_state(2), 0, 2), META | {"position": 6})]
    time.sleep(0.2)  # an old file of rank 1 must not pass for its new one
    pretend(monkeypatch, 1, 2)
    saves.append(convert.save(tmp_path, 2, sharded(full_state(2), 1, 2), META | {"position": 6}))
    settle_all(monkeypatch, saves)
    assert find_quietly(tmp_path)[0][0] == 2
    (folder / "iter_000000002.pt").unlink()
    save = convert.save(tmp_path, 3, full_state(3), META, keep_last=1)
    news = []
    while not save.ended:
        news += save.poll()
    news = " ".join([*news, *save.poll(), *save.news])
    assert not list(folder.glob("iter_000000002_*"))
    assert f"removed {folder}/iter_000000002*, of a save that was never completed" in news


def fail_after_save(run, size, ranks):
    """Training that ends by an error while a save is being written by these ranks."""
    write, convert.VISIBLE_S = convert.write, 1
    convert.write = lambda *arguments: time.sleep(0.2) or write(*arguments)
    tp.size = lambda: size
    for rank in ranks:
        tp.rank = tp.world_rank = lambda rank=rank: rank
        convert.save(run, 2, sharded(full_state(2), rank, size), META | {"position": 6})
    sys.stderr = open(os.devnull, "w")
    raise RuntimeError("a clip, a kernel, a cable")


@pytest.mark.parametrize("size, ranks", [(1, [0]), (2, [1, 0]), (2, [0])])
def test_a_save_outlives_an_error_of_training_but_not_a_lost_rank(size, ranks, tmp_path):
    child = processes().Process(target=fail_after_save, args=(tmp_path, size, ranks))
    child.start()
    child.join(30)
    assert child.exitcode == 1
    metadata = tmp_path / "checkpoints" / "iter_000000002.pt"
    assert metadata.exists() == (size == len(ranks))
    if size == len(ranks):
        assert resumed(metadata, 2)


def save_limited(run, limit, ballast, room, queue):
    """A save on a disk that fills up; with `room`, it has room again after the first failure."""
    convert.RETRY_S = 0.05
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    save, news = convert.save(run, 2, full_state(2, scale=8), META | {"position": 6}, retries=2), []
    while not save.ended:
        news += save.poll()
        if news and room:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            if ballast:
                ballast.unlink(missing_ok=True)
    try:
        finish(save)
        queue.put((news, None))
    except RuntimeError as error:
        queue.put((news, str(error)))


@pytest.mark.parametrize("room", [False, True], ids=["stays full", "has room again"])
@pytest.mark.parametrize("disk", ["tmpfs", "quota"])
@pytest.mark.parametrize("limit", [5_000, 60_000, 200_000])
def test_full_disk(disk, limit, room, tmp_path, monkeypatch):
    run, ballast = tmp_path / "run", None
    run.mkdir()
    save_all(monkeypatch, run, 1, 1, scale=8)
    if disk == "tmpfs":
        small = tmp_path / "small"
        small.mkdir()
        total = sum(f.stat().st_size + 4096 for f in run.rglob("*"))
        mount = ["mount", "-t", "tmpfs", "-o", f"size={3 * total + limit}", "tmpfs", small]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs privileges")
        run, ballast = shutil.copytree(run, small / "run"), small / "ballast"
        ballast.write_bytes(bytes(2 * total))
    try:
        queue = processes().Queue()
        limit = limit if disk == "quota" else 0
        child = processes().Process(target=save_limited, args=(run, limit, ballast, room, queue))
        child.start()
        news, problem = queue.get(timeout=60)
        child.join()
        (step, path), warned = find_quietly(run)
        why = "No space left on device" if disk == "tmpfs" else "File too large"
        ok = step == 1 + room and resumed(path, step, scale=8) and not list(run.rglob("*.tmp"))
        ok &= bool(re.search(rf"step 2: {run}/checkpoints/iter_000000002_\w+.pt could not be "
                             rf"written \({why}\); training goes on, next attempt in 0.05 s",
                             news[0]))
        if room:
            ok &= problem is None
        else:
            ok &= len(news) == 2 and problem.endswith(f"could not be written ({why})")
    finally:
        if disk == "tmpfs":
            subprocess.run(["umount", small], check=True)
    case = f"full disk ({disk}), {'has room again' if room else 'stays full'}"
    TABLE.setdefault(case, []).append(ok)
    assert ok, (news, problem, warned)


def test_a_folder_that_was_deleted_is_made_again(tmp_path, monkeypatch):
    save_all(monkeypatch, tmp_path, 1)
    shutil.rmtree(tmp_path / "checkpoints")
    save_all(monkeypatch, tmp_path, 2)
    assert resumed(tmp_path / "checkpoints" / "iter_000000002.pt", 2)


def save_until_killed(run, rank, pipes):
    torch.set_num_threads(1)

    def from_all(value):
        pipes[1 - rank].put(value)
        values = [value, pipes[rank].get()]
        return values if rank == 0 else values[::-1]

    tp.rank = tp.world_rank = lambda: rank
    tp.size, tp.from_all = lambda: 2, from_all
    tp.from_rank0 = lambda fn: from_all(fn() if rank == 0 else None)[0]
    found = find_quietly(run)[0]
    step, save = found[0] if found else 0, None
    while True:
        step += 1
        save = convert.save(run, step, sharded(full_state(step, 8), rank, 2),
                            META | {"position": 3 * step}, keep_last=2, previous=save)


@pytest.mark.parametrize("victims", ["one", "all"])
def test_sigkill_during_saves(victims, tmp_path, monkeypatch):
    dice, best = random.Random(victims), 0
    for _ in range(15):
        pipes = [processes().SimpleQueue() for _ in range(2)]
        ranks = [processes().Process(target=save_until_killed, args=(tmp_path, rank, pipes))
                 for rank in range(2)]
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
