"""Runs over a tiny corpus of points, their models and batches, and gradients by plain autograd."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from curate.pipeline.models.checkpoint import find_checkpoints, load_model
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable
from curate.scorers.protocol import Batch, Outputs


class Points:
    """A corpus of points with its checkpoints; what the stores say of it can be computed here."""

    def __init__(self, corpus: str, checkpoints: str, out: Path) -> None:
        self.corpus, self.checkpoints, self.out = corpus, checkpoints, out
        tables = [pq.read_table(file) for file in sorted(Path(corpus).glob("*.parquet"))]
        self.x = torch.tensor([x for t in tables for x in t["x"].to_pylist()])
        self.y = torch.tensor([y for t in tables for y in t["label"].to_pylist()])

    def models(self) -> list[nn.Module]:
        return [load_model(c).eval() for c in find_checkpoints(self.checkpoints)]

    def batch(self) -> Batch:
        return Batch({"x": self.x}, self.y, len(self.y))

    @staticmethod
    def outputs(model: nn.Module, batch: Any) -> Outputs:
        logits = model(batch.inputs["x"])
        loss = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        return Outputs(loss, batch.targets, logits)

    def gradients(self, model: nn.Module) -> Tensor:
        """Each row's gradient in float64, parameters end to end: plain autograd, row by row."""
        model = model.double()
        rows = []
        for x, y in zip(self.x.double(), self.y, strict=True):
            loss = nn.functional.cross_entropy(model(x[None]), y[None])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
        return torch.stack(rows)

    def score(self, name: str = "scores", **settings: Any) -> ScoreTable:
        table = score(
            self.corpus,
            checkpoints=self.checkpoints,
            **{
                "out": str(self.out / name),
                "engine": "local",
                "progress": False,
                "batch_rows": 16,
                **settings,
            },
        )
        assert isinstance(table, ScoreTable)
        return table


@pytest.fixture
def points(
    make_points: Callable[..., str], points_checkpoints: Callable[..., str], tmp_path: Path
) -> Points:
    """60 rows in two shards; two seeds of two checkpoints, learning rates 0.05 and 0.1/3."""
    return Points(make_points([40, 20]), points_checkpoints(seeds=2, steps=(1, 2)), tmp_path)


@pytest.fixture
def point_target(make_points: Callable[..., str]) -> str:
    """Nine other rows, with ids."""
    rng = np.random.default_rng(3)
    first = {i: float(v) for i, v in enumerate(rng.normal(size=9))}
    return make_points(
        [5, 4], first=first, name="target", extra={"id": [f"t{i}" for i in range(9)]}
    )
