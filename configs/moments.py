"""What an optimizer keeps of the one tensor that it steps, under its own names: AdamW's exp_avg,
exp_avg_sq and step, another one's momentum. Which of it a checkpoint holds, and its way back."""

import copy

import torch


def stepped(optimizer) -> torch.Tensor:
    [master] = optimizer.param_groups[0]["params"]
    return master


def check(optimizer):
    """ValueError now, not at the first save, for an optimizer that could not be saved."""
    master = stepped(optimizer)
    kept, shape = optimizer.state.get(master), master.shape
    try:
        if not kept:  # it makes its state in its first step: see what that is on two elements
            probe = torch.zeros(2, device=master.device)
            probe.grad, shape = torch.zeros_like(probe), probe.shape
            twin = copy.deepcopy(optimizer, {id(master): probe})
            twin.step()
            kept = twin.state[probe]
        odd = [name for name, value in kept.items() if isinstance(value, (list, dict))
               or torch.is_tensor(value) and value.shape not in ((), shape)]
    except TypeError as error:  # such as LBFGS, whose step wants a closure
        odd = [str(error)]
    if odd:
        raise ValueError(f"{type(optimizer).__name__} cannot be saved and resumed ({odd[0]}); use "
                         "one that steps without a closure and keeps single values or one per "
                         "element")


def per_element(optimizer) -> dict[str, torch.Tensor]:
    """What it keeps for each element; nothing before its first step."""
    master = stepped(optimizer)
    return {name: value for name, value in optimizer.state[master].items()
            if torch.is_tensor(value) and value.shape == master.shape}


def scalars(optimizer) -> dict:
    """The rest as plain values, and the optimizer's name as "optimizer"."""
    arrays = per_element(optimizer)
    rest = {name: value.item() if torch.is_tensor(value) else value
            for name, value in optimizer.state[stepped(optimizer)].items() if name not in arrays}
    return {"optimizer": type(optimizer).__name__, **rest}


def restore(optimizer, kinds, saved: dict):
    """Its state for a resume: zeros to be filled for each of `kinds`, and the scalars as saved."""
    own = type(optimizer).__name__
    if saved["optimizer"] != own:
        raise ValueError(f"the checkpoint's optimizer is {saved['optimizer']}, this run's is "
                         f"{own}; resume with the former, or start another run")
    state = {kind: torch.zeros_like(stepped(optimizer)) for kind in kinds}
    state |= {name: torch.tensor(value) if isinstance(value, float) else value
              for name, value in saved.items() if name != "optimizer"}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
