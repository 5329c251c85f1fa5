"""The scores of one unit's rows while they are made, and the reduction of signals to scores.

Shapes: K checkpoints, S seeds, B rows of a batch.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float64
from torch import Tensor

from curate.pipeline.scoring.aggregate import KEY, aggregate_of, part_moments
from curate.pipeline.scoring.reference import not_finite_at_reference
from curate.pipeline.scoring.units import Unit
from curate.pipeline.scoring.work import (
    Work,
    has_checkpoints,
    has_groups,
    learning_rate_weights,
    mean_rates,
    reads_model,
    record_signals,
    table_signals,
    text_signals,
)
from curate.pipeline.training.records import read_records
from curate.scorers.protocol import (
    ADAM_KINDS,
    ANGLE_KINDS,
    GROUP_KINDS,
    RECORD_KINDS,
    SPREAD_KINDS,
    Signal,
)
from curate.scorers.token_angles import NO_TOKEN

Records = dict[int, dict[Signal, np.ndarray]]
"""Seed -> signal -> float64 value of each row; NaN where training did not see the row."""


class Reduction:
    """Turns signals into scores: within a run by the scorer, over seeds by the mean."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.scorers = work.made
        of_run = {s: [work.checkpoints[k] for k in indices] for s, indices in work.runs.items()}
        self.weights = {s: torch.from_numpy(learning_rate_weights(c)) for s, c in of_run.items()}
        # LESS averages the rate over the epoch that led to a checkpoint (Xia et al. 2024).
        self.mean_weights = {
            s: torch.from_numpy(learning_rate_weights(mean_rates(c))) for s, c in of_run.items()
        }
        later = text_signals(self.scorers) | table_signals(self.scorers)
        self.records = sorted(record_signals(self.scorers) | later)

    def read_records(self, unit: Unit) -> Records:
        """Return what training recorded of the unit's rows, and room for what comes later."""
        recorded = [s for s in self.records if s.kind in RECORD_KINDS]
        found: Records = {
            seed: {s: np.full(unit.rows, np.nan) for s in self.records if s not in recorded}
            for seed in self.work.runs
        }
        if self.work.records is None or not recorded:
            return found
        spans = [read_records(self.work.records, s.shard, s.start, s.rows) for s in unit.spans]
        for seed in self.work.runs:
            for signal in recorded:
                values = [span[seed][signal.kind] for span in spans]
                found[seed][signal] = np.concatenate(values).astype(float)
        return found

    def by_seed(
        self, alias: str, reading: Mapping[Signal, Tensor], records: Records, rows: np.ndarray
    ) -> Float64[np.ndarray, "s b"]:
        """Return a scorer's float64 value in each run."""
        scorer, runs = self.scorers[alias], []
        is_less = any(s.kind in ADAM_KINDS for s in scorer.needs)
        weights = self.mean_weights if is_less else self.weights
        for seed, indices in self.work.runs.items():
            signals = {
                s: torch.from_numpy(records[seed][s][rows])[None]
                if s in self.records
                else reading[s][indices[-1:] if s.kind in SPREAD_KINDS else indices]
                for s in scorer.needs
            }
            runs.append(scorer.reduce(signals, weights[seed]).double().numpy())
        return np.stack(runs)

    def by_checkpoint(
        self, alias: str, reading: Mapping[Signal, Tensor]
    ) -> Float64[np.ndarray, "k b"]:
        """Return a scorer's value at each checkpoint alone."""
        scorer, one = self.scorers[alias], torch.ones(1, dtype=torch.float64)
        at = [
            scorer.reduce({s: reading[s][k : k + 1] for s in scorer.needs}, one).double().numpy()
            for k in range(len(self.work.checkpoints))
        ]
        return np.stack(at)

    def by_group(self, alias: str, reading: Mapping[Signal, Tensor]) -> Float64[np.ndarray, "m b"]:
        """Return a scorer's mean over seeds where each group of the target is alone."""
        groups = next(v.shape[2] for s, v in reading.items() if s.kind in GROUP_KINDS)
        alone = [
            {s: v[:, :, m : m + 1] if s.kind in GROUP_KINDS else v for s, v in reading.items()}
            for m in range(groups)
        ]
        return np.stack([self.by_seed(alias, r, {}, np.empty(0, int)).mean(0) for r in alone])


class ScoreRows:
    """Columns of a unit, filled batch by batch in any order."""

    def __init__(self, work: Work, unit: Unit) -> None:
        self.work, self.unit = work, unit
        self.reduction = Reduction(work)
        self.records = self.reduction.read_records(unit)
        self.errors: dict[int, str] = {}
        n = unit.rows
        self.columns: dict[str, np.ndarray] = {}
        for alias, scorer in self.reduction.scorers.items():
            self.columns[alias] = np.full(n, np.nan, np.float32)
            if alias in work.averaged:
                self.columns[f"{alias}_std"] = np.full(n, np.nan, np.float32)
            by_checkpoint = work.keep_checkpoints or aggregate_of(scorer) is not None
            if by_checkpoint and has_checkpoints(scorer):
                shape = (n, len(work.checkpoints))
                self.columns[f"{alias}_by_checkpoint"] = np.full(shape, np.nan, np.float32)
            if work.keep_groups and has_groups(scorer):
                assert work.target is not None, "checked with the request"
                shape = (n, len(work.target.groups))
                self.columns[f"{alias}_by_group"] = np.full(shape, np.nan, np.float32)
        if work.with_tokens:
            self.columns["tokens"] = np.zeros(n, np.int32)

    def put_texts(self, start: int, values: Mapping[Signal, np.ndarray]) -> None:
        """Take what the texts of the rows from `start` on tell, before these rows are filled."""
        for of_seed in self.records.values():
            for signal, found in values.items():
                of_seed[signal][start : start + len(found)] = found

    def fill(self, rows: np.ndarray, reading: Mapping[Signal, Tensor]) -> np.ndarray:
        """Store these rows' scores; return which of them (bool [B]) are not finite and were not.

        A value that is missing because training never saw the row is null, and no fault.
        """
        found, bad = {}, np.zeros(len(rows), dtype=bool)
        if reading:
            bad |= ~torch.isfinite(reading[Signal("loss")]).all(0).numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            for alias, scorer in self.reduction.scorers.items():
                runs = self.reduction.by_seed(alias, reading, self.records, rows)
                found[alias] = runs.mean(0).astype(np.float32)
                if f"{alias}_std" in self.columns:
                    found[f"{alias}_std"] = runs.std(0, ddof=1).astype(np.float32)
                if reads_model(scorer):
                    bad |= ~np.isfinite(found[alias])
                if f"{alias}_by_checkpoint" in self.columns:
                    at = self.reduction.by_checkpoint(alias, reading)
                    found[f"{alias}_by_checkpoint"] = at.T.astype(np.float32)
                if f"{alias}_by_group" in self.columns:
                    each = self.reduction.by_group(alias, reading)
                    found[f"{alias}_by_group"] = each.T.astype(np.float32)
        if "tokens" in self.columns:
            found["tokens"] = reading[Signal("tokens")][0].nan_to_num().numpy().astype(np.int32)
        for name, values in found.items():
            self.columns[name][rows[~bad]] = values[~bad]
        return bad

    def why_not_finite(self, reading: Mapping[Signal, Tensor]) -> str:
        """Return what is wrong with the one row of this reading."""
        losses = reading[Signal("loss")][:, 0]
        for checkpoint, loss in zip(self.work.checkpoints, losses.tolist(), strict=True):
            if not np.isfinite(loss):
                return f"the loss is {loss} at checkpoint {checkpoint.path.rsplit('/', 1)[-1]}"
        if (said := not_finite_at_reference(self.work, reading)) is not None:
            return said
        if any(s.kind in ANGLE_KINDS and x.isnan().any() for s, x in reading.items()):
            return NO_TOKEN
        for alias, scorer in self.reduction.scorers.items():
            if reads_model(scorer):
                value = self.reduction.by_seed(alias, reading, {}, np.zeros(1, int)).mean()
                if not np.isfinite(np.float32(value)):
                    return f"the score {alias} is {np.float32(value)}"
        return "a value is not finite"

    def fail(self, row: int, reason: str) -> None:
        """Give a row its error."""
        self.errors[int(row)] = reason

    def moments(self) -> dict[str, Any]:
        """Return what the receipt holds of the scores that are aggregated at each checkpoint."""
        whole = np.ones(self.unit.rows, dtype=bool)
        whole[list(self.errors)] = False
        found = {
            alias: self.columns[f"{alias}_by_checkpoint"][whole]
            for alias, scorer in self.reduction.scorers.items()
            if aggregate_of(scorer) is not None
        }
        return {KEY: part_moments(found)} if found else {}

    def table(self, kept: pa.Table | None) -> pa.Table:
        """Return the part: identity, kept columns, scores (null on error), errors."""
        schema = self.work.schema
        spans = self.unit.spans
        columns: dict[str, pa.Array | pa.ChunkedArray] = {
            "shard": np.concatenate([np.full(s.rows, s.shard, np.int32) for s in spans]),
            "row": np.concatenate([np.arange(s.start, s.start + s.rows) for s in spans]),
            "error": [self.errors.get(i) for i in range(self.unit.rows)],
        }
        failed = np.zeros(self.unit.rows, dtype=bool)
        failed[list(self.errors)] = True
        for name, values in self.columns.items():
            if name not in schema.names:
                continue  # only for an aggregate
            if values.ndim == 2:
                columns[name] = _lists(values, failed)
            else:
                absent = failed if name == "tokens" else failed | np.isnan(values)
                columns[name] = pa.array(values, mask=absent)
        for field in schema:
            if field.name not in columns:
                source = self.work.id_column if field.name == "id" else field.name
                columns[field.name] = (
                    pa.nulls(self.unit.rows, field.type) if kept is None else kept.column(source)
                )
        return pa.table({n: columns[n] for n in schema.names}, schema=schema)


def _lists(values: np.ndarray, failed: np.ndarray) -> pa.Array:
    offsets = pa.array(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1])
    flat = pa.array(values.reshape(-1), mask=np.isnan(values.reshape(-1)))
    return pa.ListArray.from_arrays(offsets, flat, mask=pa.array(failed))
