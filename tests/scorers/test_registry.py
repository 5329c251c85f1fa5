"""Requests on the command line become scorers, and scorers describe themselves."""

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.scorers.grand import GraNd
from curate.scorers.protocol import REFERENCE_KINDS, TARGET_KINDS, Direction, Scorer, Signal
from curate.scorers.registry import (
    SCORERS,
    make_scorers,
    scorer_from_spec,
    scorer_names,
    scorer_spec,
)
from curate.scorers.self_influence import SelfInfluence


def test_commas_and_repeats_name_several_scorers_in_order() -> None:
    made = make_scorers(["grand,el2n", "si=self_influence(params=head)"])
    assert list(made) == ["grand", "el2n", "si"]
    assert made["si"] == SelfInfluence(params="head")


@settings(deadline=None)
@given(st.from_regex(r"[a-z.\\(|)\[\]*+,= ]{0,12}", fullmatch=True))
def test_any_quoted_pattern_survives_the_request(pattern: str) -> None:
    assert make_scorers(f"x=grand(params={pattern!r})") == {"x": GraNd(params=pattern)}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("el2m", "unknown scorer 'el2m'; choose from: angle_concentration, aum"),
        ("grand(params=1)", "scorer 'grand': params must be a text, not 1"),
        ("grand(parms=1)", "scorer 'grand' has no parameter 'parms'; it takes: params"),
        ("grand(3)", "cannot read '3' in scorer 'grand(3)'; write field=value"),
        ("el2n,el2n", "scorer 'el2n' is asked for twice"),
        ("", "no scorer is named; choose from"),
        ("x=", "cannot read scorer 'x='"),
    ],
)
def test_a_bad_request_is_one_sentence(request_: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_scorers(request_)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_listing_names_imports_no_torch() -> None:
    code = (
        "import sys; from curate.scorers.registry import scorer_names; scorer_names();"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plugins_join_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curate.scorers.registry._plugins", lambda: {"twice": f"{__name__}:Twice"})
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Twice.__module__])
    assert scorer_names()[-1] == "twice"
    (scorer,) = make_scorers("twice(factor=3)").values()
    assert scorer_spec(scorer) == {"name": "twice", "params": {"factor": 3}}


@dataclass(frozen=True)
class Twice:
    factor: int = 2
    direction: ClassVar[Direction] = Direction("large", "high", "this test")
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal("loss")})

    def reduce(self, signals: dict[Signal, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        return self.factor * signals[Signal("loss")].sum(0)


def drawn(scorer: Scorer, checkpoints: int, rows: int) -> dict[Signal, torch.Tensor]:
    """Return signals in [0, 1], of two groups or references where rows are compared."""
    return {
        s: torch.rand(
            checkpoints,
            rows,
            *([2] if s.kind in TARGET_KINDS | REFERENCE_KINDS else []),
            dtype=torch.double,
        )
        for s in scorer.needs
    }


@pytest.mark.parametrize("name", sorted(SCORERS))
class TestEveryScorer:
    """The contract that the registry's table promises of each of its scorers."""

    def make(self, name: str) -> Scorer:
        return make_scorers(name)[name]

    def test_it_follows_the_protocol_and_survives_its_spec(self, name: str) -> None:
        scorer = self.make(name)
        assert isinstance(scorer, Scorer)
        assert scorer_from_spec(scorer_spec(scorer)) == scorer
        assert scorer.direction.keep in ("high", "low")
        assert scorer.direction.high_means and scorer.direction.source

    def test_rows_are_scored_apart_and_in_order(self, name: str) -> None:
        scorer, rows = self.make(name), 7
        torch.manual_seed(0)
        signals = drawn(scorer, 3, rows)
        weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        scores = scorer.reduce(signals, weights)
        assert scores.shape == (rows,) and scores.dtype == torch.float64
        order = torch.randperm(rows)
        permuted = scorer.reduce({s: v[:, order] for s, v in signals.items()}, weights)
        assert torch.equal(permuted, scores[order])

    def test_one_checkpoint_repeated_scores_like_one(self, name: str) -> None:
        scorer = self.make(name)
        one = drawn(scorer, 1, 5)
        three = {s: v.expand(3, *v.shape[1:]) for s, v in one.items()}
        third = torch.full((3,), 1 / 3, dtype=torch.float64)
        torch.testing.assert_close(
            scorer.reduce(three, third), scorer.reduce(one, torch.ones(1, dtype=torch.float64))
        )
