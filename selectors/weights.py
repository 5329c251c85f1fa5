"""What weights mean, how one kind becomes another, and what clipping costs.

`loss` multiplies a row's loss and has mean 1 over the selection. `sampling` is a relative rate at
which rows are drawn with replacement, mean 1. `repeat` is how often a row comes in an epoch.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float64
from numpy import ndarray

from curate.selectors.exact_sum import ExactSum, Moments

KINDS = ("none", "loss", "sampling", "repeat")
BLOCK_ROWS = 1 << 20
WHOLE = 1e-6  # float32 holds a ratio of two weights to about 1e-7


class Weighting:
    """The batches of a selection with their weights as a manifest writes them.

    `made` is the kind that the selector made, `asked` the one wanted (None: the same), `clip` the
    largest weight allowed, in units of the mean. Conversions: between `loss` and `sampling` the
    numbers stay (a row's expected gradient is the same), `repeat` becomes either by dividing by
    the mean, and either becomes `repeat` if all weights are whole multiples of the smallest.
    Rows without weights weigh 1 in any kind.

    Everything is read once into `folder` (the rows and 4 bytes a row) before the first batch is
    given back, unless there are no weights. Memory: one batch.

    Raises:
        ValueError: a weight is negative or not finite, all are 0, there is nothing to clip, or the
            conversion would not be exact.
    """

    def __init__(
        self,
        batches: Iterable[pa.RecordBatch],
        made: str,
        folder: Path,
        asked: str | None = None,
        clip: float | None = None,
    ) -> None:
        check_weighting(asked, clip)
        self.kind = made if asked is None else asked
        self.report: dict[str, Any] | None = None
        """What the manifest says of the weights; None where there are none."""
        if made == "none":
            if clip is not None:
                raise ValueError(
                    "the method makes no weights, so there are none to clip: "
                    "leave --clip-weights out"
                )
            self._batches = iter(batches)
            return
        if self.kind == "none":
            raise ValueError(
                f"weights of kind {made} cannot be left out: the rows were chosen to be weighted; "
                "choose loss or sampling, or a method without weights"
            )
        self._folder = folder
        self._batches = self._weighed(batches, made, clip)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self._batches

    def _weighed(
        self, batches: Iterable[pa.RecordBatch], made: str, clip: float | None
    ) -> Iterator[pa.RecordBatch]:
        raw = self._spool(batches)
        if not raw.count:
            return iter(())
        if not raw.highest > 0:
            raise ValueError("all weights are 0; no manifest is written")
        scale, limit, clipped = 1.0, np.inf, None
        if self.kind == "repeat":
            if clip is not None:
                raise ValueError("weights of kind repeat are whole and not clipped; ask for loss")
            scale = 1 / (self._unit(raw) if made != "repeat" else 1)
        else:
            if clip is not None and raw.highest > clip * raw.mean:
                limit, mean, clipped = self._limit(raw, clip)
                scale = 1 / mean
            else:
                scale = 1 / raw.mean

        def written(weights: Float64[ndarray, " n"]) -> Float64[ndarray, " n"]:
            found = np.minimum(weights, limit) * scale
            return np.asarray(np.rint(found) if self.kind == "repeat" else found)

        self.report = self._summary(written)
        if made != "repeat" and self.kind != "repeat":
            # Times this, the weights before clipping are those that the method made.
            self.report["scale"] = raw.mean
        if clip is not None:
            self.report["clip"] = {"largest": clip, **(clipped or {"rows": 0, "removed": 0.0})}
        return self._again(written)

    def _spool(self, batches: Iterable[pa.RecordBatch]) -> Moments:
        moments, writer, bad = Moments(), None, 0
        with (
            pa.OSFile(str(self._folder / "rows"), "wb") as rows,
            (self._folder / "weights").open("wb") as file,
        ):
            for batch in batches:
                if writer is None:
                    writer = pa.ipc.new_stream(rows, batch.schema)
                writer.write_batch(batch)
                weights = batch.column("weight").fill_null(1.0).to_numpy(zero_copy_only=False)
                weights = weights.astype("<f4")
                bad += int((~(np.isfinite(weights) & (weights >= 0))).sum())
                weights.tofile(file)
                moments.add(weights.astype(np.float64))
            if writer is not None:
                writer.close()
        if bad:
            raise ValueError(f"{bad} weights are negative or not finite; no manifest is written")
        return moments

    def _values(self) -> Iterator[Float64[ndarray, " n"]]:
        with (self._folder / "weights").open("rb") as file:
            while len(block := np.fromfile(file, "<f4", count=BLOCK_ROWS)):
                yield block.astype(np.float64)

    def _unit(self, raw: Moments) -> float:
        """Return the smallest weight above 0 if all weights are whole multiples of it."""
        smallest = min(float(w[w > 0].min(initial=np.inf)) for w in self._values())
        for weights in self._values():
            multiple = weights / smallest
            if (np.abs(multiple - np.rint(multiple)) > WHOLE * np.maximum(1, multiple)).any():
                raise ValueError(
                    "the weights are no whole multiples of the smallest one, so repeating rows "
                    "cannot stand for them; choose --weight-kind sampling"
                )
        return smallest

    def _limit(self, raw: Moments, clip: float) -> tuple[float, float, dict[str, Any]]:
        """Return the cap c with c = clip * mean(min(w, c)), that mean, and what it removes.

        Newton's method from above: the difference is convex and piecewise linear in c, so it ends
        after a few passes at the largest solution.
        """
        limit = clip * raw.mean
        while True:
            below, above, beyond = ExactSum(), 0, ExactSum()
            for weights in self._values():
                is_above = weights > limit
                below.add(weights[~is_above])
                beyond.add(weights[is_above])
                above += int(is_above.sum())
            following = clip * below.value() / (raw.count - clip * above)
            if following <= 0:
                raise ValueError(
                    f"weights cannot be clipped at {clip:g} times their mean: fewer than one row "
                    f"in {clip:g} has a weight above 0"
                )
            if not following < limit * (1 - 1e-9):
                break
            limit = following
        removed = beyond.value() - above * limit
        mean = (below.value() + above * limit) / raw.count
        return limit, mean, {"rows": above, "removed": removed / raw.total}

    def _summary(self, written: Callable[[Float64[ndarray, " n"]], Any]) -> dict[str, Any]:
        moments, squares = Moments(), ExactSum()
        for weights in self._values():
            final = written(weights).astype(np.float32).astype(np.float64)
            moments.add(final)
            squares.add(final * final)
        return {
            "effective_rows": moments.total**2 / squares.value(),
            "smallest": moments.lowest,
            "largest": moments.highest,
            "sum": moments.total,
        }

    def _again(self, written: Callable[[Float64[ndarray, " n"]], Any]) -> Iterator[pa.RecordBatch]:
        with (
            pa.OSFile(str(self._folder / "rows"), "rb") as rows,
            (self._folder / "weights").open("rb") as file,
        ):
            for batch in pa.ipc.open_stream(rows):
                raw = np.fromfile(file, "<f4", count=batch.num_rows).astype(np.float64)
                weight = pa.array(written(raw).astype(np.float32))
                yield batch.set_column(batch.schema.get_field_index("weight"), "weight", weight)


def check_weighting(asked: str | None, clip: float | None) -> None:
    """Raise ValueError for a kind that is none, or a clip that would leave no differences."""
    if asked is not None and asked not in KINDS:
        raise ValueError(f"unknown kind of weights {asked!r}; choose from: {', '.join(KINDS)}")
    if clip is None:
        return
    is_number = isinstance(clip, int | float) and not isinstance(clip, bool)
    if not is_number or not 1 < clip < np.inf:
        raise ValueError(
            f"--clip-weights is a multiple of the mean weight above 1, such as 5; not {clip!r}"
        )
