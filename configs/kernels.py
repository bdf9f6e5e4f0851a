"""Which attention kernel this machine gets: the fastest that is seen running forward and backward.

F.scaled_dot_product_attention stays what model.py calls; torch's own switches decide what it runs.
And whether torch.compile, which makes the other kernels, has what it needs.
"""

import importlib.metadata
import re
import warnings

import torch

NAMES = ("cudnn", "flash", "mem_efficient", "math")  # fastest first, as measured on Hopper


def check_compiler(device: torch.device):
    """ValueError if torch.compile can build nothing for a GPU: before weights are read, and in a
    sentence, where the first kernel would end a run in a traceback."""
    if device.type != "cuda":
        return
    x = torch.zeros(8, device=device)
    try:
        torch.compile(lambda x: x.sin())(x)
    except Exception as error:  # compiler, linker and driver fail in ways of their own
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        reason = next((line for line in lines if "Error:" in line), lines[0])
        raise ValueError(
            f"torch.compile builds no kernels here: {reason[:300]}; it needs a C compiler and "
            "Python's headers (Debian: gcc and python3-dev), which slim containers lack, and "
            "folders for what it makes (TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR)") from None


def choose_attention(attend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Leave torch only the fastest kernel for attend(q, k, v), each (B, L, N, K); its name.

    CPUs have but one. On Hopper flash-attn-4, where it is installed, comes before cuDNN.
    """
    if device.type != "cuda":
        return "torch"
    rng = torch.Generator(device).manual_seed(0)
    q = torch.randn(1, 512, 2, head_dim, generator=rng, device=device).to(dtype).requires_grad_()

    def probe():  # output and gradient
        with warnings.catch_warnings(action="ignore"):  # torch explains each refusal
            out = attend(q, q, q)
            return out.detach(), *torch.autograd.grad(out.square().sum(), q)

    for name in NAMES:
        use_only(name)
        try:
            found = probe()
        except RuntimeError:  # refuses the device, the precision or the head width
            continue
        use_only("flash")  # flash-attn-4 takes its place
        verdict = activate_flash_attention_4(probe, found) if dtype == torch.bfloat16 else ""
        if verdict.startswith("flash-attn-4"):
            return verdict
        use_only(name)
        return name + verdict
    raise RuntimeError(f"no attention kernel of this torch runs on {device} in {dtype} with head "
                       f"width {head_dim}")


def use_only(name):
    for other in NAMES:
        getattr(torch.backends.cuda, f"enable_{other}_sdp")(other == name)


def activate_flash_attention_4(probe, wanted) -> str:
    """Its name and release if torch's flash kernel is now flash-attn-4 and agrees with `wanted`;
    else why not, "" where it is not installed."""
    try:
        release = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return ""
    try:
        torch.nn.attention.activate_flash_attention_impl("FA4")
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(probe(), wanted)]
        if max(errors) < 2e-2:  # two bfloat16 kernels differ by 3e-3 to 6e-3
            return f"flash-attn-4 {release}"
        problem = f"its results are off by {max(errors):.1e}"
    except Exception as error:  # an unfit release fails in any way
        plain = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # without colours
        reason = next(filter(str.strip, plain.splitlines()), "").strip()
        problem = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    if torch.nn.attention.current_flash_attention_impl():  # else torch warns, on every rank
        torch.nn.attention.restore_flash_attention_impl()
    return (f" (not flash-attn-4 {release}: {problem}; torch {torch.__version__} was seen working "
            "with 4.0.0b18 and heads 128 wide)")
