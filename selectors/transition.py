"""Transition matrices T[noisy, clean] = P(noisy label | clean label): given, symmetric, estimated.

Shapes: n rows, c classes. Columns of T sum to 1.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

SUMS = 1e-3  # written matrices are often rounded to four digits


def symmetric(rate: float | int, classes: int) -> Float64[ndarray, "c c"]:
    """Return the matrix of noise that moves a share `rate` of labels evenly to other classes."""
    if isinstance(rate, bool) or not 0 <= rate <= 1:
        raise ValueError(f"the noise rate must be a share in [0, 1], not {rate!r}")
    if classes < 2:
        raise ValueError("a transition between labels needs two classes")
    matrix = np.full((classes, classes), rate / (classes - 1))
    np.fill_diagonal(matrix, 1 - rate)
    return matrix


def read_transition(path: str) -> Float64[ndarray, "c c"]:
    """Return the matrix in a `.npy` file or in a text file of comma-separated rows.

    Raises:
        ValueError: there is no such file, or it is no matrix of shares whose columns sum to 1.
    """
    try:
        if path.endswith(".npy"):
            found = np.load(path, allow_pickle=False)
        else:
            found = np.loadtxt(path, delimiter=",", ndmin=2)
    except FileNotFoundError:
        raise ValueError(f"transition: there is no file {path}") from None
    except (ValueError, OSError, EOFError) as problem:
        raise ValueError(
            f"transition: {path} is no matrix: {str(problem).splitlines()[0]}"
        ) from None
    return checked(found, Path(path).name)


def checked(matrix: ndarray, name: str) -> Float64[ndarray, "c c"]:
    """Return the matrix in float64 if it is a transition matrix, with T[noisy, clean].

    Raises:
        ValueError: it is not; where its rows sum to 1, that it should be transposed.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype.kind not in "fiu":
        raise ValueError(
            f"transition: {name} has shape {list(matrix.shape)}, not classes x classes"
        )
    wide = matrix.astype(np.float64)
    if not np.isfinite(wide).all() or (wide < 0).any():
        raise ValueError(f"transition: {name} holds numbers that are no shares")
    if (np.abs(wide.sum(axis=0) - 1) > SUMS).any():
        turned = (np.abs(wide.sum(axis=1) - 1) <= SUMS).all()
        advice = "its rows do: transpose it" if turned else "neither do its rows"
        raise ValueError(
            f"transition: columns of {name} are clean labels and must sum to 1; {advice}"
        )
    return wide


def anchored(probs: Float64[ndarray, "n c"]) -> Float64[ndarray, "c c"]:
    """Return T[:, y] = p(. | the row with the largest p_y): anchor points.

    Patrini et al. 2017 ("Making deep neural networks robust to label noise", CVPR, equations 12 and
    13), for probabilities of a model of the noisy labels. The first of equal rows.
    """
    best = probs.argmax(axis=0)
    return np.asarray(probs[best].T / probs[best].sum(axis=1))


def confident(
    probs: Float64[ndarray, "n c"], labels: Int64[ndarray, " n"]
) -> Float64[ndarray, "c c"]:
    """Return T from the confident joint of given and probable labels.

    Northcutt, Jiang and Chuang 2021 ("Confident learning", JAIR, section 3.1): a row counts for the
    class y of the largest p_y among classes with p_y >= the mean p_y of the rows labelled y; the
    counts of each given label are scaled to its rows; columns are then divided by their sums.

    Raises:
        ValueError: a class that no row is labelled with, or none is confidently of.
    """
    classes = probs.shape[1]
    rows = np.bincount(labels, minlength=classes)
    if (rows == 0).any():
        raise ValueError(f"no row is labelled class {int(rows.argmin())}; give the transition")
    own = probs[np.arange(len(labels)), labels]
    least = np.bincount(labels, own, classes) / rows
    sure = probs >= least
    counted = sure.any(axis=1)
    likely = np.where(sure, probs, -1).argmax(axis=1)
    joint = np.zeros((classes, classes))
    np.add.at(joint, (labels[counted], likely[counted]), 1)
    given = joint.sum(axis=1, keepdims=True)
    joint = np.divide(joint, given, out=np.zeros_like(joint), where=given > 0) * rows[:, None]
    totals = joint.sum(axis=0)
    if (totals == 0).any():
        raise ValueError(
            f"no row is confidently of class {int(totals.argmin())}; give the transition"
        )
    return np.asarray(joint / totals)
