"""The column of `gio`: a last step over all rows, when the vectors of all units are there.

The units' parts are in `raw/` then. What the search finds is kept there too until the run is whole,
so that a run that is killed while it writes the table goes on with the same numbers.
"""

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from curate.pipeline.scoring.score_folder import committed
from curate.pipeline.scoring.score_table import ROW_GROUP, UNITS, ScoreTable, part_name
from curate.pipeline.scoring.store_receipts import stores_of
from curate.pipeline.scoring.units import Unit
from curate.pipeline.scoring.work import Work
from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder, canonical_json
from curate.pipeline.vectors.resolve import TableWithVectors, find_source
from curate.pipeline.vectors.source import Wanted
from curate.pipeline.vectors.stored import is_store
from curate.scorers.gio import GIO
from curate.scorers.protocol import Scorer
from curate.selectors.gio import Gio
from curate.selectors.settings import made

log = logging.getLogger("curate.score")

Steps = Float32[np.ndarray, " n"]


def stores_for(scorers: Mapping[str, Scorer]) -> list[str]:
    """Return the stores that scorers read in a last step."""
    named = [name for scorer in gios(scorers).values() for name in _named(scorer)]
    return [name for name in dict.fromkeys(named) if is_store(name)]


def described(work: Work) -> dict[str, list[dict[str, Any]]]:
    """Return what decides each alias's column beside its settings: vectors from outside the run.

    Raises:
        ValueError: settings, a target or vectors with which the last step would fail.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for alias, scorer in gios(work.made).items():
        selector = _selector(alias, scorer)
        if work.target is None:
            raise ValueError(f"{alias} compares rows with a target: name it by --target CORPUS")
        if work.target.corpus.rows <= selector.k:
            raise ValueError(
                f"{alias} needs a target of more than k={selector.k} rows, not "
                f"{work.target.corpus.rows}; give more rows, or a smaller k"
            )
        if selector.base is not None and selector.base not in work.keep:
            raise ValueError(f"{alias} reads its base set from the table: --keep {selector.base}")
        scores = _Planned(work)
        for text, is_target in zip(_named(scorer), (False, True), strict=True):
            if not is_store(text):
                source = find_source(text, Wanted(scores, is_target))
                found.setdefault(alias, []).append(source.content)
    return found


def gio_steps(work: Work, units: Sequence[Unit]) -> tuple[dict[str, Steps], dict[str, Any]]:
    """Return each alias's column over all rows, NaN where never accepted, and what to record."""
    raw = Folder(work.parts)
    columns, notes = {}, {}
    for alias, scorer in gios(work.made).items():
        kept = f"steps-{alias}.npy"
        if not raw.exists(kept):
            column, report = _searched(work, units, alias, scorer)
            out = io.BytesIO()
            np.save(out, column)
            raw.replace(f"steps-{alias}.json", canonical_json(report))
            raw.replace(kept, out.getvalue())
        with raw.open(kept) as file:
            columns[alias] = np.load(io.BytesIO(file.read()))
        notes[alias] = raw.read_json(f"steps-{alias}.json")
    return columns, notes


def with_steps(table: pa.Table, columns: Mapping[str, Steps], start: int) -> pa.Table:
    """Return the table of a unit, whose first row is `start`, with its steps."""
    for alias, column in columns.items():
        steps = column[start : start + table.num_rows]
        place = table.schema.names.index(alias)
        table = table.set_column(place, alias, pa.array(steps, mask=np.isnan(steps)))
    return table


def gios(scorers: Mapping[str, Scorer]) -> dict[str, GIO]:
    """Return the scorers whose column is made here."""
    return {alias: scorer for alias, scorer in scorers.items() if isinstance(scorer, GIO)}


def _named(scorer: GIO) -> tuple[str, str]:
    """Return the names of the vectors of the corpus and of the target."""
    return scorer.vectors, scorer.target_vectors or scorer.vectors


def _selector(alias: str, scorer: GIO) -> Gio:
    selector: Gio = made(f"scorer {alias!r}", Gio, scorer.settings)
    return selector


def _searched(
    work: Work, units: Sequence[Unit], alias: str, scorer: GIO
) -> tuple[Steps, dict[str, Any]]:
    scores = _Unfinished(work, units)
    vectors, target_vectors = _named(scorer)
    sources = (
        find_source(vectors, Wanted(scores)),
        find_source(target_vectors, Wanted(scores, is_target=True)),
    )
    table = TableWithVectors(scores, *sources)
    rng = np.random.default_rng(scorer.seed)
    places, outcome = _selector(alias, scorer).searched(table, rng)
    column = np.full(scores.rows, np.nan, np.float32)
    column[places] = np.where(outcome.step < 0, np.nan, outcome.step)
    if not outcome.found.rows:
        log.warning("%s accepts no row: the start is closer to the target than the corpus", alias)
    said = {"vectors": sources[0].content, "target_vectors": sources[1].content}
    report: dict[str, Any] = json.loads(json.dumps({**outcome.report, **said}))
    return column, report


class _Planned(ScoreTable):
    """The score table of a run before it, as far as sources of vectors ask for one."""

    def __init__(self, work: Work) -> None:
        self.folder = Folder(work.out)
        self.path: str = self.folder.uri
        self.corpus: dict[str, Any] = work.corpus.describe()
        target = None if work.target is None else work.target.describe()
        self.meta = {
            "run": work.run,
            "corpus": self.corpus,
            "target": target,
            "task": dict(work.task),
        }
        self.rows: int = work.corpus.rows
        self.schema: pa.Schema = work.schema


class _Unfinished(_Planned):
    """The score table of a run whose parts are in `raw/`."""

    def __init__(self, work: Work, units: Sequence[Unit]) -> None:
        super().__init__(work)
        self._raw = Folder(work.parts)
        receipts = committed(self._raw, units)
        stores = stores_of(self.folder, receipts) if work.stores is not None else {}
        self.success = {"rows": self.rows, "units": len(units), "stores": stores}
        with open_parquet(self.folder, UNITS) as file:
            self.units: pa.Table = file.read(use_threads=False)

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        for unit in range(self.success["units"]):
            with open_parquet(self._raw, part_name(unit)) as file:
                for batch in file.iter_batches(ROW_GROUP, columns=columns, use_threads=False):
                    yield batch.select(columns)
