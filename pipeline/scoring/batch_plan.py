"""Which rows share a batch: a pure function of the rows' costs and the settings.

Rows are sorted by length within a window and cut under a budget, so padding is small, memory is
bounded, and a rerun makes the same batches whatever was killed and however many workers there are.
"""

from dataclasses import dataclass

import numpy as np

WINDOW_BYTES = 1 << 26
"""A window's rows, as read or encoded; two windows are held, each in both forms and in pieces."""
WINDOW_ROWS = (32, 2048)


@dataclass(frozen=True)
class BatchPlan:
    """Limits of a batch. `batch_tokens` counts padding; `batch_bytes` is of encoded rows."""

    batch_rows: int = 256
    batch_tokens: int = 8192
    batch_bytes: int = 8 << 20
    window_rows: int = WINDOW_ROWS[1]

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def batches(self, costs: np.ndarray, row_bytes: float) -> list[np.ndarray]:
        """Return the rows of each batch, int64 indices into the window.

        Longest first: a batch that does not fit in memory shows at once. Rows of equal cost stay
        in corpus order. A row over budget alone is a batch of its own.
        """
        by_size = int(self.batch_bytes // max(row_bytes, 1.0))
        limit = max(1, min(self.batch_rows, by_size))
        order = np.argsort(-costs, kind="stable").astype(np.int64)
        batches, start = [], 0
        while start < len(order):
            longest = max(1, int(costs[order[start]]))
            rows = max(1, min(limit, self.batch_tokens // longest))
            batches.append(order[start : start + rows])
            start += rows
        return batches


def window_rows(row_bytes: float) -> int:
    """Return how many rows of that size a window takes: fewer of wide ones, to bound memory."""
    least, most = WINDOW_ROWS
    return max(least, min(most, int(WINDOW_BYTES // max(row_bytes, 1.0))))
