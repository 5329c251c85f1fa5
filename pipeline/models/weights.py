"""Weights files: one entry per tied group, safetensors or a pickle read with `weights_only`."""

import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

WHOLE = ("model.safetensors", "pytorch_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def weight_files(folder: str | Path) -> list[Path]:
    """Return the folder's weights: one file, or the shards of an index, in order; [] if none.

    Raises:
        ValueError: an index names a file that is not there.
    """
    for whole, index in zip(WHOLE, INDEXES, strict=True):
        if (path := Path(folder) / whole).is_file():
            return [path]
        if (listing := Path(folder) / index).is_file():
            names = sorted(set(json.loads(listing.read_text())["weight_map"].values()))
            missing = [name for name in names if not (Path(folder) / name).is_file()]
            if missing:
                raise ValueError(f"{listing} names {missing[0]}, which is not there")
            return [Path(folder) / name for name in names]
    return []


def weight_shapes(folder: str | Path) -> dict[str, list[int]]:
    """Return the shapes of the weights in a folder by name; nothing is loaded of safetensors."""
    return {name: shape for file in weight_files(folder) for name, shape in _shapes(file)}


def save_weights(path: str | Path, model: nn.Module) -> None:
    """Write the model's state dict, each tied weight once, under its first name."""
    state = _state(model)
    leaders = _tied(state)
    kept = {name: tensor for name, tensor in state.items() if leaders[name] == name}
    try:
        save_file({k: _own(v) for k, v in kept.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from None
        raise OSError(f"cannot write {path}: {error}") from error


def load_weights_file(model: nn.Module, folder: str | Path) -> None:
    """Copy the folder's weights into the model, in place, tensor by tensor.

    A tied weight may stand in the file under any of its names.

    Raises:
        ValueError: there are no weights, or names or shapes do not fit; nothing is copied then.
    """
    files = weight_files(folder)
    if not files:
        raise ValueError(f"{folder} has no weights ({' or '.join(WHOLE)})")
    state = _state(model)
    _refuse_misfit(str(folder), state, {k: s for f in files for k, s in _shapes(f)})
    with torch.no_grad():
        for file in files:
            for name, tensor in _tensors(file):
                state[name].copy_(tensor)


def copy_weights(model: nn.Module, source: nn.Module) -> None:
    """Copy the weights of one model into another, in place.

    Raises:
        ValueError: names or shapes do not fit; nothing is copied then.
    """
    state, new = _state(model), _state(source)
    shapes = {name: list(tensor.shape) for name, tensor in new.items()}
    _refuse_misfit(type(source).__name__, state, shapes)
    with torch.no_grad():
        for name, tensor in new.items():
            state[name].copy_(tensor)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model itself from under `torch.compile` and data-parallel wrappers."""
    if isinstance(model, DataParallel | DistributedDataParallel):
        return unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)  # torch.compile's
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = dict(unwrapped(model).state_dict())
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"the model's state {odd[0]!r} is no tensor; safetensors cannot hold it")
    return state


def _tied(state: dict[str, Tensor]) -> dict[str, str]:
    """Return each name's leader: the first name of the same memory."""
    first: dict[tuple[object, ...], str] = {}
    return {
        name: first.setdefault((t.data_ptr(), t.shape, t.stride(), t.dtype), name)
        if t.numel()
        else name
        for name, t in state.items()
    }


def _own(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU in memory of its own, which safetensors insists on."""
    tensor = tensor.detach().cpu().contiguous()
    shared = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone() if shared else tensor


def _refuse_misfit(folder: str, state: dict[str, Tensor], shapes: dict[str, list[int]]) -> None:
    leaders = _tied(state)
    present = {leaders[name] for name in shapes if name in state}
    missing = [name for name, leader in leaders.items() if leader == name and name not in present]
    unknown = [name for name in shapes if name not in state]
    wrong = [n for n in state if n in shapes and shapes[n] != list(state[n].shape)]
    said = []
    if missing:
        said.append(f"the model's {_few(missing)} are not in the file")
    if unknown:
        said.append(f"the file's {_few(unknown)} are not in the model")
    if wrong:
        name = wrong[0]
        said.append(f"{name} is {shapes[name]} in the file, {list(state[name].shape)} in the model")
    if said:
        raise ValueError(f"the weights in {folder} do not fit the model: {'; '.join(said)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    if file.suffix == ".safetensors":
        with _opened(file) as tensors:
            for name in tensors.keys():
                yield name, tensors.get_slice(name).get_shape()
    else:
        for name, tensor in _tensors(file):
            yield name, list(tensor.shape)


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        with _opened(file) as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)
        return
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} cannot be read as plain weights: {_first_line(error)}") from error
    for name, tensor in state.items():
        yield name, tensor


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(os.fspath(file), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
