"""Products with a matrix and look-ups in a table: uses whose gradient is a sum of outer products.

Shapes: S sequences, T tokens, O and I the sides of a matrix.
"""

from typing import Any

from torch import Tensor

from curate.kernels.grad_norm import accumulable
from curate.kernels.sketch import sketch_left, sketch_side
from curate.scorers.parts import Full, Indexed, Layout, Pair, Part, Sketched
from curate.scorers.readouts import TwoSidedSketch
from curate.scorers.uses import Lookup, Param, Saved, Use, by_role


def linear(param: Lookup, input: Tensor, weight: Any, bias: Any = None) -> Use | None:
    w, b = param(weight), param(bias)
    if param(input) or weight.dim() != 2 or (b is not None and b.shape != weight.shape[:1]):
        return None
    return _matrix_product("linear", input, w, b, output_is_rows=True)


def addmm(
    param: Lookup,
    input: Any,
    mat1: Tensor,
    mat2: Any,
    *,
    beta: float | int = 1,
    alpha: float | int = 1,
) -> Use | None:
    w, b = param(mat2), param(input)
    if param(mat1) or beta != 1 or alpha != 1 or (b is not None and b.shape != mat2.shape[1:]):
        return None
    return _matrix_product("linear", mat1, w, b, output_is_rows=False)


def matmul(param: Lookup, input: Tensor, other: Any) -> Use | None:
    w = param(other)
    if w is None or param(input) or other.dim() != 2 or input.dim() < 2:
        return None
    return _matrix_product("linear", input, w, None, output_is_rows=False)


def _matrix_product(
    kind: str, x: Tensor, w: Param | None, b: Param | None, *, output_is_rows: bool
) -> Use:
    """output = x @ W^T + b, W [O, I] stored as the parameter (or its transpose)."""
    saved = [Saved(x)]
    swap = w is not None and output_is_rows == w.transposed
    projected: list[tuple[Tensor, TwoSidedSketch]] = []

    def inputs(layout: Layout) -> Tensor:
        return _tokens(layout.rows_first(saved[0].get()))

    def shrink(layout: Layout, sketch: TwoSidedSketch) -> None:
        assert w is not None, "a sketch of its gradient is wanted"
        side = 0 if swap else 1
        projected.append(
            (sketch_side(inputs(layout), sketch.keys(w.name)[side], sketch.k[side]), sketch)
        )
        saved.clear()

    def parts(g: Tensor, layout: Layout, roles: frozenset[str]) -> dict[str, Part]:
        out: dict[str, Part] = {}
        g = _tokens(layout.rows_first(g))
        if "weight" in roles and w is not None and projected:
            kept, sketch = projected[0]
            side = 1 if swap else 0
            k = sketch.k[side], sketch.k[1 - side]
            value = sketch_left(g[:, None], kept[:, None], sketch.keys(w.name)[side], k)
            if swap:
                value = value.view(len(value), *k).mT.flatten(1)
            out["weight"] = Sketched(value)
        elif "weight" in roles and w is not None:
            left, right = g[:, None], inputs(layout)[:, None]
            out["weight"] = Pair(right, left, swapped=True) if swap else Pair(left, right)
        if "bias" in roles and b is not None:
            out["bias"] = Full(accumulable(g).sum(1))
        return out

    return Use(kind, by_role(weight=w, bias=b), parts, _not_last, saved, shrink=shrink)


def embedding(
    param: Lookup,
    weight: Any,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use | None:
    w = param(weight)
    if w is None or w.transposed or scale_grad_by_freq:
        return None
    a = Saved(indices)

    def parts(g: Tensor, layout: Layout, roles: frozenset[str]) -> dict[str, Part]:
        g = _tokens(layout.rows_first(g))
        index = layout.rows_first(layout.spread(a.get())).reshape(len(g), -1)
        if padding_idx >= 0:
            g = g.masked_fill((index == padding_idx)[..., None], 0.0)
        return {"weight": Indexed(index, g)}

    return Use("embedding", {"weight": w}, parts, _not_last, [a], may_be_shared=True)


def _not_last(axis: int, axes: int) -> bool:
    return axis < axes - 1


def _tokens(x: Tensor) -> Tensor:
    """Return [S, T, c] from [S, *, c], all between taken as tokens."""
    return x.reshape(len(x), -1, x.shape[-1])
