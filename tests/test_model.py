"""The network, the objective and the sampler where the reference tensors do not reach: batches,
random draws, the full size, recomputation, initial weights.

`tiny`, `randomise`, `example` and `row` make the small models and batches that the other tests use
too.
"""

import collections
import itertools
import math
import zlib

import pytest
import torch
from test_golden import GOLDEN, error, read
from torch.utils._python_dispatch import TorchDispatchMode

import convert
import model as m
import tp
import train
from configs import estimate, recompute, schema
from configs.recompute import Away, host

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are too small to share: on a busy machine a second thread only waits for its
    turn.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(views, **sizes):
    """A model of 3 blocks, 2 of them controlled, whose text is narrower than the stream and whose
    heads are 4.
    """
    small = dict(
        max_img_h=16,
        max_img_w=16,
        max_frames=8,
        model_channels=64,
        num_blocks=3,
        num_heads=4,
        num_control_blocks=2,
        adaln_lora_dim=16,
        crossattn_emb_channels=32,
        text_tokens=6,
        n_views=views,
        conditioning="v2w" if views > 1 else None,
    )
    return m.ModelConfig(**small | sizes)


@torch.no_grad()
def randomise(net):
    """Give every tensor values of its own, the same at any tp; none stays zero, so that every
    gradient is alive.
    """
    for name, p in [*net.named_parameters(), *net.named_buffers()]:
        dim = getattr(p, "tp_dim", None)
        shape = [n * (tp.size() if i == dim else 1) for i, n in enumerate(p.shape)]
        full = torch.randn(
            shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
        )
        p.copy_(
            tp.shard(1 + full / 10 if "norm.weight" in name else full / math.sqrt(shape[-1]), dim)
        )
    return net


def build(cfg):
    return randomise(m.build(cfg, CPU, torch.float32))


def example(cfg, grid, seed=0):
    """x0, condition and noise of three rows that differ in everything; grid: latent frames, token
    rows and columns.
    """
    rng = torch.Generator().manual_seed(seed)
    (t, h, w), views, rows = grid, cfg.n_views, 3
    shape = (rows, m.LATENT, views * t, 2 * h, 2 * w)
    randn = lambda *size: torch.randn(size, generator=rng)
    mask = torch.zeros(rows, 1, 16 * h, 16 * w)  # in pixels, 16 a token
    mask[1, :, :, :8] = 1
    mask[2, :, 8:] = 1
    text, fps = randn(rows, views * cfg.text_tokens, cfg.crossattn_emb_channels), torch.tensor(
        [10.0, 24.0, 30.0]
    )
    cond = m.Condition(text, fps, mask, hint=randn(*shape) / 2)
    noise = m.Noise(
        torch.tensor([0.3, 2.0, 7.0]), randn(*shape), keep_text=torch.tensor([True, False, True])
    )
    eps_a, x0 = randn(*shape) if views > 1 else None, randn(*shape) / 2
    if views > 1:
        known = torch.zeros(rows, 1, views, t, 1, 1)
        known[:, :, 0] = 1  # view 0 of all rows, and the first frame or two of every view
        known[1, :, :, :1] = known[2, :, :, :2] = 1
        noise = noise._replace(
            sigma_a=torch.tensor([0.02, 0.1, 0.5]), eps_a=eps_a, known=known.flatten(2, 3)
        )
        cond = cond._replace(view_index=torch.tensor([[0, 1, 4], [0, 2, 5], [0, 4, 5]]))
        cond = m.give(cond, noise.known, x0, noise.sigma_a, eps_a)
    return x0, cond, noise


def row(batch, i):
    """Row i, as a batch of one, of a tensor or of every tensor of a named tuple."""
    if isinstance(batch, torch.Tensor):
        return batch[i : i + 1]
    return type(batch)(*(v if v is None else v[i : i + 1] for v in batch))


# ---- batches -------------------------------------------------------------------------------------


def forward_backward(net, x0, cond, noise):
    """The network's output, the denoised latents, the loss and every gradient."""
    x_t = x0 + m.per_row(noise.sigma) * noise.eps
    x = m.network_input(x_t, noise.sigma, cond)
    net.zero_grad(set_to_none=True)
    with torch.no_grad():
        out = net(x, noise.sigma.log() / 4, cond)
        pred = m.denoise(net, x_t, noise.sigma, cond)
    loss = m.training_loss(net, x0, cond, noise)
    loss.backward()
    return (
        out,
        pred,
        loss.detach(),
        {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None},
    )


def row_losses(net, x0, pred, sigma):
    """The objective for each row by itself."""
    weight = m.per_row((sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    logvar = m.per_row(net.logvar(sigma.log() / 4))
    return (weight * (x0 - pred) ** 2 * torch.exp(-logvar) + logvar).mean(dim=(1, 2, 3, 4))


@pytest.mark.parametrize("views", [1, 3])
def test_a_batch_is_its_rows(views):
    cfg = tiny(views)
    net, (x0, cond, noise) = build(cfg), example(cfg, (3, 3, 5))
    cond = cond._replace(text=cond.text * noise.keep_text[:, None, None])
    out, pred, loss, grads = forward_backward(net, x0, cond, noise)
    rows = [forward_backward(net, row(x0, i), row(cond, i), row(noise, i)) for i in range(3)]
    assert error(out[0], out[1]) > 0.1  # rows that were alike would prove nothing
    worst = {
        "output": max(error(row(out, i), rows[i][0]) for i in range(3)),
        "x0": max(error(row(pred, i), rows[i][1]) for i in range(3)),
        "row loss": error(
            row_losses(net, x0, pred, noise.sigma), torch.stack([r[2] for r in rows])
        ),
        "loss": error(loss, sum(r[2] for r in rows) / 3),
        "gradient": max(error(grads[k], sum(r[3][k] for r in rows) / 3) for k in grads),
    }
    print("\n%d views: " % views + ", ".join("%s %.1e" % item for item in worst.items()))
    assert worst.pop("gradient") < 1e-4 and max(worst.values()) < 1e-5, worst


def test_one_padding_mask_serves_every_row():
    cfg = tiny(3)
    net, (x0, cond, noise) = build(cfg), example(cfg, (2, 2, 3))
    one = cond._replace(padding_mask=row(cond.padding_mask, 1))
    each = cond._replace(padding_mask=row(cond.padding_mask, 1).expand(3, -1, -1, -1))
    with torch.no_grad():
        assert torch.equal(net(x0, noise.sigma, one), net(x0, noise.sigma, each))
        # and the mask is not ignored
        assert error(net(x0, noise.sigma, one), net(x0, noise.sigma, cond)) > 1e-3


def test_dropped_text_is_zero_text():
    cfg = tiny(1)
    net, (x0, cond, noise) = build(cfg), example(cfg, (2, 2, 3))
    yes = torch.ones(3, dtype=torch.bool)
    with torch.no_grad():
        kept, dropped, silent = (
            m.training_loss(net, x0, cond._replace(text=text), noise._replace(keep_text=keep))
            for text, keep in (
                (cond.text, yes),
                (cond.text, ~yes),
                (torch.zeros_like(cond.text), yes),
            )
        )
    assert dropped == silent and dropped != kept


# ---- random draws --------------------------------------------------------------------------------


def draws(cfg, count, frames):
    """`count` rows of training draws for tiny latents, over steps of 10 samples."""
    shape = (1, cfg.n_views * frames, 1, 1)
    steps = [m.draw_noise(cfg, shape, 0, step, range(10), CPU) for step in range(count // 10)]
    return m.Noise(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*steps)))


def assert_normal(values, mean, std):
    """Kolmogorov-Smirnov: the empirical distribution of the values is nowhere far from Normal(mean,
    std).
    """
    values = values.flatten().double().sort().values
    expected = (1 + torch.erf((values - mean) / (std * math.sqrt(2)))) / 2
    steps = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    distance = max((expected - steps[:-1]).max().item(), (steps[1:] - expected).max().item())
    assert distance * math.sqrt(len(values)) < 2.47  # a true sample exceeds this once in 100,000


def test_sigma_and_dropout_distributions():
    count, frames = 10_000, 7
    drawn = draws(tiny(1), count, frames)
    assert_normal(drawn.sigma.log(), math.log(math.sqrt(frames)), 1)
    assert_normal(drawn.eps, 0, 1)
    kept = drawn.keep_text.double().mean().item()
    assert len(drawn.sigma) == count and abs(kept - 0.8) < 3.3 * math.sqrt(0.2 * 0.8 / count)


def test_multi_view_sigma_counts_the_frames_of_one_view():
    drawn = draws(tiny(3), 3000, 4)
    assert_normal(drawn.sigma.log(), math.log(math.sqrt(4)), 1)
    assert_normal(drawn.sigma_a.log(), -3, 2)


def test_known_latents_of_t2w():
    for known in draws(tiny(3, conditioning="t2w"), 50, 4).known:
        assert known.flatten().tolist() == [1] * 4 + [0] * 8


def test_known_latents_of_v2w():
    """View 0 is known whole, and of every view the first n frames; n is uniform in {0, 1, 2}."""
    counts, frames, total = collections.Counter(), 4, 3000
    for known in draws(tiny(3), total, frames).known:
        assert known.shape == (1, 3 * frames, 1, 1)
        front, left, right = known.view(3, frames).tolist()
        n = int(sum(left))
        assert front == [1] * frames and left == right == [1] * n + [0] * (frames - n)
        counts[n] += 1
    assert set(counts) == {0, 1, 2}
    # chi-square, 2 degrees, 0.001
    assert sum((c - total / 3) ** 2 / (total / 3) for c in counts.values()) < 13.8


def test_draws_depend_on_seed_step_and_sample_alone():
    cfg, shape = tiny(3), (16, 6, 2, 2)
    draw = lambda seed, step, samples: m.draw_noise(cfg, shape, seed, step, samples, CPU)
    content = lambda d: b"".join(v.numpy().tobytes() for v in d)
    torch.manual_seed(1)
    first = content(draw(0, 5, [2]))
    torch.manual_seed(2)  # the global generator plays no part
    assert content(draw(0, 5, [2])) == first
    seen = {
        content(draw(seed, step, [i]))
        for seed, step, i in itertools.product(range(2), range(6), range(6))
    }
    assert len(seen) == 2 * 6 * 6  # (step 2, sample 5) is not (step 5, sample 2)
    both = draw(0, 0, [3, 4])  # nor does it matter which samples are drawn together
    assert [content(row(both, i)) for i in range(2)] == [content(draw(0, 0, [i])) for i in (3, 4)]


# ---- sampler -------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (GOLDEN / "sampler_io.safetensors").exists(), reason="GOLDEN_DIR holds no sampler set"
)
def test_golden_sampler():
    io, meta = read("sampler_io")
    assert (
        meta["x0_fn"] == "(mu*s^2 + 0.25*x)/(s^2+0.25) + 0.1*tanh(x/(1+s))" and meta["rho"] == "7"
    )
    mu = io["mu"].double()
    denoiser = lambda x, s: (mu * s**2 + 0.25 * x) / (s**2 + 0.25) + 0.1 * torch.tanh(x / (1 + s))
    steps, highest, lowest = (
        int(meta["num_steps"]),
        float(meta["sigma_max"]),
        float(meta["sigma_min"]),
    )
    out = m.solve(denoiser, io["x_sigma_max"], steps, highest, lowest)
    print("\nsampler: %.1e" % error(out, io["sample"]))
    assert out.dtype == torch.float64 and error(out, io["sample"]) < 1e-6


def guided_row(net, noise, eps_a, cond, x0, guidance, n):
    """One row (B=1) of `sample`, guidance and known latents spelled out."""
    sigma_a = 1e-3

    def denoiser(x, sigma):
        known = torch.zeros_like(cond.known) if sigma <= sigma_a else cond.known
        c_in, at_a = (sigma**2 + 0.25) ** -0.5, (sigma_a**2 + 0.25) ** -0.5
        x_in = torch.where(known > 0, at_a * (x0 + sigma_a * eps_a), c_in * x)
        c_noise, pred = torch.tensor([math.log(sigma) / 4]), []
        for text in (cond.text, torch.zeros_like(cond.text)):
            told = cond._replace(
                text=text, known=known, given=x0, seen=at_a * (x0 + sigma_a * eps_a)
            )
            out = 0.25 / (sigma**2 + 0.25) * x + 0.5 * sigma * c_in * net(x_in, c_noise, told)
            pred.append(torch.where(known > 0, x0.double(), out))
        return pred[0] + guidance * (pred[0] - pred[1])

    return torch.where(cond.known > 0, x0, m.solve(denoiser, 80 * noise, n).float())


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_a_sampled_batch_is_its_rows(guidance):
    """Known latents come back as x0, and every row is the guided solution for its own text, hint
    and known latents.
    """
    cfg = tiny(3)
    net, (x0, cond, _) = build(cfg), example(cfg, (2, 2, 3))
    out = m.sample(net, x0.shape, cond, torch.Generator().manual_seed(3), guidance, 6, x0)
    known = cond.known.expand_as(x0) > 0
    assert out.dtype == torch.float32 and torch.equal(out[known], x0[known])
    rng = torch.Generator().manual_seed(3)
    noise, eps_a = torch.randn(x0.shape, generator=rng, dtype=torch.float64), torch.randn(
        x0.shape, generator=rng
    )
    for i in range(3):
        alone = guided_row(net, row(noise, i), row(eps_a, i), row(cond, i), row(x0, i), guidance, 6)
        assert error(row(out, i), alone) < 1e-4


@torch.no_grad()
def test_single_view_sample_repeats_with_its_seed():
    cfg = tiny(1)
    net, (x0, cond, _) = build(cfg), example(cfg, (2, 3, 3))
    run = lambda seed, guidance: m.sample(
        net, x0.shape, cond, torch.Generator().manual_seed(seed), guidance, 4
    )
    assert run(0, 5.0).isfinite().all() and torch.equal(run(0, 5.0), run(0, 5.0))
    assert error(run(0, 5.0), run(1, 5.0)) > 1e-3 and error(run(0, 5.0), run(0, 0.0)) > 1e-3


# ---- what the backward pass runs -----------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts operators as they run, under what `kind(op, args)` calls them if it calls them
    anything: a result that checkpointing kept is not a run.
    """

    def __init__(self, kind):
        super().__init__()
        self.kind, self.counts = kind, collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if name := self.kind(op, args):
            self.counts[name] += 1
        return op(*args, **(kwargs or {}))


def attention(op, args):
    if "scaled_dot_product" not in op.name():
        return None
    backward = "backward" in op.name()
    q, k = args[1:3] if backward else args[:2]
    kind = "self" if q.shape[-2] == k.shape[-2] else "cross"
    return f"{kind} backward" if backward else kind


def gelu(op, args):
    name = op.overloadpacket.__name__
    return name if name.startswith("gelu") else None


@pytest.mark.parametrize("keep, runs", [
    (["none"] * 4, {"self": 5, "cross": 5}),
    (["mlp_saved"] * 4, {"self": 5, "cross": 9}),  # the text's few keys are gone over again
    (["residual_saved"] * 4, {"self": 5, "cross": 9}),
    (["attention_saved"] * 4, {"self": 5, "cross": 9}),
    (["full"] * 4, {"self": 9, "cross": 9}),
    (["full", "attention_saved", "mlp_saved", "none"], {"self": 6, "cross": 8}),
])
def test_attention_runs(keep, runs):
    """Three base and two control blocks; base block 0 has no backward pass, so it is run once at
    any rate.
    """
    cfg = tiny(1)
    net, (x0, cond, noise) = build(cfg), example(cfg, (2, 2, 3))
    net.keep = keep
    with Calls(attention) as calls:
        m.training_loss(net, x0, cond, noise).backward()
    assert calls.counts == runs | {"self backward": 4, "cross backward": 4}


def test_a_trained_block_is_run_again_though_no_gradient_reaches_its_input():
    """Base block 0, trained: its plan holds as that of the others does."""
    cfg = tiny(1)
    net, (x0, cond, noise) = build(cfg), example(cfg, (2, 2, 3))
    net.base.blocks[0].requires_grad_()
    net.keep = ["full"] * 5
    with Calls(attention) as calls:
        m.training_loss(net, x0, cond, noise).backward()
    assert calls.counts == {"self": 10, "cross": 10, "self backward": 5, "cross backward": 5}
    with Calls(attention) as calls, torch.no_grad():
        m.training_loss(net, x0, cond, noise)
    assert calls.counts["self"] == 5


@pytest.mark.parametrize("keep, again", [
    ("full", 2), ("attention_saved", 2), ("residual_saved", 2), ("mlp_saved", 0)])
def test_recomputation_of_a_frozen_block_ends_before_its_gelu(keep, again):
    """Of its five blocks the two control blocks need what their GELU gives for the weights' sake;
    the others need what it reads.
    """
    cfg = tiny(1)
    net, (x0, cond, noise) = build(cfg), example(cfg, (2, 2, 3))
    net.keep = [keep] * 4
    with Calls(gelu) as calls:
        m.training_loss(net, x0, cond, noise).backward()
    assert calls.counts == {"gelu": 5 + again, "gelu_backward": 4}


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("keep", ["none", "mlp_saved", "residual_saved", "attention_saved", "full"])
def test_host_memory_changes_nothing(keep, views):
    """Every gradient, bit by bit, in a second step too, whose tensors go where others have been;
    and what is kept there is what the estimate counts.
    """
    cfg = tiny(views, num_blocks=4)
    net, (x0, cond, noise) = build(cfg), example(cfg, (4, 5, 6))
    net.keep, wanted, stream = [keep] * 5, None, 3 * views * 120 * 64 * 4  # bytes
    plan = estimate.Plan("megatron", net.keep, 5)
    run = schema.Config(model=cfg)
    kept = [away for *_, away in estimate.kept(run, plan, estimate.trained_blocks(net))][::-1]
    reserved = int(stream * sum(kept[:4]))  # not enough for the last
    assert host.reserve(reserved, for_gpu=False) == "" and len(host.region) == reserved
    for net.on_host in (0, 2, 5, 5):
        net.zero_grad()
        loss = m.training_loss(net, x0, cond, noise)
        apart = [away for block in host.blocks for away in block
                 if away.buffer.untyped_storage().data_ptr() != host.region.data_ptr()]
        assert bool(apart) == (net.on_host == 5) and 0 <= reserved - host.used
        buffers = [away.buffer.data_ptr() for block in host.blocks for away in block]
        assert len(set(buffers)) == len(buffers)
        found = [sum(away.buffer.nbytes for away in block) / stream for block in host.blocks]
        assert len(found) == net.on_host and len(host.leaving) + len(host.before) <= 2 * 31
        exact = {"none": 5, "mlp_saved": 2}.get(keep, 0)  # others keep less once compiled
        assert found[exact:] == kept[exact:net.on_host]
        for buffer in itertools.chain(*host.free.values()):
            buffer.fill_(255)  # is nobody's
        loss.backward()
        grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        wanted = wanted or grads
        assert all(torch.equal(grads[name], wanted[name]) for name in wanted)
        assert not host.blocks
    lent = sum(map(len, host.free.values()))
    abandoned = m.training_loss(net, x0, cond, noise)
    assert sum(map(len, host.free.values())) < lent
    del abandoned
    host.begin()
    assert sum(map(len, host.free.values())) == lent


@pytest.mark.parametrize("kernel, arguments", [
    ("cudnn", [None, True, 0.0]), ("flash", [0.0]), ("efficient", [None, True, 0.0]),
])
def test_what_attention_on_a_gpu_gives_is_kept_and_given_back(kernel, arguments):
    """Tensors, numbers and nothing, as its kernels return them; on meta, for there is no GPU."""
    op = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention").default
    q, kept = torch.empty(1, 4, 256, 64, device="meta", dtype=torch.bfloat16), []
    with recompute._Keep("attention_saved", kept):
        out = op(q, q, q, *arguments)
    assert len(kept) == 1
    with Calls(attention) as calls, recompute._Restore("attention_saved", kept):
        found = op(q, q, q, *arguments)
    assert not calls.counts and not kept and len(found) == len(out) >= 4
    for a, b in zip(found, out):
        form = lambda x: (x.shape, x.stride(), x.dtype) if torch.is_tensor(x) else x
        assert form(a) == form(b)


def test_what_is_in_host_memory_is_on_its_way_before_it_is_asked_for(monkeypatch):
    cfg, asked = tiny(1, num_blocks=5), []
    net, (x0, cond, noise) = build(cfg), example(cfg, (4, 5, 6))
    net.keep, net.on_host = ["mlp_saved"] * 6, 4
    real = host.take

    def take(x):
        if isinstance(x, Away) and x.taken() is None:
            asked.append(x.copy is not None)
        return real(x)

    monkeypatch.setattr(host, "take", take)
    m.training_loss(net, x0, cond, noise).backward()
    assert len(asked) >= 2 * 5 + 2 * 9 and all(asked)
    assert not (host.leaving or host.before)


@pytest.mark.parametrize("keep", ["none", "mlp_saved", "residual_saved", "attention_saved", "full"])
def test_backward_leaves_the_base_alone(keep):
    """No base parameter gets a gradient, and base block 0, which comes before the first residual,
    is in no graph.
    """
    cfg = tiny(3)
    net, (x0, cond, noise) = build(cfg), example(cfg, (2, 2, 3))
    net.keep, in_graph = [keep] * 5, {}
    for i, block in enumerate(net.base.blocks):
        block.register_forward_hook(
            lambda _, args, out, i=i: in_graph.update({i: out.requires_grad})
        )
    m.training_loss(net, x0, cond, noise).backward()
    assert in_graph == {0: False, 1: True, 2: True}
    assert all(
        p.grad is None and not p.requires_grad
        for p in [*net.base.parameters(), *net.logvar.parameters()]
    )
    for name, p in net.control.named_parameters():
        assert (p.grad is None) == name.startswith("head."), name


class OnGpu(torch.Tensor):
    is_cuda = True


def test_what_runs_forward_only_shares_one_graph(monkeypatch):
    """A graph is compiled for each grad mode and each set of what needs a gradient, so these must
    be alike for validation and for frozen blocks of training that no gradient reaches.
    """
    seen = []
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: fn)
    spy = m.fused(lambda *args: seen.append((torch.is_grad_enabled(), *(
        a.requires_grad for a in args if torch.is_tensor(a)))))
    x, weight = torch.ones(2).as_subclass(OnGpu), torch.ones(2, requires_grad=True)
    spy(x, weight.detach(), 2)
    with torch.no_grad():
        spy(x, weight, 2)
    assert seen == [(False, False, False)] * 2
    spy(x, weight, 2)
    assert seen[2:] == [(True, False, True)]


# ---- full size -----------------------------------------------------------------------------------


def released_branch(multi_view, blocks):
    """name -> shape of the tensors that base and control branch share, as released: D=4096,
    K=128.
    """
    d, rank, text, channels = 4096, 256, 1024, 16 + 1 + (1 + 6 if multi_view else 0)
    shapes = {
        "x_embedder.proj.1.weight": (d, 4 * channels),
        "affline_norm.weight": (d,),
        "t_embedder.1.linear_1.weight": (d, d),
        "t_embedder.1.linear_2.weight": (3 * d, d),
        "final_layer.linear.weight": (64, d),
        "final_layer.adaLN_modulation.1.weight": (rank, d),
        "final_layer.adaLN_modulation.2.weight": (2 * d, rank),
    }
    if multi_view:
        shapes |= {"view_embeddings.weight": (7, 6), "repeat_frame_embedding.weight": (6, 1),
                   "repeat_frame_embedding.bias": (6,)}
    else:
        shapes |= {
            f"extra_pos_embedder.pos_emb_{axis}": (n, d)
            for axis, n in (("t", 128), ("h", 120), ("w", 120))
        }
    for block, j in itertools.product(range(blocks), range(3)):
        stem = f"blocks.block{block}.blocks.{j}"
        shapes |= {
            f"{stem}.adaLN_modulation.1.weight": (rank, d),
            f"{stem}.adaLN_modulation.2.weight": (3 * d, rank),
        }
        if j == 2:
            shapes |= {
                f"{stem}.block.layer1.weight": (4 * d, d),
                f"{stem}.block.layer2.weight": (d, 4 * d),
            }
        else:
            wide = text if j else d
            shapes |= {f"{stem}.block.attn.{name}.weight": shape for name, shape in {
                "to_q.0": (d, d), "to_k.0": (d, wide), "to_v.0": (d, wide), "to_out.0": (d, d),
                "to_q.1": (128,), "to_k.1": (128,)}.items()}
    return shapes


def released_control(multi_view):
    d, widths = 4096, [4096, 16, 16, 32, 32, 96, 96, 256, 4096]
    shapes = released_branch(multi_view, 3) | {"x_embedder2.proj.1.weight": (d, 4 * 17)}
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        shapes |= {
            f"input_hint_block.{2 * i}.weight": (b, a),
            f"input_hint_block.{2 * i}.bias": (b,),
        }
    for i in range(3):
        shapes |= {f"zero_blocks.block{i}.weight": (d, d), f"zero_blocks.block{i}.bias": (d,)}
    return shapes


@pytest.mark.parametrize("cfg, base_count, control_count", [
    (m.ModelConfig(n_views=1), 7_236_192_256, 891_645_728),
    (m.ModelConfig(n_views=3, conditioning="t2w"), 7_234_799_670, 890_253_142),
], ids=["single view", "multi-view"])
def test_full_size(cfg, base_count, control_count):
    """The published counts are those of the parameters of `net`: without logvar and
    pos_embedder.seq.
    """
    net, multi_view = m.build(cfg, "meta", torch.bfloat16), cfg.n_views > 1
    shapes = {f"net.{k}": v for k, v in released_control(multi_view).items()}
    shapes |= {f"base_model.net.{k}": v for k, v in released_branch(multi_view, 28).items()}
    shapes |= {"logvar.0.freqs": (128,), "logvar.0.phases": (128,), "logvar.1.weight": (1, 128)}
    own = {convert.to_nvidia(k): v for k, v in net.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in own.items()} == shapes
    assert sum(p.numel() for p in net.base.parameters()) == base_count
    assert sum(p.numel() for p in net.control.parameters()) == control_count
    for name, p in net.named_parameters():
        assert getattr(p, "tp_dim", None) == convert.tp_dim_of(convert.to_nvidia(name)), name
        assert p.dtype == (torch.float32 if name.startswith("logvar.") else torch.bfloat16)


def test_tflop_of_the_released_model():
    """6,466 TFLOP a step at 56,320 tokens: attention backward twice its forward, no weight
    gradients in the base.
    """
    tflop = estimate.tflop_per_sample(m.ModelConfig(n_views=1), 56_320)
    assert tflop == pytest.approx(6466, rel=1e-3)


# ---- initial weights -----------------------------------------------------------------------------


def is_zero_at_start(name):
    return (
        name.endswith(".bias")
        or name.startswith(("control.zero_linears.", "control.hint_encoder.14."))
        or name == "logvar.weight"
        or ".blocks." in name
        and name.endswith("ada.up.weight")
    )


@pytest.mark.parametrize("views", [1, 3])
def test_initial_weights(views):
    net = m.build(tiny(views), CPU, torch.float32)
    tp.init_weights(net, 0)
    for name, p in net.named_parameters():
        if is_zero_at_start(name):
            assert not p.any(), name
        elif name.endswith("norm.weight"):
            assert (p == 1).all(), name
        elif "time_mlp" in name:
            assert 0.019 < p.std() < 0.021 and p.abs().max() > 0.05, name
        elif ".pos_" in name:
            assert 0.017 < p.std() < 0.023, name
        elif "view_embed" in name:
            assert 0.6 < p.std() < 1.4, name
        # Xavier: uniform within sqrt(6 / (fan in + fan out)), so its mean square is a third of the
        # bound's
        else:
            bound = math.sqrt(6 / sum(p.shape))
            assert p.abs().max() <= bound, name
            if p.numel() >= 256:
                assert (
                    p.abs().max() > 0.97 * bound and 0.8 < p.square().mean() / (bound**2 / 3) < 1.25
                ), name


def test_initial_weights_depend_on_seed_and_name():
    cfg, nets = tiny(1), []
    for seed in (0, 0, 1):
        nets.append(m.build(cfg, CPU, torch.float32))
        tp.init_weights(nets[-1], seed)
    one, again, other = (dict(net.named_parameters()) for net in nets)
    assert all(torch.equal(one[k], again[k]) for k in one)
    q = "blocks.0.self_attn.q.weight"
    assert not torch.equal(one["base." + q], other["base." + q])
    # pretraining copies the base, it does not hope
    assert not torch.equal(one["base." + q], one["control." + q])


# ---- schedules -----------------------------------------------------------------------------------


def ema_gamma(s):
    """Largest real root of x^3 + 7x^2 + (16 - s^-2)x + (12 - s^-2): beyond its local minimum the
    cubic only rises.
    """
    cubic = lambda x: x**3 + 7 * x**2 + (16 - s**-2) * x + (12 - s**-2)
    low, high = (-7 + math.sqrt(49 - 3 * (16 - s**-2))) / 3, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if cubic(middle) > 0 else (middle, high)
    return low


@pytest.mark.parametrize("s, published", [(0.1, 6.94), (0.05, 16.97)])  # table of arXiv 2312.02696
def test_ema(s, published):
    gamma = ema_gamma(s)
    assert gamma == pytest.approx(published, abs=5e-3)
    assert train.ema_exponent(s) == pytest.approx(gamma, rel=1e-9)
    assert train.ema_beta(0, s) == 0
    for i in (1, 2, 10, 1000, 10**6):
        assert train.ema_beta(i, s) == pytest.approx((i / (i + 1)) ** (gamma + 1), rel=1e-9)


def test_learning_rate_ramp():
    cfg = schema.Optimizer()
    assert (cfg.lr, cfg.warmup_steps) == (2**-14.3, 1000)
    assert train.learning_rate(0, cfg) == pytest.approx(1e-6 * cfg.lr, rel=1e-9)
    assert train.learning_rate(500, cfg) == pytest.approx((1 + 1e-6) / 2 * cfg.lr, rel=1e-9)
    assert train.learning_rate(999, cfg) < cfg.lr
    assert [train.learning_rate(step, cfg) for step in (1000, 1001, 10**6)] == [cfg.lr] * 3
    assert train.learning_rate(0, schema.Optimizer(warmup_steps=0)) == cfg.lr
