"""Whether a run lies where its scorers are known to hold; what does not is said, once.

A scorer's `Direction.asks` names conditions; each is one function here, from the run to a sentence
that says what is amiss, or to None.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from curate.pipeline.models.checkpoint import Checkpoint
from curate.pipeline.models.weights import weight_shapes
from curate.pipeline.scoring.work import Work
from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder

log = logging.getLogger("curate.score")

TEXT_TASKS = frozenset({"text_classification", "causal_lm", "seq2seq"})


def warn_of_settings(work: Work) -> dict[str, list[str]]:
    """Return what is amiss for each scorer, by alias, and tell it: once for all that share it."""
    found: dict[str, list[str]] = {}
    told: dict[str, list[str]] = {}
    for alias, scorer in work.made.items():
        for ask in scorer.direction.asks:
            sentence = CHECKS[ask](work) if ask in CHECKS else None
            if sentence is not None:
                found.setdefault(alias, []).append(sentence)
                told.setdefault(sentence, []).append(alias)
    for sentence, aliases in told.items():
        log.warning("%s %s", ", ".join(aliases), sentence)
    return found


def refuse_settings(work: Work) -> None:
    """Raise ValueError where a scorer cannot be computed from this run."""
    for alias, scorer in work.made.items():
        for ask in scorer.direction.asks:
            sentence = REFUSED[ask](work) if ask in REFUSED else None
            if sentence is not None:
                raise ValueError(f"{alias} {sentence}")


def one_epoch(work: Work) -> str | None:
    """No checkpoint comes from before the end of the first epoch."""
    return _early(
        [c for c in work.checkpoints if (_epoch(c) or 0.0) < 1 and _epoch(c) is not None], work
    )


def trained_one_epoch(work: Work) -> str | None:
    """The same, of those that are trained at all: `step_zero.py` tells of gradient norms there."""
    return _early([c for c in work.checkpoints if c.step > 0 and 0 < (_epoch(c) or 0.0) < 1], work)


def _early(found: list[Checkpoint], work: Work) -> str | None:
    if not found:
        return None
    if work.task.get("kind") in TEXT_TASKS:
        why = "in fine-tuning such scores can be worse than random (Fayyaz et al. 2022)"
    else:
        why = "its source takes it from epoch 10 of 200 on (Paul et al. 2021)"
    return f"of {_names(found)}, from before the end of the first epoch: {why}"


def after_step_0(work: Work) -> str | None:
    """No checkpoint is untrained."""
    untrained = [c for c in work.checkpoints if c.step == 0 and _is_told(c)]
    if not untrained:
        return None
    return f"of {_names(untrained)}, which is not trained yet: nothing is learnt that it could tell"


def several_checkpoints(work: Work) -> str | None:
    """Every run has two checkpoints or more, for a spread."""
    if alone := _alone(work):
        return (
            f"of one checkpoint is 0 for every row: give two or more checkpoints of a run "
            f"(seed {alone} has one)"
        )
    return None


def spread_checkpoints(work: Work) -> str | None:
    """Every run has two checkpoints or more, at different steps, for a sum over training."""
    if alone := _alone(work):
        return (
            f"sums over the training of a run, but seed {alone} has one checkpoint, at one step: "
            f"give checkpoints from several steps"
        )
    return None


def several_epochs(work: Work) -> str | None:
    """Training saw rows more than once. Told by the statistics of `records.parquet`."""
    if work.records is None:
        return None
    name = Path(work.records).name
    most = 0
    with open_parquet(Folder(work.records[: -len(name)] or "."), name) as file:
        column = file.schema_arrow.get_field_index("seen")
        for group in range(file.metadata.num_row_groups):
            statistics = file.metadata.row_group(group).column(column).statistics
            if statistics is None or not statistics.has_min_max:
                return None
            most = max(most, int(statistics.max))
    if most > 1:
        return None
    return "counts over several epochs, but training saw no row more than once: train for more"


def nonlinear(work: Work) -> str | None:
    """The model is more than one matrix: else its logits' gradients are the same for all rows."""
    for checkpoint in work.checkpoints[:1]:
        shapes = weight_shapes(checkpoint.path)
        matrices = [s for s in shapes.values() if len(s) > 1]
        if len(matrices) == 1 and len(matrices[0]) == 2 and len(shapes) <= 2:
            return (
                "of a linear model tells the label alone: the gradient of its logits is the same "
                "for all rows of a class; use a model with hidden layers"
            )
    return None


def trained_on_target(work: Work) -> str | None:
    """The checkpoints' model was trained on the target."""
    if work.target is None:
        return None
    for checkpoint in work.checkpoints:
        trained = checkpoint.corpus or {}
        if trained.get("digest") not in (None, work.target.corpus.digest):
            return (
                f"is defined by a model that is trained on the target, but {_names([checkpoint])} "
                f"was trained on {trained.get('uri', 'other data')}: train on the target, or use "
                f"mode=tracin"
            )
    return None


def reference_of_other_rows(work: Work) -> str | None:
    """The references were not trained on the rows that are scored."""
    for checkpoint in work.reference:
        trained = (checkpoint.corpus or {}).get("digest")
        if not checkpoint.null_input and trained == work.corpus.digest:
            return (
                f"takes the loss at the reference {_names([checkpoint])} for irreducible, but that "
                f"was trained on rows of the corpus that is scored: train it on others"
            )
    return None


def right_labels(work: Work) -> str | None:
    """Rows' labels are right. No run can show that, so it is said in any case."""
    return (
        "takes inner products, in which long gradients decide: hard rows and wrong labels stand "
        "at the top; similarity=cosine does not have it so"
    )


def right_labels_by_class(work: Work) -> str | None:
    """Rows' labels are right, or the target's groups are not the classes."""
    target = work.target
    if target is None or len(target.groups) < 2 or target.column != work.label:
        return None
    return (
        "takes the class that a row helps most, and a wrong label helps the class that it names: "
        "wrong labels stand high; groups=mean does not have it so"
    )


def two_checkpoints(work: Work) -> str | None:
    """Every run has two checkpoints or more: one has neither mean nor spread to speak of."""
    if alone := _alone(work):
        return (
            f"compares the gradients of several checkpoints of a run, but seed {alone} has one: "
            f"give two or more"
        )
    return None


REFUSED: dict[str, Callable[[Work], str | None]] = {"two_checkpoints": two_checkpoints}
"""Conditions without which there is no score at all."""
CHECKS: dict[str, Callable[[Work], str | None]] = {
    "one_epoch": one_epoch,
    "trained_one_epoch": trained_one_epoch,
    "after_step_0": after_step_0,
    "several_checkpoints": several_checkpoints,
    "spread_checkpoints": spread_checkpoints,
    "several_epochs": several_epochs,
    "nonlinear": nonlinear,
    "trained_on_target": trained_on_target,
    "reference_of_other_rows": reference_of_other_rows,
    "right_labels": right_labels,
    "right_labels_by_class": right_labels_by_class,
}
"""By the names that `Direction.asks` uses. A plug-in's own names are its own affair."""


def _epoch(checkpoint: Checkpoint) -> float | None:
    """Return how many epochs led to it, None where that is unknown."""
    if checkpoint.epoch is not None:
        return float(checkpoint.epoch)
    rows: Any = (checkpoint.corpus or {}).get("rows")
    if checkpoint.rows_seen is not None and rows:
        return checkpoint.rows_seen / int(rows)
    return 0.0 if checkpoint.step == 0 and _is_told(checkpoint) else None


def _is_told(checkpoint: Checkpoint) -> bool:
    """Return whether its step is known: a folder that tells none may be trained to the end."""
    return checkpoint.task is not None or checkpoint.epoch is not None


def _alone(work: Work) -> str:
    """Return the seeds that have a single checkpoint, "" where none has."""
    return ", ".join(str(seed) for seed, of in work.runs.items() if len(of) == 1)


def _names(checkpoints: Iterable[Checkpoint]) -> str:
    names = [Path(c.path).name for c in checkpoints]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
