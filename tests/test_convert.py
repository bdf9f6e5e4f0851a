"""Names, reading, strict loading, split and merge, on the golden weights and on small files."""

import ctypes
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from ranks import processes
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert
import model as m
import tp
import train
from configs import files

ROOT = Path(__file__).parent.parent
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*view*_weights.safetensors"))
FAMILIES = [path for path in GOLDEN if "v2w" not in path.name]


def sizes(path):
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    return m.ModelConfig(
        **
        {key: value
         for key, value in config.items() if key in m.ModelConfig.__dataclass_fields__})


def pretend(monkeypatch, rank, size):
    """Act as one rank of a tensor-parallel group, without the group."""
    monkeypatch.setattr(tp, "rank", lambda: rank)
    monkeypatch.setattr(tp, "world_rank", lambda: rank)
    monkeypatch.setattr(tp, "size", lambda: size)


def tensors_of(net):
    return dict(net.named_parameters()) | dict(net.named_buffers())


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n])
                                        for n in a)


def read(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def stems(weights, prefix):
    return {name: value for name, value in weights.items() if name.startswith(prefix)}


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_names_are_total_both_ways(path):
    golden = load_file(path)
    net = tensors_of(m.build(sizes(path), torch.device("cpu"), torch.float32))
    ours = {name: convert.from_nvidia(name) for name in golden}
    constants = {"control.pos_embedder.seq", "base.pos_embedder.seq"}
    assert set(ours.values()) == net.keys() | constants  # nothing missing, and nothing else exists
    assert {
        convert.to_nvidia(name)
        for name in net
    } == {
        name
        for name in golden
        if not name.endswith("pos_embedder.seq") and not name.startswith("base_model.logvar.")
    }
    for theirs, name in ours.items():
        assert convert.to_nvidia(name) == theirs.replace("base_model.logvar.", "logvar.")
        if name not in constants:
            assert net[name].shape == golden[theirs].shape
            assert getattr(net[name], "tp_dim", None) == convert.tp_dim_of(theirs)


@pytest.mark.parametrize("name", [
    "net.blocks.block0.blocks.3.block.layer1.weight", "net.blocks.block01.blocks.2.block."
    "layer1.weight", "net.blocks.block*.blocks.2.block.layer1.weight", "net.unknown", "x",
    "base_model.net.zero_blocks.block0.weight", "base.zero_linears.0.weight",
    "net.input_hint_block.1.bias", "logvar.0.weight"
])
def test_unknown_names_are_errors(name):
    with pytest.raises(ValueError, match="is no parameter"):
        convert.from_nvidia(name)
    with pytest.raises(ValueError, match="is no parameter"):
        convert.to_nvidia(name)


# ---- reading and loading -------------------------------------------------------------------------


def layouts(golden, folder):
    """The same weights as every kind of file that can hold them."""
    extra = {
        "net.blocks.block0.blocks.0.block.attn._extra_state": io.BytesIO(b"abc"),
        "net.a._extra_state": None
    }
    torch.save(golden | extra, folder / "flat.pt")
    dashed = {
        name.replace(".", "-"): value * 2
        for name, value in golden.items() if not name.startswith("logvar.")
    }
    torch.save({"model": golden, "ema": dashed}, folder / "wrapped.pt")
    save_file(golden, folder / "flat.safetensors")
    convert.split(folder / "flat.pt", 4)
    convert.split(folder / "wrapped.pt", 2, "safetensors")
    return [
        folder / name for name in ("flat.pt", "wrapped.pt", "flat.safetensors",
                                   "checkpoints_tp/flat.pt", "checkpoints_tp/wrapped.pt")
    ]


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_every_layout_loads_into_every_tp(path, tmp_path, monkeypatch, capsys):
    golden = load_file(path)
    for file in layouts(golden, tmp_path):
        for rank, size in ((0, 1), (1, 2), (2, 4)):
            pretend(monkeypatch, rank, size)
            net = m.build(sizes(path), torch.device("cpu"), torch.float32)
            for part in ("base", "control", "logvar"):
                convert.load(net, file, part)
            for name, value in tensors_of(net).items():
                full = golden[convert.to_nvidia(name)]
                assert torch.equal(value, tp.shard(full, getattr(value, "tp_dim", None), rank,
                                                   size)), (file, name)
    pretend(monkeypatch, 0, 1)
    whole = m.build(sizes(path), torch.device("cpu"), torch.bfloat16)
    convert.load(whole, tmp_path / "wrapped.pt", "control", ema=True)
    net = whole.control
    assert torch.equal(net.zero_linears[1].weight,
                       2 * golden["net.zero_blocks.block1.weight"].bfloat16())
    count = sum(p.numel() for p in net.parameters())
    assert f"loaded control from {tmp_path}/wrapped.pt (EMA weights): " in (out :=
                                                                            capsys.readouterr().out)
    assert f"{len(list(net.parameters()))} tensors, {count:,} parameters" in out


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_loading_is_strict(path, tmp_path):
    golden = stems(load_file(path), "net.")
    golden["net.zero_blocks.block0.bias"] = golden["net.zero_blocks.block0.bias"][:-1].clone()
    golden["net.affline_norm.bias"] = golden.pop("net.affline_norm.weight")
    save_file(golden, tmp_path / "odd.safetensors")
    net = m.build(sizes(path), torch.device("cpu"), torch.float32)
    control = net.control
    before = {name: value.fill_(7).clone() for name, value in control.state_dict().items()}
    with pytest.raises(ValueError) as error:
        convert.load(net, tmp_path / "odd.safetensors", "control")
    for part in ("odd.safetensors", "missing 1: net.affline_norm.weight;",
                 "unexpected 1: net.affline_norm.bias;",
                 "misshapen 1: net.zero_blocks.block0.bias (63,), expected (64,)"):
        assert part in str(error.value)
    assert same(before, control.state_dict())  # nothing was copied


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", "complex64"])
def test_weights_that_are_no_floats_are_refused(dtype, tmp_path):
    """Quantized ones, without their scales, would be trained on as they are."""
    golden = stems(load_file(FAMILIES[0]), "net.")
    name = "net.blocks.block1.blocks.2.block.layer1.weight"
    golden[name] = golden[name].to(getattr(torch, dtype))
    torch.save(golden, tmp_path / "odd.pt")
    net = m.build(sizes(FAMILIES[0]), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=f"odd.pt .* {name} as torch.{dtype}, one of 1 that are"):
        convert.load(net, tmp_path / "odd.pt", "control")
    golden[name] = golden[name].to(torch.float64)
    torch.save(golden, tmp_path / "wide.pt")
    convert.load(net, tmp_path / "wide.pt", "control")


def test_wrong_kind_or_family_is_recognisable(tmp_path):
    single, multi = (load_file(path) for path in sorted(FAMILIES, reverse=True))
    net = m.build(sizes(FAMILIES[-1]), torch.device("cpu"), torch.float32)
    base = {name.removeprefix("base_model."): t for name, t in stems(single, "base_model.").items()}
    for weights, part, words in ((stems(single, "net."), "base", "single-view control"),
                                 (base, "control", "single-view base"),
                                 (stems(multi, "net."), "control", "multi-view control"),
                                 (multi, "base", "multi-view base")):
        save_file(weights, tmp_path / "x.safetensors")
        with pytest.raises(
                ValueError,
                match=f"{words} by its names. does not fit the {part} of this model: missing"):
            convert.load(net, tmp_path / "x.safetensors", part)


def test_control_starts_as_a_copy_of_the_base(monkeypatch):
    pretend(monkeypatch, 1, 2)
    net = m.build(sizes(FAMILIES[0]), torch.device("cpu"), torch.float32)
    for i, value in enumerate(tensors_of(net).values()):
        value.detach().fill_(i)
    before = {name: value.clone() for name, value in net.control.named_parameters()}
    train.copy_base_to_control(net)
    base, own = dict(net.base.named_parameters()), ("hint_embed.", "hint_encoder.", "zero_linears.")
    for name, value in net.control.named_parameters():
        assert torch.equal(value, before[name] if name.startswith(own) else base[name]), name


def test_reading_twice_after_pages_were_released(tmp_path):
    """Released pages must come back from the file, in all dtypes and layouts, neighbours too."""
    tensors = {
        "a.layer2.weight": torch.randn(300, 4096).bfloat16(), "b": torch.tensor(3.5),
        "c": torch.randn(7, 3).T, "d.layer1.weight": torch.randn(512, 17), "e": torch.randn(5, 0),
        "f": torch.arange(5)
    }
    torch.save(tensors, tmp_path / "x.pt")
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "x.safetensors")
    for file in ("x.pt", "x.safetensors"):
        weights = convert.open_weights(tmp_path / file)
        for _ in range(2):
            assert same({name: t.read() for name, t in weights.items()}, tensors)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_only_pages_of_the_file_are_released(suffix, tmp_path, monkeypatch):
    """What lies behind the mapping may be anyone's memory, and would be filled with zeros."""
    name, path, released = "net.a.layer2.weight", tmp_path / f"x.{suffix}", []
    (save_file if suffix == "safetensors" else torch.save)({name: torch.randn(300, 8192)}, path)
    weights = convert.open_weights(path)
    libc = ctypes.CDLL(None)
    monkeypatch.setattr(libc, "madvise", lambda start, length, advice: released.append(
        (start.value, length.value)))
    monkeypatch.setattr(files.ctypes, "CDLL", lambda _: libc)
    for rank in range(8):
        weights[name].read(rank, 8)
    maps = [line.split()[0].split("-") for line in open("/proc/self/maps") if str(path) in line]
    spans = [(int(start, 16), int(end, 16)) for start, end in maps]
    assert len(released) == 8
    assert all(
        any(low <= start and start + length <= high for low, high in spans)
        for start, length in released)


@pytest.mark.parametrize("broken", [
    "truncated.pt", "garbage.pt", "truncated.safetensors", "garbage.safetensors", "empty.pt",
    "empty.safetensors", "ranks.pt", "absent.pt", "old.pt"
])
def test_broken_files_are_refused_in_one_sentence(broken, tmp_path):
    path = tmp_path / broken
    content = {"net.a": torch.randn(100, 100)}
    torch.save(content, tmp_path / "good.pt")
    save_file(content, tmp_path / "good.safetensors")
    if broken.startswith("truncated"):
        path.write_bytes((tmp_path / f"good{path.suffix}").read_bytes()[:-5000])
    elif broken.startswith("garbage"):
        path.write_bytes(os.urandom(5000))
    elif broken.startswith("empty"):
        path.write_bytes(b"")
    elif broken == "ranks.pt":
        torch.save({"iteration": 0}, path)
        torch.save({"model": content}, tmp_path / "ranks_model_mp_1.pt")
    elif broken == "old.pt":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    with pytest.raises((ValueError, FileNotFoundError), match=broken) as error:
        convert.open_weights(path)
    assert "\n" not in str(error.value)


def web_page(path):
    path.write_bytes(
        b"\n<!DOCTYPE html><html><head><title>Access is restricted</title></head></html>")


def lfs_pointer(path):
    path.write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 14000000000\n")


def dtensor(path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    mesh = init_device_mesh("cpu", (1,))
    torch.save({"net.a": distribute_tensor(torch.zeros(4), mesh, [Shard(0)])}, path)
    torch.distributed.destroy_process_group()


def dcp_folder(path):
    path.mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (path / name).write_bytes(b"PK\3\4")


def cut_short(path):
    whole = {"net.a": torch.randn(100, 100)}
    torch.save(whole, path) if path.suffix == ".pt" else save_file(whole, path)
    path.write_bytes(path.read_bytes()[:20_000])


def script(path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)


def old_torch(path):
    torch.save({"net.a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)


ALMOST = {  # what may stand in a checkpoint's place: (name, how it is made, what is said of it)
    "web page": ("x.pt", web_page, "is a web page, .*accept the license .*download .* again"),
    "LFS pointer": ("x.pt", lfs_pointer, "is a Git LFS pointer, .*git lfs pull"),
    "LFS safetensors": ("x.safetensors", lfs_pointer, "is a Git LFS pointer, .*git lfs pull"),
    "empty": ("x.pt", Path.touch, "is empty; download"),
    "zeros": ("x.pt", lambda path: path.write_bytes(bytes(9999)), "only zeros .*; download"),
    "cut pt": ("x.pt", cut_short, "is cut short: its 20,000 bytes .*download"),
    "cut safetensors": ("x.safetensors", cut_short, "is cut short: it has 20,000 of 40,.* bytes"),
    "folder": ("x", Path.mkdir, "is a folder; name a file in it"),
    "pipe": ("x.pt", os.mkfifo, "is no regular file"),
    "DCP folder": ("x", dcp_folder, "torch.distributed.checkpoint; .*dcp_to_torch FOLDER FILE.pt"),
    "old torch": ("x.pt", old_torch, "before 1.6, .*convert it once: python -c"),
    "DTensor": ("x.pt", dtensor, "holds shards of a distributed run .*; gather them"),
    "TorchScript": ("x.pt", script, "is a TorchScript archive"),
    "pickle": ("x.pt", lambda path: path.write_bytes(pickle.dumps({"a": 1})), "is a pickle that"),
    "module": ("x.pt", lambda path: torch.save(torch.nn.Linear(2, 2), path),
               r"more than tensors .*\(torch.nn.modules.linear.Linear\).*; save the state_dict"),
    "error text": ("x.pt", lambda path: path.write_text("Invalid username or password."),
                   "is a text file that begins with 'Invalid username"),
    "gzip": ("x.pt", lambda path: path.write_bytes(b"\x1f\x8b" + bytes(range(99))), "unpack it"),
    "tensor": ("x.pt", lambda path: torch.save(torch.zeros(3), path), "holds a Tensor, not"),
    "settings": ("x.pt", lambda path: torch.save({"optimizer": {}, "lr": 1}, path),
                 "holds no tensors, only optimizer, lr"),
}


@pytest.mark.parametrize("kind", ALMOST)
def test_a_file_that_is_something_else_is_recognised(kind, tmp_path):
    name, make, words = ALMOST[kind]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"/{name} .*{words}") as error:
        convert.open_weights(tmp_path / name)
    assert "\n" not in str(error.value)
    helps = ("page", "LFS", "empty", "zeros", "cut")
    assert ("download" in str(error.value)) == kind.startswith(("web", *helps))


def test_an_old_file_loads_once_converted_as_the_sentence_says(tmp_path):
    old_torch(tmp_path / "x.pt")
    with pytest.raises(ValueError) as error:
        convert.open_weights(tmp_path / "x.pt")
    code = str(error.value).partition('python -c "')[2].removesuffix('"')
    exec(code)
    assert torch.equal(convert.open_weights(tmp_path / "x_zip.pt")["net.a"].read(), torch.zeros(3))


def test_wrappers_of_other_programs_load(tmp_path):
    weights = {"net.blocks.block0.a": torch.randn(3), "base_model.net.b": torch.randn(2)}
    compiled = {
        "net._orig_mod.blocks.block0._checkpoint_wrapped_module.a": weights["net.blocks.block0.a"],
        "base_model.module.net.b": weights["base_model.net.b"]
    }
    for i, content in enumerate(
        ({"state_dict": weights}, {"module": weights, "lr": 1}, {"model": {"state_dict": weights}},
         {"model_state_dict": {f"module.{name}": t
                               for name, t in weights.items()},
          "step": 3}, {f"_orig_mod.{name}": torch.nn.Parameter(t)
                       for name, t in weights.items()}, {"state_dict": compiled, "iteration": 5},
         {"model": {f"module._orig_mod.{name}": t
                    for name, t in weights.items()}, "ema": None})):
        path = tmp_path / f"{i}.ckpt"
        torch.save(content, path)
        assert same({n: t.read() for n, t in convert.open_weights(path).items()}, weights), content
    save_file(weights, tmp_path / "safetensors.pt")  # the content decides, not the suffix
    assert convert.open_weights(tmp_path / "safetensors.pt").keys() == weights.keys()
    torch.save({"net.a": torch.zeros(1), "module.net.a": torch.ones(1)}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="holds net.a twice"):
        convert.open_weights(tmp_path / "two.pt")


IDLE = {
    "net.pos_embedder.seq": torch.arange(16.0), "net.pos_embedder.dim_spatial_range": torch.ones(3),
    "net.pos_embedder.dim_temporal_range": torch.ones(3), "net.accum_video_counter": torch.ones(1),
    "net.accum_iteration": torch.tensor(3), "ema_decay": torch.ones(1), "iteration": 3,
    "conditioner.weight": torch.ones(4, 4), "net.blocks.block0._extra_state": torch.ones(5),
    "net.t_embedder._extra_state": io.BytesIO(), "net.x_embedder._extra_state": None
}


@pytest.mark.parametrize("part", ["base", "control"])
def test_what_nothing_is_computed_with_may_be_there_or_not(part, tmp_path, capsys):
    path, file = FAMILIES[0], tmp_path / "x.pt"
    golden = load_file(path)
    needed = stems(golden, "net." if part == "control" else "base_model.net.")
    needed = {n.removeprefix("base_model."): t for n, t in needed.items() if not n.endswith(".seq")}
    net = m.build(sizes(path), torch.device("cpu"), torch.float32)
    for idle in ({}, *({name: value} for name, value in IDLE.items()), IDLE):
        torch.save(needed | idle, file)
        convert.load(net, file, part)
        said = capsys.readouterr().out
        assert f"passed over {len(idle)} entries" in said
        assert ("among them conditioner.weight" in said) == ("conditioner.weight" in idle)
    for foreign in ("net.blocks.block0.blocks.0.block.attn.to_q.0.bias", "net.accumulate.weight",
                    "net.pos_embedder.seq.weight"):
        torch.save(needed | {foreign: torch.ones(1)}, file)
        with pytest.raises(ValueError, match=f"unexpected 1: {foreign};"):
            convert.load(net, file, part)
    torch.save({n: t for n, t in needed.items() if n != "net.affline_norm.weight"}, file)
    with pytest.raises(ValueError, match="missing 1: net.affline_norm.weight;"):
        convert.check_fits(m.build(sizes(path), "meta", torch.float32), file, part)
    torch.save({name.removeprefix("net."): t for name, t in needed.items()}, file)
    with pytest.raises(ValueError,
                       match=r"nothing named net.\*, but names like affline_norm.weight"):
        convert.load(net, file, part)


def test_a_control_without_its_unused_head_gets_the_one_of_the_base(tmp_path):
    golden = load_file(FAMILIES[0])
    net = m.build(sizes(FAMILIES[0]), torch.device("cpu"), torch.float32)
    convert.load(net, FAMILIES[0], "base")
    for lacking in ("net.final_layer.", "net.final_layer.linear."):
        left = {n: t for n, t in stems(golden, "net.").items() if not n.startswith(lacking)}
        save_file(left, tmp_path / "x.safetensors")
        net.control.load_state_dict({n: t.fill_(7) for n, t in net.control.state_dict().items()})
        convert.load(net, tmp_path / "x.safetensors", "control")
        for name, tensor in net.control.state_dict().items():
            theirs = convert.to_nvidia(f"control.{name}")
            assert torch.equal(tensor, golden[theirs if theirs in left else f"base_model.{theirs}"])


def test_a_base_without_logvar_names_the_remedy(tmp_path):
    save_file(stems(load_file(FAMILIES[0]), "base_model.net."), tmp_path / "x.safetensors")
    net = m.build(sizes(FAMILIES[0]), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError,
                       match=r"holds no logvar.\* weights; .* set model.logvar to none"):
        convert.load(net, tmp_path / "x.safetensors", "logvar")


def test_memory_that_is_no_mapping_of_a_file_survives_reading():
    value = torch.randn(600, 4096)
    tensor = files.DiskTensor([value], 0, files.file_mappings())
    for _ in range(2):
        assert torch.equal(tensor.read(1, 2), value[300:]) and value.abs().sum() > 0


# ---- verify --------------------------------------------------------------------------------------


def test_verify_says_of_each_file_what_it_is(tmp_path, monkeypatch, capsys):
    names = {name: repository for repository, name in files.RELEASED.values()}
    sums = {}
    for name, repository in names.items():
        path = tmp_path / repository / name
        path.parent.mkdir(exist_ok=True)
        torch.save({"net.a": torch.full((3000,), float(len(sums)))}, path)
        sums[hashlib.md5(path.read_bytes()).hexdigest()] = (repository, name)
    monkeypatch.setattr(files, "RELEASED", sums)
    folder, tokenizer = tmp_path / files.SINGLE, tmp_path / files.TOKENIZER
    torch.save((torch.zeros(1), torch.ones(1)), tokenizer / "mean_std.pt")

    def verify(config="configs/lidar_posttrain.yaml", **paths):
        paths = {"base_path": folder / "base_model.pt", "load_path": folder / "lidar_control.pt"
                 } | paths
        arguments = [f"checkpoint.{key}={path}" for key, path in paths.items()]
        code = convert.main(
            ["verify", str(ROOT / config), f"tokenizer.path={tokenizer}", *arguments])
        return code, capsys.readouterr().out.splitlines()

    code, lines = verify()
    assert code == 0 and len(lines) == 5 and all(line.startswith("ok ") for line in lines)
    assert lines[0].endswith(f"base_model.pt: NVIDIA's release {files.SINGLE}/base_model.pt")
    shutil.copy(folder / "base_model.pt", tmp_path / "mine.pt")
    assert verify(base_path=tmp_path / "mine.pt")[0] == 0
    for name, words in (("hdmap_control.pt",
                         "release .*/hdmap_control.pt, but .* for .*/lidar_contr"),
                        ("other.pt", "another file, none of NVIDIA's releases"),
                        ("cut.pt", "is cut short: its 9,000 bytes .* hf download nvidia/"),
                        ("page.pt", "is a web page"),
                        ("gone.pt",
                         f"missing; hf download nvidia/{files.SINGLE} lidar_control.pt")):
        if name == "other.pt":
            torch.save({"net.a": torch.zeros(7)}, folder / name)
        elif name == "cut.pt":
            (folder / name).write_bytes((folder / "lidar_control.pt").read_bytes()[:9000])
        elif name == "page.pt":
            web_page(folder / name)
        code, lines = verify(load_path=folder / name)
        assert code == 1 and re.match(f"NOT OK checkpoint.load_path .*: .*{words}", lines[1])
        assert [line.startswith("ok ") for line in lines] == [True, False, True, True, True]
    multi = tmp_path / files.MULTI
    paths = {"base_path": multi / "v2w_base_model.pt", "load_path": multi / "v2w_hdmap_control.pt"}
    assert verify("configs/mv_v2w_hdmap_posttrain.yaml", **paths)[0] == 0
    assert verify("configs/mv_t2w_hdmap_posttrain.yaml", **paths)[0] == 1


class Payload:
    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return os.system, (f"touch {self.touched}",)


def test_hostile_file_is_refused_and_does_not_run(tmp_path, capsys):
    touched = tmp_path / "touched"
    torch.save({"net.a": torch.zeros(3), "net.b._extra_state": Payload(touched)},
               tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(touched)))
    torch.save({"iteration": 100, "tp_size": 1, "files": {}, "extra": Payload(touched)},
               tmp_path / "iter_000000100.pt")
    for name in ("zip.pt", "plain.pt", "iter_000000100.pt"):
        with pytest.raises(ValueError, match=name):
            convert.open_weights(tmp_path / name)
        assert convert.main(["merge", str(tmp_path / name)]) == 2
        assert convert.main(["split", str(tmp_path / name)]) == 2
    assert convert.damage(tmp_path / "iter_000000100.pt")
    assert not touched.exists() and "could run code" in capsys.readouterr().err
    torch.load(tmp_path / "zip.pt", weights_only=False)  # the payload is a working one
    assert touched.exists()


# ---- split and merge -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_split_then_merge_is_the_input(size, suffix, tmp_path, capsys):
    golden = load_file(GOLDEN[-1])
    golden |= {name: golden[name].bfloat16() for name in list(golden)[::2]}
    torch.save(golden, tmp_path / "x.pt")
    assert convert.main(["split", str(tmp_path / "x.pt"), "--tp",
                         str(8)]) == 0  # more files than the next one leaves
    assert convert.main(["split",
                         str(tmp_path / "x.pt"), "--tp",
                         str(size), "--format", suffix]) == 0
    folder = tmp_path / "checkpoints_tp"
    assert sorted(os.listdir(folder)) == sorted(["x.pt"] +
                                                [f"x_model_mp_{r}.{suffix}" for r in range(size)])
    assert torch.load(folder / "x.pt", weights_only=True) == {"grad_scaler": {}, "iteration": 0}
    for rank in range(size):
        shard = read(folder / f"x_model_mp_{rank}.{suffix}")
        if suffix == "pt":
            assert shard.keys() == {"model", "ema"} and shard["ema"] is None
            shard = shard["model"]
        assert same(shard,
                    {n: tp.shard(t, convert.tp_dim_of(n), rank, size)
                     for n, t in golden.items()})
    capsys.readouterr()
    assert convert.main(["merge", str(folder / "x.pt"), "--format", suffix]) == 0
    said = capsys.readouterr().out
    line = f'"ckpt_path": "{tmp_path}/fsdp_checkpoints/x_reg_model.pt"'
    assert line in said if suffix == "pt" else "reads .pt files alone" in said
    assert os.listdir(tmp_path / "fsdp_checkpoints") == [f"x_reg_model.{suffix}"]
    assert same(read(tmp_path / "fsdp_checkpoints" / f"x_reg_model.{suffix}"), golden)


def test_split_that_cannot_be(tmp_path, capsys):
    torch.save({"net.a.to_q.0.weight": torch.zeros(6, 5)}, tmp_path / "x.pt")
    assert convert.main(["split", str(tmp_path / "x.pt"), "--tp", "4"]) == 2
    assert "net.a.to_q.0.weight (6, 5)" in capsys.readouterr().err and os.listdir(tmp_path) == [
        "x.pt"
    ]
    assert convert.main(["split", str(tmp_path / "x.pt"), "--tp", "0"]) == 2
    assert convert.main(["split", str(tmp_path / "y.pt")
                         ]) == 2 and "y.pt" in capsys.readouterr().err


def peak():
    """Peak resident bytes of this process."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def report_peak(queue, fn, args):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # what the code takes is no part of the measure
        torch.save({"net.a.layer2.weight": torch.zeros(64, 64)}, folder + "/x.pt")
        convert.split(folder + "/x.pt")
    before = peak()
    fn(*args)
    queue.put(peak() - before)


def measure(fn, *args):
    """Peak resident bytes of fn(*args) in a new process, above what that has after its imports."""
    queue = processes().SimpleQueue()
    process = processes().Process(target=report_peak, args=(queue, fn, args))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return queue.get()


def test_split_and_merge_sizes_and_memory(tmp_path):
    """Outputs are the input plus the replicated tensors; memory is one output file."""
    block = "net.blocks.block{}.blocks.2.block.{}.weight"
    large = {
        block.format(i, layer): torch.randn(shape).bfloat16()
        for i in range(4)
        for layer, shape in (("layer1", (8192, 1024)), ("layer2", (1024, 8192)))
    }
    replicated = {f"net.zero_blocks.block{i}.weight": torch.randn(256, 256) for i in range(3)}
    torch.save(large | replicated, tmp_path / "x.pt")
    memory = measure(convert.split, tmp_path / "x.pt", 8)
    shards = list((tmp_path / "checkpoints_tp").glob("x_model_mp_*"))
    total, largest = sum(f.stat().st_size for f in shards), max(f.stat().st_size for f in shards)
    expected = (tmp_path / "x.pt").stat().st_size + 7 * sum(t.nbytes for t in replicated.values())
    print(
        f"split: {total:,} bytes, input plus replicated {expected:,}, "
        f"memory {memory / largest:.2f} of an output"
    )
    assert len(shards) == 8 and total <= expected + 8 * 20_000  # pickle and archive headers
    assert memory < 1.3 * largest + 2 * 2**24
    memory = measure(convert.merge, tmp_path / "checkpoints_tp" / "x.pt")
    largest = (tmp_path / "fsdp_checkpoints" / "x_reg_model.pt").stat().st_size
    print(f"merge: memory {memory / largest:.2f} of the output")
    assert memory < 1.3 * largest


def load_half(path, cfg):
    """A model as the second of two ranks has it, and its weights."""
    tp.rank, tp.size = lambda: 1, lambda: 2
    net = m.build(cfg, torch.device("cpu"), torch.bfloat16)
    for part in ("base", "control", "logvar"):
        convert.load(net, path, part)


def test_model_loads_within_its_own_memory(tmp_path):
    """From the meta device to loaded: a rank's share of the weights and little more."""
    cfg = m.ModelConfig(model_channels=1024, num_blocks=4, num_heads=8, n_views=1)
    net = m.build(cfg, torch.device("meta"), torch.bfloat16)
    seqs = {prefix + "net.pos_embedder.seq": torch.arange(128.0) for prefix in ("", "base_model.")}
    file = {
        convert.to_nvidia(name): torch.empty(p.shape, dtype=torch.bfloat16).normal_()
        if p.dim() else p
        for name, p in tensors_of(net).items()
    } | seqs
    torch.save(file, tmp_path / "x.pt")
    memory = measure(load_half, tmp_path / "x.pt", cfg)
    share = sum(t.numel() // (2 if convert.tp_dim_of(name) is not None else 1) * 2
                for name, t in file.items())
    print(f"loading: memory {memory / share:.2f} of a rank's share, {share:,} bytes")
    assert memory < 1.2 * share + 2**24


def test_a_gap_among_split_files_is_refused(tmp_path):
    """Ranks 0 and 7 alone must not pass for a checkpoint of one rank."""
    torch.save({"net.a.to_q.0.weight": torch.zeros(8, 5)}, tmp_path / "x.pt")
    convert.split(tmp_path / "x.pt", 8)
    for rank in range(1, 7):
        (tmp_path / "checkpoints_tp" / f"x_model_mp_{rank}.pt").unlink()
    with pytest.raises(FileNotFoundError, match="x_model_mp_1.pt, which is not there"):
        convert.open_weights(tmp_path / "checkpoints_tp" / "x.pt")


def test_a_part_of_a_model_is_not_merged(tmp_path, capsys):
    """Neither one rank's file nor split files of which the last is gone: nothing numbers them."""
    torch.save(load_file(GOLDEN[-1]), tmp_path / "x.pt")
    convert.split(tmp_path / "x.pt", 4)
    folder = tmp_path / "checkpoints_tp"
    (folder / "x_model_mp_3.pt").unlink()
    for name in ("x.pt", "x_model_mp_0.pt"):
        assert convert.main(["merge", str(folder / name)]) == 2
        assert "holds a part of the model (" in capsys.readouterr().err
    assert not (tmp_path / "fsdp_checkpoints").exists()


def test_a_torch_file_named_otherwise_is_told(tmp_path):
    torch.save({"net.a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is a file of torch.save; name it x.pt"):
        convert.open_weights(tmp_path / "x.safetensors")
