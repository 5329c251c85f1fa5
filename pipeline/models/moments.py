"""Adam's moments beside a checkpoint's weights: ours, or those of the Hugging Face Trainer.

`moments.safetensors` holds `exp_avg/NAME` and `exp_avg_sq/NAME` for each trained parameter, and in
its header the number of steps, betas and eps. They are no part of what the checkpoint is: its
digest is the same with and without them. The Trainer's `optimizer.pt` names parameters by number;
the numbers follow its two groups, those that decay first.
"""

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from curate.pipeline.models.weights import unwrapped
from curate.scorers.adam_readout import Moments
from curate.scorers.prepared import named_parameters

FILE, TRAINER_FILE = "moments.safetensors", "optimizer.pt"
HEADER = "curate.moments"
MEAN, SQUARE = "exp_avg", "exp_avg_sq"


def save_moments(folder: str | Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write the moments of every trained parameter; zeros where no step was taken yet."""
    groups = optimizer.param_groups
    tensors: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    of = {id(p): optimizer.state.get(p, {}) for group in groups for p in group["params"]}
    for name, p in named_parameters(unwrapped(model)).items():
        if id(p) not in of:
            continue
        state = of[id(p)]
        steps[name] = int(state.get("step", 0))
        for key in (MEAN, SQUARE):
            value = state.get(key, torch.zeros_like(p))
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    said = {"steps": steps, "betas": list(groups[0]["betas"]), "eps": groups[0]["eps"]}
    # One entry: the order of several would not be the same in every process.
    save_file(tensors, Path(folder) / FILE, {HEADER: json.dumps(said, sort_keys=True)})


def moments_file(checkpoint: str | Path) -> Path:
    """Return the file that holds the moments of the checkpoint in this folder.

    Raises:
        ValueError: there is none.
    """
    for name in (FILE, TRAINER_FILE):
        if (path := Path(checkpoint) / name).is_file():
            return path
    raise ValueError(
        f"checkpoint {checkpoint} has no Adam moments ({FILE}, or the Trainer's "
        f"{TRAINER_FILE}): train with --save-moments, or ask for no scorer that reads "
        "them (mode=less, curvature=adam)"
    )


def moments_digest(checkpoint: str | Path) -> str:
    """Return the sha256 of the file that holds the moments of the checkpoint in this folder."""
    with moments_file(checkpoint).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_moments(checkpoint: str | Path, model: nn.Module) -> Moments:
    """Return the moments of the model's trainable parameters, by their names, on the CPU.

    Raises:
        ValueError: there are none, the file is damaged, or it is of other parameters or no Adam's.
    """
    path = moments_file(checkpoint)
    params = named_parameters(unwrapped(model))
    found = _own(path) if path.name == FILE else _of_trainer(path, unwrapped(model))
    trained = [name for name, p in params.items() if p.requires_grad]
    if absent := [name for name in trained if name not in found.mean]:
        raise ValueError(
            f"{path} has no moments of {absent[0]}, which can be trained in the model: name the "
            "model as it was trained by --model, or train again"
        )
    for name in trained:
        for moment in (found.mean[name], found.square[name]):
            if moment.shape != params[name].shape:
                raise ValueError(
                    f"{path} holds moments of shape {list(moment.shape)} for {name}, which is "
                    f"{list(params[name].shape)}: it belongs to another model"
                )
        if not (found.mean[name].isfinite().all() and found.square[name].isfinite().all()):
            raise ValueError(f"{path} holds moments of {name} that are not finite: train again")
        if (found.square[name] < 0).any():
            raise ValueError(f"{path} is damaged: exp_avg_sq of {name} is negative")
    return found


def _own(path: Path) -> Moments:
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {})[HEADER])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        mean, square, (beta1, beta2) = _part(tensors, MEAN), _part(tensors, SQUARE), said["betas"]
        return Moments(mean, square, said["steps"], beta1, beta2, said["eps"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {_first_line(error)}") from None


def _part(tensors: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{key}/"): v for n, v in tensors.items() if n.startswith(f"{key}/")}


# -- the Trainer's


def _of_trainer(path: Path, model: nn.Module) -> Moments:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        groups, state = saved["param_groups"], saved["state"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as an optimizer's state: {_first_line(error)}"
        ) from None
    ways = {(*g.get("betas", ()), g.get("eps")) for g in groups if g["params"]}
    odd = [s for s in state.values() if not {"step", MEAN, SQUARE} <= s.keys()]
    if odd or len(ways) != 1 or len(way := ways.pop()) != 3:
        raise ValueError(
            f"{path} holds no plain Adam's state (exp_avg, exp_avg_sq, one pair of betas): train "
            "with adamw"
        )
    names = _names(path, groups, model)
    params = named_parameters(model)
    found = {name: state.get(number, {}) for number, name in names.items()}
    return Moments(
        {n: s.get(MEAN, torch.zeros_like(params[n])) for n, s in found.items()},
        {n: s.get(SQUARE, torch.zeros_like(params[n])) for n, s in found.items()},
        {n: int(s.get("step", 0)) for n, s in found.items()},
        *way,
    )


def _names(path: Path, groups: Sequence[Mapping[str, Any]], model: nn.Module) -> dict[int, str]:
    """Return the parameter that each number stands for, as the Trainer groups them.

    An optimizer that was given names has kept them; one with a single group has the model's order.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if all("param_names" in group for group in groups):
        listed = [list(group["param_names"]) for group in groups]
    elif len(groups) == 1:
        listed = [trained]
    else:
        decaying = _decaying(model)
        listed = [[n for n in trained if n in decaying], [n for n in trained if n not in decaying]]
    numbers = [list(group["params"]) for group in groups]
    if [len(n) for n in numbers] != [len(n) for n in listed]:
        raise ValueError(
            f"{path} was not written for the model's trainable parameters: it groups "
            f"{' + '.join(str(len(n)) for n in numbers)} of them, the Trainer would group "
            f"{' + '.join(str(len(n)) for n in listed)}; where some were frozen, name a factory "
            "that freezes them by --model file.py:factory"
        )
    return {
        number: name
        for some, called in zip(numbers, listed, strict=True)
        for number, name in zip(some, called, strict=True)
    }


def _decaying(model: nn.Module) -> set[str]:
    from transformers import Trainer

    # The method reads nothing of the trainer itself.
    return set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
