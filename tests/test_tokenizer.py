"""tokenizer.py: the golden tensors, its loaders, clip interface, the shipped small tokenizer."""

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file, save_file
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tokenizer as tokenizer_module  # noqa: E402
from tokenizer import (  # noqa: E402
    HaarPatcher, HaarUnpatcher, Tokenizer, load_tokenizer)
from configs.files import read_archive  # noqa: E402

GOLDEN = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
SMOKE = ROOT / "configs" / "smoke_tokenizer.safetensors"
TOLERANCE = 1e-5


def relative_error(a, b):
    assert a.shape == b.shape
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


@pytest.fixture(scope="module")
def weights():
    return load_file(GOLDEN / "tokenizer_weights.safetensors")


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "tokenizer_io.safetensors")


@pytest.fixture(scope="module")
def tokenizer_file(weights, golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    save_file(weights | {"mean": golden["mean"], "std": golden["std"]}, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return load_tokenizer(tokenizer_file, dtype=torch.float32)


def random_frames(*sizes):
    return torch.randint(256, sizes, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- golden


def test_golden_names_are_the_module_s(weights):
    channels = len(weights["encoder.conv_in.0.conv3d.weight"])
    ours = {name: t.shape for name, t in Tokenizer(channels).state_dict().items()}
    assert ours == {name: t.shape for name, t in weights.items()}


def test_golden_encode_decode_normalise(tokenizer, golden):
    raw = tokenizer.encode(golden["video"])
    assert relative_error(raw, golden["latent"]) < TOLERANCE
    assert relative_error(tokenizer.decode(golden["latent"]), golden["reconstruction"]) < TOLERANCE
    latent, normalised = golden["latent"], golden["latent_normalised"]
    assert relative_error(tokenizer.normalise(latent), normalised) < TOLERANCE
    assert relative_error(tokenizer.denormalise(normalised), latent) < TOLERANCE


def test_golden_taps(tokenizer, golden):
    seen, handles = {}, []
    for name, module in tokenizer.named_modules():
        def keep(module, args, output, name=name):
            seen[f"tap.{name}"] = output
        handles.append(module.register_forward_hook(keep))
    tokenizer.decode(tokenizer.encode(golden["video"]))
    for handle in handles:
        handle.remove()
    taps = [name for name in golden if name.startswith("tap.")]
    if not taps:
        pytest.skip("these golden files come without the outputs of inner modules")
    errors = {name: relative_error(seen[name], golden[name]) for name in taps}
    assert max(errors.values()) < TOLERANCE, errors


def test_bfloat16_is_near_golden(tokenizer_file, golden):
    low = load_tokenizer(tokenizer_file)
    latent = low.normalise(low.encode(golden["video"].bfloat16()))
    assert latent.dtype == torch.bfloat16 and low.mean.dtype == torch.float32
    assert relative_error(latent, golden["latent_normalised"]) < 5e-2


# ---------------------------------------------------------------- mathematics


def test_haar_round_trip_and_scale():
    video = torch.randn(2, 3, 9, 16, 24, dtype=torch.float64)
    patches = HaarPatcher()(video)
    assert patches.shape == (2, 192, 3, 4, 6)
    torch.testing.assert_close(HaarUnpatcher()(patches), video)
    # channel group 0 is the mean of the 4x4x4 block, first of all that of the repeated first frame
    torch.testing.assert_close(patches[:, :3, 0], nn.functional.avg_pool2d(video[:, :, 0], 4))
    torch.testing.assert_close(patches[:, :3, 1:], nn.functional.avg_pool3d(video[:, :, 1:], 4))


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_shapes_and_rows_are_independent_of_the_batch(tokenizer, frames):
    video = torch.rand(2, 3, frames, 24, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = tokenizer.encode(video)
    assert raw.shape == (2, 16, (frames - 1) // 8 + 1, 3, 5)
    back = tokenizer.decode(raw)
    assert back.shape == video.shape
    for i in range(2):
        assert relative_error(raw[i:i + 1], tokenizer.encode(video[i:i + 1])) < TOLERANCE
        assert relative_error(back[i:i + 1], tokenizer.decode(raw[i:i + 1])) < TOLERANCE


@pytest.mark.parametrize("changed", [1, 8, 9, 16])
def test_causality(tokenizer, changed):
    video = torch.rand(1, 3, 17, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = video.clone()
    other[:, :, changed:] = -other[:, :, changed:]
    a, b = tokenizer.encode(video), tokenizer.encode(other)
    first = (changed + 7) // 8  # the latent frame that holds video frame `changed`
    torch.testing.assert_close(a[:, :, :first], b[:, :, :first], rtol=0, atol=1e-6)
    assert (a[:, :, first] - b[:, :, first]).abs().max() > 1e-5
    back, other_back = tokenizer.decode(a), tokenizer.decode(b)
    same = slice(8 * first - 7)
    torch.testing.assert_close(back[:, :, same], other_back[:, :, same], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- clips


def test_encode_views_orders_view_then_time(tokenizer):
    frames = random_frames(2, 3, 3, 9, 16, 24)
    latents = tokenizer.encode_views(frames)
    assert latents.shape == (2, 16, 3 * 2, 2, 3)
    for b in range(2):
        for v in range(3):
            video = frames[b:b + 1, v].float() / 127.5 - 1
            alone = tokenizer.normalise(tokenizer.encode(video))
            assert relative_error(latents[b:b + 1, :, 2 * v:2 * v + 2], alone) < TOLERANCE


def test_decode_views_inverts_the_order_and_clamps(tokenizer):
    frames = random_frames(2, 3, 3, 9, 16, 24)
    latents = tokenizer.encode_views(frames) * 3  # far enough out to leave [-1, 1]
    pixels = tokenizer.decode_views(latents, views=3)
    assert pixels.shape == frames.shape and pixels.dtype == torch.uint8
    for b in range(2):
        for v in range(3):
            video = tokenizer.decode(tokenizer.denormalise(latents[b:b + 1, :, 2 * v:2 * v + 2]))
            expected = (video.clamp(-1, 1) + 1) * 127.5
            assert (pixels[b, v].float() - expected[0]).abs().max() < 0.51
    assert pixels.min() == 0 or pixels.max() == 255


def test_bfloat16_pixels_are_rounded_once(tokenizer_file):
    low = load_tokenizer(tokenizer_file)
    frames = random_frames(1, 1, 3, 9, 16, 24)
    video = (frames[:, 0].float() / 127.5 - 1).bfloat16()
    expected = low.normalise(low.encode(video))
    latents = low.encode_views(frames)
    assert latents.dtype == torch.bfloat16 and torch.equal(latents, expected)
    assert not latents.requires_grad


@pytest.mark.parametrize("sizes", [(8, 16, 16), (16, 16, 16), (9, 12, 16), (9, 16, 20)])
def test_sizes_that_do_not_divide_are_refused(tokenizer, sizes):
    told = f"{sizes[0]} frames of {sizes[1]}x{sizes[2]}: use 8k\\+1.*multiples of 8"
    with pytest.raises(ValueError, match=told):
        tokenizer.encode_views(random_frames(1, 2, 3, *sizes))


def test_more_frames_than_statistics_are_refused(tokenizer):
    known = tokenizer.mean.shape[1]
    assert tokenizer.normalise(torch.zeros(1, 16, known, 2, 2)).shape[2] == known
    for method in (tokenizer.normalise, tokenizer.denormalise):
        told = f"{known + 1} latent frames.*the {known} of .*data.num_frames={8 * known - 7}"
        with pytest.raises(ValueError, match=told):
            method(torch.zeros(1, 16, known + 1, 2, 2))


# ---------------------------------------------------------------- files


def test_strict_loading_names_every_fault(weights, golden, tmp_path):
    tensors = weights | {"mean": golden["mean"], "std": golden["std"]}
    tensors["encoder.surplus.weight"] = torch.zeros(2)
    del tensors["decoder.mid.block_1.norm1.norm.bias"]
    tensors["quant_conv.conv3d.bias"] = torch.zeros(17)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError) as error:
        load_tokenizer(tmp_path / "bad.safetensors")
    for name in ("decoder.mid.block_1.norm1.norm.bias", "encoder.surplus.weight",
                 "quant_conv.conv3d.bias"):
        assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mean", "encoder.conv_in.0.conv3d.weight"])
def test_a_file_without_statistics_or_first_layer_is_refused(weights, golden, tmp_path, name):
    tensors = weights | {"mean": golden["mean"], "std": golden["std"]}
    del tensors[name]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=name):
        load_tokenizer(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("tensor", [
    torch.tensor(1.0), torch.zeros(0), torch.zeros(3), torch.zeros(8, 192, 1, 3, 3).int(),
    torch.zeros(12, 192, 1, 3, 3),
])
def test_a_first_layer_of_another_form_costs_a_sentence(weights, golden, tmp_path, tensor):
    name = "encoder.conv_in.0.conv3d.weight"
    tensors = weights | {"mean": golden["mean"], "std": golden["std"], name: tensor}
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="bad.safetensors lacks or misshapes") as error:
        load_tokenizer(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


def test_missing_and_corrupt_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        load_tokenizer(tmp_path / "nothing.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"not tensors" * 10)
    with pytest.raises(ValueError, match="garbage.safetensors is a text file"):
        load_tokenizer(tmp_path / "garbage.safetensors")
    with pytest.raises(FileNotFoundError, match=".jit|mean_std.pt"):
        load_tokenizer(tmp_path)


class Tree(nn.Module):
    """Parameters and buffers under given dotted names, which TorchScript can save."""

    def __init__(self, tensors):
        super().__init__()
        children = {}
        for name, tensor in tensors.items():
            head, _, rest = name.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = tensor
            elif head in ("weight", "bias"):
                self.register_parameter(head, nn.Parameter(tensor))
            else:
                self.register_buffer(head, tensor)
        for head, below in children.items():
            self.add_module(head, Tree(below))

    def forward(self, x):
        return x


def save_folder(folder, weights, statistics):
    ignorable = {
        "encoder.patcher3d.wavelets": torch.ones(2),
        "encoder.patcher3d._arange": torch.arange(2),
        "decoder.unpatcher3d.patch_size_buffer": torch.tensor(4),
    }
    parts = {"encoder.jit": ("encoder.", "quant_conv."),
             "decoder.jit": ("decoder.", "post_quant_conv.")}
    for file, prefixes in parts.items():
        part = {k: t for k, t in (weights | ignorable).items() if k.startswith(prefixes)}
        torch.jit.script(Tree(part)).save(str(folder / file))
    torch.save(statistics, folder / "mean_std.pt")


def save_as(form, folder, weights, golden):
    """The path that load_tokenizer is given."""
    if form == "archives":
        save_folder(folder, weights, (golden["mean"], golden["std"]))
        return folder
    save_file(weights | {k: golden[k] for k in ("mean", "std")}, folder / "tokenizer.safetensors")
    return folder / "tokenizer.safetensors"


def copy_folder(source, target):
    """Copies of the three files, one of which a test then replaces."""
    for name in ("encoder.jit", "decoder.jit", "mean_std.pt"):
        (target / name).write_bytes((source / name).read_bytes())


@pytest.fixture(scope="module")
def folder(weights, golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("released")
    save_folder(path, weights, (golden["mean"].reshape(-1), golden["std"].reshape(1, 16, -1, 1, 1)))
    return path


def test_torchscript_folder_equals_safetensors(folder, tokenizer, golden, capsys):
    loaded = load_tokenizer(folder, dtype=torch.float32)
    ours, others = loaded.state_dict(), tokenizer.state_dict()
    assert str(folder) in loaded.description and f"{len(ours)} tensors" in loaded.description
    assert capsys.readouterr().out == ""  # a line for the run to print once, not for every rank
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), others.values(), strict=True))
    assert torch.equal(loaded.mean, golden["mean"]) and torch.equal(loaded.std, golden["std"])
    latent = loaded.normalise(loaded.encode(golden["video"]))
    assert relative_error(latent, golden["latent_normalised"]) < TOLERANCE


@pytest.mark.parametrize("kind", ["folder", "tokenizer_file"])
def test_encoder_alone(kind, request, golden, tmp_path):
    path = request.getfixturevalue(kind)
    if kind == "folder":  # decoder.jit is not even opened
        for name in ("encoder.jit", "mean_std.pt"):
            (tmp_path / name).symlink_to(path / name)
        path = tmp_path
    alone = load_tokenizer(path, dtype=torch.float32, decoder=False)
    assert not any(name.startswith(("decoder", "post_quant")) for name in alone.state_dict())
    assert relative_error(alone.encode(golden["video"]), golden["latent"]) < TOLERANCE


def test_a_surplus_tensor_in_an_archive_is_refused(weights, golden, tmp_path):
    surplus = weights | {"encoder.extra.weight": torch.zeros(1)}
    save_folder(tmp_path, surplus, (golden["mean"], golden["std"]))
    with pytest.raises(ValueError, match="encoder.extra.weight"):
        load_tokenizer(tmp_path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_hostile_statistics_do_not_run(folder, tmp_path):
    for name in ("encoder.jit", "decoder.jit"):
        (tmp_path / name).symlink_to(folder / name)
    marker = tmp_path / "ran"
    torch.save((Payload(marker), Payload(marker)), tmp_path / "mean_std.pt")
    with pytest.raises(ValueError, match="mean_std.pt holds more than tensors .* could run code"):
        load_tokenizer(tmp_path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload would have worked"


def test_statistics_that_are_no_pair_are_refused(folder, tmp_path, golden):
    for name in ("encoder.jit", "decoder.jit"):
        (tmp_path / name).symlink_to(folder / name)
    torch.save((golden["mean"],), tmp_path / "mean_std.pt")
    with pytest.raises(ValueError, match="mean_std.pt holds a tuple, not tensors by name"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("values, index", [
    ("mean", float("nan")), ("mean", float("inf")), ("std", float("nan")), ("std", float("inf")),
    ("std", 0.0), ("std", -1.0),
])
@pytest.mark.parametrize("kind", ["folder", "tokenizer_file"])
def test_statistics_that_divide_by_nothing_are_refused(kind, values, index, request, tmp_path):
    path = request.getfixturevalue(kind)
    if kind == "folder":
        copy_folder(path, tmp_path)
        file = tmp_path / "mean_std.pt"
        statistics = dict(zip(("mean", "std"), torch.load(file)))
    else:
        tmp_path = file = tmp_path / "tokenizer.safetensors"
        statistics = load_file(path)
    statistics[values].view(-1)[3] = index
    if kind == "folder":
        torch.save((statistics["mean"], statistics["std"]), file)
    else:
        save_file(statistics, file)
    with pytest.raises(ValueError, match=f"{file}: mean .* finite, and std positive"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("statistics", [
    {"average": torch.ones(16), "std": torch.ones(16)},
    (torch.ones(15), torch.ones(15)),
    (torch.ones(32), torch.ones(16)),
    (1.0, 2.0),
    torch.ones(2, 16, 4).unbind()[0],
    [],
])
def test_statistics_of_another_form_are_refused(statistics, folder, tmp_path):
    copy_folder(folder, tmp_path)
    torch.save(statistics, tmp_path / "mean_std.pt")
    with pytest.raises(ValueError, match="mean_std.pt"):
        load_tokenizer(tmp_path)


def test_clips_longer_than_the_statistics_are_refused_at_loading(folder, tokenizer):
    known = tokenizer.mean.shape[1]
    load_tokenizer(folder, frames=known)
    with pytest.raises(ValueError, match=f"{known + 1} latent frames.*data.num_frames="):
        load_tokenizer(folder, frames=known + 1)


@pytest.mark.parametrize("kind", ["folder", "tokenizer_file"])
def test_weights_that_are_not_finite_are_named(kind, request, weights, golden, tmp_path):
    broken = {name: tensor.clone() for name, tensor in weights.items()}
    broken["encoder.mid.block_1.norm1.norm.bias"][1] = float("nan")
    statistics = golden["mean"], golden["std"]
    path = tmp_path
    if kind == "folder":
        save_folder(tmp_path, broken, statistics)
    else:
        path = tmp_path / "tokenizer.safetensors"
        save_file(broken | dict(zip(("mean", "std"), statistics)), path)
    with pytest.raises(ValueError, match="not finite in encoder.mid.block_1.norm1.norm.bias"):
        load_tokenizer(path)


# ---------------------------------------------------------------- levels that are not used

IDLE = ("encoder.down.1.downsample.", "decoder.up.2.upsample.")


@pytest.mark.parametrize("form", ["archives", "safetensors"])
@pytest.mark.parametrize("without", [IDLE, IDLE[:1], IDLE[1:]])
def test_idle_levels_may_lack_their_weights(form, without, weights, golden, tmp_path):
    present = {name: t for name, t in weights.items() if not name.startswith(without)}
    assert len(weights) - len(present) == 6 * len(without)
    path = save_as(form, tmp_path, present, golden)
    whole = load_tokenizer(path, dtype=torch.float32)
    assert set(whole.state_dict()) == set(present)
    assert relative_error(whole.decode(golden["latent"]), golden["reconstruction"]) < TOLERANCE
    for loaded in (whole, load_tokenizer(path, dtype=torch.float32, decoder=False)):
        assert relative_error(loaded.encode(golden["video"]), golden["latent"]) < TOLERANCE


@pytest.mark.parametrize("form", ["archives", "safetensors"])
@pytest.mark.parametrize("level", IDLE)
def test_half_an_idle_level_is_named(form, level, weights, golden, tmp_path):
    lost = [f"{level}conv{i}.conv3d.{kind}" for i, kind in ((1, "bias"), (2, "weight"))]
    present = {name: tensor for name, tensor in weights.items() if name not in lost}
    path = save_as(form, tmp_path, present, golden)
    for decoder in (True, False):
        if level.startswith("decoder") and not decoder:
            load_tokenizer(path, decoder=False)  # the decoder is none of its business
            continue
        with pytest.raises(ValueError) as error:
            load_tokenizer(path, decoder=decoder)
        assert all(name in str(error.value) for name in lost) and "\n" not in str(error.value)


def test_a_level_that_is_used_is_missed(weights, golden, tmp_path):
    used = "decoder.up.1.upsample."
    present = {name: tensor for name, tensor in weights.items() if not name.startswith(used)}
    with pytest.raises(ValueError, match=f"{used}conv1.conv3d.weight"):
        load_tokenizer(save_as("archives", tmp_path, present, golden))


# ---------------------------------------------------------------- archives, read and not run


def repack(source, target, edit=lambda name, content: content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))


@pytest.mark.parametrize("how, dtype", [
    ("trace", torch.bfloat16), ("script", torch.bfloat16), ("script", torch.float16),
    ("script", torch.float64), ("script", torch.float32),
])
def test_archives_hold_what_torchscript_says(how, dtype, weights, tmp_path):
    names = "encoder.conv_in.", "encoder.mid.", "quant_conv."
    if how == "trace":
        encoder, module = Tokenizer(8, decoder=False).to(dtype).encoder, nn.Sequential()
        module.add_module("mid", encoder.mid)  # idle levels as the release's: no weights, no code
        module.add_module("idle", nn.Identity())
        module = torch.jit.trace(module, torch.zeros(1, 32, 2, 3, 4, dtype=dtype))
    else:
        tensors = {k: t.to(dtype) for k, t in weights.items() if k.startswith(names)}
        first = tensors["encoder.conv_in.0.conv3d.weight"]
        tensors |= {"turned.weight": first.transpose(0, 1)[:, :3],  # strided, of a shared storage
                    "part.weight": first[2:5], "scalar.weight": torch.tensor(2.5, dtype=dtype),
                    "empty.weight": torch.empty(0, 3), "count.steps": torch.tensor([7, 8]),
                    "mask.flags": torch.tensor([True, False])}
        module = torch.jit.script(Tree(tensors))
    file = tmp_path / "network.jit"
    module.save(str(file))
    repack(file, tmp_path / "packed.jit", compression=zipfile.ZIP_DEFLATED)
    expected = torch.jit.load(file).state_dict()
    for path in (file, tmp_path / "packed.jit"):
        found = read_archive(path)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


class Overwrites(Tree):
    """TorchScript runs what its class does with its state, at loading; torch.save among it."""

    @torch.jit.export
    def __getstate__(self):
        return "marker", self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        torch.save(torch.ones(1), state[0])
        self.training = state[1]


def test_the_code_of_an_archive_does_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy_folder(folder, tmp_path)
    torch.jit.script(Overwrites({})).save(str(tmp_path / "encoder.jit"))
    with pytest.raises(ValueError, match="encoder.jit holds no tensors, only an empty dict"):
        load_tokenizer(tmp_path)
    assert not Path("marker").exists()
    torch.jit.load("encoder.jit")
    assert Path("marker").exists(), "the archive would have worked"


def hostile(content):
    """A pickle in which `content` is called when it is opened."""
    return b"\x80\x02" + content + b"."


@pytest.mark.parametrize("content", [
    b"cposix\nsystem\n(X\x0c\x00\x00\x00touch markertR",
    b"cbuiltins\neval\n(X\x01\x00\x00\x001tR",
    b"(X\x0c\x00\x00\x00touch markeriposix\nsystem\n",
    b"ctorch\nload\n(X\x01\x00\x00\x00xtR",
    b"ctorch._utils\n_rebuild_qtensor\n)R",
    b"c__torch__\nA\n)\x81}X\x01\x00\x00\x00acposix\nsystem\nsb",
])
def test_hostile_archives_do_not_run(content, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy_folder(folder, tmp_path)
    swap = lambda name, old: hostile(content) if name.endswith("/data.pkl") else old
    repack(folder / "decoder.jit", tmp_path / "decoder.jit", swap)
    with pytest.raises(ValueError, match="decoder.jit .*code that could do anything"):
        load_tokenizer(tmp_path)
    assert not Path("marker").exists()


SELF = b"c__torch__\nA\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb"  # a module that holds itself
WIDE = b"c__torch__\nA\n)\x81q\x00}(" + b"X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00" + b"ub"
TOO_LARGE = (b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
             b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00(J\xff\xff\xff\x7ft(K\x00t\x89}tR")


@pytest.mark.parametrize("content, told", [
    (SELF, "no end"), (WIDE, "no end"), (TOO_LARGE, "has a storage of"), (b"}", "dict"),
    (b"r\xff\xff\xff\x7f", "do not fit together: IndexError"), (b"", "do not fit together"),
    (b"\xff", "do not fit together: KeyError 255"),
])
def test_broken_archives_cost_a_sentence(content, told, folder, tmp_path):
    copy_folder(folder, tmp_path)
    swap = lambda name, old: hostile(content) if name.endswith("/data.pkl") else old
    repack(folder / "decoder.jit", tmp_path / "decoder.jit", swap)
    words = f"decoder.jit is not a readable tokenizer .*{told}"
    with pytest.raises(ValueError, match=words) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def halves(content):
    return content[:len(content) // 2]


def no_entries(content):
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").close()
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 14000000000\n"
PAGE = b"<!DOCTYPE html><html><head><title>Access is restricted</title></head></html>"


@pytest.mark.parametrize("name", ["encoder.jit", "decoder.jit", "mean_std.pt"])
@pytest.mark.parametrize("edit, told", [
    (halves, "cut short"), (no_entries, "neither .pt nor"), (lambda content: b"", "empty"),
    (lambda content: LFS, "a Git LFS pointer"), (lambda content: PAGE, "a web page"),
    (lambda content: b"\n" + PAGE.lower(), "a web page"),
])
def test_files_that_are_not_what_they_should_be(name, edit, told, folder, tmp_path):
    copy_folder(folder, tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(edit(content))
    with pytest.raises(ValueError, match=f"{name} is .*{told}") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["encoder.jit", "mean_std.pt"])
def test_a_flipped_bit_in_an_archive_is_noticed(folder, tmp_path, name):
    copy_folder(folder, tmp_path)
    content = bytearray((folder / name).read_bytes())
    with zipfile.ZipFile(folder / name) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 200] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} was damaged after .*Bad CRC"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- compilation


def test_equal_blocks_share_a_graph_and_no_limit_is_hit(tokenizer_file, monkeypatch):
    graphs, compile_function = [], torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_counted(function, **options):
        return compile_function(function, backend=count, **options)

    torch._dynamo.reset()
    plain = load_tokenizer(tokenizer_file, dtype=torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", compile_counted)
        compiled = load_tokenizer(tokenizer_file, dtype=torch.float32, compile=True)
    frames = random_frames(1, 2, 3, 17, 16, 24)
    latents = compiled.encode_views(frames)
    assert len(graphs) == 8
    pixels = compiled.decode_views(latents, views=2)
    assert len(graphs) == 9
    with torch._dynamo.config.patch(error_on_recompile=True):  # the next clips find all of it there
        swapped = compiled.encode_views(frames.flip(1))
        assert torch.equal(swapped, latents.roll(latents.shape[2] // 2, dims=2))
        compiled.decode_views(latents, views=2)
    assert relative_error(latents, plain.encode_views(frames)) < TOLERANCE
    assert (pixels.int() - plain.decode_views(latents, views=2).int()).abs().max() <= 1
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list
    held = len(entries(tokenizer_module.ResBlock.forward.__code__))
    assert held == 5 < torch._dynamo.config.recompile_limit


# ---------------------------------------------------------------- the shipped tokenizer


def test_smoke_tokenizer_reconstructs_a_new_drive(tmp_path):
    from data import decode
    from configs.smoke_drive import write_drive

    root = write_drive(tmp_path / "drive", clips=4, frames=17, height=80, width=128, seed=123,
                       views=1)
    files = [sorted((root / kind / "pinhole_front").glob("*.mp4"))
             for kind in ("videos", "lidar", "hdmap")]
    frames = [torch.stack([torch.from_numpy(decode(file, 0, 17)) for file in clip])
              for clip in zip(*files)]
    frames = torch.stack(frames).movedim(-1, 2)                                    # (4,3,3,F,H,W)
    assert SMOKE.stat().st_size < 1_000_000
    smoke = load_tokenizer(SMOKE)
    latents = smoke.encode_views(frames)
    difference = smoke.decode_views(latents, views=3).float() - frames.float()
    squared = difference.square().mean(dim=(0, 2, 3, 4, 5))
    decibels = 10 * torch.log10(255**2 / squared)
    assert decibels[0] > 19 and decibels[1] > 24 and decibels.min() > 14, decibels
    assert 0.3 < latents.float().std() < 0.8 and latents.float().abs().max() < 10
    assert smoke.mean.shape[1] >= 16


def test_a_run_is_refused_before_its_model_is_built(tmp_path, monkeypatch, capsys):
    import model as m
    import train

    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    monkeypatch.setattr(m, "build", lambda *args: pytest.fail("a model was built"))
    tensors = load_file(SMOKE)
    short = tensors | {name: tensors[name][:, :2].contiguous() for name in ("mean", "std")}
    save_file(short, tmp_path / "short.safetensors")
    words = [f"tokenizer.path={tmp_path / 'short.safetensors'}", "data.root=synthetic"]
    monkeypatch.setattr(train.data, "open_clips", lambda cfg: [1])
    assert train.main([str(ROOT / "configs" / "smoke.yaml"), *words]) == 2
    assert "3 latent frames a view exceed the 2 of" in capsys.readouterr().err
