"""Tensors that a run makes once and keeps beside its table: written whole, checked when read.

One safetensors file, whose header says in one entry what run they are of, their digest, and more.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from curate.pipeline.storing.storage import Folder


def kept_bytes(tensors: Mapping[str, Tensor], entry: str, said: Mapping[str, Any]) -> bytes:
    """Return the file's bytes; `said` holds `run` and goes into the header as `entry`."""
    on_cpu = {name: v.cpu() for name, v in tensors.items()}
    told = {**said, "digest": digest_of(on_cpu)}
    # One entry: the order of several would not be the same in every process.
    return save(on_cpu, {entry: json.dumps(told, sort_keys=True)})


def read_kept(
    folder: Folder, name: str, entry: str, run: str, all_of_it: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors that the run kept, and what it said of them.

    Raises:
        ValueError: the file is of another run, or damaged (`all_of_it`: by its digest).
    """
    path = folder.local_path(name)
    try:
        found = load(folder.read(name)) if path is None else load_file(path)
        said = said_of(folder, name, entry)
    except (SafetensorError, json.JSONDecodeError):
        found, said = {}, {}
    is_whole = not all_of_it or said.get("digest") == digest_of(found)
    if said.get("run") != run or not is_whole:
        raise ValueError(f"{folder.full_name(name)} is damaged: delete it and run the same command")
    return found, said


def said_of(folder: Folder, name: str, entry: str) -> dict[str, Any]:
    """Return what the file's header says of it."""
    with folder.open(name) as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    said: dict[str, Any] = json.loads(header.get("__metadata__", {}).get(entry, "{}"))
    return said


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and numbers."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()
