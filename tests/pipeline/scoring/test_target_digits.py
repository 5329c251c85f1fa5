"""On real data: wrong labels among handwritten digits, found by a small clean target."""

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
SPLITS = (0, 1, 2)


def write(path: Path, images: np.ndarray, labels: np.ndarray) -> str:
    flat = pa.array(images.astype(np.float32).reshape(-1))
    table = pa.table({"image": pa.FixedSizeListArray.from_arrays(flat, 64), "label": labels})
    pq.write_table(table, path)
    return str(path)


@pytest.mark.parametrize("split", SPLITS)
def test_flipped_labels_are_found_by_two_hundred_clean_rows(split: int, tmp_path: Path) -> None:
    """1300 rows, 20 % with another label; AUROC of the clean against the flipped.

    The dot product with one mean gradient, or the cosine averaged over classes, loses classes.
    """
    torch.set_num_threads(1)
    digits, rng = load_digits(), np.random.default_rng(split)
    order = rng.permutation(len(digits.target))
    clean, rows = order[:200], order[200:1500]
    labels, flipped = digits.target[rows].copy(), rng.random(1300) < 0.2
    labels[flipped] = (labels[flipped] + rng.integers(1, 10, flipped.sum())) % 10
    images = digits.data / 16
    corpus = write(tmp_path / "corpus.parquet", images[rows], labels)
    target = write(tmp_path / "target.parquet", images[clean], digits.target[clean])
    found = {}
    for mode, data, epochs, saved in (
        ("tracin", corpus, 5, [1, 2, 3, 5]),
        ("dvgs", target, 20, [2, 5, 10, 20]),
    ):
        checkpoints = str(tmp_path / mode)
        curate.train(
            data, model="mlp", seeds=1, epochs=epochs, save_epochs=saved, out=checkpoints,
            progress=False,
        )  # fmt: skip
        for group in (None, "none"):
            table = curate.score(
                corpus, target=target, target_group=group, checkpoints=checkpoints,
                scorers=f"max=grad_similarity(mode={mode}),"
                f"mean=grad_similarity(mode={mode},groups=mean)",
                out=tmp_path / f"{mode}-{group}", progress=False,
            )  # fmt: skip
            assert isinstance(table, ScoreTable)
            scores = pa.Table.from_batches(list(table.scan()), table.schema)
            for name in ("max", "mean"):
                found[mode, group, name] = roc_auc_score(~flipped, scores[name].to_numpy())
    for mode in ("tracin", "dvgs"):
        assert found[mode, None, "max"] > 0.95
        assert found[mode, None, "max"] > found[mode, None, "mean"] + 0.05
        assert found[mode, None, "max"] > found[mode, "none", "max"] + 0.05
