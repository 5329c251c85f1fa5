"""What every selector in the registry promises."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import curate
from curate.selectors.protocol import SELECTION_SCHEMA, Budget, Selector
from curate.selectors.registry import SELECTORS, make_selector, selector_fields, selector_names
from curate.selectors.vectors import ArrayVectors

REQUIRED = {
    "by": "score",
    "label": "label",
    "group": "group",
    "column": "score",
    "transition": (np.full((4, 4), 0.1) + 0.6 * np.eye(4)).tolist(),
    "by_group": "label",
    "direction": "low",
    "at_least": -10.0,
}

MORE = {
    "semdedup": {"epsilon": 0},  # without one it removes near duplicates
    "gsr": {"steps": 5},  # 100 heads by default
}


def make(name):
    wanted = {f for f in selector_fields(name)} & REQUIRED.keys()
    if name != "balanced":
        wanted -= {"by_group"}
    return make_selector(name, **{f: REQUIRED[f] for f in wanted}, **MORE.get(name, {}))


@pytest.fixture
def table(make_table):
    generator = np.random.default_rng(3)
    scores = generator.integers(1, 9, 95).astype(np.float32)
    scores = [None if i in (5, 6) else score for i, score in enumerate(scores.tolist())]
    made = make_table(scores, errors=[1, 50], label=pa.array(generator.integers(0, 3, 95)))
    made.vectors = ArrayVectors(generator.dirichlet(np.ones(4), 95))
    made.target = ArrayVectors(np.abs(generator.normal(size=(9, 4))))
    classes = pa.array(np.arange(9) % 3)
    made.target_values = {"label": classes, "group": classes}.__getitem__
    return made


def test_names_are_listed():
    assert selector_names()[: len(SELECTORS)] == sorted(SELECTORS)


def test_the_docs_list_every_method_with_its_settings():
    text = (Path(curate.__file__).parent / "docs" / "selectors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]*) \| [^|]+ \| [^|]+ \|$", text, re.MULTILINE)
    assert {name for name, _ in rows} >= set(SELECTORS)
    for name, settings in rows:
        named = re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", settings))
        assert set(named) <= set(selector_fields(name)), name


@pytest.mark.parametrize("name", sorted(SELECTORS))
class TestEverySelector:
    def test_is_a_selector_with_documented_class(self, name):
        assert isinstance(make(name), Selector)
        assert type(make(name)).__doc__

    def test_keeps_the_budget_once_sorted_and_without_failed_rows(self, name, table, kept):
        selection = make(name).select(table, Budget("fraction", 0.4), np.random.default_rng(0))
        batches = list(selection.batches)
        chosen = kept(replace(selection, batches=batches))
        if selection.params.get("weight_kind") == "repeat":
            assert sum(batch.column("weight").to_numpy().sum() for batch in batches) == 38
        else:
            assert len(chosen) == 38
        assert (np.diff(chosen) > 0).all()
        failed = {1, 50, 5, 6} if "by" in selector_fields(name) else {1, 50}
        assert not failed & set(chosen.tolist())

    def test_tokens_below_at_and_above_the_supply(self, name, make_table, table, kept):
        """Kept to below, everything chosen at, refused above; failed rows do not count."""
        tokens = np.random.default_rng(5).integers(1, 9, 95)
        columns = {"label": table.data["label"], "tokens": pa.array(tokens, pa.int32())}
        counted = make_table(np.arange(1, 96) % 7 + 1, errors=[1, 50], **columns)
        for part in ("vectors", "target", "target_values"):
            setattr(counted, part, getattr(table, part))
        supply = int(tokens.sum() - tokens[1] - tokens[50])

        def chosen(amount):
            budget = Budget("tokens", amount)
            return kept(make(name).select(counted, budget, np.random.default_rng(0)))

        if name == "pa_da":
            with pytest.raises(ValueError, match="counted in rows, not in tokens"):
                chosen(9)
            return
        half = int(tokens[chosen(supply // 2)].sum())
        # Fifty strata or three groups each end before their own row of up to 8 tokens.
        assert supply // 2 - 50 < half <= supply // 2
        assert len(chosen(supply)) == 93
        for amount in (supply + 1, 10 * supply):
            said = f"{amount} tokens is more than the {supply} tokens"
            with pytest.raises(ValueError, match=said):
                chosen(amount)

    def test_batches_begin_with_the_selection_schema(self, name, table):
        selection = make(name).select(table, Budget("rows", 9), np.random.default_rng(0))
        for batch in selection.batches:
            head = batch.select(SELECTION_SCHEMA.names).schema
            assert head.equals(SELECTION_SCHEMA)

    def test_is_a_function_of_the_seed_not_of_the_batches(self, name, table, kept):
        selector = make(name)
        draws = []
        for batch_rows in (1, 13, 95):
            table.batch_rows = batch_rows
            rng = np.random.default_rng(4)
            draws.append(kept(selector.select(table, Budget("rows", 30), rng)).tolist())
        assert draws[0] == draws[1] == draws[2]

    def test_the_whole_corpus_fits(self, name, table, kept):
        selection = make(name).select(table, Budget("fraction", 1.0), np.random.default_rng(0))
        if name == "gio":  # all is no budget: its criterion decides
            assert selection.params["stopped"] != "budget"
        elif selection.params.get("weight_kind") != "repeat":
            assert len(kept(selection)) in (91, 93)


@pytest.mark.parametrize("name", ["herding", "random"])
def test_tokens_above_what_groups_with_a_share_hold_are_refused(name, make_table, table, caplog):
    label = table.data["label"].to_numpy()
    counted = make_table(np.ones(95), label=table.data["label"], tokens=pa.array([2] * 95))
    counted.vectors, counted.target = table.vectors, None
    selector = make_selector(name, by_group="label", group_shares={"1": 1.0})
    held = 2 * int((label == 1).sum())
    said = f"{held + 1} tokens is more than the {held} tokens"
    with pytest.raises(ValueError, match=said):
        selector.select(counted, Budget("tokens", held + 1), np.random.default_rng(0))
    selector.select(counted, Budget("rows", held), np.random.default_rng(0))
    assert f"only {held // 2}" in caplog.text
