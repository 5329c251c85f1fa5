"""Add-One-In with judges that need no model: stochastic greedy, a score, a stubborn one."""

import math

import numpy as np
import pyarrow as pa
import pytest

from curate.selectors.choice_greedy import ChoiceGreedy, one_by_one
from curate.selectors.coverage import Coverage
from curate.selectors.greedy import stochastic_greedy
from curate.selectors.protocol import Budget, Selector
from curate.selectors.vectors import ArrayVectors


@pytest.mark.parametrize("seed", range(5))
def test_a_judge_of_coverage_is_stochastic_greedy_with_the_same_draws(seed):
    """ALGORITHMS 3.7: a deterministic judge by facility-location gain, the same candidates."""
    points = ArrayVectors(np.random.default_rng(seed).normal(size=(60, 4)).astype(np.float32))
    ones, k, epsilon = np.ones(60, dtype=np.int64), 12, 0.1
    wanted, _ = stochastic_greedy(
        Coverage(points, points), ones, k, np.random.default_rng(seed), epsilon
    )
    seen = Coverage(points, points)
    known: list[int] = []

    def judge(chosen, options):
        for row in chosen[len(known) :]:
            seen.add(row)
            known.append(row)
        return int(np.argmax(seen.gains(np.array(options))))

    options = math.ceil(60 / k * math.log(1 / epsilon))
    rng = np.random.default_rng(seed)
    assert one_by_one(np.arange(60), judge, ones, k, options, rng).tolist() == wanted.tolist()


@pytest.fixture
def table(make_table):
    return make_table(
        np.arange(40) % 7, errors=[6], label=pa.array(np.arange(40) % 2), tokens=pa.array([3] * 40)
    )


def by_score(score):
    return lambda chosen, options: int(np.argmax([score[i] for i in options]))


def test_a_judge_who_sees_all_options_takes_the_top(table, ranked):
    score = np.random.default_rng(0).random(40)
    method = ChoiceGreedy(by_score(score), options=40)
    assert isinstance(method, Selector)
    found = ranked(method.select(table, Budget("rows", 9), np.random.default_rng(0))).tolist()
    assert found == [i for i in np.argsort(-score).tolist() if i != 6][:9]


def test_the_judge_sees_what_was_chosen_and_options_that_are_left(table, kept):
    asked = []

    def judge(chosen, options):
        asked.append((list(chosen), list(options)))
        return len(options) - 1

    chosen = kept(
        ChoiceGreedy(judge, options=5).select(table, Budget("rows", 38), np.random.default_rng(1))
    )
    assert len(chosen) == 38 == len(asked)
    for before, (already, options) in enumerate(asked):
        assert len(already) == before and not set(already) & set(options)
        assert len(options) == min(5, 39 - before) and 6 not in options


def test_groups_and_tokens(table, kept):
    score = np.random.default_rng(0).random(40)
    method = ChoiceGreedy(by_score(score), options=4, by_group="label", group_shares="equal")
    chosen = kept(method.select(table, Budget("rows", 10), np.random.default_rng(2)))
    assert sorted(np.bincount(chosen % 2)) == [5, 5]
    by_tokens = ChoiceGreedy(by_score(score)).select(
        table, Budget("tokens", 20), np.random.default_rng(2)
    )
    assert len(kept(by_tokens)) == 6


@pytest.mark.parametrize("answer", [8, -1, "first", True, None])
def test_an_answer_that_names_no_option_is_refused(table, answer):
    with pytest.raises(ValueError, match="must answer with a number from 0 to 7"):
        ChoiceGreedy(lambda *_: answer).select(table, Budget("rows", 3), np.random.default_rng(0))


def test_a_wrong_number_of_options_is_refused():
    with pytest.raises(ValueError, match="options must be"):
        ChoiceGreedy(lambda *_: 0, options=0)
