"""All that a scoring process needs to know, small enough to send to any worker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from curate.pipeline.models.checkpoint import Checkpoint
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.scoring.batch_plan import BatchPlan
from curate.pipeline.scoring.reference_task import own_tasks
from curate.pipeline.scoring.score_table import RAW, score_schema
from curate.pipeline.scoring.store_plan import StorePlan
from curate.pipeline.scoring.target import Target
from curate.pipeline.storing.storage import join
from curate.pipeline.tasks.registry import task_from_description
from curate.scorers.curvature import CurvatureSettings
from curate.scorers.protocol import (
    ADAM_KINDS,
    GROUP_KINDS,
    RECORD_KINDS,
    SPREAD_KINDS,
    TABLE_KINDS,
    TEXT_KINDS,
    Scorer,
    Signal,
)
from curate.scorers.registry import scorer_from_spec


@dataclass(frozen=True)
class Work:
    """One scoring run. Two runs with equal work give equal parts.

    `checkpoints` are ordered by (seed, step); those of one seed form a run. `records` is the
    `records.parquet` that training wrote, and `target` the rows to compare with, where a scorer
    asks for them. `reference` are other checkpoints that scorers compare with, and `stores` are
    vectors of rows that are kept beside the scores.
    """

    run: str
    out: str
    corpus: Corpus
    task: Mapping[str, Any]
    model: str | None
    checkpoints: tuple[Checkpoint, ...]
    scorers: Mapping[str, Mapping[str, Any]]
    keep: tuple[str, ...] = ()
    id_column: str | None = None
    plan: BatchPlan = field(default_factory=BatchPlan)
    keep_checkpoints: bool = False
    keep_groups: bool = False
    with_tokens: bool = False
    max_bad_rows: int = 10
    records: str | None = None
    target: Target | None = None
    stores: StorePlan | None = None
    reference: tuple[Checkpoint, ...] = ()
    threads: int = 1
    device: str = "cpu"

    @cached_property
    def made(self) -> dict[str, Scorer]:
        """The scorers by alias."""
        return {alias: scorer_from_spec(dict(spec)) for alias, spec in self.scorers.items()}

    @property
    def signals(self) -> frozenset[Signal]:
        """What one pass over the model must give: for scorers, and the vectors that are stored."""
        found = model_signals(self.made)
        if self.stores is None:
            return found
        return found | {Signal("loss")} | frozenset(self.stores.signals.values())

    @property
    def runs(self) -> dict[int, list[int]]:
        """Seed -> indices of its checkpoints."""
        runs: dict[int, list[int]] = {}
        for index, checkpoint in enumerate(self.checkpoints):
            runs.setdefault(checkpoint.seed, []).append(index)
        return runs or {0: []}  # what needs no model still has one value

    @cached_property
    def standardised(self) -> dict[str, str]:
        """How the scores of an alias are standardised over the whole table, where they are."""
        asked = {alias: getattr(scorer, "normalise", "raw") for alias, scorer in self.made.items()}
        return {alias: how for alias, how in asked.items() if how != "raw"}

    @cached_property
    def averaged(self) -> list[str]:
        """The aliases whose score is a mean over several seeds, with its deviation beside it."""
        if len(self.runs) < 2:
            return []
        return [alias for alias, scorer in self.made.items() if has_seeds(scorer)]

    @cached_property
    def label(self) -> str | None:
        """The corpus column that holds the class."""
        return task_from_description(dict(self.task), self.corpus).columns(self.corpus.schema).label

    @property
    def parts(self) -> str:
        """Where units are committed: the table itself, unless a last step makes it of them."""
        return join(self.out, RAW) if self.standardised or table_signals(self.made) else self.out

    @cached_property
    def columns(self) -> list[str]:
        """The corpus columns to read: the task's where a model runs, the kept ones, the id."""
        names: list[str] = []
        if self.signals:
            task = task_from_description(dict(self.task), self.corpus)
            others = own_tasks(self.task, self.reference, self.corpus)
            for read in (task, *others.values()):
                names += read.columns(self.corpus.schema).all
        if text_signals(self.made):
            task = task_from_description(dict(self.task), self.corpus)
            names += task.columns(self.corpus.schema).inputs
        names += [*self.keep, *([self.id_column] if self.id_column else [])]
        return list(dict.fromkeys(names))

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of a part."""
        scorers = self.made
        corpus = self.corpus.schema
        return score_schema(
            scorers,
            id_type=corpus.field(self.id_column).type if self.id_column else None,
            keep=[corpus.field(name) for name in self.keep],
            with_std=self.averaged,
            with_checkpoints=[a for a, s in scorers.items() if has_checkpoints(s)]
            if self.keep_checkpoints
            else [],
            with_groups=[a for a, s in scorers.items() if has_groups(s)]
            if self.keep_groups
            else [],
            with_tokens=self.with_tokens,
        )


def model_signals(scorers: Mapping[str, Scorer]) -> frozenset[Signal]:
    """Return what one pass over the model must give: the union of all needs, and the loss."""
    apart = RECORD_KINDS | TEXT_KINDS | TABLE_KINDS
    needs = {s for scorer in scorers.values() for s in scorer.needs if s.kind not in apart}
    return frozenset(needs | {Signal("loss")}) if needs else frozenset()


def record_signals(scorers: Mapping[str, Scorer]) -> frozenset[Signal]:
    """Return what is read from the records of training."""
    return frozenset(s for c in scorers.values() for s in c.needs if s.kind in RECORD_KINDS)


def text_signals(scorers: Mapping[str, Scorer]) -> frozenset[Signal]:
    """Return what is read from the rows' texts."""
    return frozenset(s for c in scorers.values() for s in c.needs if s.kind in TEXT_KINDS)


def table_signals(scorers: Mapping[str, Scorer]) -> frozenset[Signal]:
    """Return what is made of all rows of the table in a last step."""
    return frozenset(s for c in scorers.values() for s in c.needs if s.kind in TABLE_KINDS)


def needs_checkpoints(scorers: Mapping[str, Scorer]) -> bool:
    """Tell whether a scorer needs a model, or the records of one that was trained."""
    apart = TEXT_KINDS | TABLE_KINDS
    return any(s.kind not in apart for scorer in scorers.values() for s in scorer.needs)


def needs_moments(scorers: Mapping[str, Scorer]) -> bool:
    """Tell whether a scorer reads the moments that Adam left beside the checkpoints."""
    signals = {s for scorer in scorers.values() for s in scorer.needs}
    curvatures = {s.curvature for s in signals if s.curvature}
    return any(s.kind in ADAM_KINDS for s in signals) or any(
        CurvatureSettings.of(text).from_moments for text in curvatures
    )


def has_checkpoints(scorer: Scorer) -> bool:
    """Tell whether the scorer has a value at each checkpoint, rather than one per run."""
    if getattr(scorer, "is_of_run", False):
        return False
    of_run = RECORD_KINDS | SPREAD_KINDS | TEXT_KINDS | TABLE_KINDS
    return not any(s.kind in of_run for s in scorer.needs)


def has_seeds(scorer: Scorer) -> bool:
    """Tell whether the scorer has a value in each seed's run: not what is read from texts alone,
    or made of the whole table."""
    return needs_checkpoints({"": scorer})


def has_groups(scorer: Scorer) -> bool:
    """Tell whether the scorer compares a row with each group of a target."""
    return any(s.kind in GROUP_KINDS for s in scorer.needs)


def reads_model(scorer: Scorer) -> bool:
    """Tell whether the scorer's value comes from passes over the model alone."""
    return not any(s.kind in RECORD_KINDS | TEXT_KINDS | TABLE_KINDS for s in scorer.needs)


def mean_rates(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return them with the mean learning rates of the steps that led to each, where known."""
    known = all(c.mean_lr is not None for c in checkpoints)
    return [replace(c, lr=c.mean_lr) for c in checkpoints] if known else list(checkpoints)


def learning_rate_weights(checkpoints: Sequence[Checkpoint]) -> np.ndarray:
    """Return the learning rates of one run's checkpoints, normalised to sum 1.

    Equal weights where a rate is unknown, or zero everywhere.
    """
    if not checkpoints:
        return np.zeros(0)
    rates = np.array([c.lr or 0.0 for c in checkpoints], dtype=np.float64)
    if any(c.lr is None for c in checkpoints) or not rates.sum() > 0:
        return np.full(len(rates), 1 / len(rates))
    weights: np.ndarray = rates / rates.sum()
    return weights
