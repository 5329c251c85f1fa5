"""Loss-driven schedules replayed on recorded losses, without a training.

A replay shows what the rule does with losses that some other training had. Live, the rule changes
which rows are trained on and so the losses themselves: the rows of a replay are not those that
live training would have chosen. Everything here says so in its `label`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from curate.pipeline.manifests.loss_driven import LossDriven
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.manifests.merge import row_keys
from curate.pipeline.scoring.score_table import ScoreTable

LABEL = "replay of recorded losses, not what live training would have chosen"


@dataclass(frozen=True)
class ReplayedEpoch:
    """What the rule chose for an epoch."""

    epoch: int
    positions: Int64[ndarray, " n"]
    weights: Float32[ndarray, " n"]
    label: str = LABEL


def replay(sampler: LossDriven, losses: Float[ndarray, "e n"]) -> Iterator[ReplayedEpoch]:
    """Yield each epoch's choice when shown rows have these losses: `losses[e]` after epoch e.

    Fewer recordings than epochs are spread evenly over them. Only rows that an epoch shows get a
    new loss, as in training. The sampler's `is_replay` is true from then on.

    Raises:
        ValueError: the losses are not of the sampler's rows, or not finite.
    """
    if losses.ndim != 2 or losses.shape[1] != sampler.rows or not len(losses):
        raise ValueError(f"recorded losses are [epochs, {sampler.rows}], not {losses.shape}")
    sampler.is_replay = True
    for epoch in range(sampler.epochs):
        sampler.start(epoch)
        positions = sampler.positions()
        yield ReplayedEpoch(epoch, positions, sampler.weights(positions))
        recorded = losses[epoch * len(losses) // sampler.epochs]
        sampler.update(positions, recorded[positions])


def recorded_losses(
    scores: str | Path | ScoreTable, manifest: Manifest, column: str = "loss"
) -> Float32[ndarray, "c n"]:
    """Return the losses at each checkpoint of the selected rows: [checkpoints, K].

    From `<column>_by_checkpoint`, which `curate score --keep-checkpoints` writes. Memory: 4 bytes
    per row and checkpoint.

    Raises:
        ValueError: the table has no such column, is of another corpus, or a row has no losses.
    """
    table = scores if isinstance(scores, ScoreTable) else ScoreTable.open(scores)
    name = f"{column}_by_checkpoint"
    if name not in table.schema.names:
        raise ValueError(
            f"{table.path} has no column {name!r}; score again with --scorer {column} "
            "--keep-checkpoints"
        )
    if table.corpus["shards"] != manifest.content["corpus"]["shards"]:
        raise ValueError(f"{table.path} and {manifest.path} are of different corpora")
    wanted = np.concatenate([row_keys(b) for b in manifest.batches(["shard", "row"])])
    found: list[ndarray] = []
    for batch in table.scan(["shard", "row", name]):
        chosen = np.flatnonzero(np.isin(row_keys(batch), wanted, assume_unique=True))
        values = batch.column(name).take(chosen)
        if values.null_count or not len(chosen):
            if values.null_count:
                raise ValueError(f"{values.null_count} selected rows have no recorded losses")
            continue
        found.append(values.flatten().to_numpy(zero_copy_only=False).reshape(len(chosen), -1))
    return np.concatenate(found).T.astype(np.float32)
