"""A subset built one row at a time by a judge who picks the best of a few options: Add-One-In."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.selectors.divided import Divided
from curate.selectors.picks import picked
from curate.selectors.protocol import Budget, Selection, Table

Judge = Callable[[Sequence[int], Sequence[int]], int]
"""From the places of chosen rows, in their order, and of options to the number of an option."""


@dataclass(frozen=True)
class ChoiceGreedy(Divided):
    """Again and again `options` random rows are shown to `judge`, and the one it names is added.

    Add-One-In (2025, read in a summary: sample a few candidates, ask a language model which one
    adds the most value to the subset so far, repeat to the budget). With a judge who names the
    option that adds most to a submodular function it is stochastic greedy
    (`selectors/greedy.py`), with the same draws from the same generator. The judge is called as
    `judge(chosen, options)` with places in the table and answers with a number from 0; what it
    looks up there (texts, images, a summary it keeps) is its own affair. With `by_group` each
    group's budget is filled in turn, and `chosen` holds that group's rows.

    From Python only, as a judge is no setting that a manifest could keep. One call for each row
    of the budget. Ranked without groups.
    """

    judge: Judge
    options: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.options, bool) or self.options < 1:
            raise ValueError(f"options must be a whole number from 1, not {self.options!r}")

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        places = []
        for part in self.parts(table, budget):
            order = one_by_one(part.places, self.judge, part.sizes, part.amount, self.options, rng)
            places.append(part.places[order])
        chosen = np.concatenate(places) if places else np.empty(0, dtype=np.int64)
        ranks = None if self.by_group is not None else np.arange(len(chosen))
        return picked(table, chosen, ranks=ranks)


def one_by_one(
    places: Int64[ndarray, " n"],
    judge: Judge,
    sizes: Int64[ndarray, " n"],
    amount: int,
    options: int,
    rng: np.random.Generator,
) -> Int64[ndarray, " k"]:
    """Return numbers of rows in the order of the judge's choices, within `amount` of `sizes`.

    Raises:
        ValueError: the judge names none of the options.
    """
    left = np.arange(len(places))
    order: list[int] = []
    while len(left):
        drawn = np.sort(rng.choice(len(left), min(options, len(left)), replace=False))
        shown = places[left[drawn]].tolist()
        answer = judge(places[order].tolist(), shown)
        is_number = isinstance(answer, int | np.integer) and not isinstance(answer, bool)
        if not is_number or not 0 <= answer < len(shown):
            raise ValueError(
                f"the judge answered {answer!r} to {len(shown)} options; it must answer with a "
                f"number from 0 to {len(shown) - 1}"
            )
        row = int(left[drawn[answer]])
        if sizes[row] > amount:
            break
        amount -= int(sizes[row])
        order.append(row)
        left = np.delete(left, drawn[answer])
        if amount <= 0:
            break
    return np.array(order, dtype=np.int64)
