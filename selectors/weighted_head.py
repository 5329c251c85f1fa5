"""A weighted logistic head on frozen features, and how its optimum moves with the weights.

Shapes: n rows, c classes, d features with a constant 1 as the last, m = c·d.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize


@dataclass(frozen=True)
class Head:
    """The least of sum_i w_i loss_i(theta) + decay |theta|² (biases included), sum w = 1.

    loss is the cross-entropy of softmax(theta x).
    """

    theta: Float64[ndarray, "c d"]
    decay: float

    def log_probabilities(self, features: Float64[ndarray, "n d"]) -> Float64[ndarray, "n c"]:
        logits = features @ self.theta.T
        logits -= logits.max(axis=1, keepdims=True)
        return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))

    def losses(
        self, features: Float64[ndarray, "n d"], labels: Int64[ndarray, " n"]
    ) -> Float64[ndarray, " n"]:
        return np.asarray(-self.log_probabilities(features)[np.arange(len(labels)), labels])

    def errors(
        self, features: Float64[ndarray, "n d"], labels: Int64[ndarray, " n"]
    ) -> Float64[ndarray, "n c"]:
        """Return p - onehot(y): a row's gradient is this times its features."""
        errors = np.exp(self.log_probabilities(features))
        errors[np.arange(len(labels)), labels] -= 1
        return np.asarray(errors)

    def hessian(
        self, features: Float64[ndarray, "n d"], weights: Float64[ndarray, " n"]
    ) -> Float64[ndarray, "m m"]:
        """Return the second derivative of the objective at theta; time n m²."""
        p = np.exp(self.log_probabilities(features))
        c, d = self.theta.shape
        whole = np.empty((c, d, c, d))
        for a in range(c):
            for b in range(a, c):
                curve = weights * p[:, a] * ((a == b) - p[:, b])
                whole[a, :, b] = (features * curve[:, None]).T @ features
                whole[b, :, a] = whole[a, :, b].T
        return np.asarray(whole.reshape(c * d, c * d) + 2 * self.decay * np.eye(c * d))

    def helpfulness(
        self,
        features: Float64[ndarray, "n d"],
        labels: Int64[ndarray, " n"],
        weights: Float64[ndarray, " n"],
        goal: Float64[ndarray, "c d"],
        damp: float,
    ) -> Float64[ndarray, " n"]:
        """Return how fast a function with gradient `goal` falls as each row's weight rises.

        -d theta / d w_i = H⁻¹ (grad loss_i + 2 decay theta), the second part because weights are
        divided by their sum (at the optimum the weighted mean gradient is -2 decay theta).
        Positive: with less of the row the function would rise.
        """
        factor = cho_factor(self.hessian(features, weights) + damp * np.eye(goal.size))
        pulled = cho_solve(factor, goal.ravel()).reshape(goal.shape)
        by_loss = np.einsum("nc,cd,nd->n", self.errors(features, labels), pulled, features)
        return np.asarray(by_loss + 2 * self.decay * float(np.sum(self.theta * pulled)))


def fit_head(
    features: Float64[ndarray, "n d"],
    labels: Int64[ndarray, " n"],
    weights: Float64[ndarray, " n"],
    classes: int,
    decay: float,
    start: Float64[ndarray, "c d"] | None = None,
) -> Head:
    """Return the head that is best under these weights, which sum to 1; by L-BFGS.

    Raises:
        ValueError: it finds no finite optimum.
    """
    shape = (classes, features.shape[1])
    rows = np.arange(len(labels))

    def objective(flat: Float64[ndarray, " m"]) -> tuple[float, Float64[ndarray, " m"]]:
        head = Head(flat.reshape(shape), decay)
        logs = head.log_probabilities(features)
        errors = np.exp(logs)
        errors[rows, labels] -= 1
        gradient = (errors * weights[:, None]).T @ features + 2 * decay * head.theta
        value = -weights @ logs[rows, labels] + decay * flat @ flat
        return float(value), gradient.ravel()

    first = np.zeros(shape) if start is None else start
    found = minimize(
        objective,
        first.ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-9},
    )
    if not np.isfinite(found.x).all():
        raise ValueError("the weighted head has no finite optimum; raise the weight decay")
    return Head(found.x.reshape(shape), decay)
