"""The diffusion transformer, its control branch, the objective and the sampler (SPEC sections 1, 2 and 4).

Letters: B batch, V views, T latent frames per view, H W latent size, h=H/2 w=W/2 token grid, L=V*T*h*w tokens,
L_tp = L/tp this rank's tokens, D model width, N heads (N_tp a rank), K head width, M text tokens per view.
"""

import functools
import math
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tp
from tp import ColumnLinear, Linear, RowLinear

LATENT = 16  # channels of the tokenizer's latents
SIGMA_DATA = 0.5
EPS = 1e-6


@dataclass
class ModelConfig:
    max_img_h: int = 240  # latent cells the position tables are made for; 2 a token
    max_img_w: int = 240
    max_frames: int = 128
    model_channels: int = 4096
    num_blocks: int = 28
    num_heads: int = 32
    num_control_blocks: int = 3
    adaln_lora_dim: int = 256
    crossattn_emb_channels: int = 1024
    text_tokens: int = 512  # per view
    n_views: int | None = None  # data.views; more than 1 is the multi-view family
    n_views_emb: int = 7
    view_condition_dim: int = 6
    conditioning: str | None = None  # multi-view: t2w or v2w


# ---- elementwise chains: one kernel each on the GPU, statistics in float32 -------------------------------------------


def fused(fn):
    """Compile a pure function for CUDA tensors; on the CPU it runs as written."""
    compiled = functools.cache(lambda: torch.compile(fn, dynamic=False))

    @functools.wraps(fn)
    def call(x, *args):
        return compiled()(x, *args) if x.is_cuda else fn(x, *args)

    return call


@fused
def norm_modulate(x, shift, scale):  # (B, L_tp, D), (B, 1, D) twice
    x32 = x.float()
    mean = x32.mean(-1, keepdim=True)
    var = (x32 - mean).square().mean(-1, keepdim=True)
    return ((x32 - mean) * torch.rsqrt(var + EPS) * (1 + scale.float()) + shift.float()).to(x.dtype)


@fused
def norm_rotate(x, weight, cos, sin):  # (B, L, N_tp, K), angles (B, L, 1, K/2)
    a, b = F.rms_norm(x.float(), weight.shape, weight.float(), EPS).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@fused
def norm_heads(x, weight):  # (B, L, N_tp, K)
    return F.rms_norm(x.float(), weight.shape, weight.float(), EPS).to(x.dtype)


@fused
def gated_add(x, gate, y):  # (B, L_tp, D), (B, 1, D), (B, L_tp, D)
    return (x.float() + gate.float() * y.float()).to(x.dtype)


class FrozenGatedAdd(torch.autograd.Function):
    """gated_add for a gate without gradient, which it keeps where checkpointing does not see it: recomputation then has
    nothing left to restore behind the last linear of a block, and stops before running it."""

    @staticmethod
    def forward(ctx, x, gate, y):
        ctx.gate = gate
        return gated_add(x, gate, y)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, grad * ctx.gate


# ---- attention and recomputation -------------------------------------------------------------------------------------

_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def attend(q, k, v, backend):  # (B, L, N, K), (B, M, N, K) twice -> (B, L, N*K)
    q, k, v = (rearrange(x, "b l n k -> b n l k") for x in (q, k, v))  # a view
    if backend is None:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        with sdpa_kernel(_BACKENDS[backend]):
            out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "b n l k -> b l (n k)")


def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Name of the fastest attention kernel that runs forward and backward here; None leaves it to torch (CPU)."""
    if device.type != "cuda":
        return None
    for name in _BACKENDS:  # fastest first, as measured on Hopper
        q = torch.randn(1, 256, 2, head_dim, device=device, dtype=dtype, requires_grad=True)
        with warnings.catch_warnings(action="ignore"):  # torch explains each refusal
            try:
                attend(q, q, q, name).sum().backward()
                return name
            except RuntimeError:
                continue  # refuses the device, the precision or the head width
    raise RuntimeError(f"no attention kernel of this torch runs on {device} in {dtype} with head width {head_dim}")


_ATTENTION_OPS = [getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default for kind in
                  ("cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu")]


def _keep_attention(ctx, op, *args, **kwargs):
    """Keep the output of self-attention; the few keys of cross-attention are cheaper to go over again than to keep."""
    if op in _ATTENTION_OPS and args[0].shape[-2] == args[1].shape[-2]:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def run_block(block, recompute, *args):
    """block(*args), keeping for the backward pass: everything (none), input and attention output, or input (full)."""
    if recompute == "none" or not torch.is_grad_enabled():
        return block(*args)
    contexts = {"full": None, "attention_saved": functools.partial(create_selective_checkpoint_contexts, _keep_attention)}
    extra = {"context_fn": contexts[recompute]} if contexts[recompute] else {}
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **extra)


# ---- modules ---------------------------------------------------------------------------------------------------------


@dataclass
class Context:
    """What every block reads besides the stream. emb (B, D) activated, lora (B, 3D), text (B, V*M, 1024)."""
    emb: torch.Tensor
    lora: torch.Tensor
    text: torch.Tensor
    cos: torch.Tensor  # (B, L, 1, K/2) float32
    sin: torch.Tensor
    views: int
    backend: str | None

    @property
    def length(self):
        return self.cos.shape[1]


class AdaLN(nn.Module):
    """chunk(A2 A1 SiLU(emb) + lora): (B, D) -> `parts` of (B, 1, D)."""

    def __init__(self, dim, rank, parts):
        super().__init__()
        self.parts = parts
        self.down = Linear(dim, rank, bias=False)
        self.up = Linear(rank, parts * dim, bias=False)

    def forward(self, ctx):
        x = self.up(self.down(ctx.emb))
        return (x + ctx.lora[:, : x.shape[-1]]).unsqueeze(1).chunk(self.parts, dim=-1)


class Sublayer(nn.Module):
    """x + gate * f(modulated norm of x); f is `mix`, sharded over heads or columns."""

    def forward(self, x, ctx):  # (B, L_tp, D)
        shift, scale, gate = self.ada(ctx)
        tokens = tp.gather_tokens(norm_modulate(x, shift, scale), ctx.length)  # (B, L, D)
        add = gated_add if gate.requires_grad else FrozenGatedAdd.apply
        return add(x, gate, tp.scatter_tokens(self.mix(tokens, ctx)))


class Attention(Sublayer):
    """Projections of self-attention, or of cross-attention to `context` channels."""

    def __init__(self, cfg, context):
        super().__init__()
        dim, self.head_dim = cfg.model_channels, cfg.model_channels // cfg.num_heads
        self.ada = AdaLN(dim, cfg.adaln_lora_dim, 3)
        self.q, self.k, self.v = ColumnLinear(dim, dim), ColumnLinear(context, dim), ColumnLinear(context, dim)
        self.out = RowLinear(dim, dim)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, EPS) for _ in range(2))

    def heads(self, x):
        return rearrange(x, "b l (n k) -> b l n k", k=self.head_dim)


class SelfAttention(Attention):
    def mix(self, tokens, ctx):  # (B, L, D)
        q = norm_rotate(self.heads(self.q(tokens)), self.q_norm.weight, ctx.cos, ctx.sin)  # (B, L, N_tp, K)
        k = norm_rotate(self.heads(self.k(tokens)), self.k_norm.weight, ctx.cos, ctx.sin)
        return self.out(attend(q, k, self.heads(self.v(tokens)), ctx.backend))


class CrossAttention(Attention):
    """Every view attends to its own text."""

    def mix(self, tokens, ctx):  # (B, L, D)
        views = rearrange(tokens, "b (v l) d -> (b v) l d", v=ctx.views)
        text = rearrange(ctx.text, "b (v m) d -> (b v) m d", v=ctx.views)
        q = norm_heads(self.heads(self.q(views)), self.q_norm.weight)  # ((B V), L/V, N_tp, K)
        k = norm_heads(self.heads(self.k(text)), self.k_norm.weight)
        out = attend(q, k, self.heads(self.v(text)), ctx.backend)
        return self.out(rearrange(out, "(b v) l d -> b (v l) d", v=ctx.views))


class MLP(Sublayer):
    def __init__(self, cfg):
        super().__init__()
        dim = cfg.model_channels
        self.ada = AdaLN(dim, cfg.adaln_lora_dim, 3)
        self.up, self.down = ColumnLinear(dim, 4 * dim), RowLinear(4 * dim, dim)

    def mix(self, tokens, ctx):  # (B, L, D)
        return self.down(F.gelu(self.up(tokens)))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.self_attn = SelfAttention(cfg, cfg.model_channels)
        self.cross_attn = CrossAttention(cfg, cfg.crossattn_emb_channels)
        self.mlp = MLP(cfg)

    def forward(self, x, position, ctx):  # (B, L_tp, D)
        x = self.self_attn(x + position, ctx)
        return self.mlp(self.cross_attn(x, ctx), ctx)


class Head(nn.Module):
    def __init__(self, dim, rank):
        super().__init__()
        self.ada = AdaLN(dim, rank, 2)
        self.linear = Linear(dim, 4 * LATENT, bias=False)

    def forward(self, x, ctx):  # (B, L_tp, D) -> (B, L_tp, 64)
        shift, scale = self.ada(ctx)
        return self.linear(norm_modulate(x, shift, scale))


class DiT(nn.Module):
    """The embedders, `num_blocks` blocks and the head that base and control branch share."""

    def __init__(self, cfg: ModelConfig, num_blocks: int):
        super().__init__()
        self.cfg, dim = cfg, cfg.model_channels
        multi_view = cfg.n_views > 1
        channels = LATENT + 1 + (1 + cfg.view_condition_dim if multi_view else 0)
        self.patch_embed = Linear(4 * channels, dim, bias=False)
        self.time_mlp = nn.Sequential(Linear(dim, dim, bias=False), nn.SiLU(), Linear(dim, 3 * dim, bias=False))
        self.emb_norm = nn.RMSNorm(dim, EPS)
        if multi_view:
            self.view_embed = nn.Embedding(cfg.n_views_emb, cfg.view_condition_dim)
            self.frame_repeat = Linear(1, cfg.view_condition_dim)
        else:
            for axis, cells in (("t", cfg.max_frames), ("h", cfg.max_img_h // 2), ("w", cfg.max_img_w // 2)):
                setattr(self, f"pos_{axis}", nn.Parameter(torch.empty(cells, dim)))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(num_blocks))
        self.head = Head(dim, cfg.adaln_lora_dim)

    def embed(self, x, cond):  # (B, 16, V*T, H, W) -> this rank's patches (B, L_tp, D)
        maps = [x, cond.padding_map(x)]
        if self.cfg.n_views > 1:
            repeats = torch.zeros_like(cond.view_index, dtype=x.dtype).unsqueeze(-1) / 10  # training never repeats frames
            view = self.view_embed(cond.view_index) + self.frame_repeat(repeats)  # (B, V, 6)
            view = repeat(view, "b v c -> b c (v t) h w", t=x.shape[2] // cond.views, h=x.shape[3], w=x.shape[4])
            maps = [x, cond.known.to(x.dtype).expand(-1, -1, -1, *x.shape[3:]), cond.padding_map(x), view]
        return self.patch_embed(patchify(torch.cat(maps, dim=1)))

    def position(self, views, grid, dtype):  # (B or 1, L_tp, D), added before every block
        (t, h, w), dim = grid, self.cfg.model_channels
        if self.cfg.n_views == 1:
            x = self.pos_t[:t, None, None].float() + self.pos_h[:h, None].float() + self.pos_w[:w].float()  # (T, h, w, D)
            x = x / (EPS + x.square().mean(-1, keepdim=True).sqrt())
        else:
            device, spatial = self.patch_embed.weight.device, dim // 6 * 2
            wave_t = sin_cos(torch.arange(t, device=device), dim - 2 * spatial)
            wave_h, wave_w = (sin_cos(torch.arange(n, device=device), spatial) for n in (h, w))
            x = torch.cat([wave_t[:, None, None].expand(t, h, w, -1), wave_h[:, None].expand(t, h, w, -1),
                           wave_w.expand(t, h, w, -1)], dim=-1)
        return tp.own_tokens(repeat(x.to(dtype), "t h w d -> 1 (v t h w) d", v=views))

    def context(self, c_noise, cond, grid, backend, dtype):
        half = self.cfg.model_channels // 2
        freqs = 10000.0 ** (-torch.arange(half, device=c_noise.device, dtype=torch.float32) / half)
        angles = c_noise.float()[:, None] * freqs
        wave = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)  # (B, D)
        cos, sin = rotary(grid, cond.views, cond.fps, self.cfg.model_channels // self.cfg.num_heads)
        return Context(F.silu(self.emb_norm(wave)), self.time_mlp(wave), cond.text.to(dtype), cos, sin, cond.views, backend)


class ControlBranch(DiT):
    """DiT over the first blocks, fed with the control latents; its head exists in checkpoints only."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg, cfg.num_control_blocks)
        dim = cfg.model_channels
        self.hint_embed = Linear(4 * (LATENT + 1), dim, bias=False)
        widths = [dim, 16, 16, 32, 32, 96, 96, 256, dim]
        layers = [m for a, b in zip(widths, widths[1:]) for m in (Linear(a, b), nn.SiLU())]
        self.hint_encoder = nn.Sequential(*layers[:-1])
        self.zero_linears = nn.ModuleList(Linear(dim, dim) for _ in self.blocks)

    def forward(self, x, c_noise, hint, cond, grid, run, backend):  # -> residuals, num_control_blocks of (B, L_tp, D)
        hint = torch.cat([hint, cond.padding_map(hint)], dim=1)
        encoded = self.hint_encoder(self.hint_embed(patchify(hint)))
        ctx = self.context(c_noise, cond, grid, backend, x.dtype)
        position = self.position(cond.views, grid, x.dtype)
        stream, residuals = self.embed(x, cond), []
        for i, (block, zero) in enumerate(zip(self.blocks, self.zero_linears)):
            stream = run(block, stream, position, ctx)
            stream = stream + encoded if i == 0 else stream
            residuals.append(zero(stream))
        return residuals


class LogVar(nn.Module):
    """Learned log-variance of the error at each noise level: c_noise (B,) -> (B,)."""

    def __init__(self, channels=128):
        super().__init__()
        self.register_buffer("freqs", torch.empty(channels, dtype=torch.float32))
        self.register_buffer("phases", torch.empty(channels, dtype=torch.float32))
        self.weight = nn.Parameter(torch.empty(1, channels, dtype=torch.float32), requires_grad=False)

    def forward(self, c_noise):
        waves = math.sqrt(2) * torch.cos(c_noise.float()[:, None] * self.freqs + self.phases)
        return F.linear(waves, self.weight)[:, 0]


@dataclass
class Condition:
    """What the network is told. text (B, V*M, 1024), fps (B,), padding_mask (B or 1, 1, 8H, 8W),
    view_index (B, V) and known (B, 1, V*T, 1, 1) for multi-view, hint (B, 16, V*T, H, W) or None for the base alone."""
    text: torch.Tensor
    fps: torch.Tensor
    padding_mask: torch.Tensor
    hint: torch.Tensor | None = None
    view_index: torch.Tensor | None = None
    known: torch.Tensor | None = None

    @property
    def views(self):
        return 1 if self.view_index is None else self.view_index.shape[1]

    def padding_map(self, x):  # (B, 1, V*T, H, W)
        mask = F.interpolate(self.padding_mask.float(), size=x.shape[-2:], mode="nearest").to(x.dtype)
        return mask[:, :, None].expand(x.shape[0], 1, x.shape[2], *x.shape[-2:])


class ControlledDiT(nn.Module):
    """The frozen base with its trained control branch."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg, self.recompute, self.attention = cfg, "none", None
        self.base = DiT(cfg, cfg.num_blocks).requires_grad_(False)
        self.control = ControlBranch(cfg)
        self.control.head.requires_grad_(False)  # in the checkpoints, never used
        self.logvar = LogVar()

    def forward(self, x, c_noise, cond):  # (B, 16, V*T, H, W), (B,) -> (B, 16, V*T, H, W)
        x = x.to(self.base.patch_embed.weight.dtype)
        grid = (x.shape[2] // cond.views, x.shape[3] // 2, x.shape[4] // 2)
        run = lambda block, *args: run_block(block, self.recompute, *args)
        residuals = [] if cond.hint is None else self.control(
            x, c_noise, cond.hint.to(x.dtype), cond, grid, run, self.attention)
        ctx = self.base.context(c_noise, cond, grid, self.attention, x.dtype)
        position = self.base.position(cond.views, grid, x.dtype)
        stream = self.base.embed(x, cond)
        for i, block in enumerate(self.base.blocks):
            # No gradient reaches a block before the first residual, so there is nothing to keep or recompute for it.
            stream = run(block, stream, position, ctx) if stream.requires_grad else block(stream, position, ctx)
            if i < len(residuals):
                stream = stream + residuals[i]
        out = tp.gather_output(self.base.head(stream, ctx), ctx.length)  # (B, L, 64)
        return rearrange(out, "b (t h w) (p q c) -> b c t (h p) (w q)", h=grid[1], w=grid[2], p=2, q=2)


def patchify(x):  # (B, C, V*T, H, W) -> this rank's (B, L_tp, 4C)
    return tp.own_tokens(rearrange(x, "b c t (h p) (w q) -> b (t h w) (c p q)", p=2, q=2))


def sin_cos(pos, dim):  # (n,) -> (n, dim) float64
    half = dim // 2
    angles = pos.double()[:, None] * 10000.0 ** (-torch.arange(half, device=pos.device, dtype=torch.float64) / half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotary(grid, views, fps, head_dim):
    """cos and sin (B, L, 1, K/2) float32 of the rotary angles: time scaled by 24/fps, every view from time 0."""
    (t, h, w), device = grid, fps.device
    spatial = head_dim // 6 * 2

    def angles(n, dim):
        exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
        return torch.outer(torch.arange(n, device=device, dtype=torch.float32), 10000.0 ** -exponent)

    time = (24 / fps.float())[:, None, None] * angles(t, head_dim - 2 * spatial)  # (B, T, .)
    rows, cols = angles(h, spatial), angles(w, spatial)
    full = torch.cat([time[:, :, None, None].expand(-1, t, h, w, -1), rows[:, None].expand(len(fps), t, h, w, -1),
                      cols.expand(len(fps), t, h, w, -1)], dim=-1)
    full = repeat(full, "b t h w k -> b (v t h w) 1 k", v=views)
    return full.cos(), full.sin()


# ---- construction ----------------------------------------------------------------------------------------------------


def build(cfg: ModelConfig, device, dtype: torch.dtype) -> ControlledDiT:
    """This rank's shard of the model on `device` ("meta" too), memory allocated and not yet filled."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = ControlledDiT(cfg)
    finally:
        torch.set_default_dtype(before)
    if torch.device(device).type != "meta":
        model.attention = choose_attention(torch.device(device), dtype, cfg.model_channels // cfg.num_heads)
    return model


@torch.no_grad()
def init_weights(model: ControlledDiT, seed: int):
    """Fill every parameter as in SPEC section 2. A parameter's values depend on seed and name alone, not on tp.

    logvar's weight is zero, which leaves the plain EDM loss: no released model comes without its own.
    """
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        rng = torch.Generator(p.device).manual_seed(seed_of(seed, zlib.crc32(name.encode())))
        dim = getattr(p, "tp_dim", None)
        full = torch.zeros([n * (tp.size() if i == dim else 1) for i, n in enumerate(p.shape)],
                           dtype=torch.float32, device=p.device)
        if name.startswith("logvar."):
            if not name.endswith("weight"):
                full.uniform_(generator=rng).mul_(2 * math.pi)
        elif "norm.weight" in name:
            full.fill_(1)
        elif "time_mlp" in name:
            full.normal_(std=0.02, generator=rng)
        elif ".pos_" in name:
            nn.init.trunc_normal_(full, std=0.02, generator=rng)
        elif "view_embed" in name:
            full.normal_(generator=rng)
        elif full.ndim == 2 and not (name.startswith("control.zero_linears") or name.startswith("control.hint_encoder.14")
                                     or (".blocks." in name and name.endswith("ada.up.weight"))):
            nn.init.xavier_uniform_(full, generator=rng)
        p.copy_(tp.shard(full, dim))


def seed_of(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ---- objective (SPEC section 4) --------------------------------------------------------------------------------------


@dataclass
class Noise:
    """One training draw: sigma, keep_text, sigma_a (B,); eps, eps_a (B, 16, V*T, H, W); known (B, 1, V*T, 1, 1)."""
    sigma: torch.Tensor
    eps: torch.Tensor
    keep_text: torch.Tensor
    sigma_a: torch.Tensor | None = None
    eps_a: torch.Tensor | None = None
    known: torch.Tensor | None = None


def known_frames(conditioning: str, views: int, frames: int, n: int) -> torch.Tensor:
    """(V*T,) indicator of known latents: view 0 whole; v2w also the first n frames of every view."""
    known = torch.zeros(views, frames)
    known[0] = 1
    if conditioning == "v2w":
        known[:, :n] = 1
    return known.flatten()


def draw_noise(cfg: ModelConfig, shape, seed: int, step: int, samples, device) -> Noise:
    """Everything random of some training samples of a step, each from (seed, step, its global index in the step) alone.

    shape: (16, V*T, H, W) of one sample's latents.
    """
    rows = []
    for sample in samples:
        rng = torch.Generator(device).manual_seed(seed_of(seed, step, sample))
        randn = lambda *size: torch.randn(size, generator=rng, device=device)
        frames = shape[1] // cfg.n_views
        row = [randn(1).exp() * math.sqrt(frames), randn(1, *shape), (torch.rand(1, generator=rng, device=device) >= 0.2)]
        if cfg.n_views > 1:
            n = torch.randint(3, (), generator=rng, device=device).item()
            known = known_frames(cfg.conditioning, cfg.n_views, frames, n).view(1, 1, -1, 1, 1).to(device)
            row += [(randn(1) * 2 - 3).exp(), randn(1, *shape), known]
        rows.append(row)
    return Noise(*map(torch.cat, zip(*rows)))


def coefficients(sigma):
    """EDM preconditioning (arXiv 2206.00364, table 1): c_skip, c_out, c_in, c_noise for sigma (B,)."""
    total = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total.sqrt(), total.rsqrt(), sigma.log() / 4


def loss_weight(sigma):
    return (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2


def per_row(x):  # (B,) -> (B, 1, 1, 1, 1)
    return x.view(-1, 1, 1, 1, 1)


def network_input(x_t, sigma, x0=None, known=None, sigma_a=None, eps_a=None):
    """c_in x_t, with known latents at their own low noise level sigma_a."""
    x = per_row(coefficients(sigma)[2]) * x_t
    if known is None:
        return x
    return torch.where(known > 0, per_row(coefficients(sigma_a)[2]) * (x0 + per_row(sigma_a) * eps_a), x)


def denoise(model, x_t, sigma, cond: Condition, x0=None, sigma_a=None, eps_a=None):
    """D(x_t) in float32 (float64 for a float64 x_t); latents marked by cond.known come back as x0."""
    c_skip, c_out, _, c_noise = (per_row(c) for c in coefficients(sigma))
    x = network_input(x_t, sigma, x0, cond.known, sigma_a, eps_a)
    out = c_skip * x_t + c_out * model(x, c_noise.flatten(), cond).to(x_t.dtype)
    return out if cond.known is None else torch.where(cond.known > 0, x0, out)


def training_loss(model, x0, cond: Condition, noise: Noise) -> torch.Tensor:
    """Scalar loss of latents x0 (B, 16, V*T, H, W); cond as for `denoise`, its text dropped out here."""
    x0 = x0.float()
    text = cond.text * noise.keep_text[:, None, None]
    cond = Condition(text, cond.fps, cond.padding_mask, cond.hint, cond.view_index, noise.known)
    x_t = x0 + per_row(noise.sigma) * noise.eps
    pred = denoise(model, x_t, noise.sigma, cond, x0, noise.sigma_a, noise.eps_a)
    edm = per_row(loss_weight(noise.sigma)) * (x0 - pred).square()
    logvar = per_row(model.logvar(coefficients(noise.sigma)[3]))
    return (edm * (-logvar).exp() + logvar).mean()


# ---- sampler (SPEC section 4, second-order multistep of arXiv 2308.02157) --------------------------------------------


def solve(denoiser, x, n=35, sigma_max=80.0, sigma_min=0.002):
    """Denoise x = sigma_max * noise; denoiser(x float64, sigma float) -> D. Returns D(x, sigma_min) in float64."""
    ramp = torch.arange(n + 1, dtype=torch.float64) / n
    s = ((sigma_max ** (1 / 7) + ramp * (sigma_min ** (1 / 7) - sigma_max ** (1 / 7))) ** 7).tolist()
    x, previous = x.double(), None
    for k in range(n):
        d = denoiser(x, s[k]).double()
        r = s[k + 1] / s[k]
        h = -math.log(r)
        if previous is None:
            x = r * x + (1 - r) * d
        else:
            c = math.log(s[k - 1] / s[k]) / h
            p1 = (1 - r) / h
            p2 = (1 - p1) / h
            x = r * x + h * ((p1 + p2 / c) * d - p2 / c * previous)
        previous = d
    return denoiser(x, s[n]).double()


@torch.no_grad()
def sample(model, shape, cond: Condition, rng: torch.Generator, guidance=5.0, n=35, x0=None) -> torch.Tensor:
    """Latents (B, 16, V*T, H, W) float32 for a condition; multi-view: cond.known of x0 are given, and come back."""
    device = cond.text.device
    noise = torch.randn(shape, generator=rng, device=device, dtype=torch.float64)
    sigma_a, eps_a, marks = torch.full(shape[:1], 1e-3, device=device), None, cond.known
    if marks is not None:
        eps_a = torch.randn(shape, generator=rng, device=device)

    def guided(x, sigma):
        known = marks * float(sigma > 1e-3) if marks is not None else None
        pred = []
        for text in (cond.text, torch.zeros_like(cond.text))[: 2 if guidance else 1]:
            told = Condition(text, cond.fps, cond.padding_mask, cond.hint, cond.view_index, known)
            pred.append(denoise(model, x, x.new_full(shape[:1], sigma), told, x0, sigma_a, eps_a))
        return pred[0] + guidance * (pred[0] - pred[-1])

    out = solve(guided, 80.0 * noise, n).float()
    return out if marks is None else torch.where(marks > 0, x0, out)


def tflop_per_sample(cfg: ModelConfig, tokens: int) -> float:
    """Model TFLOP of one training step on one sample: attention backward counts as 2x forward (no recomputation),
    frozen weights have no weight gradient, base block 0 no backward."""
    linears = 28 * tokens * cfg.model_channels**2
    attention = 4 * tokens * (tokens + cfg.text_tokens) * cfg.model_channels
    base = cfg.num_blocks * (linears + attention) + (cfg.num_blocks - 1) * (linears + 2 * attention)
    return (base + 3 * cfg.num_control_blocks * (linears + attention)) / 1e12
