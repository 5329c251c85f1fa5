"""Images with a class: encoded files, arrays in lists, or paths; float32 [B, C, H, W] out.

Shapes: B rows, C channels, H height, W width.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
import torch

from curate.pipeline.corpus import Corpus
from curate.pipeline.images import Mode, decode, measure
from curate.pipeline.task import Columns
from curate.pipeline.tasks import options
from curate.pipeline.tasks.arrays import (
    combined,
    dense,
    fixed_lists,
    is_list,
    is_string,
    leaf_type,
    list_shape,
    storage_type,
)
from curate.pipeline.tasks.classification import Classification, described
from curate.pipeline.tasks.labels import find_labels
from curate.pipeline.tasks.schema import (
    features,
    id_column,
    inputs_left,
    is_image,
    is_square_list,
    sample,
    square_shape,
)
from curate.scorers.protocol import Batch

CHANNELS = (1, 3, 4)
TOLERANCE = 1.01
"""Floats this far above the scale still count as [0, scale]: resampling overshoots a little."""
SCALES = (1.0, 16.0, 255.0, 65535.0)
log = logging.getLogger("curate.tasks")


@dataclass
class ImageClassification(Classification):
    """One image column and a label.

    Pixels reach the model as float32 [C, H, W] in [0, 1]: encoded files and uint8 arrays are
    divided by 255, other arrays by `scale`, which holds for values of type `stored` (None: left as
    they are). `mean` and `std` per channel come after that, where given.
    """

    shape: tuple[int, int, int] = (1, 1, 1)
    stored: str = "encoded"
    scale: float | None = 255.0
    layout: str = "chw"
    resize: bool = False
    root: str = ""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    kind = "image_classification"

    @classmethod
    def from_corpus(
        cls,
        corpus: Corpus,
        *,
        inputs: str | Sequence[str] | None = None,
        label: str | None = None,
        classes: int | str | Sequence[str | int] | None = None,
        shape: str | Sequence[int] | None = None,
        layout: str | None = None,
        scale: float | str | None = None,
        mode: str | None = None,
        resize: str | int | Sequence[int] | None = None,
        mean: str | float | Sequence[float] | None = None,
        std: str | float | Sequence[float] | None = None,
        root: str | None = None,
    ) -> Self:
        """Return the task for this corpus; what is not given is read off its first rows.

        Raises:
            ValueError: no column is evidently the image or the label, or images do not agree.
        """
        label, labels = find_labels(corpus, label, classes)
        column = _image_column(corpus.schema, label, inputs)
        made = cls((column,), label, labels, id_column(corpus.schema))
        made.stored = _stored(corpus.schema.field(column).type)
        rows = sample(corpus, [column])
        if made.stored == "encoded":
            made.root = root if root is not None else corpus.root if _has_paths(rows) else ""
            made._from_files(
                rows, mode, None if resize is None else options.sizes(resize, "resize")
            )
        else:
            if resize is not None:
                raise ValueError(f"resize works on image files, but {column!r} holds arrays")
            given = None if shape is None else options.sizes(shape, "shape")
            made._from_arrays(corpus.schema, rows, given, layout, scale)
        made.mean = None if mean is None else options.numbers(mean, "mean")
        made.std = None if std is None else options.numbers(std, "std")
        return made

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        """Return the task that `describe` described."""
        kept = {k: v for k, v in description["preprocess"].items() if k not in ("labels", "mode")}
        for name in ("shape", "mean", "std"):
            kept[name] = None if kept.get(name) is None else tuple(kept[name])
        return cls(**described(description), **kept)

    def columns(self, schema: pa.Schema) -> Columns:
        """Return the image and label columns, and `id` where the corpus has it."""
        found = super().columns(schema)
        kind = schema.field(self.inputs[0]).type
        dims = list_shape(kind)
        if _stored(kind) != "encoded" and None not in dims and np.prod(dims) != np.prod(self.shape):  # type: ignore[arg-type]
            raise ValueError(
                f"column {self.inputs[0]!r} holds images of {_by(dims)} values, but the task's "  # type: ignore[arg-type]
                f"images are {_by(self.shape)}"
            )
        return found

    def preprocess(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "mode": self._mode,
            "stored": self.stored,
            "scale": self.scale,
            "layout": self.layout,
            "resize": self.resize,
            "root": self.root,
            "mean": None if self.mean is None else list(self.mean),
            "std": None if self.std is None else list(self.std),
        }

    def model_args(self) -> dict[str, Any]:
        """Return what a model must know: the number of classes and the input's shape."""
        return {"num_classes": len(self.labels.classes), "input_shape": self.shape}

    def encode(self, rows: pa.Table) -> pa.Table:
        """Return `image` (flat [C·H·W] uint8, or float32 in [0, 1]) and `label`."""
        (name,) = self.inputs
        column, label = rows.column(name), self.encode_label(rows)
        stored = _stored(column.type)
        pixels = self._decode(column) if stored == "encoded" else self._arrays(column, stored)
        columns = {"image": fixed_lists(pixels), "label": pa.array(label)}
        return pa.table(columns)

    def collate(self, encoded: pa.Table) -> Batch:
        """Return float32 images [B, C, H, W] and class indices."""
        pixels = dense(encoded.column("image"), "image")
        images = torch.from_numpy(pixels.astype(np.float32)).view(encoded.num_rows, *self.shape)
        if pixels.dtype == np.uint8:
            images.div_(255)
        if self.mean is not None:
            images = images - torch.tensor(self.mean).reshape(-1, 1, 1)
        if self.std is not None:
            images = images / torch.tensor(self.std).reshape(-1, 1, 1)
        targets = torch.from_numpy(encoded.column("label").to_numpy().copy())
        return Batch({"images": images}, targets, encoded.num_rows)

    @property
    def _mode(self) -> Mode:
        return "L" if self.shape[0] == 1 else "RGB"

    def _decode(self, column: pa.ChunkedArray) -> np.ndarray:
        size = self.shape[1:] if self.resize else None
        out = np.empty((len(column), *self.shape), dtype=np.uint8)
        for i, encoded in enumerate(_files(column, self.root, self.inputs[0])):
            pixels = decode(encoded, self._mode, size)
            if pixels.shape != self.shape:
                raise ValueError(
                    f"the image is {_by(pixels.shape[1:])}, but the task's images are "
                    f"{_by(self.shape[1:])} (height x width); --task-option "
                    f"resize={_by(self.shape[1:])} would fit them"
                )
            out[i] = pixels
        return out

    def _arrays(self, column: pa.ChunkedArray, stored: str) -> np.ndarray:
        pixels = _shaped(dense(column, self.inputs[0]), self.shape, self.layout)
        scale = self.scale if stored == self.stored else 1.0 if stored == "float" else 255.0
        if pixels.dtype == np.uint8 and scale == 255.0:
            return pixels
        scaled = pixels.astype(np.float32) / np.float32(scale or 1.0)
        if not np.isfinite(scaled).all():
            raise ValueError("a pixel is NaN or infinite")
        if scale is not None and scaled.size and scaled.max() > TOLERANCE:
            raise ValueError(
                f"a pixel is {pixels.max():g}, above the task's scale {scale:g}; "
                "--task-option scale=NUMBER sets the value that means white"
            )
        return scaled

    def _from_files(self, rows: pa.Table, mode: str | None, size: tuple[int, ...] | None) -> None:
        seen: Counter[tuple[int, int]] = Counter()
        colours, broken = set(), 0
        column = rows.column(0)
        for i in range(len(column)):
            try:
                (encoded,) = _files(column.slice(i, 1), self.root, self.inputs[0])
                colour, height, width = measure(encoded)
            except ValueError as error:
                broken, last = broken + 1, error
                continue
            seen[height, width] += 1
            colours.add(colour)
        if not seen:
            raise ValueError(f"no image of column {self.inputs[0]!r} can be read: {last}")
        if mode not in (None, "L", "RGB"):
            raise ValueError(f"option mode={mode!r} is unknown; choose L or RGB")
        height, width = seen.most_common(1)[0][0]
        if size is not None:
            height, width = (*size, *size)[:2]
            self.resize = True
        elif seen[height, width] < 0.9 * seen.total():
            sizes = ", ".join(_by(s) for s, _ in seen.most_common(3))
            raise ValueError(
                f"the images of column {self.inputs[0]!r} differ in size ({sizes}, …); "
                f"make them one size with --task-option resize={height}x{width}"
            )
        channels = 3 if (mode or ("RGB" if "RGB" in colours else "L")) == "RGB" else 1
        self.shape = (channels, height, width)
        log.info("images are %s, %s", _by((height, width)), "RGB" if channels == 3 else "gray")

    def _from_arrays(
        self,
        schema: pa.Schema,
        rows: pa.Table,
        given: tuple[int, ...] | None,
        layout: str | None,
        scale: float | str | None,
    ) -> None:
        (name,) = self.inputs
        dims = _dims(schema, rows, name)
        self.shape, self.layout = _image_shape(dims, given, layout, name)
        log.info(
            "reading column %r as images of %s (channels x height x width)", name, _by(self.shape)
        )
        if scale is not None:
            (self.scale,) = options.numbers(scale, "scale")
            if not self.scale > 0:
                raise ValueError(f"option scale={scale!r} must be positive")
        else:
            self.scale = _guess_scale(rows.column(0), self.stored, name)


def _image_column(schema: pa.Schema, label: str, inputs: str | Sequence[str] | None) -> str:
    if inputs is not None:
        found = list(options.names(inputs))
        missing = [name for name in found if name not in schema.names]
        if missing:
            raise ValueError(f"no column {missing[0]!r}; the corpus has {', '.join(schema.names)}")
    else:
        left = inputs_left(schema, label)
        found = [name for name in left if is_image(schema, name)]
        content = [name for name in found if not is_string(storage_type(schema.field(name).type))]
        found = content or found or [name for name in left if is_square_list(schema, name)]
        if not found and len(left) == 1 and is_list(storage_type(schema.field(left[0]).type)):
            found = left
    if len(found) != 1:
        raise ValueError(
            f"which column is the image? {', '.join(found) or 'none looks like one'} (of "
            f"{', '.join(schema.names)}); name it with --task-option inputs=COLUMN"
        )
    _stored(schema.field(found[0]).type)
    return found[0]


def _stored(kind: pa.DataType) -> str:
    """Return `encoded` for files in bytes or paths, else the sort of numbers in the lists."""
    kind = storage_type(kind)
    if not is_list(kind):
        if pt.is_struct(kind) or is_string(kind) or pt.is_binary(kind) or pt.is_large_binary(kind):
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


def _files(column: pa.ChunkedArray, root: str, name: str) -> "list[bytes]":
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


def _has_paths(rows: pa.Table) -> bool:
    array = combined(rows.column(0))
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


def _dims(schema: pa.Schema, rows: pa.Table, name: str) -> tuple[int, ...]:
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


def _image_shape(
    dims: tuple[int, ...], given: tuple[int, ...] | None, layout: str | None, name: str
) -> tuple[tuple[int, int, int], str]:
    if layout not in (None, "chw", "hwc"):
        raise ValueError(f"option layout={layout!r} is unknown; choose chw or hwc")
    if given is not None:
        full = given if len(given) == 3 else (1, *given)
        if len(full) != 3 or np.prod(full) != np.prod(dims):
            raise ValueError(f"shape={_by(given)} does not fit {_by(dims)} values in {name!r}")
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


def _is_hwc(dims: tuple[int, ...]) -> bool:
    return len(dims) == 3 and dims[0] not in CHANNELS and dims[2] in CHANNELS


def _shaped(pixels: np.ndarray, shape: tuple[int, int, int], layout: str) -> np.ndarray:
    """Return [n, C, H, W] from rows of any dimensions that hold one image each."""
    channels, height, width = shape
    if pixels.shape[1:] and np.prod(pixels.shape[1:]) != np.prod(shape) and len(pixels):
        raise ValueError(
            f"the image is {_by(pixels.shape[1:])}, but the task's images are {_by(shape)}"
        )
    if pixels.ndim == 3 and pixels.shape[1:] != (height, width) and channels == 1 and len(pixels):
        raise ValueError(
            f"the image is {_by(pixels.shape[1:])}, but the task's images are {_by(shape[1:])}"
        )
    if layout == "hwc":
        return pixels.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
    return pixels.reshape(-1, *shape)


def _guess_scale(column: pa.ChunkedArray, stored: str, name: str) -> float | None:
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


def _by(shape: Sequence[int]) -> str:
    return "x".join(str(s) for s in shape)
