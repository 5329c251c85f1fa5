"""Columns of numbers as images: their shape, their layout and the value that means white.

Shapes: C channels, H height, W width.
"""

import logging
from collections.abc import Sequence
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from curate.pipeline.tasks.arrays import (
    dense,
    is_binary,
    is_list,
    is_string,
    leaf_type,
    list_shape,
    storage_type,
)
from curate.pipeline.tasks.schema import features, square_shape

CHANNELS = (1, 3, 4)
TOLERANCE = 1.01
"""Floats this far above the scale still count as [0, scale]: resampling overshoots a little."""
SCALES = (1.0, 16.0, 255.0, 65535.0)
log = logging.getLogger("curate.tasks")


def stored_as(kind: pa.DataType) -> str:
    """Return `encoded` for files in bytes or paths, else the sort of numbers in the lists."""
    kind = storage_type(kind)
    if not is_list(kind):
        if pt.is_struct(kind) or is_string(kind) or is_binary(kind):
            return "encoded"
        raise ValueError(f"a column of type {kind} cannot hold images")
    leaf = leaf_type(kind)
    if pt.is_uint8(leaf):
        return "uint8"
    if pt.is_integer(leaf) or pt.is_boolean(leaf):
        return "integer"
    if pt.is_floating(leaf):
        return "float"
    raise ValueError(f"lists of {leaf} cannot be images")


def dims_of(schema: pa.Schema, rows: pa.Table, name: str) -> tuple[int, ...]:
    """Return the lengths of an array column: from its type, its metadata, or its first row."""
    shape = list_shape(schema.field(name).type)
    declared = features(schema).get(name, {}).get("shape")
    if None not in shape:
        return cast(tuple[int, ...], shape)
    if declared and len(declared) == len(shape):
        return tuple(declared)
    column = rows.column(0)
    for i in range(len(column)):
        try:
            return dense(column.slice(i, 1), name).shape[1:]
        except ValueError:
            continue
    raise ValueError(f"no row of column {name!r} holds a whole image")


def image_shape(
    dims: tuple[int, ...], given: tuple[int, ...] | None, layout: str | None, name: str
) -> tuple[tuple[int, int, int], str]:
    """Return (C, H, W) and the layout, `chw` or `hwc`, of lists of these lengths.

    Raises:
        ValueError: the lengths are no image, or do not hold the shape that is given.
    """
    if layout not in (None, "chw", "hwc"):
        raise ValueError(f"option layout={layout!r} is unknown; choose chw or hwc")
    if given is not None:
        full = given if len(given) == 3 else (1, *given)
        if len(full) != 3 or np.prod(full) != np.prod(dims):
            raise ValueError(f"shape={by(given)} does not fit {by(dims)} values in {name!r}")
        return full, layout or ("hwc" if _is_hwc(dims) else "chw")
    if len(dims) == 1:
        square = square_shape(dims[0])
        if square is None:
            raise ValueError(
                f"column {name!r} holds {dims[0]} values, which is no square image; "
                "say --task-option shape=CxHxW"
            )
        return square, layout or "chw"
    if len(dims) == 2:
        return (1, *dims), "chw"
    if len(dims) != 3:
        raise ValueError(f"column {name!r} has {len(dims)} dimensions; an image has two or three")
    layout = layout or ("hwc" if _is_hwc(dims) else "chw")
    height, width, channels = dims if layout == "hwc" else (dims[1], dims[2], dims[0])
    return (channels, height, width), layout


def shaped(pixels: np.ndarray, shape: tuple[int, int, int], layout: str) -> np.ndarray:
    """Return [n, C, H, W] from rows of any dimensions that hold one image each."""
    channels, height, width = shape
    if pixels.shape[1:] and np.prod(pixels.shape[1:]) != np.prod(shape) and len(pixels):
        raise ValueError(
            f"the image is {by(pixels.shape[1:])}, but the task's images are {by(shape)}"
        )
    if pixels.ndim == 3 and pixels.shape[1:] != (height, width) and channels == 1 and len(pixels):
        raise ValueError(
            f"the image is {by(pixels.shape[1:])}, but the task's images are {by(shape[1:])}"
        )
    if layout == "hwc":
        return pixels.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
    return pixels.reshape(-1, *shape)


def guess_scale(column: pa.ChunkedArray, stored: str, name: str) -> float | None:
    """Return the value that means white, from the type or the largest values of the sample.

    One image in twenty may lie above: it is taken for broken, not for the rule.
    """
    lows, highs = _extremes(column, name)
    high = float(np.quantile(highs, 0.95, method="higher"))
    if stored == "uint8":
        if high <= 16:
            log.warning(
                "column %r is uint8 but its largest value is %g: it is divided by 255 all the "
                "same; --task-option scale=%g would use the whole range",
                name,
                high,
                high or 1,
            )
        return 255.0
    if np.quantile(lows, 0.05, method="lower") < 0:
        log.warning("column %r has negative values: its pixels are taken as they are", name)
        return None
    if high <= TOLERANCE:
        return 1.0
    scale = next((s for s in SCALES[1:] if high <= s), high)
    log.info("column %r goes up to %g in the sample: pixels are divided by %g", name, high, scale)
    return scale


def by(shape: Sequence[int | None]) -> str:
    """Return a shape as text: 3x32x32."""
    return "x".join(str(s) for s in shape)


def _extremes(column: pa.ChunkedArray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and largest value of every image that is whole and finite."""
    found = []
    for i in range(len(column)):
        try:
            pixels = dense(column.slice(i, 1), name)
        except ValueError:
            continue  # its own row error, later
        if pixels.size and np.isfinite(pixels).all():
            found.append((float(pixels.min()), float(pixels.max())))
    if not found:
        raise ValueError(f"no row of column {name!r} holds a whole image")
    lows, highs = np.array(found).T
    return lows, highs


def _is_hwc(dims: tuple[int, ...]) -> bool:
    return len(dims) == 3 and dims[0] not in CHANNELS and dims[2] in CHANNELS
