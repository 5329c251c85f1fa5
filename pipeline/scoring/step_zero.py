"""GraNd at initialisation: a warning, and how far it is just the norm of the input."""

import itertools
import logging

import numpy as np
import pyarrow as pa
import torch
from scipy.stats import spearmanr

from curate.pipeline.scoring.score_table import part_name
from curate.pipeline.scoring.units import Unit
from curate.pipeline.scoring.windows import NoLedger, windows
from curate.pipeline.scoring.work import Work
from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder
from curate.pipeline.tasks.registry import task_from_description
from curate.pipeline.tasks.task import Task
from curate.scorers.protocol import TARGET_KINDS, Batch

log = logging.getLogger("curate.score")

ROWS = 10_000
BATCH = 256


def gradient_scorers(work: Work) -> list[str]:
    """Return the scorers that are made of gradient norms; what compares directions is not."""
    kinds = {alias: {s.kind for s in scorer.needs} for alias, scorer in work.made.items()}
    return [a for a, of in kinds.items() if "grad_sq_norm" in of and not of & TARGET_KINDS]


def warn_of_step_zero(work: Work) -> bool:
    """Warn when gradient norms are asked for at step 0; return whether that is so."""
    aliases = gradient_scorers(work)
    # A model folder that tells neither step nor epoch may be trained to the end.
    is_told = [c.task is not None or c.epoch is not None for c in work.checkpoints]
    if not aliases or not any(c.step == 0 for c in itertools.compress(work.checkpoints, is_told)):
        return False
    log.warning(
        "%s at step 0: gradient norms at initialisation do not reproduce as a score and are no "
        "better than random (Kirsch 2023, arXiv 2303.14753); use checkpoints from after some "
        "training",
        ", ".join(aliases),
    )
    return True


def input_norm_correlations(work: Work, units: list[Unit]) -> dict[str, float | None]:
    """Return Spearman's rank correlation of gradient scores with the input norm, and tell it.

    Over the first rows, up to ROWS. None where inputs are tokens, which have no norm, or where
    one of the two does not vary.
    """
    aliases = gradient_scorers(work)
    task = task_from_description(dict(work.task), work.corpus)
    norms: list[np.ndarray] = []
    tables: list[pa.Table] = []
    for unit in units:
        found = _norms(work, task, unit)
        if found is None:
            log.warning("rank correlation with the input norm: not defined for token inputs")
            return dict.fromkeys(aliases)
        norms.append(found)
        with open_parquet(Folder(work.parts), part_name(unit.number)) as file:
            tables.append(file.read(aliases, use_threads=False))
        if sum(map(len, norms)) >= ROWS:
            break
    norm, scores = np.concatenate(norms)[:ROWS], pa.concat_tables(tables).slice(0, ROWS)
    return {alias: _correlation(alias, norm, scores.column(alias)) for alias in aliases}


def _norms(work: Work, task: Task, unit: Unit) -> np.ndarray | None:
    """Return the norm of each row's input, NaN where there is none; None for token inputs."""
    found = np.full(unit.rows, np.nan)
    for window in windows(work, unit, task, NoLedger()):
        if window.encoded is None:
            continue
        for start in range(0, window.encoded.num_rows, BATCH):
            encoded = window.encoded.slice(start, BATCH)
            try:
                batch = task.collate(encoded)
            except ValueError:
                continue  # rows with an error have no score to compare
            norms = _batch_norms(batch)
            if norms is None:
                return None
            found[window.positions[start : start + BATCH]] = norms
        if window.start + window.raw.num_rows >= ROWS:
            break
    return found


def _batch_norms(batch: Batch) -> np.ndarray | None:
    inputs = [value for value in batch.inputs.values() if value.is_floating_point()]
    if not inputs or batch.row_ids is not None:
        return None
    squares = torch.stack([v.double().flatten(1).pow(2).sum(1) for v in inputs]).sum(0)
    norms: np.ndarray = squares.sqrt().numpy()
    return norms


def _correlation(alias: str, norm: np.ndarray, column: pa.ChunkedArray) -> float | None:
    score = column.to_numpy().astype(float)
    valid = np.isfinite(norm) & np.isfinite(score)
    if valid.sum() < 2 or np.ptp(norm[valid]) == 0 or np.ptp(score[valid]) == 0:
        return None
    found = round(float(spearmanr(norm[valid], score[valid]).statistic), 4)
    log.warning(
        "%s: rank correlation with the input norm is %.2f over %d rows", alias, found, valid.sum()
    )
    return found
