"""tokenizer.py: the golden tensors, its loaders, clip interface, the shipped small tokenizer."""

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizer import HaarPatcher, HaarUnpatcher, Tokenizer, load_tokenizer  # noqa: E402

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
    assert taps
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
        told = f"{known + 1} latent frames.*{known} of the statistics"
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


def test_missing_and_corrupt_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        load_tokenizer(tmp_path / "nothing.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"not tensors" * 10)
    with pytest.raises(ValueError, match="garbage.safetensors is not a tokenizer"):
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


@pytest.fixture(scope="module")
def folder(weights, golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("released")
    save_folder(path, weights, (golden["mean"].reshape(-1), golden["std"].reshape(1, 16, -1, 1, 1)))
    return path


def test_torchscript_folder_equals_safetensors(folder, tokenizer, golden, capsys):
    loaded = load_tokenizer(folder, dtype=torch.float32)
    line = capsys.readouterr().out
    ours, others = loaded.state_dict(), tokenizer.state_dict()
    assert str(folder) in line and f"{len(ours)} tensors" in line and line.count("\n") == 1
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
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload would have worked"


def test_statistics_that_are_no_pair_are_refused(folder, tmp_path, golden):
    for name in ("encoder.jit", "decoder.jit"):
        (tmp_path / name).symlink_to(folder / name)
    torch.save((golden["mean"],), tmp_path / "mean_std.pt")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- the shipped tokenizer


def test_smoke_tokenizer_reconstructs_a_new_drive(tmp_path):
    from data import decode
    from configs.smoke_drive import write_drive

    root = write_drive(tmp_path / "drive", clips=1, frames=17, seed=123)
    files = [next((root / kind / "pinhole_front").glob("*.mp4"))
             for kind in ("videos", "lidar", "hdmap")]
    frames = torch.stack([torch.from_numpy(decode(file, 0, 17)) for file in files])
    frames = frames.movedim(-1, 1)[None]                                           # (1,3,3,F,H,W)
    assert SMOKE.stat().st_size < 1_000_000
    smoke = load_tokenizer(SMOKE)
    latents = smoke.encode_views(frames)
    difference = smoke.decode_views(latents, views=3).float() - frames.float()
    squared = difference.square().mean(dim=(0, 2, 3, 4, 5))
    decibels = 10 * torch.log10(255**2 / squared)
    assert decibels[0] > 22 and decibels.min() > 18, decibels
    assert 0.3 < latents.float().std() < 0.8 and latents.float().abs().max() < 8
    assert smoke.mean.shape[1] >= 16
