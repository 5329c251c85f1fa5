"""Which parameters a curvature covers: matrices with their biases, or everything.

Shapes: none; this is about names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from curate.scorers.plan import Plan

MATRICES = frozenset({"linear", "linear_head", "conv1d", "conv2d", "conv3d"})
"""Uses whose gradient is a sum of outer products of an input and a pseudo-gradient."""
MOST_SIDE = 16_384
"""Columns of the largest matrix that is decomposed: 2 GiB in float64, and some minutes."""


@dataclass(frozen=True)
class Layer:
    """A weight and the bias that is added to its product: one matrix, [W b]."""

    weight: str
    bias: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Cover:
    """The layers of a curvature, in the model's order, and why the other parameters have none."""

    layers: tuple[Layer, ...]
    left_out: Mapping[str, str]

    def left_out_aloud(self) -> str:
        """Return the parameters without a layer by reason, a few names of each."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        said = []
        for reason, names in by_reason.items():
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            said.append(f"{', '.join(names[:4])}{more} ({reason})")
        return "; ".join(said)


def matrix_cover(plan: Plan, shapes: Mapping[str, torch.Size]) -> Cover:
    """Return the layers among these parameters whose gradients come as factors, with their biases.

    A bias is part of its layer if it is added wherever the weight is used, and nowhere else.
    """
    layers, left_out = [], dict[str, str]()
    for name, shape in shapes.items():
        if len(shape) < 2:
            continue
        reason = _why_not(plan, name, shape)
        if reason is not None:
            left_out[name] = reason
            continue
        layers.append(Layer(name, _bias(plan, name, shapes)))
    covered = {name for layer in layers for name in layer.names}
    rest = {n: left_out.get(n, "no matrix, nor a layer's bias") for n in shapes if n not in covered}
    return Cover(tuple(layers), rest)


def full_cover(plan: Plan, shapes: Mapping[str, torch.Size]) -> Cover:
    """Return a layer for every parameter, matrices together with their biases."""
    matrices = matrix_cover(plan, shapes)
    layer_of = {layer.weight: layer for layer in matrices.layers}
    biases = {layer.bias for layer in matrices.layers}
    used = [n for n in shapes if plan.path(n).kind != "unused"]
    layers = tuple(layer_of.get(n, Layer(n)) for n in used if n not in biases)
    return Cover(layers, {n: "unused" for n in shapes if n not in used})


def _why_not(plan: Plan, name: str, shape: Sequence[int]) -> str | None:
    path = plan.path(name)
    if path.kind == "unused":
        return "unused"
    if path.kind != "analytic":
        return "no factors: its gradient is taken by autograd"
    kinds = {key[0] for key in plan.layouts if name in key[1]}
    if others := sorted(kinds - MATRICES):
        return f"used as {others[0]}"
    if any(key[1][0] != name for key in plan.layouts if name in key[1]):
        return "no layer's weight"
    if len({key[1][1:] for key in plan.layouts if name in key[1]}) > 1:
        return "used with different biases"
    if max(shape[0], torch.Size(shape[1:]).numel()) > MOST_SIDE:
        return f"a side of more than {MOST_SIDE}"
    return None


def _bias(plan: Plan, weight: str, among: Mapping[str, torch.Size]) -> str | None:
    keys = [key for key in plan.layouts if weight in key[1]]
    biases = keys[0][1][1:] if keys else ()
    if len(biases) != 1 or biases[0] not in among or plan.path(biases[0]).kind != "analytic":
        return None
    uses = [key for key in plan.layouts if biases[0] in key[1]]
    return biases[0] if all(key[1][0] == weight for key in uses) else None
