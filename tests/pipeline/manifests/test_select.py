"""`select` on real score tables: defaults, refusals, idempotence, what the manifest says."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.pipeline.manifests.census import Census, attached
from curate.pipeline.manifests.loader import load_manifest
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.manifests.select import select
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.scoring.score_table import (
    META,
    SUCCESS,
    UNITS,
    ScoreTable,
    parquet_bytes,
    score_schema,
    write_part,
)
from curate.pipeline.storing.storage import Folder, canonical_json
from curate.selectors.farthest import FarthestFirst, nearest_to_mean
from curate.selectors.protocol import Budget
from curate.selectors.registry import selector_names
from curate.selectors.top import Top
from curate.selectors.vectors import ArrayVectors

ROWS = [40, 1, 59]


def write_scores(run: Path, corpus_uri: str, scores: dict[str, np.ndarray], **columns) -> Path:
    """Write a finished score table of one unit per shard; NaN scores become failed rows."""
    corpus, folder = open_corpus(corpus_uri), Folder(str(run / "scores"))
    keep = [pa.field(n, pa.array(v).type) for n, v in columns.items() if n not in ("id", "tokens")]
    schema = score_schema(
        scores,
        id_type=pa.string() if "id" in columns else None,
        keep=keep,
        with_tokens="tokens" in columns,
    )
    start = 0
    for unit, shard in enumerate(corpus.shards):
        part = slice(start, start + shard.rows)
        values = {
            "shard": np.full(shard.rows, unit),
            "row": np.arange(shard.rows),
            **{n: np.asarray(v, dtype=object)[part] for n, v in columns.items()},
            **{n: [None if np.isnan(x) else x for x in v[part]] for n, v in scores.items()},
            "error": [
                "broken" if any(np.isnan(v[i]) for v in scores.values()) else None
                for i in range(part.start, part.stop)
            ],
        }
        table = pa.table([pa.array(values[f.name], f.type) for f in schema], schema=schema)
        write_part(folder, unit, table, {"rows": shard.rows})
        start += shard.rows
    units = pa.table(
        {
            "unit": range(len(ROWS)),
            "shard": range(len(ROWS)),
            "row_start": [0] * len(ROWS),
            "rows": ROWS,
        }
    )
    folder.replace(UNITS, parquet_bytes(units))
    meta = {
        "format": "curate.scores",
        "version": 1,
        "run": "r1",
        "corpus": corpus.describe(),
        "scorers": {name: {"name": name.split("-")[0], "params": {}} for name in scores},
    }
    folder.replace(META, canonical_json(meta))
    success = {"rows": corpus.rows, "units": len(ROWS), "digest": "d1", "run": "r1"}
    folder.replace(SUCCESS, canonical_json(success))
    return run / "scores"


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    for i, n in enumerate(ROWS):
        table = pa.table({"x": np.arange(n) + 1000 * i, "text": [f"{i}/{j}" for j in range(n)]})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"s{i}.parquet", row_group_size=16)
    return str(tmp_path / "data")


@pytest.fixture
def values() -> np.ndarray:
    found = np.random.default_rng(0).random(100).astype(np.float32)
    found[[3, 70]] = np.nan
    return found


@pytest.fixture
def scores(tmp_path: Path, corpus: str, values: np.ndarray) -> Path:
    label = np.arange(100) % 3
    ids = [f"id{i}" for i in range(100)]
    return write_scores(tmp_path / "run", corpus, {"el2n": values}, label=label, id=ids)


def positions(manifest: Manifest) -> list[int]:
    table = pa.Table.from_batches(list(manifest.batches()))
    starts = np.cumsum([0, *ROWS])[:-1]
    return (starts[table["shard"].to_numpy()] + table["row"].to_numpy()).tolist()


def rows_and_weights(manifest: Manifest) -> list[dict]:
    return pa.Table.from_batches(list(manifest.batches(["shard", "row", "weight"]))).to_pylist()


def test_the_short_form_keeps_the_half_that_the_scorer_says(
    tmp_path, corpus, scores, values, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    manifest = select(budget=0.5)
    expected = sorted(np.argsort(-np.nan_to_num(values, nan=-1), kind="stable")[:50].tolist())
    assert positions(manifest) == expected
    assert manifest.path == str(tmp_path / "run" / "manifest")
    content = manifest.content
    assert content["selection"] == {
        "method": "keep",
        "by": "el2n",
        "direction": "high",
        "budget": {"kind": "fraction", "value": 0.5},
        "selected": 50,
        "seed": 0,
        "params": {
            "drop_top": 0,
            "include_errors": False,
            "group_column": "label",
            "ties": {"rule": "row order", "at_cut": 0},
        },
    }
    assert content["corpus"] == open_corpus(corpus).describe()
    assert content["weight_kind"] == "none" and content["schedule"] is None
    label = np.arange(100) % 3
    assert content["groups"] == {
        str(c): {"of": int((label == c).sum()), "kept": int((label[expected] == c).sum())}
        for c in range(3)
    }
    rows = pa.Table.from_batches(list(manifest.batches()))
    assert rows.column_names == ["shard", "row", "id", "weight", "rank"]
    assert rows["id"].to_pylist() == [f"id{i}" for i in expected]
    by_rank = np.array(expected)[np.argsort(rows["rank"].to_numpy())]
    assert (np.diff(values[by_rank]) <= 0).all()


def test_low_is_kept_where_the_scorer_says_low(tmp_path, corpus, values):
    from curate.scorers.registry import SCORERS, make_scorers

    for name in SCORERS:
        direction = make_scorers(name)[name].direction.keep
        table = write_scores(tmp_path / name, corpus, {name: values})
        kept = positions(select(table, budget=10, out=tmp_path / name / "m"))
        sign = -1 if direction == "high" else 1
        assert kept == sorted(np.argsort(sign * values)[:10].tolist()), name


def test_the_summary_stands_beside_random(scores, tmp_path, values):
    manifest = select(scores, budget=0.5, out=tmp_path / "m")
    summary, good = manifest.summary, ~np.isnan(values)
    assert summary["random"]["overlap"] == pytest.approx(50 / 98)
    assert summary["score"]["random_mean"] == pytest.approx(values[good].mean(), rel=1e-6)
    assert summary["score"]["kept_mean"] == pytest.approx(values[positions(manifest)].mean())
    able = np.bincount((np.arange(100) % 3)[good])
    for c in range(3):
        assert summary["groups"][str(c)]["random"] == pytest.approx(able[c] * 50 / 98)
    text = str(manifest)
    assert "50 of 100 rows (50.0%)" in text and "random" in text
    json.dumps(manifest.describe())


def test_the_summary_says_how_much_of_a_token_budget_is_spent(tmp_path, corpus, values):
    scores = write_scores(tmp_path / "run", corpus, {"el2n": values}, tokens=np.full(100, 30))
    text = str(select(scores, budget="1000tok", out=tmp_path / "m"))
    assert "tokens: 990 of 3000, 99.0% of the budget of 1000" in text


def test_reads_the_table_three_times(scores, tmp_path, monkeypatch):
    scans = []
    scan = ScoreTable.scan
    monkeypatch.setattr(
        ScoreTable, "scan", lambda self, columns: scans.append(columns) or scan(self, columns)
    )
    monkeypatch.setattr("curate.pipeline.manifests.score_columns._has_few_values", lambda *_: True)
    select(scores, budget=0.5, out=tmp_path / "m")
    assert len(scans) == 3


def test_the_same_request_is_found_and_another_is_refused(scores, tmp_path):
    out = tmp_path / "m"
    first = select(scores, budget=0.5, out=out)
    files = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("*.[jp]*")}
    again = select(ScoreTable.open(scores), budget="50%", out=out)
    assert again.content == first.content
    assert files == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("*.[jp]*")}
    with pytest.raises(ValueError, match=r'budget .*0\.5.*now .*"rows", "value": 9.*--overwrite'):
        select(scores, budget=9, out=out)
    with pytest.raises(ValueError, match=r"selection \(drop_top 0, now 5\)"):
        select(scores, budget=0.5, drop_top=5, out=out)
    assert len(select(scores, budget=9, out=out, overwrite=True)) == 9


def test_a_refusal_leaves_the_manifest_that_was_to_be_overwritten(scores, tmp_path):
    out = tmp_path / "m"
    select(scores, budget=0.5, out=out)
    files = {p.name: p.read_bytes() for p in out.glob("*.[jp]*")}
    with pytest.raises(ValueError, match="token"):
        select(scores, budget="1e15tok", out=out, overwrite=True)
    with pytest.raises(ValueError, match="how often a row is shown"):
        weighted = dict(method="importance", weight_kind="sampling", schedule="rs2")
        select(scores, budget=20, out=out, overwrite=True, **weighted)
    assert files == {p.name: p.read_bytes() for p in out.glob("*.[jp]*")}


def test_equal_requests_write_equal_bytes(scores, tmp_path):
    for name in ("a", "b"):
        select(scores, budget=0.5, method="random", seed=3, out=tmp_path / name)
    for path in (tmp_path / "a").glob("*.[jp]*"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_interrupted_selection_is_done_again(scores, tmp_path):
    out = tmp_path / "m"
    content = select(scores, budget=0.5, out=out).content
    (out / "manifest.json").unlink()
    (out / "part-00007.parquet").write_bytes(b"left over")
    assert select(scores, budget=0.5, out=out).content == content
    assert not (out / "part-00007.parquet").exists()
    (out / "part-00000.parquet").write_bytes(b"damaged")
    assert select(scores, budget=0.5, out=out).content == content
    Manifest.read(out).check_files()


def test_other_peoples_files_are_left_alone(scores, tmp_path):
    out = tmp_path / "m"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other files"):
            select(scores, budget=0.5, out=out, overwrite=overwrite)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="holds other files"):
        select(scores, budget=0.5, out=scores)


def test_several_scores_need_by(tmp_path, corpus, values):
    table = write_scores(tmp_path / "run", corpus, {"el2n": values, "loss": 1 - values})
    with pytest.raises(ValueError, match=r"several scores; .*--by: el2n, loss"):
        select(table, budget=0.5, out=tmp_path / "m")
    with pytest.raises(ValueError, match="no score 'el2m'; it has: el2n, loss"):
        select(table, by="el2m", budget=0.5, out=tmp_path / "m")
    assert len(select(table, by="loss", budget=0.5, out=tmp_path / "m")) == 50
    drawn = select(table, method="random", budget=0.5, out=tmp_path / "r")
    assert drawn.content["selection"]["by"] is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "say how much to keep"),
        ({"budget": 0}, "not a positive number of rows"),
        ({"budget": -3}, "not a positive number of rows"),
        ({"budget": 1.5}, "not a fraction"),
        ({"budget": 101}, "101 rows is more than the 100 rows there are"),
        ({"budget": "9tok"}, "no column 'tokens'"),
        ({"budget": 0.5, "method": "best"}, "unknown method 'best'; choose from: balanced"),
        ({"budget": 0.5, "method": "random", "drop_top": 3}, "no parameter 'drop_top'"),
        ({"budget": 0.5, "drop_top": 100}, "fewer than the 100 rows"),
        ({"budget": 0.5, "by": "label"}, "no known direction"),
        ({"budget": 0.5, "by": "id", "method": "top"}, "holds string, not scores"),
        ({"budget": 0.5, "seed": -1}, "seed must be"),
        ({"budget": 0.5, "method": "balanced", "params": {"by_group": "x"}}, "no column 'x'"),
        ({"method": "threshold", "params": {"at_least": 5.0}}, "no row is left"),
        ({"budget": 0.5, "params": {"colour": 1}}, "no parameter 'colour'; it takes"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(scores, tmp_path, asked, message):
    with pytest.raises(ValueError, match=message) as caught:
        select(scores, out=tmp_path / "m", **asked)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "m").glob("*.*"))


def test_missing_and_unfinished_tables_are_named(tmp_path, scores):
    with pytest.raises(ValueError, match="holds no score table; make one with"):
        select(tmp_path / "nowhere", budget=0.5, out=tmp_path / "m")
    (scores / SUCCESS).unlink()
    with pytest.raises(ValueError, match="not finished"):
        select(scores, budget=0.5, out=tmp_path / "m")


def test_balanced_uses_the_label_column_and_the_scorers_direction(scores, tmp_path, values):
    manifest = select(scores, budget=30, method="balanced", out=tmp_path / "m")
    kept, label = np.array(positions(manifest)), np.arange(100) % 3
    for c in range(3):
        mine = np.flatnonzero((label == c) & ~np.isnan(values))
        best = mine[np.argsort(-values[mine])[:10]]
        assert sorted(best.tolist()) == kept[label[kept] == c].tolist()
    assert manifest.content["selection"]["params"]["by_group"] == "label"
    assert "rank" not in next(manifest.batches()).schema.names


def test_classes_are_counted_by_the_tasks_own_label(tmp_path, corpus, values):
    diagnosis = np.array(["benign", "malignant"])[np.arange(100) % 2]
    table = write_scores(tmp_path / "run", corpus, {"el2n": values}, diagnosis=diagnosis)
    meta = json.loads((table / META).read_text())
    meta["task"] = {"kind": "tabular_classification", "columns": {"label": "diagnosis"}}
    (table / META).write_bytes(canonical_json(meta))
    manifest = select(table, budget=10, method="balanced", out=tmp_path / "m")
    assert manifest.content["groups"] == {c: {"of": 50, "kept": 5} for c in ("benign", "malignant")}


def test_token_budgets_and_failed_rows(tmp_path, corpus, values):
    tokens = np.arange(100) % 7 + 1
    table = write_scores(tmp_path / "run", corpus, {"el2n": values}, tokens=tokens)
    manifest = select(table, budget="60tok", out=tmp_path / "m")
    assert manifest.content["selection"]["budget"] == {"kind": "tokens", "value": 60}
    kept = positions(manifest)
    assert (
        53 < tokens[kept].sum() <= 60 and manifest.summary["tokens"]["kept"] == tokens[kept].sum()
    )
    everything = select(table, budget=1.0, out=tmp_path / "all")
    assert len(everything) == 98 and not {3, 70} & set(positions(everything))
    errors = select(table, budget=1.0, include_errors=True, out=tmp_path / "with")
    assert errors.summary["random"]["overlap"] == 1  # a random one may keep them, too
    assert len(errors) == 100
    with pytest.raises(ValueError, match="no row fits the budget"):
        hardest = int(np.nanargmax(values))
        select(table, budget=f"{tokens[hardest] - 1 or 1}tok", out=tmp_path / "none")


def test_columns_are_attached_for_selectors_that_do_not_carry_them(scores):
    table = ScoreTable.open(scores)
    columns = ("id", "el2n")
    budget, rng = Budget("rows", 37), np.random.default_rng(0)
    carried = Top(by="el2n", carry=columns).select(table, budget, rng).batches
    plain = Top(by="el2n").select(table, budget, rng).batches
    joined = attached(iter(plain), Census(table, None, None), columns)
    assert pa.Table.from_batches(list(joined)).equals(pa.Table.from_batches(list(carried)))


@pytest.fixture
def several(tmp_path: Path, corpus: str) -> tuple[Path, dict[str, np.ndarray]]:
    """A table of several scores, tokens and a language."""
    rng = np.random.default_rng(5)
    scores = {n: rng.gamma(1.0, size=100).astype(np.float32) for n in ("el2n", "aum", "margin")}
    scores["el2n"][[3, 70]] = np.nan
    lang = np.repeat(["de", "en", "fr"], [20, 70, 10])
    tokens = rng.integers(1, 9, 100)
    table = write_scores(tmp_path / "several", corpus, scores, lang=lang, tokens=tokens)
    return table, {**scores, "lang": lang, "tokens": tokens}


def ranks(x):
    from scipy.stats import rankdata

    found, there = np.full(len(x), np.nan), ~np.isnan(x)
    found[there] = rankdata(x[there]) / there.sum()
    return found


def test_a_composite_score_is_selected_by(several, tmp_path):
    table, values = several
    by = "0.7*rank(el2n) - 0.3*rank(margin)"
    manifest = select(table, by=by, budget=20, out=tmp_path / "m")
    # Rows with errors have no rank in any column.
    margin = np.where(np.isnan(values["el2n"]), np.nan, values["margin"])
    expected = 0.7 * ranks(values["el2n"]) - 0.3 * ranks(margin)
    best = np.argsort(-np.nan_to_num(expected, nan=-np.inf), kind="stable")[:20]
    assert positions(manifest) == sorted(best.tolist())
    chosen = manifest.content["selection"]
    # el2n and margin are kept high and low, and the expression falls with margin.
    assert (chosen["by"], chosen["direction"]) == (by, "high")
    assert manifest.summary["score"]["kept_mean"] == pytest.approx(expected[best].mean(), rel=1e-5)
    assert select(table, by=by, budget=20, out=tmp_path / "m").content == manifest.content


def test_directions_of_composites_are_agreed_on_or_said(several, tmp_path):
    table, _ = several
    with pytest.raises(ValueError, match=r"do not agree on which end to keep; .*--direction high"):
        select(table, by="el2n + margin", budget=20, out=tmp_path / "m")
    with pytest.raises(ValueError, match="do not agree"):
        select(table, by="el2n * aum", budget=20, out=tmp_path / "m")
    low = select(table, by="-rank(el2n) + rank(margin)", budget=20, out=tmp_path / "low")
    assert low.content["selection"]["direction"] == "low"
    said = select(table, by="el2n * aum", direction="low", budget=20, out=tmp_path / "said")
    assert said.content["selection"]["direction"] == "low"
    top = select(table, by="el2n * aum", method="top", budget=20, out=tmp_path / "top")
    assert len(top) == 20
    for by, end in (("el2n", "high"), ("aum", "low"), ("margin", "low")):
        ccs = select(table, by=by, method="ccs", budget=20, out=tmp_path / f"ccs-{by}")
        assert ccs.content["selection"]["direction"] == end  # the hard end
    with pytest.raises(ValueError, match="method 'top' has no parameter 'direction'"):
        select(table, by="aum", method="top", direction="low", budget=20, out=tmp_path / "no")


def test_weights_are_written_with_their_meaning(several, tmp_path):
    table, values = several
    asked = {"by": "aum", "budget": 30, "method": "importance", "seed": 2}
    manifest = select(table, **asked, params={"mix": 0.1}, out=tmp_path / "m")
    weights = pa.Table.from_batches(list(manifest.batches()))["weight"].to_numpy()
    assert manifest.weight_kind == "loss" and weights.mean() == pytest.approx(1, rel=1e-6)
    report = manifest.content["selection"]["params"]["weights"]
    assert report["effective_rows"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert report["largest"] == pytest.approx(weights.max()) and report["scale"] > 0
    scores = values["aum"][positions(manifest)]
    assert manifest.summary["score"]["kept_weighted_mean"] == pytest.approx(
        (weights @ scores) / weights.sum(), rel=1e-5
    )
    assert f"as good as {report['effective_rows']:.1f} rows" in str(manifest)
    rate = select(table, **asked, params={"mix": 0.1}, weight_kind="sampling", out=tmp_path / "s")
    assert rate.weight_kind == "sampling"
    same = pa.Table.from_batches(list(rate.batches()))["weight"].to_numpy()
    assert np.array_equal(same, weights)
    clipped = select(table, **asked, params={"mix": 0.1}, clip_weights=1.5, out=tmp_path / "c")
    cut = pa.Table.from_batches(list(clipped.batches()))["weight"].to_numpy()
    assert cut.max() == pytest.approx(1.5, rel=1e-5) and cut.mean() == pytest.approx(1, rel=1e-5)
    assert "of all weight, which biases" in str(clipped)
    # Another weighting is another selection, also where the first one asked for nothing.
    for how in ({"weight_kind": "sampling"}, {"clip_weights": 1.5}, {"params": {}}):
        with pytest.raises(ValueError, match="holds another selection"):
            select(table, **{**asked, "params": {"mix": 0.1}, **how}, out=tmp_path / "m")
    with pytest.raises(ValueError, match="holds another selection"):
        select(table, **asked, params={"mix": 0.1}, out=tmp_path / "c")
    repeats = select(table, by="aum", budget=60, method="pa_da", out=tmp_path / "r")
    counts = pa.Table.from_batches(list(repeats.batches()))["weight"].to_numpy()
    assert repeats.weight_kind == "repeat" and counts.sum() == 60 and len(repeats) < 60


def test_a_repeated_selection_comes_as_often_as_it_says(several, tmp_path):
    table, _ = several
    manifest = select(table, by="aum", budget=60, method="pa_da", out=tmp_path / "r")
    rows = pa.Table.from_batches(list(manifest.batches()))
    expected = {
        (shard, row): round(weight)
        for shard, row, weight in zip(
            *(rows[name].to_pylist() for name in ("shard", "row", "weight")), strict=True
        )
    }
    seen: dict[tuple[int, int], int] = {}
    for batch in manifest.as_torch(batch_size=7):
        for key in zip(batch["__shard"].tolist(), batch["__row"].tolist(), strict=True):
            seen[key] = seen.get(key, 0) + 1
    assert seen == expected


def test_groups_keep_their_least_share(several, tmp_path):
    table, _ = several
    asked = {"by": "el2n", "budget": 20, "by_group": "lang", "params": {"min_shares": 0.2}}
    manifest = select(table, **asked, out=tmp_path / "m")
    kept = {group: n["kept"] for group, n in manifest.content["groups"].items()}
    assert sum(kept.values()) == 20 and min(kept.values()) >= 4
    params = manifest.content["selection"]["params"]
    assert (params["by_group"], params["min_shares"]) == ("lang", 0.2)
    plain = select(table, by="el2n", budget=20, out=tmp_path / "p").content
    assert "min_shares" not in plain["selection"]["params"]


def test_random_spreads_are_those_of_random_selections(several, tmp_path):
    table, values = several
    manifest = select(table, by="aum", method="top", budget=30, by_group="lang", out=tmp_path / "m")
    rng, good = np.random.default_rng(0), np.flatnonzero(~np.isnan(values["el2n"]))
    drawn = [rng.choice(good, 30, replace=False) for _ in range(4000)]
    score = manifest.summary["score"]
    means = [values["aum"][rows].astype(float).mean() for rows in drawn]
    assert score["random_mean"] == pytest.approx(np.mean(means), rel=0.01)
    assert score["random_sd"] == pytest.approx(np.std(means), rel=0.06)
    english = [(values["lang"][rows] == "en").sum() for rows in drawn]
    group = manifest.summary["groups"]["en"]
    assert group["random"] == pytest.approx(np.mean(english), rel=0.01)
    assert group["random_sd"] == pytest.approx(np.std(english), rel=0.06)


def test_random_spreads_of_a_score_that_rows_lack(several, tmp_path):
    table, values = several
    odd = "(tokens - 1)*(tokens - 3)*(tokens - 5)*(tokens - 7)"
    by = f"aum + 0*{odd}/({odd})"  # rows of so many tokens have no score
    manifest = select(table, by=by, method="top", budget=40, out=tmp_path / "m")
    rng, good = np.random.default_rng(0), np.flatnonzero(~np.isnan(values["el2n"]))
    there = np.where(values["tokens"] % 2 == 1, np.nan, values["aum"].astype(float))
    assert np.isnan(there).sum() > 30
    means = [np.nanmean(there[rng.choice(good, 40, replace=False)]) for _ in range(4000)]
    # 4000 draws: the deviation to 1.1 %; first order in some 20 rows: to a few percent.
    assert manifest.summary["score"]["random_sd"] == pytest.approx(np.std(means), rel=0.08)


def test_random_of_a_token_budget_has_as_many_tokens(several, tmp_path):
    table, values = several
    manifest = select(table, by="aum", method="top", budget="150tok", out=tmp_path / "m")
    kept, good = positions(manifest), ~np.isnan(values["el2n"])
    share = values["tokens"][kept].sum() / values["tokens"][good].sum()
    random = manifest.summary["random"]
    assert random["overlap"] == pytest.approx(share)
    assert random["rows"] == pytest.approx(98 * share)
    assert random["rows_in_common"] == pytest.approx(len(kept) * share)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"by": "el2n + el2m"},
            r"names 'el2m', which the score table does not have .* character 8$",
        ),
        ({"by": "rnk(el2n)"}, "has no function 'rnk'.* at character 1"),
        ({"by": "el2n +"}, "cannot be read: .* at character 7"),
        ({"by": "rank(lang)"}, "'lang' holds string, not scores"),
        ({"by": "aum", "weight_kind": "heavy"}, "unknown kind of weights"),
        ({"by": "aum", "clip_weights": 0.5}, "above 1"),
        ({"by": "aum", "clip_weights": 5}, "makes no weights"),
        ({"by": "aum", "by_group": "x"}, "no column 'x'"),
        ({"by": "aum - 9", "method": "importance"}, "finite and at least 0"),
        ({"by": "aum - aum", "method": "importance"}, "all scores of .* are 0"),
        ({"by": "aum", "method": "pa_da", "budget": "9tok"}, "not in tokens"),
        ({"by": "aum", "method": "importance", "weight_kind": "repeat"}, "no whole multiples"),
    ],
)
def test_mistakes_in_scores_and_weights_leave_nothing(several, tmp_path, asked, message):
    with pytest.raises(ValueError, match=message) as caught:
        select(several[0], out=tmp_path / "m", **{"budget": 0.5, **asked})
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "m").glob("*.*"))


def test_the_command_prints_weights_and_random_beside_the_choice(several, tmp_path):
    from typer.testing import CliRunner

    from curate import cli

    table, _ = several
    common = ["select", str(table), "--budget", "30", "--by", "aum", "--by-group", "lang"]
    weighted = [*common, "--method", "importance", "--weight-kind", "sampling"]
    weighted += ["--clip-weights", "2", "-o", str(tmp_path / "m")]
    result = CliRunner().invoke(cli.app, [*weighted, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["weight_kind"] == "sampling"
    assert found["selection"]["params"]["clip_weights"] == 2
    assert {"random_mean", "random_sd", "kept_weighted_mean"} <= found["summary"]["score"].keys()
    assert found["summary"]["groups"]["en"]["random"] > 0
    text = CliRunner().invoke(cli.app, [*weighted, "--overwrite"]).stdout
    assert "rows of equal weight" in text and "random" in text
    low = [*common, "--direction", "low", "-o", str(tmp_path / "low"), "--json"]
    result = CliRunner().invoke(cli.app, low)
    assert json.loads(result.stdout)["selection"]["direction"] == "low"


class TestScheduled:
    def test_select_writes_the_schedule_that_the_loader_follows(self, corpus, scores, tmp_path):
        out = tmp_path / "m"
        asked = dict(budget=60, schedule="rs2", schedule_params={"fraction": 0.5}, epochs=4)
        manifest = select(scores, out=out, seed=3, **asked)
        assert manifest.content["schedule"] == {
            "rule": "rs2",
            "seed": 3,
            "epochs": 4,
            "params": {"fraction": 0.5, "replacement": False},
        }
        assert positions(manifest) == positions(select(scores, budget=60, out=tmp_path / "plain"))
        rows = load_manifest(out).as_torch()
        first = {int(r["x"]) for r in rows}
        rows.set_epoch(1)
        second = {int(r["x"]) for r in rows}
        assert len(first) == len(second) == 30 and not first & second
        assert select(scores, out=out, seed=3, **asked).content == manifest.content
        with pytest.raises(ValueError, match=r"holds another selection .*scheduled"):
            select(scores, out=out, seed=3, budget=60)

    @pytest.mark.parametrize("method", ["keep", "importance", "moderate"])
    def test_classes_of_the_score_table_come_in_proportion(self, scores, tmp_path, method):
        asked = dict(schedule="rs2", schedule_params={"fraction": 0.25, "by_group": "label"})
        made = select(scores, budget=60, method=method, out=tmp_path / "m", **asked)
        assert made.content["version"] == 2
        labels = np.array([p % 3 for p in positions(made)])
        params = made.content["schedule"]["params"]
        counted = dict(zip(params["groups"], params["rows"], strict=True))
        assert counted == {str(c): int((labels == c).sum()) for c in range(3)}
        plain = select(scores, budget=60, method=method, out=tmp_path / "p")
        assert positions(plain) == positions(made)
        source, seen = made.as_map(["x"]), []
        for epoch in range(4):
            at = list(source.sampler(epoch=epoch))
            each = np.bincount(labels[at], minlength=3)
            assert len(at) == 15 and (np.abs(each - np.bincount(labels) / 4) < 1).all()
            seen += at
        assert sorted(seen) == list(range(60))
        cooled = select(
            scores, budget=60, out=tmp_path / "c", schedule="cooldown", epochs=2,
            schedule_params={"by_group": "label"},
        )  # fmt: skip
        assert sum(cooled.content["schedule"]["params"]["rows"]) == 60

    def test_a_curriculum_knows_which_ranks_are_hard(self, scores, tmp_path):
        made = select(scores, budget=0.5, out=tmp_path / "m", schedule="curriculum", epochs=5)
        assert made.content["schedule"]["params"]["hard"] == "first"
        easy = select(
            scores, budget=0.5, method="bottom", out=tmp_path / "e", schedule="curriculum", epochs=5
        )
        assert easy.content["schedule"]["params"]["hard"] == "last"

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ({"schedule": "cooldown"}, "cooldown needs groups: by_group=COLUMN"),
            (
                {"schedule": "rs2", "schedule_params": {"by_group": "lang"}},
                "with --keep lang",
            ),
            ({"schedule": "rs3"}, "unknown schedule 'rs3'"),
            ({"schedule": "rs2", "schedule_params": {"x": 1}}, "has no parameter 'x'"),
            ({"schedule": "rs2", "weight_kind": "sampling"}, "both say how often a row is shown"),
            ({"schedule": "curriculum"}, "needs its length"),
            ({"schedule": "curriculum", "epochs": 2, "method": "moderate"}, "needs ranks"),
            ({"epochs": 2}, "need its rule"),
        ],
    )
    def test_refusals_leave_nothing(self, scores, tmp_path, asked, said):
        out = tmp_path / "m"
        method = asked.pop("method", None) or ("importance" if "weight_kind" in asked else "keep")
        with pytest.raises(ValueError, match=said):
            select(scores, budget=20, out=out, method=method, **asked)
        assert not out.exists()


class TestAmong:
    @pytest.fixture
    def half(self, several, tmp_path) -> Manifest:
        return select(several[0], method="random", budget=0.5, seed=3, out=tmp_path / "half")

    def test_only_rows_of_the_earlier_selection_are_chosen(self, several, half, tmp_path):
        table, values = several
        mine = np.array(positions(half))
        options = {"by": "rank(el2n)", "method": "top", "budget": 20}
        found = select(table, **options, among=half.path, out=tmp_path / "m")
        score = values["el2n"][mine]
        assert positions(found) == sorted(mine[np.argsort(-score, kind="stable")[:20]].tolist())
        assert found.content["selection"]["params"]["among"]["digest"] == half.digest
        # Ranks are among them, and so is the random selection beside the choice.
        mean = found.summary["score"]["random_mean"]
        assert mean == pytest.approx((1 + 1 / len(mine)) / 2, rel=1e-6)
        assert found.summary["random"]["overlap"] == pytest.approx(20 / len(mine))
        again = select(table, **options, among=half.path, out=tmp_path / "m")
        assert again.digest == found.digest
        with pytest.raises(ValueError, match="among"):
            select(table, **options, out=tmp_path / "m")

    def test_geometry_too(self, several, half, tmp_path):
        points = np.random.default_rng(4).normal(size=(100, 3)).astype(np.float32)
        np.save(tmp_path / "v.npy", points)
        mine = np.array(positions(half))
        asked = {"method": "kcenter", "params": {"start": "mean"}, "budget": 10}
        asked |= {"vectors": str(tmp_path / "v.npy"), "among": half.path}
        found = select(several[0], **asked, out=tmp_path / "m")
        order = FarthestFirst(
            ArrayVectors(points[mine]),
            starts=[nearest_to_mean(ArrayVectors(points[mine]), "cosine")],
        ).fill(np.ones(len(mine), np.int64), 10)
        assert positions(found) == sorted(mine[order].tolist())

    def test_a_share_is_of_all_rows(self, several, half, tmp_path):
        found = select(several[0], method="random", budget=0.3, among=half.path, out=tmp_path / "m")
        assert len(found) == 30 and set(positions(found)) <= set(positions(half))

    def test_every_method_sees_the_left_out_as_rows_with_errors(self, corpus, tmp_path):
        """Twice the same call, too: it finds its manifest, whatever a method records of itself."""
        rng = np.random.default_rng(7)
        scores, lang = rng.random(100).astype(np.float32), np.repeat(["de", "en"], 50)
        more = {"lang": lang, "label": np.arange(100) % 3, "tokens": rng.integers(1, 9, 100)}
        whole = write_scores(tmp_path / "whole", corpus, {"el2n": scores}, **more)
        half = select(whole, method="random", budget=0.5, seed=3, out=tmp_path / "half")
        left = np.isin(np.arange(100), positions(half))
        able = write_scores(
            tmp_path / "able", corpus, {"el2n": np.where(left, scores, np.nan)}, **more
        )
        select(whole, method="importance", budget=30, out=tmp_path / "weighted")
        target = pa.table({"label": [str(i % 3) for i in range(18)], "g": ["a", "b"] * 9})
        pq.write_table(target, tmp_path / "target.parquet")
        files = {"v": rng.normal(size=(100, 4)), "t": rng.normal(size=(18, 4))}
        files["p"] = rng.dirichlet(np.ones(3), 100)
        for name, numbers in files.items():
            np.save(tmp_path / f"{name}.npy", numbers.astype(np.float32))
        seen = {"vectors": str(tmp_path / "v.npy")}
        aimed = {**seen, "target_vectors": str(tmp_path / "t.npy")}
        noisy = {"vectors": str(tmp_path / "p.npy"), "params": {"label": "label", "noise": 0.2}}
        asked = {
            **dict.fromkeys(["greedy_alignment", "kmm", "density_ratio"], aimed),
            **dict.fromkeys(["craig", "gradmatch", "glister", "diverse_top", "leverage"], seen),
            **dict.fromkeys(["exact", "facility_location", "kcenter", "semdedup"], seen),
            **dict.fromkeys(["rent", "dws"], noisy),
            "d2": {**seen, "params": {"cells": 2}},
            "herding": {**seen, "params": {"cells": 2}},
            "gio": {**aimed, "params": {"k": 2, "grad_desc_iter": 2}},
            "gsr": {
                **aimed,
                "target": str(tmp_path / "target.parquet"),
                "params": {"label": "label", "group": "g", "steps": 2},
            },
            "moderate_center": {**seen, "params": {"label": "label"}},
            "propagate": {**seen, "params": {"manifest": str(tmp_path / "weighted")}},
            "threshold": {"params": {"at_least": 0.3}},
        }
        for method in selector_names():
            options = {"method": method, "budget": 8, **asked.get(method, {})}
            found = select(whole, **options, among=half.path, out=tmp_path / method)
            expected = select(able, **options, out=tmp_path / f"{method}-able")
            assert rows_and_weights(found) == rows_and_weights(expected), method
            again = select(whole, **options, among=half.path, out=tmp_path / method)
            assert again.digest == found.digest, method
        with pytest.raises(ValueError, match="is one of the manifests to read"):
            spread = {"method": "propagate", "budget": 8, **asked["propagate"]}
            select(whole, **spread, overwrite=True, out=tmp_path / "weighted")

    def test_refusals(self, several, half, tmp_path):
        table, more = several[0], {"method": "random", "budget": 5, "among": half.path}
        for errors in ({"include_errors": True}, {"params": {"include_errors": True}}):
            with pytest.raises(ValueError, match="in no earlier choice"):
                select(table, **more, **errors, out=tmp_path / "m")
        with pytest.raises(ValueError, match="is one of the manifests to read"):
            select(table, **more, overwrite=True, out=tmp_path / "half")
        with pytest.raises(ValueError, match="holds no manifest"):
            select(table, **{**more, "among": str(tmp_path)}, out=tmp_path / "m")
        assert not (tmp_path / "m").exists()
