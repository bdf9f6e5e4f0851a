"""Pixels <-> latents: the causal video autoencoder Cosmos-Tokenize1-CV8x8x8-720p.

B batch, V camera views, F frames, T latent frames of one view = (F-1)/8+1, C base channels;
inside the network t h w are the sizes at hand. Module names are the released ones.
"""

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import nn

from configs.files import named_tensors, read_file

IGNORED_BUFFERS = (".wavelets", "._arange", ".patch_size_buffer")


class CausalConv(nn.Module):
    """3D convolution that sees no later frame: the first one is repeated on the left."""

    def __init__(self, c_in, c_out, kernel=(1, 1, 1), stride=(1, 1, 1), padding=0):
        super().__init__()
        self.conv3d = nn.Conv3d(c_in, c_out, kernel, stride, (0, padding, padding))
        self.repeats = max(kernel[0] - stride[0], 0)

    def forward(self, x):
        if self.repeats:
            x = torch.cat([x[:, :, :1]] * self.repeats + [x], dim=2)
        return self.conv3d(x)


class FrameNorm(nn.Module):
    """GroupNorm with one group, each frame on its own: statistics over time would look ahead."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)

    def forward(self, x):
        frames = self.norm(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(frames, "(b t) c h w -> b c t h w", b=len(x))


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(c_in), pair(c_in, c_out)
        self.norm2, self.conv2 = FrameNorm(c_out), pair(c_out, c_out)
        self.nin_shortcut = CausalConv(c_in, c_out) if c_in != c_out else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """One head, over the positions of a frame ("space") or causally the frames of a position
    ("time"). Written out: fused kernels take no head of 512 channels. Space goes a frame at a time,
    because the scores of one frame of 704x1280 are already 14,080 x 14,080.
    """

    def __init__(self, channels, over):
        super().__init__()
        self.tokens = {"space": "(b t) (h w) c", "time": "(b h w) t c"}[over]
        self.causal = over == "time"
        self.norm = FrameNorm(channels)
        self.q, self.k, self.v, self.proj_out = (CausalConv(channels, channels) for _ in range(4))

    def forward(self, x):
        b, _, t, h, _ = x.shape
        y = self.norm(x)
        q, k, v = (rearrange(f(y), f"b c t h w -> {self.tokens}") for f in (self.q, self.k, self.v))
        size = len(q) if self.causal else 1
        parts = zip(q.split(size), k.split(size), v.split(size))
        y = torch.cat([self.attend(*part) for part in parts])
        return x + self.proj_out(rearrange(y, f"{self.tokens} -> b c t h w", b=b, t=t, h=h))

    def attend(self, q, k, v):
        scores = (q * q.shape[-1] ** -0.5) @ k.mT                           # (sequences, L, L)
        if self.causal:
            scores = scores + torch.full_like(scores[0], -torch.inf).triu(1)
        return scores.softmax(-1) @ v


class Down(nn.Module):
    """Halves space, then time (t -> (t+1)/2): strided convolution plus mean pool. Idle: nothing."""

    def __init__(self, channels, idle=False):
        super().__init__()
        self.idle = idle  # a level whose weights may be in a file, but are not used
        self.conv1 = CausalConv(channels, channels, (1, 3, 3), (1, 2, 2))
        self.conv2 = CausalConv(channels, channels, (3, 1, 1), (2, 1, 1))
        self.conv3 = CausalConv(channels, channels)

    def forward(self, x):
        if self.idle:
            return x
        pooled = reduce(x, "b c t (h i) (w j) -> b c t h w", "mean", i=2, j=2)
        x = self.conv1(F.pad(x, (0, 1, 0, 1))) + pooled
        x = torch.cat([x[:, :, :1], x], dim=2)
        return self.conv3(self.conv2(x) + reduce(x, "b c (t i) h w -> b c t h w", "mean", i=2))


class Up(nn.Module):
    """Doubles time (t -> 2t-1), then space, by repetition plus convolution. Idle: nothing."""

    def __init__(self, channels, idle=False):
        super().__init__()
        self.idle = idle
        self.conv1 = CausalConv(channels, channels, (3, 1, 1))
        self.conv2 = CausalConv(channels, channels, (1, 3, 3), padding=1)
        self.conv3 = CausalConv(channels, channels)

    def forward(self, x):
        if self.idle:
            return x
        x = x.repeat_interleave(2, dim=2)[:, :, 1:]
        x = self.conv1(x) + x
        x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        return self.conv3(self.conv2(x) + x)


class HaarPatcher(nn.Module):
    """(B,3,F,H,W) -> (B,192,(F+3)/4,H/4,W/4): twice half sums, half differences along each axis."""

    def forward(self, x):
        x = torch.cat([x[:, :, :1]] * 3 + [x], dim=2)
        for dim in (4, 3, 2) * 2:  # channels: the low bands of all so far, then their high bands
            a, b = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
            x = torch.cat([a + b, a - b], dim=1) / 2
        return x


class HaarUnpatcher(nn.Module):
    def forward(self, x):
        for dim in (2, 3, 4) * 2:
            low, high = x.chunk(2, dim=1)
            x = torch.stack([low + high, low - high], dim=dim + 1).flatten(dim, dim + 1)
        return x[:, :, 3:]


def pair(c_in, c_out):
    space, time = CausalConv(c_in, c_out, (1, 3, 3), padding=1), CausalConv(c_out, c_out, (3, 1, 1))
    return nn.Sequential(space, time)


def named(**modules):
    return nn.Sequential(OrderedDict(modules))


def blocks(count, c_in, c_out):
    return nn.Sequential(ResBlock(c_in, c_out), *(ResBlock(c_out, c_out) for _ in range(count - 1)))


def middle(c):
    attention = nn.Sequential(Attention(c, "space"), Attention(c, "time"))
    return named(block_1=ResBlock(c, c), attn_1=attention, block_2=ResBlock(c, c))


def build_encoder(c):
    levels = nn.Sequential(
        named(block=blocks(2, c, 2 * c), downsample=Down(2 * c)),
        named(block=blocks(2, 2 * c, 4 * c), downsample=Down(4 * c, idle=True)),
        named(block=blocks(2, 4 * c, 4 * c)),
    )
    return named(patcher3d=HaarPatcher(), conv_in=pair(192, c), down=levels, mid=middle(4 * c),
                 norm_out=FrameNorm(4 * c), silu=nn.SiLU(), conv_out=pair(4 * c, 16))


def build_decoder(c):
    levels = named(**{  # run from level 2 to level 0
        "2": named(block=blocks(3, 4 * c, 4 * c), upsample=Up(4 * c, idle=True)),
        "1": named(block=blocks(3, 4 * c, 4 * c), upsample=Up(4 * c)),
        "0": named(block=blocks(3, 4 * c, 2 * c)),
    })
    return named(conv_in=pair(16, 4 * c), mid=middle(4 * c), up=levels, norm_out=FrameNorm(2 * c),
                 silu=nn.SiLU(), conv_out=pair(2 * c, 192), unpatcher3d=HaarUnpatcher())


class Tokenizer(nn.Module):
    """Autoencoder with its latent statistics `mean`, `std`; without `decoder` it only encodes."""

    def __init__(self, channels=128, decoder=True):
        super().__init__()
        self.encoder, self.quant_conv = build_encoder(channels), CausalConv(16, 16)
        if decoder:
            self.post_quant_conv, self.decoder = CausalConv(16, 16), build_decoder(channels)
        # (16, latent frames) each; not buffers, so that casting the module does not round them
        self.mean = self.std = torch.empty(16, 0)

    def encode(self, video):
        """(B,3,F,H,W) in [-1,1] -> raw latent (B,16,T,H/8,W/8)."""
        frames, height, width = video.shape[2:]
        if frames % 8 != 1 or height % 8 or width % 8:
            raise ValueError(f"{frames} frames of {height}x{width}: use 8k+1 frames, height and "
                             "width multiples of 8")
        return self.quant_conv(self.encoder(video))

    def decode(self, raw):
        """Raw latent (B,16,T,h,w) -> video (B,3,8T-7,8h,8w), not clamped."""
        return self.decoder(self.post_quant_conv(raw))

    def normalise(self, raw):
        """(raw - mean) / std * 0.5 of one view (B,16,T,h,w), in float32; returned as raw's type."""
        mean, std = self.statistics(raw.shape[2])
        return ((raw.float() - mean) / std * 0.5).to(raw.dtype)

    def denormalise(self, latent):
        """The inverse of `normalise`, returned in the module's precision."""
        mean, std = self.statistics(latent.shape[2])
        return (latent.float() / 0.5 * std + mean).to(self.quant_conv.conv3d.weight.dtype)

    def statistics(self, frames):
        """mean and std of the first latent frames, (1,16,T,1,1) each."""
        known = self.mean.shape[1]
        if frames > known:
            raise ValueError(f"{frames} latent frames a view exceed the {known} of the tokenizer's "
                             f"statistics; use data.num_frames={8 * known - 7} or fewer")
        return (s[None, :, :frames, None, None] for s in (self.mean, self.std))

    @torch.no_grad()
    def encode_views(self, frames):
        """uint8 (B,V,3,F,H,W) -> normalised latents (B,16,V*T,H/8,W/8); errors as in `encode`.

        One view at a time, so that peak memory and compiled shapes depend on neither B nor V.
        Frames in pinned memory are copied without making the host wait.
        """
        weight = self.quant_conv.conv3d.weight
        latents = []
        for clip in frames.flatten(0, 1).split(1):                               # B*V x (1,3,F,H,W)
            clip = clip.to(weight.device, non_blocking=True)
            video = (clip / 127.5 - 1).to(weight.dtype)
            latents.append(self.normalise(self.encode(video)))
        return rearrange(torch.cat(latents), "(b v) c t h w -> b c (v t) h w", b=len(frames))

    @torch.no_grad()
    def decode_views(self, latents, views):
        """Normalised latents (B,16,V*T,h,w) -> uint8 (B,V,3,8T-7,8h,8w), a view at a time."""
        clips = rearrange(latents, "b c (v t) h w -> (b v) c t h w", v=views).split(1)
        pixels = []
        for clip in clips:
            video = self.decode(self.denormalise(clip)).float()
            video.clamp_(-1, 1).add_(1).mul_(127.5).round_()  # in place: 1.3 GB at full size
            pixels.append(video.to(torch.uint8))
        return torch.cat(pixels).unflatten(0, (-1, views))


def compile_parts(tokenizer):
    """Compile what takes the time, by its class, so that blocks of equal shape share a graph.

    The encoder needs 8 graphs, the decoder one more. ResBlock.forward has 5 of them: below the 8 at
    which torch.compile gives up on a function. One graph of it all takes longer to compile.
    """
    for module in tokenizer.modules():
        if isinstance(module, (ResBlock, HaarPatcher, Down)) and not getattr(module, "idle", False):
            module.forward = torch.compile(module.forward, dynamic=False)
        if isinstance(module, Attention):
            module.attend = torch.compile(module.attend, dynamic=False)


# ---- files ---------------------------------------------------------------------------------------

def take_statistics(tensors, source):
    """mean and std, (16, latent frames) each, in float32, out of `tensors`."""
    try:
        mean, std = (tensors.pop(name).float().reshape(16, -1) for name in ("mean", "std"))
    except (KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{source} lacks mean or std of 16 channels: {error}") from error
    if mean.shape != std.shape or not (mean.isfinite() & std.isfinite() & (std > 0)).all():
        raise ValueError(f"{source}: mean {tuple(mean.shape)} and std {tuple(std.shape)} must be "
                         "of one shape and finite, and std positive; get the file again")
    return mean, std


def load_tokenizer(path, device="cpu", dtype=torch.bfloat16, decoder=True, compile=None, frames=0):
    """The frozen tokenizer of a folder (encoder.jit, decoder.jit, mean_std.pt) or a .safetensors,
    for clips of that many latent `frames`. Its `description` says what was loaded.

    Strict: one ValueError names every missing, unexpected and misshapen tensor. An idle level may
    come without its weights. `compile` None: on CUDA only.
    """
    path, tensors, ignored = Path(path), {}, () if decoder else ("decoder.", "post_quant_conv.")
    names = ("mean_std.pt", "encoder.jit", "decoder.jit")[:2 + decoder]
    files = [path / name for name in names] if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"there is no tokenizer file {file}; README's step 1 gets it")
        found, _ = named_tensors(read_file(file, "tokenizer"), "model", file)
        tensors |= found
    mean, std = take_statistics(tensors, files[0])
    tensors = {name: tensor for name, tensor in tensors.items()
               if not name.startswith(ignored) and not name.endswith(IGNORED_BUFFERS)}
    try:
        with torch.device("meta"):
            tokenizer = Tokenizer(len(tensors["encoder.conv_in.0.conv3d.weight"]), decoder)
        for name, module in tokenizer.named_modules():
            if getattr(module, "idle", False) and not any(t.startswith(name) for t in tensors):
                module.conv1 = module.conv2 = module.conv3 = None
        tokenizer.load_state_dict(tensors, assign=True)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} lacks or misshapes a tokenizer's tensors: {reason}") from error
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path} has values that are not finite in {', '.join(broken[:5])}")
    tokenizer.to(device, dtype).requires_grad_(False)
    tokenizer.mean, tokenizer.std = mean.to(device), std.to(device)
    tokenizer.statistics(frames)
    if tokenizer.mean.is_cuda:
        tokenizer.to(memory_format=torch.channels_last_3d)
    compile = tokenizer.mean.is_cuda if compile is None else compile
    if compile:
        compile_parts(tokenizer)
    count, parts = sum(map(torch.numel, tensors.values())), "encoder" + " and decoder" * decoder
    tokenizer.description = (f"{path}, {parts}, {len(tensors)} tensors, {count:,} parameters, "
                             f"{dtype}, {'' if compile else 'not '}compiled")
    return tokenizer
