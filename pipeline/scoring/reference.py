"""References: other checkpoints that some scorers compare the scored ones with.

A reference is the last checkpoint of a run; one that was trained on empty inputs serves pvi alone,
any other serves all but pvi.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from curate.pipeline.models.checkpoint import Checkpoint, find_checkpoints
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.scoring.work import Work
from curate.pipeline.tasks.registry import task_from_description
from curate.pipeline.tasks.tokenizers import has_tokenizer, same_tokenizer, tokenizer_digest
from curate.scorers.loss_change import LossChange
from curate.scorers.protocol import EXPERT_KINDS, Scorer, Signal

log = logging.getLogger("curate.score")

References = str | os.PathLike[str] | Sequence[str]
"""Checkpoint folders, or folders of them, as a caller names them."""


def resolved(scorers: Mapping[str, Scorer], references: Sequence[Checkpoint]) -> dict[str, Scorer]:
    """Return the scorers with what they left to whether there is a reference decided."""
    since = "first" if all(c.null_input for c in references) else "reference"
    return {
        alias: replace(s, since=since) if isinstance(s, LossChange) and s.since == "auto" else s
        for alias, s in scorers.items()
    }


def last_checkpoints(given: References | None) -> tuple[Checkpoint, ...]:
    """Return the last checkpoint of each run at these places, in the order given.

    Raises:
        ValueError: a path leads to no checkpoint.
    """
    if given is None:
        return ()
    paths = [given] if isinstance(given, str | os.PathLike) else list(given)
    found: dict[str, Checkpoint] = {}
    for path in paths:
        at = find_checkpoints(path)
        last = {c.seed: c for c in at}  # they are in order of steps
        found |= {c.path: c for c in last.values()}
        if len(last) < len(at):
            names = ", ".join(Path(c.path).name for c in last.values())
            log.info("reference %s: of %d checkpoints the last counts: %s", path, len(at), names)
    return tuple(found.values())


def check_references(
    references: Sequence[Checkpoint],
    scorers: Mapping[str, Scorer],
    checkpoints: Sequence[Checkpoint],
    task: Mapping[str, Any],
    corpus: Corpus,
) -> tuple[Checkpoint, ...]:
    """Return the references, each with the description of the task that reads rows for it.

    `task` describes the task of the checkpoints.

    Raises:
        ValueError: a scorer lacks its reference or a reference its scorer, or it does not suit.
    """
    for checkpoint in checkpoints:
        if checkpoint.null_input:
            raise ValueError(
                f"checkpoint {checkpoint.path} was trained on empty inputs and says nothing of "
                "rows: give it by --reference, to pvi"
            )
    _check_asked(references, scorers)
    _check_expert(references, scorers, checkpoints)
    found = tuple(_described(c, task) for c in references)
    for c in found:
        _check_suits(c, task, corpus)
    return found


def describe(references: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """Return what `_meta.json` records of the references."""
    shown = ("path", "digest", "seed", "epoch", "step", "null_input")
    return [{name: getattr(c, name) for name in shown} for c in references]


def not_finite_at_reference(work: Work, reading: Mapping[Signal, Tensor]) -> str | None:
    """Return what is wrong with the one row of this reading at a reference, None if nothing is."""
    for signal, is_null in ((Signal("reference_loss"), False), (Signal("null_loss"), True)):
        if (losses := reading.get(signal)) is None:
            continue
        of_kind = [c for c in work.reference if c.null_input is is_null]
        for reference, loss in zip(of_kind, losses[0, 0].tolist(), strict=True):
            if not math.isfinite(loss):
                return f"the loss is {loss} at reference {reference.path}"
    return None


def _check_asked(references: Sequence[Checkpoint], scorers: Mapping[str, Scorer]) -> None:
    plain = [c for c in references if not c.null_input]
    null = [c for c in references if c.null_input]
    of_plain = _asking(scorers, "reference_loss", *EXPERT_KINDS)
    of_null = _asking(scorers, "null_loss")
    if of_plain and not plain:
        if null:
            raise ValueError(
                f"{of_plain[0]} compares with a model that sees the rows, but the reference "
                f"{null[0].path} was trained on empty inputs: name another by --reference"
            )
        raise ValueError(
            f"{of_plain[0]} compares with another model: name its checkpoint by --reference DIR"
        )
    if of_null and not null:
        if plain:
            raise ValueError(
                f"{of_null[0]} compares with a model of empty inputs, but the reference "
                f"{plain[0].path} was not trained on them: train one with "
                "`curate train --null-input`"
            )
        raise ValueError(
            f"{of_null[0]} compares with a model of empty inputs: train one with `curate train "
            "--null-input` and name its checkpoint by --reference DIR"
        )
    if plain and not of_plain:
        raise ValueError(
            f"none of the scorers compares with the reference {plain[0].path}: add rho, "
            "loss_change(since=reference) or select_weights, or leave it out"
        )
    if null and not of_null:
        raise ValueError(
            f"the reference {null[0].path} was trained on empty inputs, which none of the scorers "
            "asks for: add pvi, or leave it out"
        )


def _check_expert(
    references: Sequence[Checkpoint],
    scorers: Mapping[str, Scorer],
    checkpoints: Sequence[Checkpoint],
) -> None:
    asking = _asking(scorers, *EXPERT_KINDS)
    if not asking:
        return
    experts = [c for c in references if not c.null_input]
    if len(experts) > 1:
        raise ValueError(
            f"{asking[0]} compares weights with those of one expert, but {len(experts)} references "
            f"are given ({experts[0].path}, {experts[1].path}, ...): name one"
        )
    for checkpoint in checkpoints:
        if checkpoint.path == experts[0].path:
            raise ValueError(
                f"{asking[0]}: the reference {experts[0].path} is one of the checkpoints, and "
                "nothing leads from it to itself: name the model that was trained further"
            )


def _described(reference: Checkpoint, task: Mapping[str, Any]) -> Checkpoint:
    """Return the reference with its task's description; it scores rows by the run's row loss."""
    if reference.task is not None:
        own = {k: v for k, v in reference.task.items() if k != "row_loss"}
        shared = {k: v for k, v in task.items() if k == "row_loss"}
        return replace(reference, task={**own, **shared})
    told = dict(task)
    if "tokenizer" in told.get("preprocess", {}) and has_tokenizer(reference.path):
        digest = tokenizer_digest(reference.path)
        theirs = {"tokenizer": reference.path, "tokenizer_digest": digest}
        told["preprocess"] = {**told["preprocess"], **theirs}
    return replace(reference, task=told)


def _check_suits(reference: Checkpoint, task: Mapping[str, Any], corpus: Corpus) -> None:
    own, path = reference.task or {}, reference.path
    if own["kind"] != task["kind"]:
        raise ValueError(
            f"the reference {path} was trained for {own['kind']}, the checkpoints for "
            f"{task['kind']}: losses of one task alone can be compared"
        )
    ours, theirs = task.get("classes"), own.get("classes")
    if ours != theirs:
        raise ValueError(
            f"the reference {path} knows other classes than the checkpoints "
            f"({len(theirs or ())} and {len(ours or ())}): train it with the same, in their order, "
            "by --task-option classes=..."
        )
    our_label, their_label = (t.get("columns", {}).get("label") for t in (task, own))
    if our_label != their_label:
        raise ValueError(
            f"the reference {path} was trained on the labels {their_label!r}, the checkpoints on "
            f"{our_label!r}"
        )
    if task["kind"] == "causal_lm":
        _check_tokens(reference, task)
    try:
        task_from_description(own, corpus).columns(corpus.schema)
    except ValueError as unsuited:
        raise ValueError(f"the reference {path} does not suit the corpus: {unsuited}") from None


def _check_tokens(reference: Checkpoint, task: Mapping[str, Any]) -> None:
    """Losses per token are comparable where the target tokens are the same.

    Behind a prompt the document's first token is a target, and else it is none.
    """
    assert reference.task is not None, "described"
    for which, name in enumerate(("document", "prompt")):
        ours, theirs = (
            (t["columns"]["inputs"][which:] or [None])[0] for t in (task, reference.task)
        )
        if ours != theirs and (which == 0 or None in (ours, theirs)):
            raise ValueError(
                f"the reference {reference.path} was trained with the {name} {theirs!r}, the "
                f"checkpoints with {ours!r}: losses of different target tokens cannot be compared"
            )
    our, their = task["preprocess"], reference.task["preprocess"]
    is_same = our["append_eos"] == their["append_eos"] and same_tokenizer(
        (our["tokenizer"], our["tokenizer_digest"]),
        (their["tokenizer"], their["tokenizer_digest"]),
    )
    if not is_same:
        raise ValueError(
            f"the reference {reference.path} has another tokenizer than the checkpoints, so that "
            "losses per token mean different things: train it with the same tokenizer"
        )


def _asking(scorers: Mapping[str, Scorer], *kinds: str) -> list[str]:
    return [a for a, s in scorers.items() if any(n.kind in kinds for n in s.needs)]
