"""The three model families against reference tensors, at tp 1, 2 and 4, in both schemes.

GOLDEN_DIR names another folder of such files; sizes are read from their metadata. Of the tensors
that come with a set, the files here hold inputs, outputs and those gradients that no other set
covers; whatever a file holds is compared.
"""

import dataclasses
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors import safe_open

import convert
import model as m
import tp

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
SETS = sorted(
    p.name.removesuffix("_weights.safetensors")
    for p in GOLDEN.glob("*_weights.safetensors")
    if "tokenizer" not in p.name
)


def read(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def config(meta):
    sizes = json.loads(meta["config"])
    fields = {f.name for f in dataclasses.fields(m.ModelConfig)}
    ratio = {"rope_t_ratio": 1.0}  # of the sets that do not name one
    return m.ModelConfig(**ratio | {k: v for k, v in sizes.items() if k in fields})


@torch.no_grad()
def fill(net, weights):
    """Copy a control checkpoint with its base into the model: every name exactly once."""
    own = dict(net.named_parameters()) | dict(net.named_buffers())
    values = {
        convert.from_nvidia(name.replace("base_model.logvar", "logvar")): value
        for name, value in weights.items()
        # the base's logvar counts
        if not name.endswith("pos_embedder.seq") and not name.startswith("logvar.")
    }
    assert set(values) == set(own)
    for name, value in values.items():
        own[name].copy_(tp.shard(value, getattr(own[name], "tp_dim", None)))


def condition(io, views):
    cond = m.Condition(io["text"], io["fps"], io["padding_mask"], io["hint"])
    if views == 1:
        return cond
    cond = cond._replace(view_index=io["view_indices"].view(len(io["x0"]), views, -1)[:, :, 0])
    return m.give(cond, io["condition_mask"], io["x0"], io["augment_sigma"], io["augment_noise"])


def compute(net, io, views):
    """Every tensor of the golden set, by the functions that training uses; leaves the gradients in
    net.
    """
    cond, sigma = condition(io, views), io["sigma"]
    x_t = io["x0"] + m.per_row(sigma) * io["epsilon"]
    _, c_out, _, c_noise = m.coefficients(sigma)
    net_input = m.network_input(x_t, sigma, cond)
    out = {"net_input": net_input, "timesteps": c_noise, "logvar_out": net.logvar(c_noise),
           "weight_per_sigma": c_out.flatten() ** -2}
    with torch.no_grad():
        out["net_output"] = net(net_input, c_noise, cond)
        out["base_only_output"] = net(net_input, c_noise, cond._replace(hint=None))
        out["x0_pred"] = m.denoise(net, x_t, sigma, cond)
        out["edm_loss"] = (
            m.per_row(out["weight_per_sigma"]) * (io["x0"] - out["x0_pred"]) ** 2
        ).mean()
    noise = m.Noise(
        sigma,
        io["epsilon"],
        torch.ones_like(sigma),
        io.get("augment_sigma"),
        io.get("augment_noise"),
        cond.known,
    )
    out["loss"] = m.training_loss(net, io["x0"], cond, noise)
    out["loss"].backward()
    return {k: v.detach().float() for k, v in out.items()}


def gradients(net):
    """name -> whole gradient of every parameter that has one."""
    grads = {}
    for name, p in net.named_parameters():
        if p.grad is None:
            continue
        dim, grad = getattr(p, "tp_dim", None), p.grad.float().contiguous()
        if tp.size() > 1:
            parts = [torch.empty_like(grad) for _ in range(tp.size())]
            torch.distributed.all_gather(parts, grad, group=tp._tp_group)
            grad = sum(parts) if dim is None else torch.cat(parts, dim)
        grads[name] = grad.cpu()
    return grads


def error(a, b):
    a, b = a.cpu().double(), b.cpu().double()
    assert a.shape == b.shape
    return (a - b).abs().max().item() / b.abs().max().item() if b.any() else a.abs().max().item()


@torch.no_grad()
def rope2_errors(name, net, io, views):
    """The same weights and inputs with the base's time frequencies of a released base."""
    if not (GOLDEN / f"rope2_{name}.safetensors").exists():
        return {}
    wanted, meta = read(f"rope2_{name}")
    before, net.base.rope_t_ratio = net.base.rope_t_ratio, config(meta).rope_t_ratio
    cond, x, c_noise = condition(io, views), io["net_input"], io["timesteps"]
    bare = cond._replace(hint=None)
    found = {"net_output": net(x, c_noise, cond), "base_only_output": net(x, c_noise, bare)}
    if tp.size() == 1:  # else a rank may have the angles of its own tokens only
        half = wanted["rope_angles"].shape[-1] // 2
        wanted["cos"] = wanted["rope_angles"][..., :half].cos().view(1, -1, 1, half)
        found["cos"] = net.base.context(x, c_noise, cond).cos
    net.base.rope_t_ratio = before
    return {f"rope2 {key}": error(value, wanted[key]) for key, value in found.items()}


def check(name, tp_size, dtype=torch.float32, keep=(), scheme="megatron"):
    """Largest relative errors (outputs, gradients) of one set, each within its bound."""
    weights, meta = read(f"{name}_weights")
    cfg = config(meta)
    device = tp.init(tp_size, cfg.num_heads)
    tp.use_scheme(scheme)
    io = {k: v.to(device) for k, v in read(f"{name}_io")[0].items()}
    net = m.build(cfg, device, dtype)
    net.keep = list(keep)
    fill(net, weights)
    tp.gather_weights(net.parameters())
    out = compute(net, io, cfg.n_views)
    outputs = {k: error(v, io[k].reshape(v.shape)) for k, v in out.items()}
    if dtype == torch.float32:
        outputs |= rope2_errors(name, net, io, cfg.n_views)
    grads = gradients(net)
    tp.shutdown()
    untouched = {convert.from_nvidia("net." + k) for k in json.loads(meta["no_grad"])}
    assert set(grads).isdisjoint(untouched)
    control = {k for k, _ in net.named_parameters() if k.startswith("control.")}
    assert set(grads) | untouched == control
    wanted = {k.removeprefix("grad."): v for k, v in io.items() if k.startswith("grad.")}
    wanted = {convert.from_nvidia(k): v for k, v in wanted.items()}
    errors = {k: error(grads[k], v) for k, v in wanted.items()}
    if dtype == torch.bfloat16:
        assert outputs["net_output"] < 2e-2 and outputs["loss"] < 1e-2, outputs
        return outputs["net_output"], outputs["loss"]
    assert max(outputs.values()) < 1e-5, outputs
    assert max(errors.values(), default=0) < 1e-4, {k: v for k, v in errors.items() if v >= 1e-4}
    return max(outputs.values()), max(errors.values(), default=0)


def check_all(tp_size, dtype=torch.float32):
    results = {}
    for name, scheme in itertools.product(SETS, ("megatron", "ulysses")):
        if config(read(f"{name}_weights")[1]).num_heads % tp_size == 0:
            results[f"{name}, {scheme}"] = check(name, tp_size, dtype, scheme=scheme)
    return results


def test_there_are_golden_sets():
    assert SETS, f"no *_weights.safetensors in {GOLDEN}"


@pytest.mark.parametrize("name", SETS)
def test_float32(name):
    print("\n%s: outputs %.1e, gradients %.1e" % (name, *check(name, 1)))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("policies", [["attention_saved"], ["full", "mlp_saved", "residual_saved"]])
def test_recomputation_changes_nothing(name, policies):
    check(name, 1, keep=policies * 10)


@pytest.mark.parametrize("name", SETS)
def test_bfloat16(name):
    print("\n%s: output %.1e, loss %.1e" % (name, *check(name, 1, torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_tensor_parallel(tp_size, dtype):
    if 0 < torch.cuda.device_count() < tp_size:
        pytest.skip("too few GPUs")
    second = "gradients" if dtype == torch.float32 else "loss"
    for errors in run_ranks(tp_size, check_all, tp_size, dtype):
        for name, (outputs, others) in errors.items():
            print(f"\ntp {tp_size}, {dtype}, {name}: outputs {outputs:.1e}, {second} {others:.1e}")
