"""The step that Adam would take on a row alone, compared with directions, and never kept.

Shapes: B rows, M directions, r and c the sides of a parameter as a matrix, k sketch size, n
numbers read off a row.

Adam's step is not linear in the gradient, so neither the factors of a gradient nor a sketch of it
tell the step's inner products: each row's gradient is made whole, a few rows at a time, and let go.
(One Triton program could make it tile by tile as `kernels/dot.py` does; torch does it here on any
device.)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curate.kernels.dot import grad_dot_matrix
from curate.kernels.summation import accumulator, chunks, inner
from curate.scorers.parts import Full, Gradient
from curate.scorers.readouts import Projection, TwoSidedSketch

UPDATES = "less", "textbook"
"""How Adam's moments become a step (see `Moments.step`)."""
LESS_EPS = 1e-8


@dataclass(frozen=True, eq=False)
class Moments:
    """Adam's state after some steps: by parameter its exp_avg, exp_avg_sq and number of steps."""

    mean: Mapping[str, Tensor]
    square: Mapping[str, Tensor]
    steps: Mapping[str, int]
    beta1: float | int
    beta2: float | int
    eps: float | int

    def step(self, name: str, grad: Float[Tensor, "b r c"], update: str) -> Float[Tensor, "b r c"]:
        """Return Γ, the direction in which Adam would next move the parameter on each gradient.

        m' = β1 m + (1 − β1) g and v' = β2 v + (1 − β2) g². `less`: m' / √(v' + 1e-8), as the code
        of Xia et al. 2024 has it: no bias correction, the constant inside the root. `textbook`:
        m̂ / (√v̂ + ε) with m̂ = m' / (1 − β1^(t+1)), v̂ = v' / (1 − β2^(t+1)) and the optimizer's own
        ε (Kingma and Ba 2015, algorithm 1); what `torch.optim.Adam` divides out of its step.
        `grad` is overwritten.
        """
        if name not in self.mean:
            raise ValueError(
                f"{name} has no Adam moments: it was not trained; limit params= to others"
            )
        m, v = (x[name].to(grad.dtype).reshape(grad.shape[1:]) for x in (self.mean, self.square))
        root = (v * self.beta2).addcmul(grad, grad, value=1 - self.beta2)
        step = grad.mul_(1 - self.beta1).add_(m * self.beta1)
        if update == "less":
            return step.div_(root.add_(LESS_EPS).sqrt_())
        t = self.steps[name] + 1
        step.div_(1 - self.beta1**t)
        return step.div_(root.div_(1 - self.beta2**t).sqrt_().add_(self.eps))


@dataclass(frozen=True, eq=False)
class AdamComparison:
    """A readout: each row's Adam step against M directions; `values` sums it over parameters.

    `directions` hold [M, *shape] by parameter; with a two-sided sketch their sketches, [M, k]; with
    a projection, under the name "", that of all parameters together, [M, k]. The step's norm is
    exact unless it is projected: then it is the projection's, as LESS normalises what it projected.
    """

    moments: Moments
    update: str
    directions: Mapping[str, Tensor]
    read: TwoSidedSketch | Projection | None = None

    def __call__(self, gradient: Gradient) -> Float[Tensor, "b n"]:
        some = chunks(gradient.rows, gradient.shape.numel())
        return torch.cat([self._some(gradient, rows) for rows in some])

    def values(
        self,
        found: Mapping[str, Float[Tensor, "b n"]],
        shapes: Mapping[str, torch.Size],
        loss: Float[Tensor, " b"],
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b m"]]:
        """Return the steps' squared norms and inner products over the parameters of `shapes`.

        What the loss of these rows does not depend on has gradient 0, and its momentum still moves
        it: so a row's step is the same whatever else is in the batch.
        """
        whole = {
            name: found[name] if name in found else self._without_gradient(name, shape, loss)
            for name, shape in sorted(shapes.items())
        }
        if isinstance(self.read, Projection):
            projected = torch.stack(list(whole.values())).sum(0)
            square: Tensor = torch.linalg.vecdot(projected, projected)
            return square, projected @ self._direction("", loss).T
        square = torch.stack([v[:, 0] for v in whole.values()]).sum(0)
        if self.read is None:
            dots = [v[:, 1:] for v in whole.values()]
        else:
            dots = [v[:, 1:] @ self._direction(name, loss).T for name, v in whole.items()]
        return square, torch.stack(dots).sum(0)

    def _some(self, gradient: Gradient, rows: slice) -> Float[Tensor, "b n"]:
        grad = gradient.materialised(rows)
        step = self.moments.step(gradient.name, grad, self.update)
        if self.read is not None:
            shaped = step.reshape(-1, *gradient.shape)
            sketch = self.read(Gradient(gradient.name, gradient.shape, full=Full(shaped)))
            if isinstance(self.read, Projection):
                return sketch
            return torch.cat([inner(step, step)[:, None], sketch], 1)
        v = self.directions[gradient.name]
        dots = grad_dot_matrix(step, v.reshape(len(v), *step.shape[1:]).to(accumulator(step)))
        return torch.cat([inner(step, step)[:, None], dots], 1)

    def _without_gradient(self, name: str, shape: torch.Size, loss: Tensor) -> Tensor:
        none = Full(loss.new_zeros(1, *shape))
        return self(Gradient(name, shape, full=none)).expand(len(loss), -1)

    def _direction(self, name: str, like: Tensor) -> Tensor:
        return self.directions[name].to(like.dtype)
