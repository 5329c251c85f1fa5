"""What is read off a head's error while it exists only tile by tile.

Shapes: n tokens = r rows of p places, w classes of a tile, v all classes, d width, u columns,
m directions.

A readout adds up tiles of E (`kernels/online_softmax.py`), is told by what to multiply what it has
whenever the shift changes, and at the end puts in the scale and the target's own error:

    e_t = scale_t E_t + e_y unit(y_t),      E_t[y_t] = 0
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """E of some classes, and how the previous tiles' has to be scaled."""

    classes: slice
    is_whole: bool
    """These are all the classes"""
    e: Float[Tensor, "n w"]
    factor: Float[Tensor, " n"] | None
    """None for the first tile"""
    spare: Float[Tensor, " scratch"]
    """Room for n * w elements"""


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a @ b (of matrices, or of batches of them), added up and kept in float32 or more."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.matmul(a, b, out=out)
    if not multiplies_16_bits(a.device):
        return torch.matmul(a.float(), b.float(), out=out)
    matmul = torch.bmm if a.dim() == 3 else torch.mm
    if out is None:
        return matmul(a, b, out_dtype=torch.float32)
    return matmul(a, b, out_dtype=torch.float32, out=out)


def multiplies_16_bits(device: torch.device) -> bool:
    """Return whether 16-bit factors can have a float32 product here: torch 2.8 on CUDA."""
    return device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype")


class Readout(ABC):
    """Something that is added up over tiles."""

    @abstractmethod
    def add(self, tile: Tile) -> None:
        """Take in a tile."""

    @abstractmethod
    def finish(self, scale: Float[Tensor, " n"], e_y: Float[Tensor, " n"]) -> Tensor:
        """Return the result, tokens (or rows) first."""


class Product(Readout):
    """e M for a matrix M [v, c] that is given by its rows."""

    def __init__(
        self, rows: Callable[[slice], Tensor], of_targets: Callable[[], Float[Tensor, "n c"]]
    ) -> None:
        self._rows, self._of_targets = rows, of_targets
        self._sum: Tensor | None = None

    def add(self, tile: Tile) -> None:
        matrix = self._rows(tile.classes)
        if self._sum is None:
            self._sum = multiply(tile.e, matrix)
            return
        if tile.factor is not None:
            self._sum.mul_(tile.factor[:, None])
        if self._sum.dtype == matrix.dtype:
            self._sum.addmm_(tile.e, matrix)
        else:
            self._sum += multiply(tile.e, matrix)

    def finish(self, scale: Float[Tensor, " n"], e_y: Float[Tensor, " n"]) -> Float[Tensor, "n c"]:
        assert self._sum is not None, "no tile was added"
        own = self._of_targets().to(scale.dtype)
        return self._sum.mul_(scale[:, None]).addcmul_(e_y[:, None], own)


class Columns(Readout):
    """e at some classes, the same ones for all tokens of a row: [r, p, u]."""

    def __init__(self, ids: Int[Tensor, "r u"], targets: Int[Tensor, "r p"]) -> None:
        self._ids, self._targets = ids, targets
        self._sum: Tensor | None = None

    def add(self, tile: Tile) -> None:
        (r, u), p = self._ids.shape, self._targets.shape[1]
        e = tile.e.view(r, p, -1)
        dtype = torch.promote_types(e.dtype, torch.float32)
        if tile.is_whole:
            self._sum = e.gather(2, self._ids[:, None].expand(r, p, u)).mT.to(dtype)
            return
        if self._sum is None:
            self._sum = e.new_zeros(r, u, p, dtype=dtype)
        elif tile.factor is not None:
            self._sum.mul_(tile.factor.view(r, 1, p))
        inside = (self._ids >= tile.classes.start) & (self._ids < tile.classes.stop)
        row, column = inside.nonzero(as_tuple=True)
        found = e[row, :, self._ids[row, column] - tile.classes.start]
        self._sum[row, column] = found.to(dtype)

    def finish(
        self, scale: Float[Tensor, " n"], e_y: Float[Tensor, " n"]
    ) -> Float[Tensor, "r p u"]:
        assert self._sum is not None, "no tile was added"
        shape = self._targets.shape
        out = self._sum.mT.mul_(scale.view(*shape, 1))
        is_target = self._ids[:, None] == self._targets[..., None]
        return torch.where(is_target, e_y.view(*shape, 1).to(out.dtype), out, out=out)


class Gram(Readout):
    """e_t . e_s within each row: [r, p, p]."""

    def __init__(self, targets: Int[Tensor, "r p"]) -> None:
        self._targets = targets
        self._cross = Columns(targets, targets)
        self._sum: Tensor | None = None

    def add(self, tile: Tile) -> None:
        self._cross.add(tile)
        e = tile.e.view(*self._targets.shape, -1)
        if self._sum is None:
            self._sum = multiply(e, e.mT)
            return
        if tile.factor is not None:
            factor = tile.factor.view(self._targets.shape)
            self._sum.mul_(factor[:, :, None]).mul_(factor[:, None, :])
        if self._sum.dtype == e.dtype:
            self._sum.baddbmm_(e, e.mT)
        else:
            self._sum += multiply(e, e.mT)

    def finish(
        self, scale: Float[Tensor, " n"], e_y: Float[Tensor, " n"]
    ) -> Float[Tensor, "r p p"]:
        assert self._sum is not None, "no tile was added"
        scale, error = scale.view(self._targets.shape), e_y.view(self._targets.shape)
        total = self._sum.mul_(scale[:, :, None]).mul_(scale[:, None, :])
        # (scale_t E_t + e_y,t unit(y_t)) . (the same of s): the two mixed terms, and the last one,
        # which is half in each of them: e_t[y_s] holds e_y,t where y_t = y_s.
        own = error[:, :, None] * (self._targets[:, :, None] == self._targets[:, None, :])
        rest = self._cross.finish(scale.flatten(), torch.zeros_like(e_y))
        mixed = rest.add_(own, alpha=0.5).mul_(error[:, None, :])
        return total.add_(mixed).add_(mixed.mT)


class Dots(Readout):
    """e_t^T V_m h_t for each direction: [n, m]."""

    def __init__(
        self,
        hidden: Float[Tensor, "n d"],
        targets: Int[Tensor, " n"],
        directions: Float[Tensor, "m v d"],
    ) -> None:
        self._hidden, self._targets, self._directions = hidden, targets, directions
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self._sum = hidden.new_zeros(len(hidden), len(directions), dtype=dtype)

    def add(self, tile: Tile) -> None:
        if tile.factor is not None:
            self._sum.mul_(tile.factor[:, None])
        products = tile.spare[: tile.e.numel()].view_as(tile.e)
        for m, direction in enumerate(self._directions):
            matrix = direction[tile.classes].to(self._hidden.dtype)
            multiply(self._hidden, matrix.T, out=products)
            self._sum[:, m] += products.mul_(tile.e).sum(1)

    def finish(self, scale: Float[Tensor, " n"], e_y: Float[Tensor, " n"]) -> Float[Tensor, "n m"]:
        out = self._sum.mul_(scale[:, None])
        for m, direction in enumerate(self._directions):
            own = direction[self._targets].to(out.dtype)
            out[:, m] += e_y * own.mul_(self._hidden).sum(1)
        return out
