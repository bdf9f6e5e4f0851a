"""What the optimizer of a tp.FlatParams keeps, under its own names: AdamW's exp_avg, exp_avg_sq and
step, another one's momentum. Which of it a checkpoint holds, and its way back."""

import copy

import torch


def check(flat):
    """ValueError now, not at the first save, for an optimizer that could not be saved."""
    kept, shape = flat.optimizer.state.get(flat.master), flat.master.shape
    try:
        if not kept:  # it makes its state in its first step: see what that is on two elements
            probe = torch.zeros(2, device=flat.master.device)
            probe.grad, shape = torch.zeros_like(probe), probe.shape
            twin = copy.deepcopy(flat.optimizer, {id(flat.master): probe})
            twin.step()
            kept = twin.state[probe]
        odd = [name for name, value in kept.items() if isinstance(value, (list, dict))
               or torch.is_tensor(value) and value.shape not in ((), shape)]
    except TypeError as error:  # such as LBFGS, whose step wants a closure
        odd = [str(error)]
    if odd:
        raise ValueError(f"{type(flat.optimizer).__name__} cannot be saved and resumed ({odd[0]}); "
                         "use one that steps without a closure and keeps single values or one per "
                         "element")


def scalars(flat) -> dict:
    """What it keeps besides flat.state(), as plain values, and its name as "optimizer"."""
    rest = {name: value.item() if torch.is_tensor(value) else value
            for name, value in flat.optimizer.state[flat.master].items()
            if name not in flat.state()}
    return {"optimizer": type(flat.optimizer).__name__, **rest}


def restore(flat, kinds, saved: dict):
    """Its state for a resume: zeros to be filled for each of `kinds`, and the scalars as saved."""
    own = type(flat.optimizer).__name__
    if saved["optimizer"] != own:
        raise ValueError(f"the checkpoint's optimizer is {saved['optimizer']}, this run's is "
                         f"{own}; resume with the former, or start another run")
    state = {kind: torch.zeros_like(flat.master) for kind in kinds}
    state |= {name: torch.tensor(value) if isinstance(value, float) else value
              for name, value in saved.items() if name != "optimizer"}
    groups = flat.optimizer.state_dict()["param_groups"]
    flat.optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
