"""Images with a class: encoded files, arrays in lists, or paths; float32 [B, C, H, W] out.

Shapes: B rows, C channels, H height, W width.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks import options
from curate.pipeline.tasks.arrays import (
    dense,
    fixed_lists,
    is_list,
    is_string,
    list_shape,
    storage_type,
)
from curate.pipeline.tasks.blank import zero_inputs
from curate.pipeline.tasks.classification import Classification, described
from curate.pipeline.tasks.image_files import files, has_paths, survey
from curate.pipeline.tasks.images import Mode, decode
from curate.pipeline.tasks.labels import find_labels
from curate.pipeline.tasks.pixels import (
    TOLERANCE,
    by,
    dims_of,
    guess_scale,
    image_shape,
    shaped,
    stored_as,
)
from curate.pipeline.tasks.schema import (
    id_column,
    inputs_left,
    is_image,
    is_square_list,
    sample,
)
from curate.pipeline.tasks.task import Columns
from curate.scorers.protocol import Batch

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
        model: str | None = None,
        inputs: str | Sequence[str] | None = None,
        label: str | None = None,
        classes: int | str | Sequence[str | int] | None = None,
        shape: str | Sequence[int] | None = None,
        layout: str | None = None,
        scale: int | float | str | None = None,
        mode: str | None = None,
        resize: str | int | Sequence[int] | None = None,
        mean: str | int | float | Sequence[float] | None = None,
        std: str | int | float | Sequence[float] | None = None,
        root: str | None = None,
    ) -> "ImageClassification":
        """Return the task for this corpus; what is not given is read off its first rows.

        Raises:
            ValueError: no column is evidently the image or the label, or images do not agree.
        """
        label, labels = find_labels(corpus, label, classes, model)
        column = _image_column(corpus.schema, label, inputs)
        made = cls((column,), label, labels, id_column(corpus.schema))
        made.stored = stored_as(corpus.schema.field(column).type)
        rows = sample(corpus, [column])
        if made.stored == "encoded":
            made.root = root or (corpus.root if has_paths(rows.column(0)) else "")
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
    def from_description(cls, description: Mapping[str, Any]) -> "ImageClassification":
        """Return the task that `describe` described."""
        kept = {k: v for k, v in description["preprocess"].items() if k not in ("labels", "mode")}
        for name in ("shape", "mean", "std"):
            kept[name] = None if kept.get(name) is None else tuple(kept[name])
        return cls(**described(description), **kept)

    def columns(self, schema: pa.Schema) -> Columns:
        """Return the image and label columns, and `id` where the corpus has it."""
        found = super().columns(schema)
        kind = schema.field(self.inputs[0]).type
        dims = [size or 0 for size in list_shape(kind)]  # 0 where the type leaves it open
        if stored_as(kind) != "encoded" and 0 not in dims and np.prod(dims) != np.prod(self.shape):
            raise ValueError(
                f"column {self.inputs[0]!r} holds images of {by(dims)} values, but the task's "
                f"images are {by(self.shape)}"
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
        stored = stored_as(column.type)
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

    def blank(self, batch: Batch) -> Batch:
        """Return the batch with zero pixels in every row."""
        return zero_inputs(batch)

    @property
    def _mode(self) -> Mode:
        return "L" if self.shape[0] == 1 else "RGB"

    def _decode(self, column: pa.ChunkedArray) -> np.ndarray:
        size = self.shape[1:] if self.resize else None
        out = np.empty((len(column), *self.shape), dtype=np.uint8)
        for i, encoded in enumerate(files(column, self.root, self.inputs[0])):
            pixels = decode(encoded, self._mode, size)
            if pixels.shape != self.shape:
                raise ValueError(
                    f"the image is {by(pixels.shape[1:])}, but the task's images are "
                    f"{by(self.shape[1:])} (height x width); --task-option "
                    f"resize={by(self.shape[1:])} would fit them"
                )
            out[i] = pixels
        return out

    def _arrays(self, column: pa.ChunkedArray, stored: str) -> np.ndarray:
        pixels = shaped(dense(column, self.inputs[0]), self.shape, self.layout)
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
        modes, sizes = survey(rows.column(0), self.root, self.inputs[0])
        if mode not in (None, "L", "RGB"):
            raise ValueError(f"option mode={mode!r} is unknown; choose L or RGB")
        (height, width), count = sizes.most_common(1)[0]
        if size is not None:
            if len(size) > 2:
                raise ValueError(f"option resize={by(size)} must be HEIGHTxWIDTH")
            height, width = size[0], size[-1]
            self.resize = True
        elif count < 0.9 * sizes.total():
            shown = ", ".join(by(s) for s, _ in sizes.most_common(3))
            raise ValueError(
                f"the images of column {self.inputs[0]!r} differ in size ({shown}, …); "
                f"make them one size with --task-option resize={height}x{width}"
            )
        channels = 3 if (mode or ("RGB" if "RGB" in modes else "L")) == "RGB" else 1
        self.shape = (channels, height, width)
        log.info("images are %s, %s", by((height, width)), "RGB" if channels == 3 else "gray")

    def _from_arrays(
        self,
        schema: pa.Schema,
        rows: pa.Table,
        given: tuple[int, ...] | None,
        layout: str | None,
        scale: int | float | str | None,
    ) -> None:
        (name,) = self.inputs
        dims = dims_of(schema, rows, name)
        self.shape, self.layout = image_shape(dims, given, layout, name)
        log.info(
            "reading column %r as images of %s (channels x height x width)", name, by(self.shape)
        )
        if scale is not None:
            (self.scale,) = options.numbers(scale, "scale")
            if not self.scale > 0:
                raise ValueError(f"option scale={scale!r} must be positive")
        else:
            self.scale = guess_scale(rows.column(0), self.stored, name)


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
    stored_as(schema.field(found[0]).type)
    return found[0]
