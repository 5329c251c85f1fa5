"""On real data: what the scores against references say of wrong labels among digits."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import curate
from curate.pipeline.scoring.score_table import ScoreTable

pytestmark = pytest.mark.slow


def write(path: Path, images: np.ndarray, labels: np.ndarray) -> str:
    flat = pa.array(images.astype(np.float32).reshape(-1))
    table = pa.table({"image": pa.FixedSizeListArray.from_arrays(flat, 64), "label": labels})
    pq.write_table(table, path)
    return str(path)


@pytest.mark.parametrize("split", [0, 1])
def test_rho_passes_wrong_labels_by_and_pvi_finds_them(split: int, tmp_path: Path) -> None:
    """900 rows, a fifth with another label; 600 clean rows for the irreducible loss.

    Early in training the highest losses are those of wrong labels. So are the highest irreducible
    ones: their difference is not.
    """
    torch.set_num_threads(1)
    digits, rng = load_digits(), np.random.default_rng(split)
    order = rng.permutation(len(digits.target))
    hold, rows = order[:600], order[600:1500]
    labels, flipped = digits.target[rows].copy(), rng.random(900) < 0.2
    labels[flipped] = (labels[flipped] + rng.integers(1, 10, flipped.sum())) % 10
    corpus = write(tmp_path / "corpus.parquet", digits.data[rows] / 16, labels)
    holdout = write(tmp_path / "hold.parquet", digits.data[hold] / 16, digits.target[hold])
    for out, data, null, epochs, saved in (
        ("run", corpus, False, 3, [1, 3]),
        ("hold", holdout, False, 15, [15]),
        ("null", corpus, True, 3, [3]),
    ):
        curate.train(
            data, model="mlp", seeds=2, epochs=epochs, save_epochs=saved, null_input=null,
            out=tmp_path / out, progress=False,
        )  # fmt: skip
    found: dict[int, pa.Table] = {}
    for epoch in (1, 3):
        table = curate.score(
            corpus, checkpoints=str(tmp_path / "run" / f"seed*-epoch00{epoch}"),
            scorers="loss,rho,pvi", reference=[str(tmp_path / "hold"), str(tmp_path / "null")],
            out=tmp_path / f"scores{epoch}", progress=False,
        )  # fmt: skip
        assert isinstance(table, ScoreTable)
        found[epoch] = pa.Table.from_batches(list(table.scan()), table.schema)

    def wrong_at_the_top(name: str) -> float:
        """The share of wrong labels in the top fifth after an epoch."""
        top = np.argsort(-found[1][name].to_numpy())[:180]
        return float(flipped[top].mean())

    by_loss, by_rho = wrong_at_the_top("loss"), wrong_at_the_top("rho")
    auroc = roc_auc_score(~flipped, found[3]["pvi"].to_numpy())
    print(f"split {split}: wrong in the top fifth by loss {by_loss:.3f}, rho {by_rho:.3f}; "
          f"share {flipped.mean():.3f}; AUROC of pvi {auroc:.3f}")  # fmt: skip
    assert by_loss > 0.7
    assert by_rho < flipped.mean() / 2
    assert auroc > 0.95
