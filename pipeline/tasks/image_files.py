"""Columns of image files: bytes, structs of bytes and path as `datasets` writes, or paths."""

import os
from collections import Counter
from typing import cast

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from curate.pipeline.tasks.arrays import combined, is_string
from curate.pipeline.tasks.images import Mode, measure


def files(column: pa.ChunkedArray, root: str, name: str) -> list[bytes]:
    """Return the encoded bytes of each row, read from its file where the row holds a path."""
    array = combined(column)
    if pt.is_struct(array.type):
        content = pc.struct_field(array, "bytes")
        has_path = array.type.get_field_index("path") >= 0
        paths = pc.struct_field(array, "path") if has_path else pa.nulls(len(array))
    elif is_string(array.type):
        content, paths = pa.nulls(len(array)), array
    else:
        content, paths = array, pa.nulls(len(array))
    return [
        encoded if encoded is not None else _read(path, root, name)
        for encoded, path in zip(content.to_pylist(), paths.to_pylist(), strict=True)
    ]


def survey(
    column: pa.ChunkedArray, root: str, name: str
) -> tuple[set[Mode], Counter[tuple[int, int]]]:
    """Return the modes of the images and how many there are of each (height, width).

    Files that cannot be read are left out: each is its own row's error, later.

    Raises:
        ValueError: no file can be read.
    """
    modes: set[Mode] = set()
    sizes: Counter[tuple[int, int]] = Counter()
    reason = "there is none"
    for i in range(len(column)):
        try:
            (encoded,) = files(column.slice(i, 1), root, name)
            mode, height, width = measure(encoded)
        except ValueError as error:
            reason = str(error)
            continue
        modes.add(mode)
        sizes[height, width] += 1
    if not sizes:
        raise ValueError(f"no image of column {name!r} can be read: {reason}")
    return modes, sizes


def has_paths(column: pa.ChunkedArray) -> bool:
    """Tell whether some rows name a file instead of holding it."""
    array = combined(column)
    if pt.is_struct(array.type):
        return bool(pc.struct_field(array, "bytes").null_count)
    return is_string(array.type)


def _read(path: str | None, root: str, name: str) -> bytes:
    if path is None:
        raise ValueError(f"image column {name!r} is null")
    whole = path if "://" in path or os.path.isabs(path) else f"{root.rstrip('/')}/{path}"
    try:
        with fsspec.open(whole, "rb") as file:
            return cast(bytes, file.read())
    except OSError as error:
        raise ValueError(f"image file {whole} cannot be read ({error})") from None
