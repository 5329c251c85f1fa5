"""The vectors of the target's rows: made by whichever worker comes first, and kept."""

import logging
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from curate.pipeline.scoring.reference_pass import joint_task
from curate.pipeline.scoring.score_unit import score_unit
from curate.pipeline.scoring.signal_pass import SignalPass
from curate.pipeline.scoring.store_receipts import TARGET, TARGET_RECEIPT
from curate.pipeline.scoring.store_unit import UnitStores
from curate.pipeline.scoring.target_sketch import SAMPLE
from curate.pipeline.scoring.units import Span, Unit
from curate.pipeline.scoring.windows import encode_rows, raw_windows
from curate.pipeline.scoring.work import Work
from curate.pipeline.storing.storage import Folder, canonical_json

log = logging.getLogger("curate.score")


def store_target(work: Work, signals: SignalPass) -> None:
    """Store the vectors of the target's rows unless that is done; the first commit stays.

    Their receipt also has the measured error of sketches, see `sketch_error`.

    Raises:
        ValueError: a row of the target cannot be used.
    """
    folder = Folder(work.out)
    if folder.exists(TARGET_RECEIPT):
        return
    assert work.target is not None and signals.stores is not None, "asked for"
    corpus = work.target.corpus
    own = replace(
        work,
        corpus=corpus,
        scorers={},
        keep=(),
        id_column=None,
        keep_checkpoints=False,
        with_tokens=False,
        max_bad_rows=corpus.rows,
    )
    spans = [Span(i, 0, shard.rows) for i, shard in enumerate(corpus.shards) if shard.rows]
    unit = Unit(0, tuple(spans))
    stores = UnitStores(own, unit, signals.stores.layouts, lead=f"{TARGET}/")
    try:
        with signals.reading(joint_task(replace(work, corpus=corpus))):
            table, _ = score_unit(own, unit, signals, stores=stores)
            _refuse_errors(own, table)
            error = _error(own, unit, signals)
        said = {"run": work.run, "rows": unit.rows, "error": error, "stores": stores.commit()}
    finally:
        stores.close()
    folder.create(TARGET_RECEIPT, canonical_json(said))


def _refuse_errors(work: Work, table: pa.Table) -> None:
    for bad in table.filter(pc.is_valid(table["error"])).slice(0, 1).to_pylist():
        raise ValueError(
            f"row {bad['row']} of {work.corpus.shards[bad['shard']].path} in the target cannot be "
            f"used: {bad['error']}"
        )


def _error(work: Work, unit: Unit, signals: SignalPass) -> float | None:
    """Return the root mean square error of sketched cosines among the first rows."""
    if not work.stores or not work.stores.sketch:
        return None
    window = next(raw_windows(work, unit))
    encoded, _, _ = encode_rows(signals.task.encode, window.raw.slice(0, SAMPLE))
    assert encoded is not None, "every row was used"
    return signals.sketch_error(signals.task.collate(encoded))
