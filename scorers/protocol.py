"""What flows between a task, the signals engine and a scorer.

Shapes: B rows, S sequences (S = B unless a long document was cut into windows), T tokens,
C classes or vocabulary size, D hidden size, K checkpoints of one run, M groups of the target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

IGNORE = -100
"""Target value of a position that is no target (padding, prompt): no loss, no statistics."""


@dataclass(frozen=True)
class Batch:
    """Model inputs and targets for B rows.

    `inputs` are the model's keyword arguments, each with the sequence axis S first. `row_ids[s]`
    is the row that sequence s belongs to; None means one sequence per row, in order. `prompt[s]`
    of the tokens that sequence s begins with are given with the row, none of its own.
    """

    inputs: Mapping[str, Tensor]
    targets: Tensor
    rows: int
    row_ids: Int[Tensor, " s"] | None = None
    weights: Float[Tensor, " b"] | None = None
    prompt: Int[Tensor, " s"] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with every tensor on `device`."""
        return Batch(
            {name: value.to(device) for name, value in self.inputs.items()},
            self.targets.to(device),
            self.rows,
            None if self.row_ids is None else self.row_ids.to(device),
            None if self.weights is None else self.weights.to(device),
            None if self.prompt is None else self.prompt.to(device),
        )

    def select_rows(self, rows: Sequence[int]) -> "Batch":
        """Return the sub-batch of these rows, in this order."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.targets.device)
        weights = None if self.weights is None else self.weights[index]
        if self.row_ids is None:
            sequences, row_ids = index, None
        else:
            picks = [(self.row_ids == r).nonzero().flatten() for r in index]
            sequences = torch.cat(picks)
            row_ids = torch.cat([torch.full_like(p, i) for i, p in enumerate(picks)])
        inputs = {name: value[sequences] for name, value in self.inputs.items()}
        prompt = None if self.prompt is None else self.prompt[sequences]
        return Batch(inputs, self.targets[sequences], len(rows), row_ids, weights, prompt)


@dataclass(frozen=True)
class Outputs:
    """What a task makes of a forward pass.

    `loss` [B] is each row's loss, differentiable. `targets` are aligned with the logits ([S] or
    [S, T]), IGNORE where nothing is predicted. Either `logits` ([S, C] or [S, T, C]) or, where the
    vocabulary is large, `hidden` ([S, T, D]) and the linear `head` that turns it into logits.
    `row_ids` as in `Batch`.
    """

    loss: Float[Tensor, " b"]
    targets: Int[Tensor, "s ..."] | None = None
    logits: Float[Tensor, "s ... c"] | None = None
    hidden: Float[Tensor, "s ... d"] | None = None
    head: nn.Linear | None = None
    row_ids: Int[Tensor, " s"] | None = None


SignalKind = Literal[
    "loss",  # the row's loss
    "el2n",  # mean over target tokens of the error vector's norm
    "el2n_seq",  # norm of d(row loss)/d(logits) over all positions
    "entropy",  # mean over target tokens, nats
    "margin",  # mean over target tokens of the logit margin z_y - max_{k != y} z_k
    "correct",  # fraction of target tokens predicted right
    "tokens",  # number of target tokens
    "grad_sq_norm",  # squared norm of d(row loss)/d(params)
    "target_dot",  # inner product of d(row loss)/d(params) with each target group's mean; M values
    "target_norm",  # norm of each target group's mean gradient, the same for all rows; M values
    "adam_sq_norm",  # squared norm of the step that Adam would take on the row alone
    "adam_target_dot",  # its inner product with the mean of each target group's unit gradients
    "weights_dot",  # inner product of d(row loss)/d(params) with (weights - a reference's weights)
    "weights_norm",  # norm of that difference, the same for all rows
    "weight_alignment",  # cos(-d(row loss)/dW, W) for the head's weight matrix W
    "logit_grad",  # d(sum of target logits)/d(input), a vector per row
    "coordinates",  # how many entries of that vector are the row's own
    "vog_std",  # its standard deviation over a run's checkpoints, mean over coordinates
    "vog_var",  # its variance over a run's checkpoints, mean over coordinates
    "grad_vector",  # d(row loss)/d(params) itself, or a sketch of it: a vector per row
    "grad_signal",  # squared norm of its mean over a run's checkpoints
    "grad_noise",  # mean squared distance from that mean, over a run's checkpoints
    "angle_paper",  # mean cosine of a row's tokens with one another, inside the last block's MLP
    "angle_pairs",  # the same of different tokens
    "angle_code",  # the same over the lower triangle and one diagonal above it, zeros elsewhere
    "angle_prompt",  # mean cosine of a row's own tokens with its prompt's, 0 where it has none
    "sketch",  # random sketch of d(row loss)/d(params), a vector per row; for a store
    "embedding",  # the input of the head, mean over target tokens, a vector per row
    "probs",  # softmax over classes, a vector per row
    "reference_loss",  # the row's loss at other checkpoints; R values, the same at each checkpoint
    "null_loss",  # the same of an empty input, at checkpoints that were trained on empty inputs
    "forgetting",  # from training records: events per run
    "aum",  # from training records: area under the margin
    "text_weight",  # from the row's text: log of how much likelier its n-grams are in the target
    "accepted_step",  # from the vectors of all rows: the step at which a search took the row
]
RECORD_KINDS = frozenset({"forgetting", "aum"})
"""Signals that training wrote down (`records.parquet`); no pass over the model computes them."""
LOGIT_SPREAD_KINDS: frozenset[SignalKind] = frozenset({"vog_std", "vog_var"})
GRADIENT_SPREAD_KINDS: frozenset[SignalKind] = frozenset({"grad_signal", "grad_noise"})
SPREAD_KINDS = LOGIT_SPREAD_KINDS | GRADIENT_SPREAD_KINDS
"""Signals made of all checkpoints of a run; no checkpoint has a value of its own."""
TEXT_KINDS: frozenset[SignalKind] = frozenset({"text_weight"})
"""Signals read from the row's text; they need no model and no checkpoint."""
TABLE_KINDS: frozenset[SignalKind] = frozenset({"accepted_step"})
"""Signals made of all rows of the table together, in a last step; until then they are NaN."""
ANGLE_KINDS = frozenset({"angle_paper", "angle_pairs", "angle_code", "angle_prompt"})
"""Signals of the angles between hidden states; `params` names the layer they go into."""
REFERENCE_KINDS = frozenset({"reference_loss", "null_loss"})
"""Signals of the R reference checkpoints, not of those that are scored: [K, B, R]."""
EXPERT_KINDS = frozenset({"weights_dot", "weights_norm"})
"""Signals that compare a row's gradient with what leads from the weights to a reference's."""
VECTOR_KINDS = frozenset({"sketch", "embedding", "probs"})
"""Signals that are a vector per row: they are stored, and no scorer reduces them."""
TARGET_KINDS = frozenset({"target_dot", "target_norm"})
"""Signals that compare a row with a target: [K, B, M] where others are [K, B]."""
ADAM_KINDS = frozenset({"adam_sq_norm", "adam_target_dot"})
"""Signals of Adam's step: checkpoints must hold its moments, and the target is compared with."""
GROUP_KINDS = TARGET_KINDS | {"adam_target_dot"}
"""Signals that have a value for each group of the target, along their last axis."""


@dataclass(frozen=True, order=True)
class Signal:
    """One per-row quantity. `params` limits a gradient signal to the parameters whose names match.

    `params` is a regular expression (searched, not anchored) or the preset `head`; "" means all.
    `adam` names how Adam's moments become a step, and `projection` how many numbers that step is
    projected to before it is compared (0: none). `curvature` describes the matrix whose inverse
    stands between the two gradients (`scorers/curvature.py`); "" is none.
    """

    kind: SignalKind
    params: str = ""
    adam: str = ""
    projection: int = 0
    curvature: str = ""


@dataclass(frozen=True)
class Direction:
    """What a high value means, what the source keeps, and where that is known to hold.

    `valid` says it in words; of `asks`, the part of it that a run can be checked for, the names
    are those of `pipeline/scoring/validity.py`.
    """

    high_means: str
    keep: Literal["high", "low"]
    source: str
    valid: str = "any task"
    asks: tuple[str, ...] = ()


@runtime_checkable
class Scorer(Protocol):
    """Declares the signals it needs and reduces them to one score per row and run.

    A scorer is a frozen dataclass whose fields are its hyper-parameters. The engine averages the
    result over seeds (mean, and standard deviation with ddof 1), so `reduce` sees one run only.
    A field `normalise` that is `class` or `dataset` has the finished column standardised. An
    attribute `aggregate` that is `gwa` has the column's mean and kurtosis taken, per checkpoint.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def direction(self) -> Direction: ...

    @property
    def needs(self) -> frozenset[Signal]: ...

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b ..."]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        """Return one score per row from float64 signals of the K checkpoints of one run.

        `weights` are the checkpoints' learning rates, normalised to sum 1 (equal where unknown);
        for Adam's steps, the means of the rates since the checkpoint before.
        Signals from training records, or made of all checkpoints, have one value per run: their
        first axis is 1.
        """
        ...
