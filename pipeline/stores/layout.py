"""What the numbers of a store are: which vectors, of which checkpoints, in which order.

Shapes: K checkpoints, L layers of a vector, W numbers of a vector at one checkpoint.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

FORMAT, VERSION = "curate.store", 1
STORES = ("sketch", "embedding", "probs")
METADATA = b"curate.store"
RECEIPT = b"curate.receipt"


@dataclass(frozen=True)
class Layer:
    """Where a part of a vector lies: a parameter's sketch, or all of it under the name "".

    `shape` is the parameter's own, () where the part is of no single parameter.
    """

    name: str
    offset: int
    size: int
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class At:
    """A checkpoint whose vectors are stored, and its weight in sums over checkpoints.

    Weights are learning rates: 1 in sum within a seed, divided by the number of seeds.
    """

    seed: int
    step: int
    epoch: int | float | None
    digest: str
    weight: float


@dataclass(frozen=True)
class Layout:
    """What a store holds, the same for all its files.

    `how` tells how vectors were made: of sketches `kind`, `k`, `jl`, `seed`, `params` and, where
    all parameters share one layer, `parameters`, a digest of their names and shapes; empty
    otherwise. Stores with equal `how` and layers were multiplied by the same signs, whoever made
    them, so their inner products estimate those of gradients.
    """

    name: str
    how: Mapping[str, Any]
    checkpoints: tuple[At, ...]
    layers: tuple[Layer, ...]

    @property
    def width(self) -> int:
        """W, the numbers of a vector at one checkpoint."""
        return sum(layer.size for layer in self.layers)

    @property
    def dimension(self) -> int:
        """K·W, the numbers of a row's vector."""
        return len(self.checkpoints) * self.width

    @property
    def has_norms(self) -> bool:
        """Whether vectors are kept as directions of length 1 (float16) and norms (float32)."""
        return self.name != "probs"

    @property
    def row_bytes(self) -> int:
        """What a row takes on disk, about."""
        norms = 4 * len(self.checkpoints) * len(self.layers) if self.has_norms else 0
        return self.dimension * (2 if self.has_norms else 4) + norms + 12

    def schema(self) -> pa.Schema:
        """Return the columns of a file, this layout in their metadata."""
        number = pa.float16() if self.has_norms else pa.float32()
        fields = [
            pa.field("shard", pa.int32(), nullable=False),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("vector", pa.list_(number, self.dimension)),
        ]
        if self.has_norms:
            norms = len(self.checkpoints) * len(self.layers)
            fields.append(pa.field("norm", pa.list_(pa.float32(), norms)))
        return pa.schema(fields, {METADATA: self.to_json()})

    def to_json(self) -> bytes:
        """Return the one spelling of this layout."""
        said = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(said, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_schema(cls, schema: pa.Schema, file: str) -> "Layout":
        """Return the layout that a file's schema holds.

        Raises:
            ValueError: the file is no store, or of a later version.
        """
        said = json.loads((schema.metadata or {}).get(METADATA, b"{}"))
        if said.get("format") != FORMAT:
            raise ValueError(f"{file} is no store of vectors: its schema says nothing of one")
        if said["version"] > VERSION:
            raise ValueError(
                f"{file} is {FORMAT} version {said['version']}; this curate reads up to {VERSION}"
            )
        return cls(
            said["name"],
            said["how"],
            tuple(At(**at) for at in said["checkpoints"]),
            tuple(
                Layer(x["name"], x["offset"], x["size"], tuple(x["shape"])) for x in said["layers"]
            ),
        )


def layers_of(sizes: Sequence[tuple[str, int, tuple[int, ...]]]) -> tuple[Layer, ...]:
    """Return layers that lie one after the other, from (name, numbers, shape)."""
    layers, offset = [], 0
    for name, size, shape in sizes:
        layers.append(Layer(name, offset, size, shape))
        offset += size
    return tuple(layers)


def check_comparable(ours: Layout, theirs: Layout, what: str, other: str) -> None:
    """Raise ValueError, naming the first difference, where inner products would mean nothing.

    `what` and `other` are what to call the two stores.
    """
    if ours.name != theirs.name:
        raise ValueError(f"{what} holds {ours.name}, {other} holds {theirs.name}")
    for key in ("kind", "k", "jl", "seed", "params", "parameters"):
        if ours.how.get(key) != theirs.how.get(key):
            raise ValueError(
                f"{what} was made with {key}={ours.how.get(key)}, {other} with "
                f"{key}={theirs.how.get(key)}: make both with the same --sketch of one model"
            )
    if len(ours.layers) != len(theirs.layers) or ours.width != theirs.width:
        raise ValueError(
            f"{what} has {len(ours.layers)} layers and {ours.width} numbers, {other} "
            f"{len(theirs.layers)} and {theirs.width}: they are of different models"
        )
    for mine, its in zip(ours.layers, theirs.layers, strict=True):
        if mine != its:
            raise ValueError(
                f"layer {mine.name or 'of the whole vector'} {list(mine.shape)} of {what} is "
                f"{its.name or 'the whole vector'} {list(its.shape)} in {other}: they are of "
                f"different models"
            )
