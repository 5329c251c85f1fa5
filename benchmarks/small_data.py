"""Real data for the reproductions: small sets, split and mislabelled anew for each split number.

Digits come with scikit-learn. Fashion-MNIST and the movie snippets are read from packages that lie
under $CURATE_DATA (Debian's `dataset-fashion-mnist`, unpacked in `debroot/`; the source archive of
`vaderSentiment==0.5` in `pypi/`); where they are missing, FileNotFoundError says what to fetch.

Shapes: n rows, d features, C classes.
"""

import gzip
import io
import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from curate.pipeline.vectors.sentences import SentenceEncoder

DATA = Path(os.environ.get("CURATE_DATA", Path.home() / ".cache" / "curate-data"))
FASHION = "debroot/usr/share/datasets/fashion-mnist"
SNIPPETS = "pypi/vaderSentiment-0.5.zip"


@dataclass(frozen=True)
class Files:
    """A split on disk: columns `features` or `text`, `label`, and `is_wrong` (0 or 1)."""

    train: str
    test: str
    clean: str | None
    """A part of the held-out rows with their true labels, which `test` leaves out."""
    wrong: Int64[np.ndarray, " n"]
    """1 where the training label was changed."""


def digits(
    folder: Path, split: int, *, flips: float = 0.0, clean: int = 0, train_rows: int = 1300
) -> Files:
    """Write a stratified split of the 1797 digits (8 x 8, 10 classes) with some labels changed."""
    found = load_digits()
    features = (found.data / 16).astype(np.float32)
    return _split(folder, {"features": features}, found.target, split, flips, clean, train_rows)


def fashion(
    folder: Path, split: int, *, flips: float = 0.0, clean: int = 0, train_rows: int = 3000
) -> Files:
    """Write a sample of Fashion-MNIST's 60 000 training images (28 x 28, 10 classes), split."""
    root = _there(FASHION, "the Debian package dataset-fashion-mnist")
    pixels = np.frombuffer(
        gzip.decompress((root / "train-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    ).reshape(-1, 784)
    labels = np.frombuffer(
        gzip.decompress((root / "train-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8
    ).astype(np.int64)
    picked = np.random.default_rng(split).choice(len(labels), train_rows + 2000, replace=False)
    features = (pixels[picked] / 255).astype(np.float32)
    return _split(folder, {"features": features}, labels[picked], split, flips, clean, train_rows)


def snippets(
    folder: Path, split: int, *, flips: float = 0.0, clean: int = 0, train_rows: int = 1000
) -> Files:
    """Write a sample of the movie snippets, split."""
    texts, labels = _snippets(split, train_rows + 1000)
    return _split(folder, {"text": texts}, labels, split, flips, clean, train_rows)


def embedded_snippets(
    folder: Path,
    split: int,
    *,
    encoder: str,
    flips: float = 0.0,
    clean: int = 0,
    train_rows: int = 3000,
) -> Files:
    """Write a sample of the movie snippets as vectors of a sentence encoder, mean square 1."""
    texts, labels = _snippets(split, train_rows + 1000)
    vectors = SentenceEncoder.load(encoder).encode(texts.tolist())
    features = vectors * np.float32(vectors.shape[1] ** 0.5)
    return _split(folder, {"features": features}, labels, split, flips, clean, train_rows)


def _snippets(split: int, rows: int) -> tuple[np.ndarray, Int64[np.ndarray, " n"]]:
    """Return sentences of movie reviews, and 1 where people rate them above 0 on average.

    10 605 sentences, each with 20 or so human ratings from -4 to 4 (Hutto and Gilbert, ICWSM 2014).
    """
    archive = zipfile.ZipFile(_there(SNIPPETS, "the sdist of vaderSentiment==0.5"))
    inner = archive.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        member = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert member is not None
        lines = member.read().decode("utf-8-sig", "replace").splitlines()
    cells = [line.split("\t") for line in lines if line.count("\t") >= 2]
    rated = [(text, float(mean)) for _, mean, text, *_ in cells if float(mean) != 0]
    picked = np.random.default_rng(split).choice(len(rated), rows, replace=False)
    texts = np.array([rated[i][0] for i in picked], dtype=object)
    return texts, np.array([int(rated[i][1] > 0) for i in picked])


def _split(
    folder: Path,
    inputs: dict[str, np.ndarray],
    labels: Int64[np.ndarray, " n"],
    split: int,
    flips: float,
    clean: int,
    train_rows: int,
) -> Files:
    everything = np.arange(len(labels))
    kept, held = train_test_split(
        everything, train_size=train_rows, stratify=labels, random_state=split
    )
    kept, held = np.sort(kept), np.sort(held)
    rng = np.random.default_rng([split, 1])
    given, wrong = labels[kept].copy(), np.zeros(len(kept), np.int64)
    classes = int(labels.max()) + 1
    # Another class, uniformly, so that the share of wrong labels is exactly the one asked for.
    flipped = rng.choice(len(kept), round(flips * len(kept)), replace=False)
    given[flipped] = (given[flipped] + rng.integers(1, classes, len(flipped))) % classes
    wrong[flipped] = 1
    target, tested = held[:0], held
    if clean:
        tested, target = train_test_split(
            held, test_size=clean, stratify=labels[held], random_state=split
        )
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, rows: np.ndarray, label: np.ndarray, is_wrong: np.ndarray) -> str:
        columns = {n: _column(x[rows]) for n, x in inputs.items()}
        table = pa.table({**columns, "label": label, "is_wrong": is_wrong})
        pq.write_table(table, folder / name)
        return str(folder / name)

    true = np.zeros(len(labels), np.int64)
    return Files(
        write("train.parquet", kept, given, wrong),
        write("test.parquet", np.sort(tested), labels[np.sort(tested)], true[: len(tested)]),
        write("clean.parquet", np.sort(target), labels[np.sort(target)], true[: len(target)])
        if clean
        else None,
        wrong,
    )


def _column(values: np.ndarray) -> pa.Array:
    if values.dtype == object:
        return pa.array(values, pa.string())
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _there(name: str, what: str) -> Path:
    path = DATA / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: fetch {what} and set CURATE_DATA")
    return path
