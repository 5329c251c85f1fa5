"""What the scores are: float64 autograd, one row at a time."""

from dataclasses import dataclass
from pathlib import Path

import torch
from session import ALL, BIASED, BLOCK, TOGETHER
from subject import Subject, curvatures, row_losses
from torch import Tensor

GRAM_ROWS = 8
"""Rows whose gradients are held at once to multiply them with one another."""


@dataclass(frozen=True)
class Truth:
    """Squared norms [rows] by case, and inner products of the first rows' gradients."""

    norms: dict[str, Tensor]
    grams: tuple[Tensor, Tensor]
    """Over the block layers' matrices, and with their biases besides."""


def ekfac(subject: Subject, folder: Path) -> Tensor:
    """Return the self-influences by the factors that a peer's driver has left, [rows]."""
    model, ids, total = subject.model(folder).double(), subject.ids(folder), []
    bases = curvatures(folder, subject.block_layers)
    params = [model.get_submodule(layer) for layer in bases]
    for row in range(subject.rows):
        loss = row_losses(model, ids[row : row + 1]).sum()
        grads = torch.autograd.grad(loss, [p for m in params for p in (m.weight, m.bias)])
        score = 0.0
        for base, weight, bias in zip(bases.values(), grads[::2], grads[1::2], strict=True):
            whole = torch.cat([weight, bias[:, None]], 1).cpu()
            turned = base.outputs.T @ whole @ base.inputs
            score += float((base.weight * turned.square()).sum())
        total.append(score)
    return torch.tensor(total, dtype=torch.float64)


def truths(subject: Subject, folder: Path) -> Truth:
    """Return the truth of every case but EK-FAC's, which needs a peer's factors first."""
    model = subject.model(folder).double()
    ids = subject.ids(folder)
    named = dict(model.named_parameters())
    matrices = [f"{layer}.weight" for layer in subject.block_layers]
    biases = [f"{layer}.bias" for layer in subject.block_layers]
    norms: dict[str, list[Tensor]] = {BLOCK: [], BIASED: [], ALL: []}
    kept: tuple[list[Tensor], list[Tensor]] = [], []
    for row in range(subject.rows):
        loss = row_losses(model, ids[row : row + 1]).sum()
        grads = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        squares = {name: grad.square().sum() for name, grad in grads.items()}
        norms[BLOCK].append(sum(squares[name] for name in matrices))
        norms[BIASED].append(sum(squares[name] for name in matrices + biases))
        norms[ALL].append(sum(squares.values()))
        if row < GRAM_ROWS:
            for rows, names in zip(kept, (matrices, biases), strict=True):
                rows.append(torch.cat([grads[name].flatten().cpu() for name in names]))
    alone, added = (x @ x.T for x in map(torch.stack, kept))
    by_case = {case: torch.stack(values).cpu() for case, values in norms.items()}
    return Truth(by_case | {TOGETHER: by_case[ALL]}, (alone, alone + added))


def error_of(case: str, found: Tensor, truth: Truth) -> float:
    """Return the largest relative error of norms, or the relative error of a sketch's products.

    A sketch may count biases with their layers, as LoGra's does: the nearer truth is taken.
    """
    found = found.double().cpu()
    if case in truth.norms:
        return float(((found.flatten() - truth.norms[case]) / truth.norms[case]).abs().max())
    few = found[: len(truth.grams[0])]
    return min(gram_error(few @ few.T, gram) for gram in truth.grams)


def gram_error(estimate: Tensor, exact: Tensor) -> float:
    """Return min over c of ||c estimate - exact|| / ||exact||, Frobenius."""
    scale = (estimate * exact).sum() / estimate.square().sum()
    return float((scale * estimate - exact).norm() / exact.norm())
