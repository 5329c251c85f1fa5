"""Exact similarities of the corpus rows that sketches retrieved for each row of a target.

A second small pass: the gradients of the retrieved rows and of the target's rows are taken again,
whole, at every checkpoint, and the pairs compared as they are.

Shapes: N pairs, M target rows at a time, B rows of a batch, P parameters that are compared.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.scoring.reference_pass import joint_task
from curate.pipeline.scoring.signal_pass import SignalPass
from curate.pipeline.scoring.windows import encode_rows
from curate.pipeline.scoring.work import Work
from curate.pipeline.tasks.task import Task
from curate.scorers.engine import Engine
from curate.scorers.gradient_vectors import Whole
from curate.scorers.memory import is_out_of_memory
from curate.scorers.protocol import Batch

log = logging.getLogger("curate.score")

TARGET_BYTES = 1 << 30
"""Gradients of target rows that are held at once; one alone may take this, or none is taken."""
BATCH_BYTES = 256 << 20
"""Gradients of a batch's rows, and copies of the target's that one row is compared with."""


class NotExact(Exception):
    """Why similarities stay estimates, in one sentence."""


@dataclass(frozen=True)
class Located:
    """Rows of a corpus by shard and row, in ascending order."""

    corpus: Corpus
    shard: Int64[np.ndarray, " n"]
    row: Int64[np.ndarray, " n"]

    def only(self, places: Int64[np.ndarray, " m"]) -> "Located":
        """Return some of them; `places` ascend."""
        return Located(self.corpus, self.shard[places], self.row[places])


class ExactPairs:
    """Compares target rows with corpus rows, by the gradients that the run's sketches are of.

    Raises:
        NotExact: a row's gradient takes too much memory.
    """

    def __init__(self, work: Work, weights: Float64[np.ndarray, " k"]) -> None:
        """`weights` of the checkpoints, 1 in sum."""
        assert work.stores is not None and work.target is not None, "asked for"
        self.weights, self.is_cosine = weights, work.stores.similarity == "cosine"
        self.params = str(work.stores.sketch["params"])
        # Nothing but gradients: no scorer, reference or target for the engine to know of.
        self.work = replace(
            work,
            scorers={},
            reference=(),
            target=None,
            stores=replace(work.stores, names=("sketch",)),
        )
        target = replace(self.work, corpus=work.target.corpus)
        self.tasks = {"corpus": joint_task(self.work), "target": joint_task(target)}
        torch.set_num_threads(work.threads)
        self.signals = SignalPass(self.work, keeps=False)
        self.names: list[str] = []
        self.edges = np.zeros(1, np.int64)

    def _learn_size(self, target: Located) -> None:
        """Take note of the parameters, which a batch must show."""
        engine = self.signals.engine_at(0)
        _, batch = next(self._batches(target.only(np.arange(1)), "target"))
        named = engine.target_params(batch, self.params)
        self.names = list(named)
        self.edges = np.cumsum([0, *(p.numel() for p in named.values())])
        if self.row_bytes > TARGET_BYTES:
            raise NotExact(f"the gradient of one row takes {self.row_bytes / 2**30:.1f} GiB")

    @property
    def row_bytes(self) -> int:
        """What a row's gradient takes."""
        return 4 * max(1, int(self.edges[-1]))

    def similarities(
        self,
        target: Located,
        corpus: Located,
        of: Int64[np.ndarray, " n"],
        at: Int64[np.ndarray, " n"],
    ) -> Float64[np.ndarray, " n"]:
        """Return Σ_k w_k cos (or the inner product) of target rows `of` and corpus rows `at`.

        `of` ascends; both are places among the rows located.

        Raises:
            NotExact: a row's gradient takes too much memory, or a product is not finite.
            ValueError: a row cannot be read as it was before.
        """
        found = np.zeros(len(of))
        try:
            self._learn_size(target)
            step = max(1, TARGET_BYTES // self.row_bytes)
            for k, weight in enumerate(self.weights):
                for first in range(0, len(target.row), step):
                    lo, hi = np.searchsorted(of, (first, first + step))
                    if lo < hi:
                        some = target.only(np.arange(first, min(first + step, len(target.row))))
                        values = self._block(k, some, corpus, of[lo:hi] - first, at[lo:hi])
                        found[lo:hi] += weight * values
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise NotExact("the gradient of a row alone does not fit in memory") from None
        if not np.isfinite(found).all():
            raise NotExact("a product of two rows' gradients is not finite")
        return found

    def _block(
        self, k: int, target: Located, corpus: Located, of: np.ndarray, at: np.ndarray
    ) -> Float64[np.ndarray, " n"]:
        """Return the pairs' similarities at checkpoint k."""
        engine = self.signals.engine_at(k)
        ours = torch.empty(len(target.row), int(self.edges[-1]), device=self.signals.device)
        for places, grads in self._gradients(engine, target, "target"):
            ours = ours.to(grads.dtype)
            ours[torch.from_numpy(places).to(ours.device)] = grads
        lengths = torch.linalg.vector_norm(ours, dim=1).double().cpu().numpy()
        wanted, inverse = np.unique(at, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        starts = np.searchsorted(inverse[order], np.arange(len(wanted) + 1))
        found = np.zeros(len(at))
        step = max(1, BATCH_BYTES // self.row_bytes)
        for places, grads in self._gradients(engine, corpus.only(wanted), "corpus"):
            sizes = torch.linalg.vector_norm(grads, dim=1).double().cpu().numpy()
            for place, g, size in zip(places, grads, sizes, strict=True):
                pairs = order[starts[place] : starts[place + 1]]
                each = np.split(of[pairs], range(step, len(pairs), step))
                parts = [ours[torch.from_numpy(some).to(ours.device)] @ g for some in each]
                dots = torch.cat(parts).double().cpu().numpy()
                scale = lengths[of[pairs]] * size if self.is_cosine else np.ones(len(pairs))
                found[pairs] = np.where(scale > 0, dots / np.where(scale > 0, scale, 1), 0)
        return found

    def _gradients(
        self, engine: Engine, rows: Located, which: str
    ) -> Iterator[tuple[Int64[np.ndarray, " b"], Float[Tensor, "b p"]]]:
        """Yield places among the rows and their gradients."""
        for places, batch in self._batches(rows, which):
            yield from self._read(engine, batch, places)

    def _batches(
        self, rows: Located, which: str
    ) -> Iterator[tuple[Int64[np.ndarray, " b"], Batch]]:
        """Yield places among the rows, and the rows, in batches that these rows alone decide."""
        task, plan = self.tasks[which], self.work.plan
        limit = max(1, BATCH_BYTES // self.row_bytes)
        for start, read in self._windows(rows, task):
            encoded, _, errors = encode_rows(task.encode, read)
            for place, reason in sorted(errors.items()):
                shard = rows.corpus.shards[int(rows.shard[start + place])].path
                raise ValueError(f"row {rows.row[start + place]} of {shard} fails now: {reason}")
            assert encoded is not None, "every row was encoded"
            row_bytes = encoded.nbytes / max(1, encoded.num_rows)
            for some in plan.batches(task.cost(encoded), row_bytes):
                for part in np.split(some, range(limit, len(some), limit)):
                    batch = task.collate(encoded.take(pa.array(part)))
                    yield start + part, batch.to(self.signals.device)

    def _read(
        self, engine: Engine, batch: Batch, places: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        try:
            loss, found = engine.read(batch, self.names, {"whole": Whole()})
            grads = loss.new_zeros(batch.rows, int(self.edges[-1]))
            for name, lo, hi in zip(self.names, self.edges, self.edges[1:], strict=False):
                if name in found["whole"]:
                    grads[:, lo:hi] = found["whole"][name]
        except Exception as error:
            if batch.rows == 1 or not is_out_of_memory(error):
                raise
        else:
            yield places, grads
            return
        middle = batch.rows // 2
        for rows in (range(middle), range(middle, batch.rows)):
            yield from self._read(engine, batch.select_rows(rows), places[rows.start : rows.stop])

    def _windows(self, rows: Located, task: Task) -> Iterator[tuple[int, pa.Table]]:
        """Yield the first place of a window and its rows, whatever shards they come from."""
        columns = list(dict.fromkeys(task.columns(rows.corpus.schema).all))
        size = self.work.plan.window_rows
        for start in range(0, len(rows.row), size):
            shards = rows.shard[start : start + size]
            own = rows.row[start : start + size]
            parts = [rows.corpus.take(int(s), own[shards == s], columns) for s in np.unique(shards)]
            yield start, pa.concat_tables(parts).combine_chunks()


def every_row(corpus: Corpus) -> Located:
    """Return all rows of a corpus."""
    counts = [shard.rows for shard in corpus.shards]
    row = np.concatenate([np.arange(n) for n in counts])
    return Located(corpus, np.repeat(np.arange(len(counts)), counts), row)
