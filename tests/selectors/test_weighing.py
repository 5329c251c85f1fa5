"""Weights of all rows as a selection, by way of a table with a column more. Shapes: N rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curate.selectors.added_column import AddedColumn
from curate.selectors.protocol import Budget, Selection
from curate.selectors.weighing import Weighing

N = 30
NAN = float("nan")


@pytest.fixture
def table(make_table) -> Any:
    return make_table(np.zeros(N), errors=[5])


class TestAddedColumn:
    def test_it_is_the_table_with_a_column_more(self, table) -> None:
        values = np.arange(float(N))
        values[3] = NAN
        added = AddedColumn(table, "extra", values)
        assert added.rows == N and added.schema.names == [*table.schema.names, "extra"]
        for columns in (["extra", "row"], ["row", "extra", "shard"], ["extra"]):
            batches = list(added.scan(columns))
            assert all(b.schema.names == columns for b in batches) and len(batches) == 5
            found = pa.Table.from_batches(batches)["extra"].to_pylist()
            assert found == [None if i == 3 else float(i) for i in range(N)]
            assert "extra" not in table.scans[-1]
        (first, *_) = added.scan(["row"])
        assert first.schema.names == ["row"] and first["row"].to_pylist() == list(range(7))

    def test_what_does_not_fit_is_a_mistake(self, table) -> None:
        with pytest.raises(AssertionError, match="one value for each row"):
            AddedColumn(table, "extra", np.zeros(N - 1))
        with pytest.raises(AssertionError, match="has a column 'row' already"):
            AddedColumn(table, "row", np.zeros(N))


@dataclass(frozen=True, kw_only=True)
class Given(Weighing):
    """Rows by weights that are given."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()


WEIGHTS = np.arange(float(N)) / 100
WEIGHTS[[0, 1, 2]] = NAN  # 3 and 5 have some, 5 has an error


def chosen(
    table: Any, budget: float | int, seed: int = 0, values: np.ndarray = WEIGHTS, **settings: Any
) -> Selection:
    kind = "fraction" if isinstance(budget, float) else "rows"
    rng, asked = np.random.default_rng(seed), Budget(kind, budget)
    return Given(**settings).weighed(table, values, asked, rng, {"found": 3})


ABLE = [i for i in range(3, N) if i != 5]


class TestWeighing:
    def test_the_whole_budget_has_the_weights(self, table, kept) -> None:
        selection = chosen(table, len(ABLE))
        batches = list(selection.batches)
        whole = pa.Table.from_batches(batches)
        assert kept(Selection(batches)).tolist() == ABLE
        assert np.array_equal(whole["weight"].to_numpy(), WEIGHTS[ABLE].astype(np.float32))
        assert selection.params["found"] == 3 and selection.params["weight_kind"] == "loss"

    def test_a_smaller_budget_is_a_uniform_sample(self, table, kept) -> None:
        """5 standard deviations of the count of each row over 100 draws of 13 of 26."""
        counts = np.zeros(N)
        for seed in range(100):
            counts[kept(chosen(table, 13, seed))] += 1
        assert np.abs(counts[ABLE] - 50).max() < 5 * np.sqrt(100 / 4)
        assert counts.sum() == counts[ABLE].sum()

    def test_drawing_takes_rows_in_proportion_and_never_those_of_weight_0(
        self, table, kept
    ) -> None:
        values = np.where(np.arange(N) % 3 == 0, WEIGHTS, 0.0)
        counts = np.zeros(N)
        for seed in range(100):
            counts[kept(chosen(table, 1, seed, values, use="draw"))] += 1
        able = [i for i in ABLE if i % 3 == 0]
        share = WEIGHTS[able] / WEIGHTS[able].sum()
        assert counts.sum() == counts[able].sum() == 100
        spread = np.sqrt(100 * share * (1 - share))
        assert (np.abs(counts[able] - 100 * share) < 5 * spread).all()

    def test_draws_carry_no_weights_unless_they_undo_them(self, table) -> None:
        plain = pa.Table.from_batches(chosen(table, 6, use="draw").batches)
        assert plain["weight"].null_count == 6
        undone = chosen(table, 6, use="draw", unbiased=True)
        assert pa.Table.from_batches(undone.batches)["weight"].null_count == 0
        assert undone.params["found"] == 3

    @pytest.mark.parametrize("values", [np.zeros(N), np.full(N, NAN)])
    @pytest.mark.parametrize("use", ["weight", "draw"])
    @pytest.mark.filterwarnings("error")
    def test_no_weight_at_all_is_refused(self, table, values, use) -> None:
        with pytest.raises(ValueError, match="all weights are 0; no row is left"):
            chosen(table, 3, values=values, use=use)

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"use": "both"}, "use must be weight or draw, not 'both'"),
            ({"unbiased": True}, "use=weight writes the weights, unbiased undoes them"),
        ],
    )
    def test_settings(self, settings, match) -> None:
        with pytest.raises(ValueError, match=match):
            Given(**settings)
