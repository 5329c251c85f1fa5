"""`open_store`: the vectors of a score table's rows, read where they lie on the disk.

Shapes: N rows, B rows of a block, K checkpoints, L layers, W numbers at one checkpoint, D = K·W.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64

from curate.pipeline.scoring.score_table import SUCCESS, ScoreTable, part_name
from curate.pipeline.scoring.store_receipts import TARGET
from curate.pipeline.stores.layout import RECEIPT, STORES, Layout, check_comparable
from curate.pipeline.stores.local_file import local_copy
from curate.pipeline.storing.storage import Folder

BLOCK_BYTES = 32 << 20
"""float32 numbers of a block."""
OPEN_FILES = 64
COPIED_FILES = 2
"""Of an object store: each is copied into the temporary folder while it is open."""


def open_store(
    folder: str | Path | ScoreTable,
    name: str,
    *,
    target: bool = False,
    checkpoints: Sequence[int] | None = None,
    unit: bool = False,
) -> "Store":
    """Return the vectors called `name` (sketch, embedding, probs) beside a score table.

    `folder` is the scores folder or the run folder that holds it; `target` opens the vectors of
    the target's rows instead. A row's vector is the concatenation over checkpoints, each times the
    square root of its weight: inner products of two such vectors are the weighted mean over
    checkpoints, then over seeds. `checkpoints` picks some by their place (negative from the end;
    their weights are made to sum to 1 again). With `unit`, each checkpoint's vector has length 1
    first: inner products are then mean cosines. Rows that could not be scored are all NaN.

    Raises:
        ValueError: there is no such store, or a file of it is missing, damaged or foreign.
    """
    if name not in STORES:
        raise ValueError(f"unknown store {name!r}; choose one of: {', '.join(STORES)}")
    table = folder if isinstance(folder, ScoreTable) else ScoreTable.open(folder)
    lead = f"target/store/{name}/" if target else f"store/{name}/"
    recorded = table.success.get("stores", {})
    files = {_unit_of(file): file for file in sorted(recorded) if file.startswith(lead)}
    if not files:
        raise ValueError(_no_store(table, name, target, sorted(recorded)))
    if target:
        plan = {0: table.meta["target"]["rows"]}
    else:
        plan = dict.fromkeys(range(table.success["units"]), 0)
        for number, rows in zip(
            table.units["unit"].to_pylist(), table.units["rows"].to_pylist(), strict=True
        ):
            plan[number] += rows
    parts = [(files.get(number), rows) for number, rows in plan.items()]
    return Store(table.folder, parts, table.meta["run"], checkpoints=checkpoints, unit=unit)


class Store:
    """Rows of vectors in the order of the score table, of any number; memory is one block's.

    `parts` are file and rows of each unit in order, from 0 on; a unit without a file has no
    vectors.
    """

    def __init__(
        self,
        folder: Folder,
        parts: Sequence[tuple[str | None, int]],
        run: str,
        *,
        checkpoints: Sequence[int] | None = None,
        unit: bool = False,
    ) -> None:
        self.folder, self.run, self.unit = folder, run, unit
        self._parts = list(parts)
        self._edges = np.cumsum([0, *(rows for _, rows in parts)]).astype(np.int64)
        self._open: OrderedDict[int, _File] = OrderedDict()
        first = next((i for i, (file, _) in enumerate(parts) if file is not None), None)
        if first is None:
            raise ValueError(f"all units of {folder.uri} were given up: there are no vectors")
        self.layout: Layout = self._read(first).layout
        count = len(self.layout.checkpoints)
        wanted = list(range(count)) if checkpoints is None else list(checkpoints)
        for k in wanted:
            if not -count <= k < count:
                raise ValueError(
                    f"checkpoint {k} of {count} in the store {self.layout.name}; choose "
                    f"{-count} to {count - 1}"
                )
        self.checkpoints = [k % count for k in wanted]
        weights = np.array([self.layout.checkpoints[k].weight for k in self.checkpoints])
        self.weights = weights / weights.sum() if weights.sum() > 0 else weights
        self.rows = int(self._edges[-1])
        self.dimension = len(self.checkpoints) * self.layout.width

    def __len__(self) -> int:
        return self.rows

    @property
    def name(self) -> str:
        """What the vectors are: sketch, embedding or probs."""
        return self.layout.name

    @property
    def path(self) -> str:
        """The folder of the files, for people."""
        file = next(file for file, _ in self._parts if file is not None)
        return self.folder.full_name(file.rpartition("/")[0])

    def blocks(self) -> Iterator[Float32[np.ndarray, "b d"]]:
        """Yield all rows in order, a block at a time; may be called any number of times."""
        step = max(1, BLOCK_BYTES // (4 * self.dimension))
        for part, (file, rows) in enumerate(self._parts):
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                if file is None:
                    yield np.full((stop - start, self.dimension), np.nan, np.float32)
                else:
                    yield self._read(part).vectors(np.arange(start, stop), self)

    def take(self, numbers: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n d"]:
        """Return the vectors of these rows (places in the score table), in this order.

        Raises:
            ValueError: a number is no row's.
        """
        if len(numbers) and not (0 <= numbers.min() and numbers.max() < self.rows):
            wrong = numbers.max() if numbers.max() >= self.rows else numbers.min()
            raise ValueError(f"row {wrong} of {self.rows} in the store {self.path}")
        out = np.full((len(numbers), self.dimension), np.nan, np.float32)
        of = np.searchsorted(self._edges, numbers, side="right") - 1
        for part in np.unique(of):
            if self._parts[part][0] is not None:
                inside = np.flatnonzero(of == part)
                rows = numbers[inside] - self._edges[part]
                out[inside] = self._read(int(part)).vectors(rows, self)
        return out

    def place(self, number: int) -> tuple[int, int]:
        """Return the unit of a row, and its place in that unit's part."""
        unit = int(np.searchsorted(self._edges, number, side="right")) - 1
        return unit, number - int(self._edges[unit])

    def norms(self) -> Iterator[Float32[np.ndarray, "b k l"]]:
        """Yield the norms of all rows by checkpoint and layer; NaN where there is no vector.

        Raises:
            ValueError: the store keeps none (probs).
        """
        if not self.layout.has_norms:
            raise ValueError(f"the store {self.path} holds {self.name} as they are, and no norms")
        shape = (len(self.checkpoints), len(self.layout.layers))
        for part, (file, rows) in enumerate(self._parts):
            if file is None:
                yield np.full((rows, *shape), np.nan, np.float32)
            else:
                yield from self._read(part).norms(self)

    def check_comparable(self, other: "Store") -> None:
        """Raise ValueError where inner products with the other's vectors would mean nothing.

        Sketches are comparable when made alike of parameters of the same names and shapes,
        embeddings when made by the same checkpoints.
        """
        check_comparable(self.layout, other.layout, self.path, other.path)
        if len(self.checkpoints) != len(other.checkpoints):
            raise ValueError(
                f"{len(self.checkpoints)} checkpoints of {self.path} and "
                f"{len(other.checkpoints)} of {other.path}: choose as many of each"
            )
        if self.name == "embedding":
            ours, theirs = (
                [s.layout.checkpoints[k].digest for k in s.checkpoints] for s in (self, other)
            )
            if ours != theirs:
                raise ValueError(
                    f"embeddings of {self.path} and {other.path} are of different checkpoints"
                )

    def _read(self, part: int) -> "_File":
        """Return the unit's file, opened; few stay open at a time."""
        if part not in self._open:
            name, rows = self._parts[part]
            assert name is not None, "a unit without vectors has no file"
            file = _File(self.folder, name, part, rows, self.run)
            if self._open and file.layout != self.layout:
                raise ValueError(f"{self.folder.full_name(name)} is laid out unlike the others")
            self._open[part] = file
            if len(self._open) > (COPIED_FILES if self.folder.is_remote else OPEN_FILES):
                self._open.popitem(last=False)
        self._open.move_to_end(part)
        return self._open[part]


class _File:
    """One unit's file, memory-mapped; of an object store, a copy of it."""

    def __init__(self, folder: Folder, name: str, unit: int, rows: int, run: str) -> None:
        full = folder.full_name(name)
        again = f"delete it, {part_name(unit)} and {SUCCESS}, and run the same command"
        if name.startswith(f"{TARGET}/"):
            again = "score with --overwrite"
        try:
            with local_copy(folder, name) as path:  # mapped: it may lose its name
                self._reader = pa.ipc.open_file(pa.memory_map(path))
            lengths = [
                self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches)
            ]
        except FileNotFoundError:
            raise ValueError(f"{full} is missing; {again}") from None
        except (pa.ArrowInvalid, OSError) as broken:
            raise ValueError(f"{full} is damaged ({broken}); {again}") from None
        schema = self._reader.schema
        self.layout = Layout.from_schema(schema, full)
        receipt: dict[str, Any] = json.loads(schema.metadata.get(RECEIPT, b"{}"))
        if receipt.get("run") != run or receipt.get("unit") != unit:
            raise ValueError(f"{full} belongs to another run or unit; {again}")
        if sum(lengths) != rows:
            raise ValueError(f"{full} has {sum(lengths)} rows, the plan says {rows}")
        self.edges = np.cumsum([0, *lengths])

    def vectors(self, rows: Int64[np.ndarray, " b"], store: Store) -> Float32[np.ndarray, "b d"]:
        """Return these rows of the unit, as the store wants them."""
        out = np.empty((len(rows), len(store.checkpoints), self.layout.width), np.float32)
        of = np.searchsorted(self.edges, rows, side="right") - 1
        for number in np.unique(of):
            inside = np.flatnonzero(of == number)
            out[inside] = self._of_batch(int(number), rows[inside] - self.edges[number], store)
        return out.reshape(len(rows), -1)

    def norms(self, store: Store) -> Iterator[Float32[np.ndarray, "b k l"]]:
        shape = (len(self.layout.checkpoints), len(self.layout.layers))
        for number in range(len(self.edges) - 1):
            batch = self._reader.get_batch(number)
            norms = _numbers(batch, "norm", shape)[:, store.checkpoints].copy()
            norms[~_is_there(batch)] = np.nan
            yield norms

    def _of_batch(
        self, number: int, rows: Int64[np.ndarray, " b"], store: Store
    ) -> Float32[np.ndarray, "b k w"]:
        batch, layers = self._reader.get_batch(number), self.layout.layers
        count = len(self.layout.checkpoints)
        stored = _numbers(batch, "vector", (count, self.layout.width))
        found = stored[rows][:, store.checkpoints].astype(np.float32)
        if self.layout.has_norms:
            norms = _numbers(batch, "norm", (count, len(layers)))[rows][:, store.checkpoints]
            for i, layer in enumerate(layers):
                found[..., layer.offset : layer.offset + layer.size] *= norms[..., i, None]
        if store.unit:
            # float16 directions are off length 1 by a rounding: measure what is there.
            lengths = np.linalg.norm(found.astype(np.float64), axis=-1, keepdims=True)
            found = (found / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        if len(store.checkpoints) > 1:
            found *= np.sqrt(store.weights).astype(np.float32)[:, None]
        found[~_is_there(batch)[rows]] = np.nan
        return np.asarray(found)


def _numbers(batch: pa.RecordBatch, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a column as [rows, *shape], where it lies."""
    flat = batch.column(name).values.to_numpy(zero_copy_only=True)
    return np.asarray(flat).reshape(batch.num_rows, *shape)


def _is_there(batch: pa.RecordBatch) -> np.ndarray:
    there: np.ndarray = batch.column("vector").is_valid().to_numpy(zero_copy_only=False)
    return there


def _unit_of(file: str) -> int:
    return int(file.rpartition("-")[2].partition(".")[0])


def _no_store(table: ScoreTable, name: str, target: bool, recorded: list[str]) -> str:
    """Say what to do about a store that a score table does not have."""
    asked = "--sketch 32x32" if name == "sketch" else f"--store {name}"
    if target and table.meta.get("target") is None:
        return (
            f"{table.path} was scored without a target, so there is no {name} of one; score again "
            f"with `curate score --target CORPUS {asked}`"
        )
    start = "target/store/" if target else "store/"
    have = sorted({file.split("/")[-2] for file in recorded if file.startswith(start)})
    there = f"it has: {', '.join(have)}" if have else "it has none"
    of = "of the target " if target else ""
    again = f"--target CORPUS {asked}" if target else asked
    return f"{table.path} has no store {name!r} {of}({there}); make one with `curate score {again}`"
