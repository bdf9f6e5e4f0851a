"""Every tensor-parallel size trains the same model: outputs, gradients, collectives, checks,
failures. gloo, CPU.

Starting ranks costs seconds, so each size makes all of its measurements in one start
(`everything`), and the tests below read what came back. The model at tp 1 in this process is the
reference.
"""

import functools
import itertools
import time
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as _symmetric_memory
from ranks import run_ranks
from test_golden import error
from test_model import build, example, row, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import model as m
import tp
from configs import estimate, guard
from configs.recompute import host
from configs.schema import Config, Data

SCHEMES = ("megatron", "ulysses")
POLICIES = ("none", "mlp_saved", "residual_saved", "attention_saved", "full")
CASES = {  # views, (latent frames, token rows, token columns) of a view
    "single view, L=45": (1, (3, 3, 5)),
    "single view, L=5": (1, (1, 1, 5)),  # at tp 4 the last rank holds nothing but padding
    "multi-view, L=48": (3, (2, 2, 4)),
    "multi-view, L=135": (3, (3, 3, 5)),  # no shard boundary falls between two views
}
UNEVEN = ("single view, L=5", "multi-view, L=135")
KEPT = ["residual_saved", "mlp_saved"] * 2  # of two trained blocks, then of two frozen ones


def two_rows(views, grid):
    """A model, and latents, condition and noise of two rows that differ in everything."""
    x0, cond, noise = example(tiny(views), grid)
    first = lambda batch: type(batch)(*(v if v is None else v[:2] for v in batch))
    net = build(tiny(views))
    tp.gather_weights(net.parameters())
    return net, x0[:2], first(cond), first(noise)


# ---- what runs on every rank ---------------------------------------------------------------------


def gathered(p, tensor):
    """The whole of a tensor that is sharded like parameter p."""
    dim = getattr(p, "tp_dim", None)
    if dim is None or tp.size() == 1:
        return tensor.clone()
    parts = [torch.empty_like(tensor) for _ in range(tp.size())]
    dist.all_gather(parts, tensor.contiguous(), group=tp._tp_group)
    return torch.cat(parts, dim)


def train_step(views, grid, keep=(), on_host=0):
    """Output, loss, norm and every whole gradient of two rows: one batch, or a row a replica if
    there are two.
    """
    net, *batch = two_rows(views, grid)
    net.keep, net.on_host = list(keep), on_host
    if tp.dp_size() == 2:
        batch = [row(part, tp.dp_rank()) for part in batch]
    x0, cond, noise = batch
    x = m.network_input(x0 + m.per_row(noise.sigma) * noise.eps, noise.sigma, cond)
    with torch.no_grad():
        out = net(x, noise.sigma.log() / 4, cond)
    loss = m.training_loss(net, x0, cond, noise)
    away = [len(block) for block in host.blocks]
    loss.backward()
    flat = tp.FlatParams([(k, p) for k, p in net.named_parameters() if p.requires_grad], lr=1.0)
    flat.take_gradients(1.0)
    norm = flat.sync_gradients()
    grads = {k: gathered(flat.params[k], grad) for k, grad in flat.views("grad").items()}
    return {"out": out, "loss": tp.mean_over_replicas(loss.detach()), "norm": norm, "grads": grads,
            "away": away}


KINDS = {
    "_allgather_base_": "gather",
    "_reduce_scatter_base_": "scatter",
    "all_to_all": "exchange",
}


class Collectives(TorchDispatchMode):
    """Lists all that is communicated: (kind, elements of the whole, width, fingerprint of what this
    rank sends).
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace in ("c10d", "tp"):
            # an all-to-all of tp.py gives what comes back, the others are told where to put it
            out, sent = args[:2] if op.namespace == "c10d" else args[:1] * 2
            kind = KINDS.get(op._opname, op._opname)
            self.calls.append(
                (kind, max(out.numel(), sent.numel()), sent.shape[-1], hash(sent.numpy().tobytes()))
            )
        return op(*args, **(kwargs or {}))


def block_collectives(frozen):
    """(forward, backward) collectives of one multi-view block over 3*5*3 tokens, two rows."""
    cfg, views, grid = tiny(3), 3, (1, 5, 3)
    net = build(cfg)
    tp.gather_weights(net.parameters())
    block, rng = net.base.blocks[0].requires_grad_(not frozen), torch.Generator().manual_seed(0)
    cond = m.Condition(
        torch.randn(2, views * cfg.text_tokens, cfg.crossattn_emb_channels, generator=rng),
        torch.tensor([10.0, 24.0]),
        None,
        view_index=torch.tensor([[0, 1, 2], [0, 2, 4]]),
    )
    latents = torch.zeros(2, m.LATENT, views * grid[0], 2 * grid[1], 2 * grid[2])
    ctx = net.base.context(latents, torch.tensor([0.1, 0.5]), cond)
    x = torch.randn(2, ctx.length, cfg.model_channels, generator=rng)
    x = tp.own_tokens(x, views).requires_grad_()
    with Collectives() as forward:
        out = block(x, ctx)
    with Collectives() as backward:
        out.sum().backward()
    return {"forward": forward.calls, "backward": backward.calls}


def step_collectives(recompute):
    """How many gathers and scatters a whole forward and backward pass takes."""
    net, x0, cond, noise = two_rows(1, (3, 3, 5))
    net.keep = [recompute] * 4
    with Collectives() as step:
        m.training_loss(net, x0, cond, noise).backward()
    kinds = [call[0] for call in step.calls]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def step_bytes(views):
    """Bytes sent in a step of two forward passes of two rows, and what the formula says."""
    cfg = Config(model=tiny(views), data=Data(num_frames=17, height=48, width=80, views=views))
    cfg.data.batch_size, cfg.parallel.tp = 2, tp.size()
    cfg.trainer.precision, cfg.trainer.grad_accum = "float32", 2
    net, x0, cond, noise = two_rows(views, (3, 3, 5))
    assert cfg.tokens == views * 45
    scheme = "ulysses" if tp.exchanges_heads() else "megatron"
    plan = estimate.Plan(scheme, ["none", "mlp_saved", "residual_saved", "attention_saved"])
    net.keep = plan.keep[::-1]
    assert len(estimate.trained_blocks(net)) == 4
    flat = tp.FlatParams([(k, p) for k, p in net.named_parameters() if p.requires_grad], lr=1.0)
    tp.traffic.read()
    for _ in range(cfg.trainer.grad_accum):
        m.training_loss(net, x0, cond, noise).backward()
        flat.take_gradients(0.5)
    flat.sync_gradients()
    flat.write("master")
    return [tp.traffic.read()[0], sum(estimate.bytes_sent(cfg, net, plan).values())]


def tokens_round_trip():
    """own_tokens and the collectives of linears that multiply by 1, of 5 tokens, forward and
    backward, two rows.
    """
    full = torch.arange(10.0).view(2, 5, 1) + 1
    own, one = tp.own_tokens(full), torch.ones(1, 1)
    mine = own.clone().requires_grad_()
    back = tp._ColumnLinears.apply(mine, 5, one)[0]
    (back * full).sum().backward()
    partial = full.clone().requires_grad_()
    summed = tp._RowLinear.apply(partial, one, True)
    (summed * own).sum().backward()
    return {
        "own": own,
        "gathered": back.detach(),
        "gather_grad": mine.grad,
        "scattered": summed.detach(),
        "scatter_grad": partial.grad,
    }


def initial_weights():
    net = m.build(tiny(3), torch.device("cpu"), torch.float32)
    tp.init_weights(net, seed=7)
    return {k: gathered(p, p.detach()) for k, p in net.named_parameters()}


class Fused:
    """torch.ops.symm_mem on gloo: what its operators for GPUs are documented to compute."""

    @staticmethod
    def fused_all_gather_matmul(x, matrices, dim, group, return_A):
        assert x.is_contiguous() and group == tp._tp_group.group_name
        parts = [torch.empty_like(x) for _ in range(tp.size())]
        dist.all_gather(parts, x, group=tp._tp_group)
        x = torch.cat(parts, dim)
        products = [(x @ m).movedim(dim, 0).contiguous().movedim(0, dim) for m in matrices]
        return x if return_A else None, products  # strided as theirs are

    @staticmethod
    def fused_matmul_reduce_scatter(x, matrix, reduce, dim, group):
        assert x.shape[dim] % tp.size() == 0 and reduce == "sum"
        y = x @ matrix
        dist.all_reduce(y, group=tp._tp_group)
        return y.chunk(tp.size(), dim)[tp.rank()].clone()


def asked_whether_gpus_share_memory():
    """(overlaps, warnings) where GPUs do, where the last rank's do not, and on several machines."""
    def ask(host, refuses):
        def workspace(group, size):
            if refuses:
                raise RuntimeError("no peer access\nframe #0")

        with (mock.patch("torch.cuda.is_available", lambda: True),
              mock.patch("socket.gethostname", lambda: host),
              mock.patch.object(_symmetric_memory, "get_symm_mem_workspace", workspace),
              warnings.catch_warnings(record=True) as told):
            tp.use_scheme("megatron", 8)
        assert tp.place.name == "the start"
        return tp.overlaps, [str(warning.message) for warning in told]

    last = tp.rank() == tp.size() - 1
    return [ask("a", False), ask("a", last), ask("ab"[last], False)]


def everything(tp_size):
    tp.init(tp_size, num_heads=4)
    found = {"cases": {name: train_step(*case) for name, case in CASES.items()}}
    found["initial weights"] = initial_weights()
    if tp.size() > 1:
        found["tokens"] = tokens_round_trip()
        found["blocks"], found["steps"], found["bytes"] = {}, {}, {}
        for scheme in SCHEMES:
            tp.use_scheme(scheme)
            found["bytes"][scheme] = {views: step_bytes(views) for views in (1, 3)}
            found["blocks"][scheme] = {f: block_collectives(f) for f in (False, True)}
            found["steps"][scheme] = {keep: step_collectives(keep) for keep in POLICIES}
            for how, on_host in (("kept", 0), ("away", 3)):
                found[f"{scheme} {how}"] = {name: train_step(*CASES[name], KEPT, on_host)
                                            for name in UNEVEN}
        found["ulysses cases"] = {name: train_step(*case) for name, case in CASES.items()}
        found["asked"] = asked_whether_gpus_share_memory()
        tp.use_scheme("megatron")
        tp.overlaps, torch.ops.symm_mem = True, Fused
        found["overlapped cases"] = {name: train_step(*CASES[name]) for name in UNEVEN}
        found["bytes"]["overlapped"] = {views: step_bytes(views) for views in (1, 3)}
    tp.shutdown()
    return found


def caught(check, *args):
    """The message of what a check raises, '' if it passes."""
    try:
        check(*args)
    except (RuntimeError, ValueError) as e:
        return str(e)
    return ""


def drift_reports():
    """What a check says after one bit of a buffer of 4 replicated and 3 sharded elements flips
    on some ranks.
    """
    flat = seven_elements()
    nothing = torch.nn.Module(), flat, 1
    still = torch.zeros(0, dtype=torch.int64)
    reports = {"none": caught(guard.check_memory, still, *nothing)}
    for where, i, rank in (
        ("replicated over tp", 2, tp.rank()),
        ("replicated over replicas", 2, tp.dp_rank()),
        ("sharded over replicas", 5, tp.dp_rank()),
    ):
        flat = seven_elements()
        if rank == 1:
            flat.master[i] = torch.nextafter(flat.master[i], torch.tensor(99.0))
        reports[where] = caught(guard.check_memory, still, torch.nn.Module(), flat, 1)
    for where, i, rank in (("ema over tp", 2, tp.rank()), ("ema over replicas", 5, tp.dp_rank())):
        flat = seven_elements()
        flat.ema[i] += rank
        reports[where] = caught(guard.check_memory, still, torch.nn.Module(), flat, 1)
    return reports


def seven_elements():
    sharded = torch.nn.Parameter(10.0 * tp.rank() + torch.arange(3.0))
    sharded.tp_dim = 0
    return tp.FlatParams(
        [("sharded", sharded), ("replicated", torch.nn.Parameter(torch.arange(4.0)))], lr=1.0
    )


def refuse():
    raise ValueError("no such file")


def two_by_two():
    """A mesh of two replicas of two ranks."""
    tp.init(2, num_heads=4)
    me = dist.get_rank()
    found = {
        "mesh": [tp.dp_rank(), tp.rank(), tp.dp_size(), tp.size(), tp.world_rank()],
        "drift": drift_reports(),
        "exchanged": tp.exchange({"b": torch.full((2,), me), "a": torch.full((3,), me).bfloat16()}),
    }
    flat, mine = seven_elements(), torch.tensor(float(me))
    flat.grad.fill_(2.0**me)
    found |= {
        "norm": flat.sync_gradients(),
        "synced": flat.grad,
        "from_all": tp.from_all(me),
        "from_rank0": tp.from_rank0(lambda: {"rank": me}),
        "refusal": caught(tp.from_rank0, refuse),
        "mean": [tp.mean_over_replicas(mine).item(), mine.item()],
        "step": train_step(*CASES["multi-view, L=135"]),
    }
    tp.barrier()
    tp.shutdown()
    return found


@functools.cache
def at_tp(size):
    """What every rank of a tensor-parallel group of this size found."""
    return run_ranks(size, everything, size) if size > 1 else [everything(1)]


@functools.cache
def replicas():
    """What the four ranks of the 2 x 2 mesh found."""
    return run_ranks(4, two_by_two)


# ---- the same numbers at any size ----------------------------------------------------------------


def assert_same_step(found, wanted, name):
    worst = {
        k: error(found[k], wanted[k])
        for k in ("out", "loss", "norm")
        if found[k].shape == wanted[k].shape
    }
    assert set(found["grads"]) == set(wanted["grads"])
    grads = {k: error(found["grads"][k], wanted["grads"][k]) for k in wanted["grads"]}
    print(
        "\n%s: %s, gradients %.1e"
        % (name, ", ".join("%s %.1e" % w for w in worst.items()), max(grads.values()))
    )
    assert max(worst.values()) < 1e-5, worst
    assert max(grads.values()) < 1e-4, {k: v for k, v in grads.items() if v >= 1e-4}


@pytest.mark.parametrize("scheme, name", [
    *itertools.product(("cases", "ulysses cases"), CASES),
    *itertools.product(("overlapped cases", "megatron kept", "ulysses kept", "megatron away",
                        "ulysses away"), UNEVEN),
])
@pytest.mark.parametrize("size", [2, 4])
def test_step_equals_tp_1(size, scheme, name):
    """Two distinct rows: output, loss, gradient norm and every gradient, on every rank of the
    group.
    """
    for rank in at_tp(size):
        wanted = at_tp(1)[0]["cases"][name]
        assert_same_step(rank[scheme][name], wanted, f"tp {size}, {scheme}: {name}")


@pytest.mark.parametrize("size", [2, 4])
def test_gpus_that_share_no_memory_are_told_once(size):
    for i, rank in enumerate(at_tp(size)):
        said = "GPUs share no memory, tokens are gathered before use: "
        refused, apart = (False, [said + "no peer access"]), (False, [said + "they are of several "
                                                                      "machines"])
        if i:
            refused = apart = (False, [])
        assert rank["asked"] == [(True, []), refused, apart]


def test_replicas_average_their_gradients():
    """Two replicas of two ranks, a row each, against the two rows in one batch."""
    name = "multi-view, L=135"
    wanted = at_tp(1)[0]["cases"][name]
    for i, rank in enumerate(replicas()):
        assert error(rank["step"]["out"], row(wanted["out"], i // 2)) < 1e-5
        assert_same_step(rank["step"], wanted, f"dp 2 x tp 2, {name}")


@pytest.mark.parametrize("size", [2, 4])
def test_synced_gradients_are_bit_identical(size):
    first, *others = at_tp(size)
    for rank, scheme, case in itertools.product(others, ("cases", "ulysses cases"), CASES):
        wanted, grads = first[scheme][case]["grads"], rank[scheme][case]["grads"]
        assert all(torch.equal(grads[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("size", [2, 4])
def test_initial_weights_do_not_depend_on_tp(size):
    wanted = at_tp(1)[0]["initial weights"]
    for rank in at_tp(size):
        assert set(rank["initial weights"]) == set(wanted)
        assert all(torch.equal(rank["initial weights"][k], wanted[k]) for k in wanted)


# ---- collectives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("size", [2, 4])
def test_megatron_block_collectives(size, frozen):
    """The formula in tp.py: per sublayer a gather and a scatter each way, of S = B * L_tp * tp * D
    elements.
    """
    cfg, rows, length = tiny(3), 2, 45
    elements = rows * -(-length // size) * size * cfg.model_channels
    for rank in at_tp(size):
        calls = rank["blocks"]["megatron"][frozen]
        for way in ("forward", "backward"):
            assert [kind for kind, *_ in calls[way]] == ["gather", "scatter"] * 3, way
            # no gather is smaller: none serves q alone; and the text, 32 wide, is in none
            assert all(count == elements for _, count, _, _ in calls[way])
            assert all(width == cfg.model_channels for _, _, width, _ in calls[way])
        both = calls["forward"] + calls["backward"]
        sent = [sent for kind, _, _, sent in both if kind == "gather"]
        assert len(set(sent)) == len(sent) == 6  # nothing is gathered twice


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("size", [2, 4])
def test_ulysses_block_collectives(size, frozen):
    """The formula in tp.py: four all-to-alls each way, of S / tp elements, S with every view padded
    by itself; and a scatter for each of the ten sharded weights that are trained.
    """
    cfg, rows, views, length = tiny(3), 2, 3, 15
    elements = rows * views * -(-length // size) * cfg.model_channels
    for rank in at_tp(size):
        calls = rank["blocks"]["ulysses"][frozen]
        assert [call[:2] for call in calls["forward"]] == [("exchange", elements)] * 4
        kinds = [kind for kind, *_ in calls["backward"]]
        assert kinds.count("exchange") == 4 and kinds.count("scatter") == (0 if frozen else 10)
        assert len(kinds) == (4 if frozen else 14)
        exchanged = [count for kind, count, _, _ in calls["backward"] if kind == "exchange"]
        assert exchanged == [elements] * 4


@pytest.mark.parametrize("size", [2, 4])
def test_megatron_step_collectives(size):
    """Five blocks forward, four backward (not base block 0), and one gather of the output, whose
    mirror is local.
    """
    once = {"gather": 3 * 5 + 3 * 4 + 1, "scatter": 3 * 5 + 3 * 4}
    # Two trained and two frozen blocks are computed again. Only a gate that is trained needs the
    # last scatter's result, of all or of either part.
    again = {
        "gather": once["gather"] + 3 * 2 + 3 * 2,
        "scatter": once["scatter"] + 3 * 2 + 2 * 2,
    }
    parts = again | {"scatter": again["scatter"] - 2}
    attention = {key: count - 4 for key, count in parts.items()}  # without those of the MLP
    for rank in at_tp(size):
        assert rank["steps"]["megatron"] == {
            "none": once, "mlp_saved": attention, "residual_saved": parts,
            "attention_saved": again, "full": again}


@pytest.mark.parametrize("size", [2, 4])
def test_ulysses_step_collectives(size):
    """Exchanges of five blocks forward and four backward, and four computed again only where what
    was exchanged is not kept; a gather of the output; a scatter for each of the ten sharded weights
    of the two trained blocks.
    """
    once = {"exchange": 4 * 5 + 4 * 4, "gather": 1, "scatter": 20}
    again = once | {"exchange": once["exchange"] + 4 * 4}
    for rank in at_tp(size):
        assert rank["steps"]["ulysses"] == {
            "none": once, "mlp_saved": once, "residual_saved": once,
            "attention_saved": again, "full": again}


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("scheme", [*SCHEMES, "overlapped"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_step_sends_the_bytes_of_the_formula(size, scheme, views):
    """Two forward passes of 45 tokens a view, which neither size divides; each block keeps another
    part, but for two.
    """
    for rank in at_tp(size):
        sent, formula = rank["bytes"][scheme][views]
        assert sent > 1e5 and sent == pytest.approx(formula, abs=8)


@pytest.mark.parametrize("scheme, trained, frozen", [("megatron", 3, 3), ("ulysses", 7, 6)])
@pytest.mark.parametrize("size", [2, 4])
def test_host_memory_gets_what_padding_was_cut_from_too(size, scheme, trained, frozen):
    """A block's input, what its attention gives, the residual behind it, and what was exchanged."""
    for rank, name in itertools.product(at_tp(size), UNEVEN):
        first, _, third = rank[f"{scheme} away"][name]["away"]
        assert (first, third) == (trained, frozen)


@pytest.mark.parametrize("size", [2, 4])
def test_tokens_are_padded_and_the_padding_dropped(size):
    full = torch.arange(10.0).view(2, 5, 1) + 1
    per_rank = -(-5 // size)
    padded = torch.cat([full, torch.zeros(2, per_rank * size - 5, 1)], dim=1)
    for r, rank in enumerate(at_tp(size)):
        own, tokens = padded[:, r * per_rank : (r + 1) * per_rank], rank["tokens"]
        assert torch.equal(tokens["own"], own)
        assert torch.equal(tokens["gathered"], full)
        # every rank's use of the token counts
        assert torch.equal(tokens["gather_grad"], size * own)
        assert torch.equal(tokens["scattered"], size * own)
        assert torch.equal(tokens["scatter_grad"], full)


# ---- the mesh ------------------------------------------------------------------------------------


def test_ranks_of_a_group_are_adjacent():
    assert [r["mesh"] for r in replicas()] == [
        [0, 0, 2, 2, 0],
        [0, 1, 2, 2, 1],
        [1, 0, 2, 2, 2],
        [1, 1, 2, 2, 3],
    ]


def test_values_travel_within_their_group():
    for me, rank in enumerate(replicas()):
        sources = me // 2 * 2, me // 2 * 2 + 1  # the ranks of the own replica
        assert [batch["a"].tolist() for batch in rank["exchanged"]] == [
            [source] * 3 for source in sources
        ]
        assert [batch["b"].tolist() for batch in rank["exchanged"]] == [
            [source] * 2 for source in sources
        ]
        assert all(batch["a"].dtype == torch.bfloat16 for batch in rank["exchanged"])
        assert rank["from_rank0"] == {"rank": 0} and rank["from_all"] == [0, 1, 2, 3]
        assert rank["refusal"] == "no such file"  # rank 0 alone found out
        assert rank["mean"] == [(me % 2 + me % 2 + 2) / 2, me]


def test_replicated_gradients_are_summed_and_all_are_averaged():
    """Ranks hold gradients of 1, 2, 4, 8; the norm counts 4 replicated elements once, 3 sharded
    ones of each rank.
    """
    for me, rank in enumerate(replicas()):
        mine = [(1 + 4) / 2, (2 + 8) / 2][me % 2]
        assert rank["synced"].tolist() == [((1 + 2) + (4 + 8)) / 2] * 4 + [mine] * 3
        assert rank["norm"].item() == pytest.approx((4 * 7.5**2 + 3 * 2.5**2 + 3 * 5**2) ** 0.5)


def test_drift_of_one_bit_is_found():
    for rank in replicas():
        drift = rank["drift"]
        assert drift["none"] == ""
        group = "master of replicated differs over the {}".format
        assert group("tensor-parallel group") in drift["replicated over tp"]
        assert group("replicas") in drift["replicated over replicas"]
        assert "master of sharded differs over the replicas" in drift["sharded over replicas"]
        assert "sharded" not in drift["replicated over tp"]
        assert "(ema of replicated differs over the tensor-parallel group)" in drift["ema over tp"]
        assert "(ema of sharded differs over the replicas)" in drift["ema over replicas"]


def test_shard():
    full = torch.arange(24).view(4, 6)
    # by default, a group of one
    assert tp.shard(full, None, 1, 2) is full and torch.equal(tp.shard(full, 0), full)
    assert torch.equal(tp.shard(full, 0, 1, 2), full[2:]) and torch.equal(
        tp.shard(full, 1, 2, 3), full[:, 4:]
    )
    # a view: slicing a checkpoint copies nothing
    assert tp.shard(full, 0, 1, 2).data_ptr() == full[2:].data_ptr()
    with pytest.raises(ValueError, match=r"dimension 1 of \(4, 6\) is not divisible by tp 4"):
        tp.shard(full, 1, 0, 4)


# ---- refusals and failures -----------------------------------------------------------------------


@pytest.mark.parametrize("ranks, tp_size, heads, message", [
    (6, 6, 32, "num_heads 32 is not divisible by tp 6; use 1, 2, 4, 8, 16 or 32"),
    (6, 4, 32, "a world of 6 ranks is not divisible by parallel.tp 4; use 1 or 2, "
               "or start torchrun with a multiple of 4 ranks"),
    (1, 2, 4, "a world of 1 ranks is not divisible by parallel.tp 2; use 1, "
              "or start torchrun with a multiple of 2 ranks"),
])
def test_a_mesh_that_does_not_fit_is_refused(monkeypatch, ranks, tp_size, heads, message):
    """Each rank refuses by itself, from its environment, before it waits for another."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(ValueError) as refused:
        tp.init(tp_size, heads)
    assert str(refused.value) == message and not dist.is_initialized()


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="^8 ranks are started on .* them 4 GPUs; .*per_node=4$"):
        tp.init(8, 32)


@pytest.mark.parametrize("free, words", [(78.6, []), (2.1, ["hold 77 GiB of GPU 3,"])])
def test_a_gpu_that_others_use_is_named(monkeypatch, free, words):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    memory = int(free * 2**30), int(79.2 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: memory)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert tp.init(1, 32) == torch.device("cuda", 3)
    tp.shutdown()
    assert len(told) == len(words) and all(w in str(t.message) for w, t in zip(words, told))


def test_a_trained_parameter_that_the_loss_does_not_use_is_named():
    used, idle = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    flat = tp.FlatParams([("used", used), ("head.idle", idle)], lr=1.0)
    used.sum().backward()
    with pytest.raises(ValueError, match="head.idle is trained, but not used for the loss"):
        flat.take_gradients(1.0)


def late(seconds):
    """Seconds that a rank has waited for rank 1, and since when its time at its place runs."""
    tp.init(2, num_heads=4, timeout_s=-27)  # collectives wait 3 s
    tp.arrive("samples")
    began = time.monotonic()
    if tp.world_rank() == 1:
        time.sleep(seconds)
    for _ in range(3):
        tp.barrier()
    waited = time.monotonic() - began, time.monotonic() - tp.place.since
    assert tp.from_all(tp.world_rank()) == [0, 1]
    tp.shutdown()
    return waited


def test_ranks_wait_for_a_slow_one_longer_than_a_collective_does():
    for waited, since in run_ranks(2, late, 4.0):
        assert waited >= 4 and since < 3


def lose_rank_1(how, done):
    """What rank 0 gets when rank 1 ends or stalls in front of a collective, and whether rank 1 was
    still stalling then.
    """
    # Collectives wait 30 s longer than timeout_s, after which a run's watch ends it; here they are
    # alone, with 3 s. The ranks meet in that time, too: they are forked at the same moment.
    tp.init(2, num_heads=4, timeout_s=-27)
    if tp.rank() == 1:
        deadline = time.monotonic() + 60
        while how == "stalls" and not done.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return {"waited for": done.exists()}
    message = caught(tp.gather_output, torch.ones(1, 2, 4), 4)
    done.touch()
    return {"message": message}


@pytest.mark.parametrize("how", ["ends", "stalls"])
def test_a_lost_rank_is_an_error_for_the_others(how, tmp_path):
    survivor, lost = run_ranks(2, lose_rank_1, how, tmp_path / "done")
    assert survivor["message"]
    assert lost["waited for"] or how == "ends"  # the error came while rank 1 stalled
