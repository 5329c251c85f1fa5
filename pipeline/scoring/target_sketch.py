"""Sketches in place of a target's gradients where those take too much memory, and their error.

Shapes: n rows of a sample, kk numbers of a sketch.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from curate.scorers.engine import Engine
from curate.scorers.protocol import Batch
from curate.scorers.readouts import Projection, TwoSidedSketch
from curate.scorers.row_vectors import Sketch

SKETCH = TwoSidedSketch(seed=0, k=(32, 32))
"""Of every parameter: a matrix two-sided to 32 x 32, a vector one-sided to 1024."""
SAMPLE = 6
NUMBERS = 1 << 28
"""Numbers of one row's gradient that are held at once for the exact products."""


def sketch_error(
    engine: Engine, batch: Batch, params: Mapping[str, Tensor], kind: Sketch = SKETCH
) -> float:
    """Return how far off cosines by such sketches are: root mean square over a sample's pairs.

    Exact products come from plain autograd on one row after the other, for some parameters at a
    time. A sample of one row tells the relative error of its squared norm.
    """
    rows = batch.select_rows(range(min(SAMPLE, batch.rows)))
    exact = torch.zeros(rows.rows, rows.rows, dtype=torch.float64)
    for names in _portions(params):
        exact += _products(engine, rows, names)
    _, read = engine.read(rows, params, {"sketch": kind})
    found = list(read["sketch"].values())
    if isinstance(kind, Projection):  # of the whole gradient: its parts are added
        found = [torch.stack(found).sum(0)]
    estimate = sum((s @ s.T).double().cpu() for s in found)
    norms = exact.diagonal().sqrt()
    lengths, is_pair = norms[:, None] * norms, torch.ones_like(exact).triu(1).bool()
    if rows.rows == 1:
        is_pair = ~is_pair
    off = ((estimate - exact) / lengths)[is_pair & (lengths > 0)]
    return float(off.square().mean().sqrt()) if len(off) else 0.0


def _portions(params: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    portion: dict[str, Tensor] = {}
    for name, p in params.items():
        if portion and sum(v.numel() for v in portion.values()) + p.numel() > NUMBERS:
            yield portion
            portion = {}
        portion[name] = p
    yield portion


def _products(engine: Engine, rows: Batch, params: Mapping[str, Tensor]) -> Float[Tensor, "n n"]:
    total = torch.zeros(rows.rows, rows.rows, dtype=torch.float64)
    one_by_one = [engine.summed_gradient(rows.select_rows([r]), params) for r in range(rows.rows)]
    for name in params:
        found = [grads[name].flatten().float() for _, grads in one_by_one if name in grads]
        if len(found) == rows.rows:  # one model: it plays a part in all rows, or in none
            g = torch.stack(found)
            total += (g @ g.T).double().cpu()
    return total
