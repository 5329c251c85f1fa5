"""How long a training is, what each step's rate is, and where checkpoints are saved."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, cos, pi
from typing import Literal

Shape = Literal["cosine", "constant"]


@dataclass(frozen=True)
class Length:
    """A training as a stream of row presentations cut into steps of `batch` rows.

    Epochs follow one another in the stream without a gap, so a batch may hold the end of one
    epoch and the start of the next, and two corpora trained with the same `presentations` take
    the same steps and see the same number of rows. Only the last step may be shorter. A last step
    of a single row would break batch normalisation: that row joins the step before.
    """

    presentations: int
    batch: int

    @property
    def steps(self) -> int:
        full, rest = divmod(self.presentations, self.batch)
        return full + (rest > 1 or full == 0)

    def bounds(self, step: int) -> tuple[int, int]:
        """Return the slice of the stream that step 1, 2, … `steps` presents."""
        end = self.presentations if step == self.steps else step * self.batch
        return (step - 1) * self.batch, end

    def rows_seen(self, step: int) -> int:
        """Return how many presentations the first `step` steps made."""
        return self.bounds(step)[1] if step else 0

    def step_of(self, presentations: int) -> int:
        """Return the first step after which that many presentations were made."""
        return min(ceil(presentations / self.batch), self.steps)


def training_length(
    rows: int,
    corpus_rows: int,
    *,
    batch: int,
    epochs: int,
    steps: int | None = None,
    match: str = "steps",
) -> Length:
    """Return the length of training on `rows` selected rows of a corpus of `corpus_rows`.

    `match="steps"` trains as long as the whole corpus would in `epochs` (Data Diet, Paul et al.
    2021: a subset sees more epochs); `match="epochs"` counts epochs over the subset. `steps`
    overrides both. A batch is never larger than the whole corpus.
    """
    batch = min(batch, corpus_rows)
    if steps is not None:
        return Length(steps * batch, batch)
    return Length(epochs * (corpus_rows if match == "steps" else rows), batch)


@dataclass(frozen=True)
class Rate:
    """The learning rate of each step: a linear warm-up, then constant or half a cosine to 0."""

    peak: int | float
    shape: str
    steps: int
    warmup: int | float

    def __call__(self, step: int) -> float:
        """Return the rate of step 1, 2, … `steps`."""
        warm = min(round(self.warmup * self.steps), self.steps - 1)
        if step <= warm:
            return self.peak * step / (warm + 1)
        if self.shape == "constant":
            return self.peak
        return self.peak * 0.5 * (1 + cos(pi * (step - 1 - warm) / (self.steps - warm)))


@dataclass(frozen=True)
class SavePoint:
    """A checkpoint to save after `step`; `epoch` is set where an epoch was asked for."""

    step: int
    epoch: int | None

    def folder(self, seed: int) -> str:
        tail = f"step{self.step:06d}" if self.epoch is None else f"epoch{self.epoch:03d}"
        return f"seed{seed}-{tail}"


def save_points(
    length: Length,
    epoch_rows: int,
    *,
    epochs: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> list[SavePoint]:
    """Return where to save, in order, each step once; the last step is always among them.

    `epoch_rows` presentations make an epoch. With neither `epochs` nor `steps` given, the points
    are a fifth, a half and the whole of the training, in epochs where it is whole epochs.

    Raises:
        ValueError: a point lies outside the training.
    """
    last_epoch, rest = divmod(length.presentations, epoch_rows)
    if epochs is None and steps is None:
        if rest or not last_epoch:
            steps = [ceil(length.steps / 5), ceil(length.steps / 2)]
        else:
            epochs = [ceil(last_epoch / 5), ceil(last_epoch / 2)]
    _check_inside("epoch", epochs or (), last_epoch)
    _check_inside("step", steps or (), length.steps)
    points = {s: SavePoint(s, None) for s in (*(steps or ()), length.steps)}
    if not rest and steps is None:
        points = {length.steps: SavePoint(length.steps, last_epoch)}
    for epoch in epochs or ():
        step = length.step_of(epoch * epoch_rows)
        points[step] = SavePoint(step, epoch)
    return [points[step] for step in sorted(points)]


def _check_inside(unit: str, points: Sequence[int], last: int) -> None:
    for point in points:
        if not 0 <= point <= last:
            raise ValueError(
                f"cannot save a checkpoint at {unit} {point}: "
                f"this training runs from {unit} 0 to {unit} {last}"
            )
