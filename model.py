"""The diffusion transformer, its control branch, the objective and the sampler.

Letters: B batch, V views, T latent frames per view, H W latent size, h=H/2 w=W/2 token grid,
L=V*T*h*w tokens, L_tp = L/tp this rank's tokens, l the tokens that a sublayer works on (L or L_tp:
see Sublayer), D model width, N heads (N_tp a rank), K head width, M text tokens per view.
"""

import functools
import math
from collections import namedtuple
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

import tp
from configs.recompute import host, rerun
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
    rope_t_ratio: float = 2.0  # of the base's rotary time axis; the control branch has 1
    logvar: Literal["from_base", "none"] = "from_base"  # none: plain EDM loss
    conditioning: str | None = None  # multi-view: t2w or v2w


# ---- elementwise chains: one kernel each on the GPU, statistics in float32 -----------------------

def fused(fn):
    """Compile a pure function for CUDA tensors; on the CPU it runs as written."""
    @functools.cache
    def compiled():  # at its first call: importing the compiler takes seconds
        # A function is compiled for each set of shapes and of what needs a gradient: trained and
        # frozen blocks, guidance, another batch. torch's limit of 8 is too near.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        return torch.compile(fn, dynamic=False)

    def run(*args):
        if not args[0].is_cuda:
            return fn(*args)
        grad = torch.is_grad_enabled() and any(getattr(a, "requires_grad", False) for a in args)
        if not grad:  # one graph for validation, sampling and what runs forward only
            args = [a.detach() if torch.is_tensor(a) else a for a in args]
        with torch.set_grad_enabled(grad):
            return compiled()(*args)

    return run


@fused
def norm_modulate(x, shift, scale):  # (B, L_tp, D), (B, 1, D) twice
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return (normed * (1 + scale.float()) + shift.float()).to(x.dtype)


@fused
def place_norm_modulate(x, position, shift, scale):  # -> x + position, norm_modulate of it
    x = x + position
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return x, (normed * (1 + scale.float()) + shift.float()).to(x.dtype)


@fused
def learned_position(time, rows, cols, dtype):  # (T, D), (h, D), (w, D) -> (T, h, w, D)
    x = time[:, None, None].float() + rows[:, None].float() + cols.float()
    return (x / (EPS + x.square().mean(-1, keepdim=True).sqrt())).to(dtype)


@fused
def norm_heads(x, weight):  # (B, l, N, K)
    return F.rms_norm(x.float(), weight.shape, weight.float(), EPS).to(x.dtype)


@fused
def norm_rotate(x, weight, cos, sin, groups):  # (B, l, N, K), cos and sin (B, l, 1, K/2)
    x = x.unflatten(2, (groups, -1)).movedim(2, 0)  # (groups, B, l, N/groups, K)
    ab = F.rms_norm(x.float(), weight.shape, weight.float(), EPS).unflatten(-1, (2, -1))
    sin = torch.arange(-1, 2, 2, device=x.device)[:, None] * sin.unsqueeze(-2)  # -sin and sin
    out = ab * cos.unsqueeze(-2) + ab.flip(-2) * sin  # (a cos - b sin, b cos + a sin)
    return out.flatten(-2).to(x.dtype).contiguous()


@fused
def gated_add(x, gate, y):  # (B, L_tp, D), (B, 1, D), (B, L_tp, D)
    return (x.float() + gate.float() * y.float()).to(x.dtype)


@fused
def gated(x, gate):  # (B, L_tp, D), (B, 1, D)
    return x * gate


class FrozenGatedAdd(torch.autograd.Function):
    """gated_add for a gate without gradient; kept as ctx.gate, it is not restored before use."""

    @staticmethod
    def forward(ctx, x, gate, y):
        ctx.gate = gate
        return gated_add(x, gate, y)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, gated(grad, ctx.gate)


# ---- attention -----------------------------------------------------------------------------------

def attend(q, k, v):  # (B, L, N, K), (B, M, N, K) twice -> (B, L, N*K)
    q, k, v = (rearrange(x, "b l n k -> b n l k") for x in (q, k, v))  # a view
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b n l k -> b l (n k)")


# ---- modules -------------------------------------------------------------------------------------

# What the network is told. text (B, V*M, 1024), fps (B,), padding_mask (B or 1, 1, 8H, 8W);
# hint (B, 16, V*T, H, W), None for the base alone; multi-view: view_index (B, V), known
# (B, 1, V*T, 1, 1), 1 at known latents, which are `given` (B, 16, V*T, H, W) and shown as `seen`
Condition = namedtuple("Condition", "text fps padding_mask hint view_index known given seen",
                       defaults=[None] * 5)

# What a block reads besides the stream. emb (B, D) activated, lora (B, 3D), text (B, V*M, 1024);
# cos, sin (B, l, 1, K/2) float32 of the tokens its linears see, position (1, L_tp, D), length L
Context = namedtuple("Context", "emb lora text cos sin position length")


class AdaLN(nn.Module):
    """chunk(A2 A1 SiLU(emb) + lora): (B, D) -> `parts` of (B, 1, D)."""

    def __init__(self, cfg, parts, init):
        super().__init__()
        self.down = Linear(cfg.model_channels, cfg.adaln_lora_dim, bias=False)
        self.up = Linear(cfg.adaln_lora_dim, parts * cfg.model_channels, bias=False, init=init)

    def forward(self, ctx):
        x = self.up(self.down(ctx.emb))  # (B, parts * D)
        x = x + ctx.lora[:, : x.shape[-1]]
        return x.unsqueeze(1).split(ctx.emb.shape[-1], dim=-1)


class Sublayer(nn.Module):
    """x + gate * f(modulated norm of x); f is `mix`. Its linears see l tokens: all L where they are
    sharded over heads or columns (megatron), this rank's L_tp with whole weights else (ulysses).
    """

    def __init__(self, cfg):
        super().__init__()
        self.ada = AdaLN(cfg, 3, tp.zero)

    def forward(self, x, ctx, position=None):  # (B, L_tp, D)
        shift, scale, gate = self.ada(ctx)
        if position is None:
            tokens = norm_modulate(x, shift, scale)
        else:
            x, tokens = place_norm_modulate(x, position, shift, scale)
        add = gated_add if gate.requires_grad else FrozenGatedAdd.apply
        return add(x, gate, self.mix(tokens, ctx))


class SelfAttention(Sublayer):
    def __init__(self, cfg, kv_width):  # width of what keys and values are made of
        super().__init__(cfg)
        dim, self.views = cfg.model_channels, cfg.n_views
        self.head_dim = dim // cfg.num_heads
        self.q = ColumnLinear(dim, dim)
        self.k = ColumnLinear(kv_width, dim)
        self.v = ColumnLinear(kv_width, dim)
        self.out = RowLinear(dim, dim)
        self.q_norm = nn.RMSNorm(self.head_dim, EPS)
        self.k_norm = nn.RMSNorm(self.head_dim, EPS)

    def heads(self, x):
        return rearrange(x, "b l (n k) -> b l n k", k=self.head_dim)

    def mix(self, tokens, ctx):  # (B, L_tp, D), also what it returns
        ranks = tp.size() if tp.exchanges_heads() else 1  # that these heads are dealt out to
        q, k, v = map(self.heads, tp.linears(tokens, ctx.length, self.q, self.k, self.v))
        q = norm_rotate(q, self.q_norm.weight, ctx.cos, ctx.sin, ranks)  # (ranks, B, l, N_tp, K)
        k = norm_rotate(k, self.k_norm.weight, ctx.cos, ctx.sin, ranks)
        v = rearrange(v, "b l (r n) k -> r b l n k", r=ranks)
        q, k, v = (tp.to_heads(x, ctx.length, self.views) for x in (q, k, v))  # (B, L, N_tp, K)
        return self.out(tp.to_tokens(attend(q, k, v), self.views, self.out.weight.requires_grad))


class CrossAttention(SelfAttention):
    """Every view attends to its own text."""

    def mix(self, tokens, ctx):  # (B, L_tp, D), also what it returns
        q = rearrange(self.q(tokens, ctx.length), "b (v l) d -> (b v) l d", v=self.views)
        text = rearrange(ctx.text, "b (v m) d -> (b v) m d", v=self.views)
        q = norm_heads(self.heads(q), self.q_norm.weight)  # ((B V), l/V, heads, K)
        k = norm_heads(self.heads(self.k(text)), self.k_norm.weight)
        out = attend(q, k, self.heads(self.v(text)))
        return self.out(rearrange(out, "(b v) l d -> b (v l) d", v=self.views))


class MLP(Sublayer):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.up = ColumnLinear(cfg.model_channels, 4 * cfg.model_channels)
        self.down = RowLinear(4 * cfg.model_channels, cfg.model_channels)

    def mix(self, tokens, ctx):  # (B, L_tp, D), also what it returns
        return self.down(F.gelu(self.up(tokens, ctx.length)))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.self_attn = SelfAttention(cfg, cfg.model_channels)
        self.cross_attn = CrossAttention(cfg, cfg.crossattn_emb_channels)
        self.mlp = MLP(cfg)

    def first(self, x, ctx):  # (B, L_tp, D)
        return self.self_attn(x, ctx, ctx.position)

    def rest(self, x, ctx):
        return self.mlp(self.cross_attn(x, ctx), ctx)

    def forward(self, x, ctx, keep="none", on_host=False):
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in (x, *self.parameters()))):
            keep, on_host = "none", False  # nothing runs backward here: a frozen base block 0
        with host.holds(x, on_host):
            if keep in ("full", "attention_saved"):
                return rerun(lambda x, ctx: self.rest(self.first(x, ctx), ctx), x, ctx, keep)
            x = rerun(self.first, x, ctx, keep)  # the residual between the parts is kept
            if keep == "mlp_saved":
                return self.mlp(rerun(self.cross_attn, x, ctx, keep), ctx)
            return rerun(self.rest, x, ctx, keep)


class Head(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ada = AdaLN(cfg, 2, tp.xavier)
        self.linear = Linear(cfg.model_channels, 4 * LATENT, bias=False)

    def forward(self, x, ctx):  # (B, L_tp, D) -> (B, L_tp, 64)
        return self.linear(norm_modulate(x, *self.ada(ctx)))


class DiT(nn.Module):
    """The embedders, `num_blocks` blocks and the head that base and control branch share."""

    def __init__(self, cfg: ModelConfig, num_blocks: int, rope_t_ratio: float):
        super().__init__()
        self.cfg, self.rope_t_ratio, dim = cfg, rope_t_ratio, cfg.model_channels
        channels = LATENT + 1  # and the padding map
        if cfg.n_views > 1:
            channels += 1 + cfg.view_condition_dim  # what is known, and which view it is
        self.patch_embed = Linear(4 * channels, dim, bias=False)
        small = lambda weight, rng: weight.normal_(std=0.02, generator=rng)
        self.time_mlp = nn.Sequential(Linear(dim, dim, bias=False, init=small), nn.SiLU(),
                                      Linear(dim, 3 * dim, bias=False, init=small))
        self.emb_norm = nn.RMSNorm(dim, EPS)
        if cfg.n_views > 1:
            self.view_embed = nn.Embedding(cfg.n_views_emb, cfg.view_condition_dim)
            self.view_embed.weight.init = lambda weight, rng: weight.normal_(generator=rng)
            self.frame_repeat = Linear(1, cfg.view_condition_dim)
        else:
            self.pos_t = nn.Parameter(torch.empty(cfg.max_frames, dim))
            self.pos_h = nn.Parameter(torch.empty(cfg.max_img_h // 2, dim))
            self.pos_w = nn.Parameter(torch.empty(cfg.max_img_w // 2, dim))
            init = lambda table, rng: nn.init.trunc_normal_(table, std=0.02, generator=rng)
            self.pos_t.init = self.pos_h.init = self.pos_w.init = init
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(num_blocks))
        self.head = Head(cfg)

    def embed(self, x, cond):  # (B, 16, V*T, H, W) -> this rank's patches (B, L_tp, D)
        views, padding = self.cfg.n_views, padding_map(x, cond)
        maps = [x, padding]
        if views > 1:
            # The released network is also told how often frames were repeated: here, never.
            repeats = torch.zeros_like(cond.view_index, dtype=x.dtype).unsqueeze(-1)
            view = self.view_embed(cond.view_index) + self.frame_repeat(repeats / 10)  # (B, V, 6)
            view = repeat(view, "b v c -> b c (v t) 1 1", t=x.shape[2] // views)
            known = cond.known.to(x.dtype).expand_as(x[:, :1])
            maps = [x, known, padding, view.expand(-1, -1, -1, *x.shape[3:])]
        return self.patch_embed(patchify(torch.cat(maps, dim=1), views))

    def position(self, grid, dtype):  # (T, h, w, D), added before every block
        if self.cfg.n_views > 1:
            device = self.patch_embed.weight.device
            waves = axis_angles(grid, self.cfg.model_channels, device, torch.float64)
            waves = [torch.cat([wave.sin(), wave.cos()], dim=-1) for wave in waves]
            return over_grid(*waves).to(dtype)
        t, h, w = grid
        return learned_position(self.pos_t[:t], self.pos_h[:h], self.pos_w[:w], dtype)

    def context(self, x, c_noise, cond):  # for the network input (B, 16, V*T, H, W)
        cfg, views = self.cfg, self.cfg.n_views
        wave = angles(c_noise.float(), cfg.model_channels)
        wave = torch.cat([wave.cos(), wave.sin()], dim=-1).to(x.dtype)  # (B, D)

        # positions of a view's tokens; each view starts at time 0, latent frame t is at 24 t / fps
        grid = (x.shape[2] // views, x.shape[3] // 2, x.shape[4] // 2)
        head_dim = cfg.model_channels // cfg.num_heads
        time, rows, cols = axis_angles(grid, head_dim, x.device, torch.float32, self.rope_t_ratio)
        time = (24 / cond.fps.float())[:, None, None] * time
        rotary = over_grid(time, rows, cols)  # (B, T, h, w, K/2)
        rotary = repeat(rotary, "b t h w k -> b (v t h w) 1 k", v=views)
        rotary = tp.own_tokens(rotary, views) if tp.exchanges_heads() else rotary
        position = repeat(self.position(grid, x.dtype), "t h w d -> 1 (v t h w) d", v=views)
        return Context(
            emb=F.silu(self.emb_norm(wave)),
            lora=self.time_mlp(wave),
            text=cond.text.to(x.dtype),
            cos=rotary.cos(),
            sin=rotary.sin(),
            position=tp.own_tokens(position, views),
            length=position.shape[1],
        )


class ControlBranch(DiT):
    """DiT over the first blocks, fed with the control latents. Its head is in checkpoints only."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg, cfg.num_control_blocks, rope_t_ratio=1.0)
        dim, layers = cfg.model_channels, []
        self.hint_embed = Linear(4 * (LATENT + 1), dim, bias=False)
        widths = [dim, 16, 16, 32, 32, 96, 96, 256]
        for a, b in zip(widths, widths[1:]):
            layers += [Linear(a, b), nn.SiLU()]
        self.hint_encoder = nn.Sequential(*layers, Linear(256, dim, init=tp.zero))
        self.zero_linears = nn.ModuleList(Linear(dim, dim, init=tp.zero) for _ in self.blocks)

    def forward(self, x, c_noise, cond, keep):  # -> residuals, num_control_blocks of (B, L_tp, D)
        hint = cond.hint.to(x.dtype)
        hint = torch.cat([hint, padding_map(hint, cond)], dim=1)
        encoded = self.hint_encoder(self.hint_embed(patchify(hint, self.cfg.n_views)))
        ctx, stream, residuals = self.context(x, c_noise, cond), self.embed(x, cond), []
        for i, (block, zero) in enumerate(zip(self.blocks, self.zero_linears)):
            stream = block(stream, ctx, *keep[i])
            stream = stream + encoded if i == 0 else stream
            residuals.append(zero(stream))
        return residuals


class LogVar(nn.Module):
    """Learned log-variance of the error at a noise level: c_noise (B,) -> (B,); 0 if not loaded."""

    def __init__(self):
        super().__init__()
        uniform = lambda buffer, rng: buffer.uniform_(0, 2 * math.pi, generator=rng)
        self.freqs = nn.Buffer(torch.empty(128, dtype=torch.float32))
        self.phases = nn.Buffer(torch.empty(128, dtype=torch.float32))
        self.freqs.init = self.phases.init = uniform
        self.weight = nn.Parameter(torch.empty(1, 128, dtype=torch.float32), requires_grad=False)
        self.weight.init = tp.zero

    def forward(self, c_noise):
        waves = math.sqrt(2) * torch.cos(c_noise.float()[:, None] * self.freqs + self.phases)
        return F.linear(waves, self.weight)[:, 0]


class ControlledDiT(nn.Module):
    """The frozen base with its trained control branch."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.keep = []  # what of each block the backward pass runs again, see forward
        self.on_host = 0  # how many of these, from the first, keep it in host memory
        self.base = DiT(cfg, cfg.num_blocks, cfg.rope_t_ratio).requires_grad_(False)
        self.control = ControlBranch(cfg)
        self.control.head.requires_grad_(False)  # in the checkpoints, never used
        self.logvar = LogVar()

    def forward(self, x, c_noise, cond):  # (B, 16, V*T, H, W), (B,) -> (B, 16, V*T, H, W)
        base, views = self.base, self.cfg.n_views
        x = x.to(base.patch_embed.weight.dtype)

        # Which part of each block is run again (parallel.recompute), in the order base block 0,
        # control, other base blocks; "none" where the first are left out. With 3 control blocks
        # keep[0] is of base block 0, keep[1:4] of the control blocks, keep[4] of base block 1.
        controls, blocks = self.cfg.num_control_blocks, self.cfg.num_blocks
        keep = [("none", False)] * (controls + blocks - len(self.keep))
        keep += [(policy, i < self.on_host) for i, policy in enumerate(self.keep)]
        keep = keep[-controls - blocks :]

        host.begin()
        residuals = []
        if cond.hint is not None:
            residuals = self.control(x, c_noise, cond, keep[1 : 1 + controls])
        ctx, stream = base.context(x, c_noise, cond), base.embed(x, cond)
        for i, block in enumerate(base.blocks):
            stream = block(stream, ctx, *keep[controls + i if i else 0])
            if i < len(residuals):
                stream = stream + residuals[i]
        out = tp.gather_output(base.head(stream, ctx), ctx.length, views)  # (B, L, 64)
        out = rearrange(out, "b (t h w) c -> b t h w c", t=x.shape[2], h=x.shape[3] // 2)
        return rearrange(out, "b t h w (p q c) -> b c t (h p) (w q)", p=2, q=2)


def padding_map(x, cond):  # (B, 1, V*T, H, W)
    mask = F.interpolate(cond.padding_mask.float(), size=x.shape[-2:], mode="nearest").to(x.dtype)
    return mask[:, :, None].expand(x.shape[0], 1, x.shape[2], *x.shape[-2:])


def patchify(x, views):  # (B, C, V*T, H, W) -> this rank's (B, L_tp, 4C)
    x = rearrange(x, "b c t (h p) (w q) -> b (t h w) (c p q)", p=2, q=2)
    return tp.own_tokens(x, views)


def angles(place, dim, ratio=1.0):  # (n,) -> (n, dim/2), in the precision of `place`
    """place * theta^(-2i/dim); a ratio stretches the longest wave by itself (NTK-aware scaling)."""
    theta = 10000.0 * ratio ** (dim / max(dim - 2, 1))
    i = torch.arange(dim // 2, device=place.device, dtype=place.dtype)
    return place[:, None] * theta ** (-i / (dim // 2))


def axis_angles(grid, dim, device, dtype, time_ratio=1.0):
    """Angles of times (T, .), rows (h, .) and columns (w, .), dim/2 of them together."""
    spatial = dim // 6 * 2
    time, rows, cols = (torch.arange(n, device=device, dtype=dtype) for n in grid)
    time = angles(time, dim - 2 * spatial, time_ratio)
    return [time, angles(rows, spatial), angles(cols, spatial)]


def over_grid(time, rows, cols):  # (..., T, a), (h, b), (w, c) -> (..., T, h, w, a+b+c)
    grid = (*time.shape[:-1], len(rows), len(cols), -1)
    axes = [time[..., None, None, :].expand(grid), rows[:, None].expand(grid), cols.expand(grid)]
    return torch.cat(axes, dim=-1)


def build(cfg: ModelConfig, device, dtype: torch.dtype) -> ControlledDiT:
    """This rank's shard of the model on `device` ("meta" too), allocated and not yet filled."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = ControlledDiT(cfg)
    finally:
        torch.set_default_dtype(before)
    return model


# ---- objective (EDM, arXiv 2206.00364) -----------------------------------------------------------

# A training draw: sigma, keep_text (B,), eps (B, 16, V*T, H, W); multi-view: sigma_a (B,) and eps_a
# like eps, the noise on known latents, known (B, 1, V*T, 1, 1).
Noise = namedtuple("Noise", "sigma eps keep_text sigma_a eps_a known", defaults=[None] * 3)


def draw_noise(cfg: ModelConfig, shape, seed: int, step: int, samples, device) -> Noise:
    """Everything random of some training samples of a step, each from (seed, step, its global index
    in the step) alone. shape: (16, V*T, H, W) of one sample's latents.
    """
    rows = []
    for sample in samples:
        rng = torch.Generator(device).manual_seed(tp.seed_of(seed, step, sample))
        randn = lambda *size: torch.randn(size, generator=rng, device=device)
        frames = shape[1] // cfg.n_views
        sigma, eps = randn(1).exp() * math.sqrt(frames), randn(1, *shape)
        keep_text = torch.rand(1, generator=rng, device=device) >= 0.2
        row = [sigma, eps, keep_text]
        if cfg.n_views > 1:  # known are view 0, and for v2w the first 0-2 latent frames of all
            n = torch.randint(3, (), generator=rng, device=device).item()
            known = torch.zeros(cfg.n_views, frames, device=device)
            known[0] = 1
            if cfg.conditioning == "v2w":
                known[:, :n] = 1
            sigma_a, eps_a = (randn(1) * 2 - 3).exp(), randn(1, *shape)
            row += [sigma_a, eps_a, known.view(1, 1, -1, 1, 1)]
        rows.append(row)
    return Noise(*map(torch.cat, zip(*rows)))


# EDM's preconditioning (table 1): c_skip, c_out, c_in (B, 1, 1, 1, 1); c_noise (B,).
Coefficients = namedtuple("Coefficients", "c_skip c_out c_in c_noise")


def coefficients(sigma):  # (B,)
    total = sigma**2 + SIGMA_DATA**2
    scales = SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total.sqrt(), total.rsqrt()
    return Coefficients(*map(per_row, scales), sigma.log() / 4)


def per_row(x):  # (B,) -> (B, 1, 1, 1, 1)
    return x.view(-1, 1, 1, 1, 1)


def give(cond: Condition, known, x0, sigma_a, eps_a) -> Condition:
    """cond with the latents x0 given where `known` is 1, which are seen at a low noise sigma_a."""
    seen = coefficients(sigma_a).c_in * (x0 + per_row(sigma_a) * eps_a)
    return cond._replace(known=known, given=x0, seen=seen)


def network_input(x_t, sigma, cond: Condition):
    x = coefficients(sigma).c_in * x_t
    return x if cond.known is None else torch.where(cond.known > 0, cond.seen, x)


def denoise(model, x_t, sigma, cond: Condition):
    """D(x_t) in float32 (float64 for a float64 x_t); known latents come back as they were given."""
    c_skip, c_out, _, c_noise = coefficients(sigma)
    out = model(network_input(x_t, sigma, cond), c_noise, cond).to(x_t.dtype)
    pred = c_skip * x_t + c_out * out
    return pred if cond.known is None else torch.where(cond.known > 0, cond.given, pred)


def training_loss(model, x0, cond: Condition, noise: Noise) -> torch.Tensor:
    """Scalar loss of latents x0 (B, 16, V*T, H, W); drops text out and gives known latents."""
    x0 = x0.float()
    cond = cond._replace(text=cond.text * noise.keep_text[:, None, None])
    if noise.known is not None:
        cond = give(cond, noise.known, x0, noise.sigma_a, noise.eps_a)
    pred = denoise(model, x0 + per_row(noise.sigma) * noise.eps, noise.sigma, cond)
    scales = coefficients(noise.sigma)
    edm = ((x0 - pred) / scales.c_out).square()  # the loss weight is c_out^-2
    logvar = per_row(model.logvar(scales.c_noise))
    return (edm * (-logvar).exp() + logvar).mean()


# ---- sampler (second-order multistep of arXiv 2308.02157) ----------------------------------------

def solve(denoiser, x, n=35, sigma_max=80.0, sigma_min=0.002):
    """Denoise x = sigma_max * noise, with denoiser(x float64, sigma) -> D; D at sigma_min."""
    top, bottom = sigma_max ** (1 / 7), sigma_min ** (1 / 7)
    s = [(top + i / n * (bottom - top)) ** 7 for i in range(n + 1)]  # from sigma_max to sigma_min
    x, slope = x.double(), 0.0
    for k in range(n):
        d = denoiser(x, s[k]).double()
        r, h = s[k + 1] / s[k], math.log(s[k] / s[k + 1])  # a step of h in -log(sigma)
        if k > 0:
            slope = (d - previous) * h / math.log(s[k - 1] / s[k])  # change of D over the step
        p1 = (1 - r) / h
        x = r * x + h * (p1 * d + (1 - p1) / h * slope)
        previous = d
    return denoiser(x, s[n]).double()


@torch.no_grad()
def sample(model, shape, cond: Condition, rng: torch.Generator, guidance=5.0, n=35, x0=None):
    """Latents (B, 16, V*T, H, W) float32, in n steps, guidance 0: off; x0 where cond.known is 1."""
    device = cond.text.device
    noise = torch.randn(shape, generator=rng, device=device, dtype=torch.float64)
    if cond.known is not None:  # they are seen with less noise than the solver's last step has
        sigma_a = torch.full(shape[:1], 1e-3, device=device)
        eps_a = torch.randn(shape, generator=rng, device=device)
        cond = give(cond, cond.known, x0, sigma_a, eps_a)
    untold = cond._replace(text=torch.zeros_like(cond.text))

    def guided(x, sigma):
        sigmas = x.new_full(shape[:1], sigma)
        pred = denoise(model, x, sigmas, cond)
        if not guidance:
            return pred
        return pred + guidance * (pred - denoise(model, x, sigmas, untold))

    return solve(guided, 80.0 * noise, n).float()
