"""The honest comparison: arms, equal steps, results that survive kills, plain words."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn

from curate.pipeline.evaluation import evaluate as evaluation
from curate.pipeline.evaluation.evaluate import evaluate, format_report
from curate.pipeline.evaluation.measure import HeldOut
from curate.pipeline.evaluation.random_subset import random_manifest
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.models.checkpoint import load_model
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.storing.storage import Folder
from curate.pipeline.tasks.registry import make_task
from curate.pipeline.training.train import train
from curate.pipeline.training.trainer import SeedTraining
from curate.scorers.protocol import IGNORE

ROWS = 400
OPTIONS = {"model": "mlp", "task": "image_classification", "task_options": {"scale": 16}}
QUICK = {**OPTIONS, "epochs": 2, "progress": False}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_digits(path, rows):
    digits = load_digits()
    pixels = pa.array(digits.data[rows].astype(np.uint8).ravel())
    images = pa.FixedSizeListArray.from_arrays(pixels, 64)
    pq.write_table(pa.table({"image": images, "label": digits.target[rows]}), path)
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A training corpus, a test corpus, and manifests of a good and a bad subset of one size."""
    folder = tmp_path_factory.mktemp("digits")
    mixed = np.random.default_rng(0).permutation(1797)
    train_path = write_digits(folder / "train.parquet", mixed[:ROWS])
    test_path = write_digits(folder / "test.parquet", mixed[ROWS : ROWS + 300])
    labels = load_digits().target[mixed[:ROWS]]
    few_classes = np.flatnonzero(labels < 3)
    corpus = open_corpus(train_path)
    mixture = random_manifest(corpus, len(few_classes), 77, Folder(folder / "mixture")).path
    narrow = rewritten(mixture, folder / "narrow", few_classes)
    return train_path, test_path, mixture, narrow, len(few_classes)


def rewritten(manifest, folder, rows):
    """The manifest with other rows."""
    from curate.pipeline.manifests.manifest import write_manifest, write_parts

    content = json.loads((Path(manifest) / "manifest.json").read_text())
    columns = [np.zeros(len(rows), np.int32), np.asarray(rows, np.int64)]
    arrays = [*map(pa.array, columns), pa.nulls(len(rows), "float32"), pa.nulls(len(rows), "int32")]
    batch = pa.record_batch(arrays, ["shard", "row", "weight", "rank"])
    content["files"], content["selection"]["selected"] = write_parts(Folder(folder), [batch])
    content["selection"] |= {"method": "top", "by": "el2n"}
    del content["format"], content["version"]
    write_manifest(Folder(folder), content)
    return str(folder)


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory):
    corpus, test, mixture, narrow, _ = data
    out = tmp_path_factory.mktemp("evaluate") / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    report = evaluate(
        corpus, manifests=[mixture, narrow], test=test, seeds=3, out=out, **QUICK | {"epochs": 6}
    )
    torch.set_num_threads(before)
    return report, out


def row(report, name):
    return next(r for r in report["rows"] if r["name"] == name)


def test_every_arm_is_there_once(evaluated, data):
    report, size = evaluated[0], data[-1]
    assert [(r["name"], r["kept"]) for r in report["rows"]] == [
        ("full", ROWS), ("mixture", size), ("narrow", size), (f"random-{size}", size)
    ]  # fmt: skip
    assert {r["steps"] for r in report["rows"]} == {report["steps"]}
    assert all(len(r["values"]) == 3 for r in report["rows"])
    assert row(report, "narrow")["method"] == "top by el2n"


def test_numbers_agree_with_scipy(evaluated, data):
    report, size = evaluated[0], data[-1]
    for arm in report["rows"]:
        assert arm["mean"] == pytest.approx(np.mean(arm["values"]))
        error = stats.sem(arm["values"])
        assert arm["ci95"] == pytest.approx(stats.t.ppf(0.975, 2) * error)
    for other in ("random", "full"):
        theirs = row(report, "full" if other == "full" else f"random-{size}")["values"]
        for name in ("mixture", "narrow"):
            ours = row(report, name)
            test = stats.ttest_rel(ours["values"], theirs)
            assert ours[f"against_{other}"]["p_t"] == pytest.approx(test.pvalue)
            assert ours[f"against_{other}"]["difference"] == pytest.approx(
                np.mean(ours["values"]) - np.mean(theirs)
            )


def test_a_bad_subset_is_called_worse_than_random(evaluated):
    report, out = evaluated
    assert row(report, "narrow")["against_random"]["verdict"] == "worse"
    text = format_report(report)
    assert "narrow: WORSE than a random subset of its size" in text
    assert "narrow: better" not in text
    assert (out / "evaluation.txt").read_text() == text + "\n"


def test_the_full_arm_is_ordinary_training(evaluated, data, tmp_path):
    """Accuracy by hand from checkpoints of `train` with the same settings and seeds."""
    corpus, test = data[:2]
    saved = train(
        corpus, **QUICK | {"epochs": 6}, seeds=3, save_steps=[], out=tmp_path / "checkpoints"
    )
    table = pq.read_table(test)
    pixels = np.stack(table["image"].to_numpy()).reshape(-1, 1, 8, 8) / 16
    labels = table["label"].to_numpy()
    with torch.no_grad():
        logits = [load_model(c)(torch.tensor(pixels, dtype=torch.float32)) for c in saved]
    by_hand = [(z.argmax(1).numpy() == labels).mean() for z in logits]
    assert row(evaluated[0], "full")["values"] == pytest.approx(by_hand)


def test_random_subsets_are_new_for_every_seed(evaluated, data):
    size, out = data[-1], evaluated[1]
    drawn = []
    for seed in range(3):
        manifest = Manifest.open(out / f"random/{size}-seed{seed}")
        drawn.append(pa.Table.from_batches(manifest.batches())["row"].to_pylist())
    assert all(len(set(d)) == size for d in drawn)
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_random_subsets_are_uniform(data, tmp_path):
    corpus, draws, size = open_corpus(data[0]), 150, 100
    counts = np.zeros(ROWS)
    for seed in range(draws):
        manifest = random_manifest(corpus, size, seed, Folder(tmp_path / str(seed)))
        counts[pa.Table.from_batches(manifest.batches())["row"].to_numpy()] += 1
    expected = draws * size / ROWS
    # Sampling without replacement: the sum of squares is chi-squared, scaled by 1 - size/rows.
    square = ((counts - expected) ** 2).sum() / (expected * (1 - size / ROWS))
    assert counts.sum() == draws * size
    assert 0.001 < stats.chi2.cdf(square, ROWS - 1) < 0.999


def test_a_stopped_evaluation_goes_on(evaluated, data, tmp_path, monkeypatch):
    corpus, test, mixture, narrow, _ = data
    options = QUICK | {"manifests": [mixture, narrow], "test": test, "seeds": 3, "epochs": 6}
    whole, calls = evaluation.run_arm, []

    def stopped(plan, arm, seed):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append((arm.name, seed))
        return whole(plan, arm, seed)

    monkeypatch.setattr(evaluation, "run_arm", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(corpus, out=tmp_path / "run", **options)
    first = set(calls)
    calls[:] = ["again"] * 6
    evaluate(corpus, out=tmp_path / "run", **options)
    assert not first & set(calls[6:]), "a finished training was run again"
    for name in ("evaluation.json", "evaluation.txt", "evaluation.svg", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (evaluated[1] / name).read_bytes()


def test_manifests_and_seeds_can_be_added(evaluated, data, tmp_path):
    corpus, test, mixture, narrow, _ = data
    options = QUICK | {"test": test, "epochs": 6, "out": tmp_path / "run"}
    first = evaluate(corpus, manifests=[mixture], seeds=1, **options)
    assert row(first, "mixture")["ci95"] is None
    assert "one seed only" in format_report(first)
    grown = evaluate(corpus, manifests=[mixture, narrow], seeds=3, **options)
    assert grown == evaluated[0]


def test_nothing_but_results_is_left(evaluated, data):
    out, size = evaluated[1], data[-1]
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "config.json", "evaluation.json", "evaluation.svg", "evaluation.txt", "random", "results"
    ]  # fmt: skip
    assert len(list((out / "results").glob(f"random-{size}-*.json"))) == 3
    written = json.loads((out / "evaluation.json").read_text())
    assert written == evaluated[0]
    assert written["format"] == "curate.evaluation"
    assert (out / "evaluation.svg").read_text().startswith("<svg")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_ray_gives_the_same_report(evaluated, data, tmp_path):
    corpus, test, mixture, narrow, _ = data
    report = evaluate(
        corpus, manifests=[mixture, narrow], test=test, seeds=3, engine="ray",
        out=tmp_path / "run", **QUICK | {"epochs": 6},
    )  # fmt: skip
    assert report == evaluated[0]


# Measuring


def test_language_is_measured_by_loss_per_token(tmp_path):
    texts = ["ab " * n for n in range(1, 40)] + [None]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": texts}), path)
    corpus = open_corpus(str(path))
    task = make_task("causal_lm", corpus, context=16, row_loss="sum")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(task.vocab_size, 8), nn.Linear(8, task.vocab_size))

    class Model(nn.Module):
        def forward(self, input_ids):
            return model(input_ids)

    found = HeldOut(corpus, task, "cpu").measure(Model())
    total, tokens = 0.0, 0
    rows = corpus.take(0, np.arange(39))
    for i in range(39):
        batch = task.collate(task.encode(rows.slice(i, 1)))
        with torch.no_grad():
            logits = model(batch.inputs["input_ids"])
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        total, tokens = total + float(loss), tokens + int((batch.targets != IGNORE).sum())
    assert found.accuracy is None
    assert found.loss == pytest.approx(total / tokens, rel=1e-5)
    assert (found.rows, found.bad_rows) == (39, 1)


def test_lower_loss_is_better(tmp_path):
    """A subset in the test's own language beats one in another; the report knows the direction."""
    own = [f"{i} the cat sat on the mat " * 3 for i in range(30)]
    other = ["".join(chr(200 + (i * k) % 40) for k in range(70)) for i in range(90)]
    pq.write_table(pa.table({"text": own + other}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"text": [t + "!" for t in own[:9]]}), tmp_path / "test.parquet")
    corpus = open_corpus(str(tmp_path / "train.parquet"))
    base = random_manifest(corpus, 30, 0, Folder(tmp_path / "base")).path
    good = rewritten(base, tmp_path / "good", range(30))
    report = evaluate(
        corpus, manifests=[good], model="gpt", task="causal_lm", task_options={"context": 32},
        model_options={"layers": 1, "heads": 2, "dim": 16}, test=str(tmp_path / "test.parquet"),
        seeds=4, steps=30, lr=1e-2, progress=False, out=tmp_path / "run",
    )  # fmt: skip
    assert (report["metric"], report["higher_is_better"]) == ("loss", False)
    ours = row(report, "good")
    assert ours["against_random"]["difference"] < 0
    assert ours["against_random"]["verdict"] == "better"
    assert ours["perplexity"] == pytest.approx(np.exp(ours["mean"]))
    assert "good: better than a random subset" in format_report(report)


# Bad input


def test_wrong_input_is_refused_in_one_sentence(data, tmp_path):
    corpus, test, mixture, narrow, _ = data
    out = tmp_path / "run"

    def refused(match, **change):
        options = {"manifests": [mixture], "test": test, "seeds": 2, "out": out}
        with pytest.raises(ValueError, match=match) as raised:
            evaluate(corpus, **QUICK | options | change)
        assert "\n" not in str(raised.value)
        assert not out.exists()

    refused("at least one manifest", manifests=[])
    refused("holds no manifest", manifests=[str(tmp_path)])
    refused("same selection", manifests=[mixture, mixture])
    refused("unknown engine", engine="spark")
    refused("seeds must be", seeds=0)
    other = write_digits(tmp_path / "other.parquet", np.arange(50))
    foreign = random_manifest(open_corpus(other), 9, 0, Folder(tmp_path / "foreign")).path
    refused("is not usable", manifests=[foreign])
    with pytest.raises(ValueError, match="holds something else"):
        evaluate(corpus, manifests=[narrow], test=test, out=tmp_path, **QUICK)


def test_the_corpus_is_the_manifests_own_where_none_is_named(evaluated, data, tmp_path):
    (_, test, mixture, narrow, _), (report, out) = data, evaluated
    options = dict(test=test, seeds=3, out=out, **QUICK | {"epochs": 6})
    assert evaluate(manifests=[mixture, narrow], **options) == report  # nothing is trained again
    shifted = write_digits(tmp_path / "shifted.parquet", np.arange(ROWS))
    other = random_manifest(open_corpus(shifted), 50, 0, Folder(tmp_path / "other")).path
    with pytest.raises(ValueError, match=r"selects from .*train.parq.* from .*shifted"):
        evaluate(manifests=[mixture, other], **options)
    with pytest.raises(ValueError, match=r"mixture is not usable: .*shifted.parquet, recorded was"):
        evaluate(shifted, manifests=[mixture], **options | {"out": tmp_path / "x"})
    with pytest.raises(ValueError, match=r"mixture is a manifest, not a corpus"):
        evaluate(mixture, manifests=[narrow], **options)
    with pytest.raises(ValueError, match="at least one manifest"):
        evaluate(manifests=[], **options)
    assert not (tmp_path / "x").exists()


def test_another_configuration_is_refused(data, evaluated, tmp_path):
    corpus, test, mixture, _, _ = data
    options = {"manifests": [mixture], "test": test, "seeds": 1, "out": tmp_path / "run"}
    evaluate(corpus, **options, **QUICK)
    with pytest.raises(ValueError, match=r"another configuration \(lr: 0.003 -> 0.01\)"):
        evaluate(corpus, **options, **QUICK, lr=0.01)
    evaluate(corpus, **options, **QUICK, lr=0.01, overwrite=True)
    assert json.loads((tmp_path / "run/config.json").read_text())["lr"] == 0.01


def test_nothing_of_what_is_overwritten_is_used_again(data, tmp_path, monkeypatch):
    """Neither results nor random subsets of other data, nor a model that another rate began."""
    corpus, test, mixture, _, n = data
    options = {"test": test, "seeds": 1, **QUICK}
    other = write_digits(tmp_path / "other.parquet", np.arange(1797 - ROWS, 1797))
    theirs = random_manifest(open_corpus(other), n, 7, Folder(tmp_path / "theirs")).path
    fresh = evaluate(corpus, manifests=[mixture], out=tmp_path / "fresh", **options)

    evaluate(other, manifests=[theirs], out=tmp_path / "run", **options)
    options |= {"out": tmp_path / "run", "overwrite": True}
    assert evaluate(corpus, manifests=[mixture], **options) == fresh

    def stopped(self, fed):
        self._save_state()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SeedTraining, "_take_step", stopped)
        evaluate(corpus, manifests=[mixture], **options, lr=0.5)
    (state,) = (tmp_path / "run").rglob("state.pt")
    torch.save(_far_off(torch.load(state)), state)
    assert evaluate(corpus, manifests=[mixture], **options) == fresh


def _far_off(state):
    """The state of a training that went wrong."""
    return {**state, "model": {name: 100 * x for name, x in state["model"].items()}}


def test_testing_on_the_training_corpus_is_said(data, tmp_path, caplog):
    corpus, _, mixture, _, _ = data
    evaluate(corpus, manifests=[mixture], test=corpus, seeds=1, out=tmp_path / "run", **QUICK)
    assert "the test corpus is the training corpus" in caplog.text
