"""Scores as unsigned integers that sort the same way."""

from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, UInt32
from numpy import ndarray

UNSCORED = 0xFFFFFFFF
"""Key of NaN and null: after every score, in either direction (infinities included)."""


def sort_keys(
    scores: Float32[ndarray, " n"], first: Literal["high", "low"]
) -> UInt32[ndarray, " n"]:
    """Return keys that ascend from the score that comes first; equal scores have equal keys.

    The sign bit of positive floats and all bits of negative ones are flipped, which makes IEEE
    order integer order. -0.0 equals 0.0; NaN becomes UNSCORED.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 is 0.0
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    keys = ascending if first == "low" else ~ascending
    return np.where(np.isnan(scores), np.uint32(UNSCORED), keys)


def key_score(key: int) -> float:
    """Return the score whose ascending key (first "low") this is; NaN for UNSCORED."""
    bits = key ^ 0x80000000 if key >> 31 else key ^ 0xFFFFFFFF
    return float("nan") if key == UNSCORED else float(np.uint32(bits).view(np.float32))


def score_column(batch: pa.RecordBatch, name: str) -> Float32[ndarray, " n"]:
    """Return a column as float32, null as NaN. Wider columns are rounded to float32."""
    column = batch.column(name)
    if not pa.types.is_floating(column.type) or pa.types.is_float16(column.type):
        column = column.cast(pa.float64())
    with np.errstate(over="ignore"):
        return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float32)
