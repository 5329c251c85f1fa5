"""Training: what it saves, that it can be killed, and what it does with weights and bad rows."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from curate.pipeline.manifests.manifest import Manifest, write_manifest, write_parts
from curate.pipeline.manifests.mixture import mix
from curate.pipeline.models.checkpoint import load_model
from curate.pipeline.models.models import make_model
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.storing.storage import Folder
from curate.pipeline.training import encoded_rows
from curate.pipeline.training.batch_loss import batch_loss
from curate.pipeline.training.records import read_records
from curate.pipeline.training.reproducible import reproducible, seed_all
from curate.pipeline.training.train import run_training, settings_for, train
from curate.pipeline.training.trainer import SeedTraining
from curate.scorers.protocol import IGNORE, Batch, Outputs

TRAIN_ROWS = 300
IMAGES = {"model": "mlp", "task": "image_classification", "task_options": {"scale": 16}}
QUICK = {**IMAGES, "epochs": 2, "seeds": 1, "progress": False}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_digits(path, rows, labels=None, row_group_size=None):
    digits = load_digits()
    pixels = pa.array(digits.data[rows].astype(np.uint8).ravel())
    label = pa.array(digits.target[rows]) if labels is None else labels
    table = pa.table({"image": pa.FixedSizeListArray.from_arrays(pixels, 64), "label": label})
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two shards of digits."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "a.parquet", range(200), row_group_size=64)
    write_digits(folder / "b.parquet", range(200, TRAIN_ROWS))
    return str(folder)


def manifest(corpus, folder, rows, weights=None, kind="none"):
    """A manifest of these positions of the corpus."""
    opened = open_corpus(corpus)
    rows = np.asarray(rows)
    shard = (rows >= 200).astype(np.int32)
    weight = pa.nulls(len(rows), pa.float32()) if weights is None else pa.array(weights, "float32")
    batch = pa.record_batch(
        [pa.array(shard), pa.array(rows - 200 * shard), weight, pa.nulls(len(rows), pa.int32())],
        ["shard", "row", "weight", "rank"],
    )
    files, kept = write_parts(Folder(folder), [batch])
    selection = {"method": "test", "by": None, "direction": None, "budget": None, "selected": kept}
    write_manifest(
        Folder(folder),
        {
            "corpus": opened.describe(),
            "selection": selection | {"seed": 0, "params": {}},
            "weight_kind": kind,
            "schedule": None,
            "groups": None,
            "scores": [],
            "files": files,
        },
    )
    return str(folder)


def tree(folder):
    """Every file and its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()
    }


# A manifest alone


def test_a_manifest_knows_its_corpus_and_a_mixture_its_corpora(corpus, tmp_path):
    """A mixture by rows is the same training as that on one corpus with the same rows."""
    parts = [
        manifest(f"{corpus}/{name}.parquet", tmp_path / f"of_{name}", range(rows))
        for name, rows in (("a", 200), ("b", 100))
    ]
    mixed = mix(parts, [2, 1], tmp_path / "mixed", by="rows")
    plain = manifest(corpus, tmp_path / "plain", range(TRAIN_ROWS))
    weights = []
    for name, path in (("x", mixed.path), ("y", plain)):
        last = train(manifest=path, out=tmp_path / name, **QUICK)[-1]
        weights.append((Path(last.path) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    with pytest.raises(ValueError, match="name what to train on"):
        train(out=tmp_path / "z", **QUICK)


# What comes out


def test_digits_are_learned_in_seconds(tmp_path):
    digits = load_digits()
    mixed = np.random.default_rng(0).permutation(len(digits.target))
    path = write_digits(tmp_path / "train.parquet", mixed[:1300])
    started = time.monotonic()
    out = train(path, **IMAGES, seeds=1, progress=False, out=tmp_path / "run")[-1]
    assert time.monotonic() - started < 20
    rest = mixed[1300:]
    images = torch.tensor(digits.data[rest] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    with torch.no_grad():
        predicted = load_model(out)(images).argmax(1).numpy()
    assert (predicted == digits.target[rest]).mean() >= 0.94


def test_checkpoints_describe_themselves(corpus, tmp_path):
    saved = train(
        corpus, **QUICK | {"epochs": 3}, save_epochs=[0, 1], batch_size=32, out=tmp_path / "run"
    )
    assert [Path(c.path).name for c in saved] == [f"seed0-epoch00{e}" for e in (0, 1, 3)]
    assert [c.step for c in saved] == [0, 10, 29]
    assert [c.rows_seen for c in saved] == [0, 320, 900]
    rate = settings_for(corpus, **IMAGES, epochs=3, batch_size=32, out=tmp_path).rate
    assert [c.lr for c in saved] == [0, rate(10), rate(29)]
    means = [np.mean([rate(s) for s in steps]) for steps in (range(1, 11), range(11, 30))]
    assert [c.mean_lr for c in saved] == [0, *map(pytest.approx, means)]
    opened = open_corpus(corpus)
    assert saved[0].corpus == {"uri": opened.uri, "digest": opened.digest, "rows": TRAIN_ROWS}
    seed_all(0, "weights")
    fresh = make_model("mlp", **saved[0].model_args)
    for name, weight in load_model(saved[0]).state_dict().items():
        assert torch.equal(weight, fresh.state_dict()[name])


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path):
    torch.manual_seed(1)
    train(corpus, **QUICK | {"seeds": 2}, out=tmp_path / "a")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    train(corpus, **QUICK | {"seeds": 2}, out=tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), before)
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert a == b
    assert a["seed0-epoch002/model.safetensors"] != a["seed1-epoch002/model.safetensors"]
    assert not any(name.startswith(("progress", "_lock")) for name in a)


def test_a_source_too_large_to_hold_trains_the_same(corpus, tmp_path, monkeypatch):
    train(corpus, **QUICK, out=tmp_path / "held")
    monkeypatch.setattr(encoded_rows, "HELD_BYTES", 0)
    held = []
    monkeypatch.setattr(encoded_rows.HeldRows, "batch", lambda *a: held.append(a))
    train(corpus, **QUICK, out=tmp_path / "streamed")
    assert not held
    assert tree(tmp_path / "held") == tree(tmp_path / "streamed")


def test_seeds_can_be_added_and_are_not_trained_twice(corpus, tmp_path):
    out = tmp_path / "run"
    train(corpus, **QUICK | {"seeds": [1]}, out=out)
    first = {p: p.stat().st_mtime_ns for p in out.rglob("seed1-*/*")}
    train(corpus, **QUICK | {"seeds": 2}, out=out)
    assert first and {p: p.stat().st_mtime_ns for p in first} == first
    train(corpus, **QUICK | {"seeds": 2}, out=tmp_path / "once")
    assert tree(out) == tree(tmp_path / "once")


def test_batch_norm_trains_and_resumes(corpus, tmp_path, monkeypatch):
    options = QUICK | {"model": "cnn", "model_options": {"width": 4}, "epochs": 1, "lr": 1e-2}
    whole = train(corpus, **options, out=tmp_path / "whole")
    monkeypatch.setattr("curate.pipeline.training.trainer.SeedTraining.write_records", _stopped)
    with pytest.raises(InterruptedError):
        train(corpus, **options, out=tmp_path / "cut")
    monkeypatch.undo()
    again = train(corpus, **options, out=tmp_path / "cut")
    assert tree(tmp_path / "whole") == tree(tmp_path / "cut")
    running = load_model(whole[-1]).state_dict()
    assert any("running_mean" in name and value.any() for name, value in running.items())
    assert [c.digest for c in again] == [c.digest for c in whole]


def _stopped(self):
    raise InterruptedError("stopped before the records")


DROPOUT = """
from torch import nn

def make(num_classes, input_shape):
    layers = nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, num_classes)
    return nn.Sequential(nn.Flatten(), *layers)
"""


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_dropout_and_momentum_survive_a_stop_at_any_step(corpus, tmp_path, monkeypatch, optimizer):
    (tmp_path / "model.py").write_text(DROPOUT)
    options = IMAGES | {"model": f"{tmp_path}/model.py:make", "optimizer": optimizer}
    settings = settings_for(corpus, **options, epochs=2, out=tmp_path / "whole")
    run_training(settings, [0], progress=False)
    cut = replace(settings, out=str(tmp_path / "cut"), save_state_s=0.0)
    step = SeedTraining._take_step
    for stop in (1, 2, 6):

        def stopping(self, fed, stop=stop):
            if fed.step == stop:
                raise InterruptedError
            step(self, fed)

        monkeypatch.setattr(SeedTraining, "_take_step", stopping)
        with pytest.raises(InterruptedError):
            run_training(cut, [0], progress=False)
    monkeypatch.undo()
    run_training(cut, [0], progress=False)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


KILLED = """
import sys
from dataclasses import replace
from curate.pipeline.training.train import run_training, settings_for
settings = settings_for(sys.argv[1], model="mlp", task="image_classification",
                        task_options={"scale": 16}, epochs=12, save_epochs=[0, 3, 12],
                        out=sys.argv[2])
run_training(replace(settings, save_state_s=0.0), [0, 1], progress=False)
"""


def test_killed_anywhere_it_ends_with_the_same_bytes(corpus, tmp_path):
    settings = settings_for(
        corpus, **IMAGES, epochs=12, save_epochs=[0, 3, 12], out=tmp_path / "whole"
    )
    run_training(settings, [0, 1], progress=False)
    out, kills = tmp_path / "killed", 0
    rng = np.random.default_rng(0)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, corpus, str(out)], stderr=subprocess.PIPE
        )
        state = _wait_for_state(out, process)
        time.sleep(rng.uniform(0, 0.35))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += state is not None and process.returncode == -signal.SIGKILL
    assert kills >= 1, "no run was killed while it trained"
    resumed = replace(settings, out=str(out))
    run_training(resumed, [0, 1], progress=False)
    assert tree(out) == tree(tmp_path / "whole")


def _wait_for_state(out, process):
    """Wait until the run saves a state that it did not have before."""
    before = {p: p.stat().st_mtime_ns for p in out.rglob("state.pt")}
    for _ in range(3000):
        for path in out.rglob("state.pt"):
            try:
                if path.stat().st_mtime_ns != before.get(path):
                    return path
            except FileNotFoundError:
                continue
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read().decode()
            return None
        time.sleep(0.01)
    raise AssertionError("the run saved no state in 30 s")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_ray_gives_the_same_bytes(corpus, tmp_path):
    train(corpus, **QUICK | {"seeds": 3}, out=tmp_path / "local")
    train(corpus, **QUICK | {"seeds": 3}, out=tmp_path / "ray", engine="ray")
    assert tree(tmp_path / "local") == tree(tmp_path / "ray")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_error_on_ray_arrives_as_it_is(corpus, tmp_path):
    with pytest.raises(ValueError, match="training diverged at step") as raised:
        train(
            corpus, **QUICK | {"lr": 1e30, "optimizer": "sgd"}, out=tmp_path / "ray", engine="ray"
        )
    assert "Traceback" not in str(raised.value)
    with pytest.raises(ValueError, match="a training asks for 3 GPUs, but the cluster has 0"):
        train(corpus, **QUICK, out=tmp_path / "gpu", engine="ray", num_gpus=3)


# Selections and weights


def test_a_subset_trains_for_as_many_steps_as_the_corpus(corpus, tmp_path):
    half = manifest(corpus, tmp_path / "half", range(0, TRAIN_ROWS, 2))
    whole = train(corpus, **QUICK, out=tmp_path / "whole")
    equal = train(corpus, **QUICK, manifest=half, out=tmp_path / "equal")
    fewer = train(corpus, **QUICK, manifest=half, match="epochs", out=tmp_path / "fewer")
    assert equal[-1].step == whole[-1].step and equal[-1].rows_seen == whole[-1].rows_seen
    assert fewer[-1].rows_seen == whole[-1].rows_seen / 2
    seen = read_records(tmp_path / "equal/records.parquet", 1, 0, 100)[0]["seen"]
    assert seen.tolist() == [4, 0] * 50  # two epochs of the corpus are four of its half
    seen = read_records(tmp_path / "fewer/records.parquet", 1, 0, 100)[0]["seen"]
    assert seen.tolist() == [2, 0] * 50


def test_repeated_rows_are_seen_as_often_as_their_weight_says(corpus, tmp_path):
    counts = np.tile([1, 2, 3], 20)
    path = manifest(corpus, tmp_path / "m", range(60), counts.astype(float), "repeat")
    train(corpus, **QUICK, manifest=path, match="epochs", out=tmp_path / "run")
    seen = read_records(tmp_path / "run/records.parquet", 0, 0, 60)[0]["seen"]
    assert seen.tolist() == (2 * counts).tolist()


def test_sampled_rows_are_seen_in_proportion_to_their_rate(corpus, tmp_path):
    rates = np.tile([0.5, 1.5], 50)
    path = manifest(corpus, tmp_path / "m", range(100), rates, "sampling")
    train(corpus, **QUICK | {"epochs": 40}, manifest=path, match="epochs", out=tmp_path / "run")
    seen = read_records(tmp_path / "run/records.parquet", 0, 0, 100)[0]["seen"]
    assert seen.sum() == 4000
    # Binomial(4000, 3/4): s.d. 27
    assert abs(seen[1::2].sum() - 3000) < 5 * 27


def test_loss_weights_reach_the_gradient(corpus, tmp_path):
    even = manifest(corpus, tmp_path / "even", range(60), np.ones(60), "loss")
    none = manifest(corpus, tmp_path / "none", range(60))
    odd = manifest(corpus, tmp_path / "odd", range(60), np.tile([0.5, 1.5], 30), "loss")
    digests = {
        Path(m).name: train(corpus, **QUICK, manifest=m, out=tmp_path / f"run-{Path(m).name}")[-1]
        for m in (even, none, odd)
    }
    weights = {name: load_model(c).state_dict()["1.weight"] for name, c in digests.items()}
    assert torch.equal(weights["even"], weights["none"])
    assert not torch.allclose(weights["odd"], weights["none"], atol=1e-3)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any), st.integers(0, 999))
def test_an_integer_weight_is_a_row_repeated(counts, seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 4).double()
    x, y = torch.randn(len(counts), 3).double(), torch.randint(0, 4, (len(counts),))
    each = torch.tensor(counts)
    weights = each / each.double().mean()  # mean 1

    def gradient(inputs, targets, weights):
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), targets, reduction="none")
        batch = Batch({}, targets, len(targets), weights=weights)
        batch_loss(Outputs(loss, targets), batch, "mean").backward()
        return model.weight.grad.clone()

    repeated = gradient(x.repeat_interleave(each, 0), y.repeat_interleave(each), None)
    assert torch.allclose(gradient(x, y, weights), repeated, atol=1e-12)


@given(st.integers(1, 4), st.integers(0, 999), st.booleans(), st.booleans())
def test_language_weights_follow_the_formula(rows, seed, is_sum, is_weighted):
    """sum_d w_d sum_t l_dt / sum_d w_d n_d, for documents of any number of windows."""
    rng = np.random.default_rng(seed)
    row_ids = np.repeat(np.arange(rows), rng.integers(1, 3, rows))
    targets = np.where(rng.random((len(row_ids), 5)) < 0.6, 1, IGNORE)
    targets[:, 0] = 1
    token = rng.random(targets.shape) * (targets != IGNORE)
    counts = np.bincount(row_ids, (targets != IGNORE).sum(1), rows)
    sums = np.bincount(row_ids, token.sum(1), rows)
    w = rng.random(rows) + 0.1 if is_weighted else np.ones(rows)
    outputs = Outputs(
        torch.tensor(sums if is_sum else sums / counts, dtype=torch.float32),
        torch.tensor(targets),
        row_ids=torch.tensor(row_ids),
    )
    weights = torch.tensor(w, dtype=torch.float32) if is_weighted else None
    batch = Batch({}, outputs.targets, rows, outputs.row_ids, weights)
    found = batch_loss(outputs, batch, "sum" if is_sum else "mean")
    assert float(found) == pytest.approx((w * sums).sum() / (w * counts).sum(), rel=1e-5)


def test_records_are_what_the_logits_said(corpus, tmp_path):
    """Train with a full batch: every forward pass can be repeated from checkpoints by hand."""
    settings = {"epochs": 6, "batch_size": TRAIN_ROWS, "save_epochs": range(7), "seeds": 1}
    saved = train(corpus, **IMAGES, **settings, progress=False, out=tmp_path / "run")
    digits = load_digits()
    images = torch.tensor(digits.data[:TRAIN_ROWS] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.tensor(digits.target[:TRAIN_ROWS])
    margins = []
    for checkpoint in saved[:-1]:  # each step's forward pass sees the weights before it
        with torch.no_grad():
            logits = load_model(checkpoint)(images)
        mine = logits.gather(1, labels[:, None]).squeeze(1)
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        margins.append((mine - others).numpy())
    right = np.array(margins) > 0
    forgot = (right[:-1] & ~right[1:]).sum(0)
    never = ~right.any(0)
    found = read_records(tmp_path / "run/records.parquet", 0, 0, 200)[0]
    np.testing.assert_allclose(found["aum"], np.mean(margins, 0)[:200], rtol=1e-4, atol=1e-5)
    assert found["never_learned"].tolist() == never[:200].tolist()
    assert found["forgetting"].tolist() == np.where(never, 6, forgot)[:200].tolist()
    assert never.any() and forgot.any()


# Language


@pytest.fixture
def documents(tmp_path):
    texts = [f"{i} " + "the cat sat on the mat. " * (i % 5 + 1) for i in range(40)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "text.parquet")
    return str(tmp_path / "text.parquet")


GPT = {
    "model": "gpt",
    "task": "causal_lm",
    "task_options": {"context": 32},
    "model_options": {"layers": 1, "heads": 2, "dim": 16},
    "progress": False,
}


def test_documents_are_learned_and_recorded(documents, tmp_path):
    saved = train(
        documents, **GPT, seeds=1, epochs=4, save_epochs=[0, 4], lr=1e-2, out=tmp_path / "run"
    )
    assert len(saved) == 2
    found = read_records(tmp_path / "run/records.parquet", 0, 0, 40)[0]
    assert (found["seen"] == 4).all()
    assert ((found["forgetting"] >= 0) & (found["forgetting"] <= 4)).all()
    assert (found["forgetting"] % 1 != 0).any(), "a document's value is a mean over its tokens"
    assert (found["last_loss"] < np.log(256) - 1).all()


def test_packed_documents_train_without_records(documents, tmp_path):
    train(documents, **GPT, seeds=1, epochs=2, pack=True, out=tmp_path / "run")
    assert not (tmp_path / "run/records.parquet").exists()
    train(documents, **GPT, seeds=1, epochs=2, pack=True, out=tmp_path / "again")
    assert tree(tmp_path / "run") == tree(tmp_path / "again")


# Bad rows and bad input


def test_bad_rows_are_left_out_and_counted(tmp_path, caplog):
    labels = load_digits().target[:120].tolist()
    labels[17], labels[90] = None, None
    path = write_digits(tmp_path / "c.parquet", range(120), pa.array(labels))
    train(path, **QUICK, out=tmp_path / "run")
    seen = read_records(tmp_path / "run/records.parquet", 0, 0, 120)[0]["seen"]
    assert np.flatnonzero(seen == 0).tolist() == [17, 90]
    assert (np.delete(seen, [17, 90]) == 2).all()
    assert "2 rows were left out of training; the first: row 17 of shard 0" in caplog.text


def test_of_many_bad_rows_a_few_are_named_and_all_counted(tmp_path, caplog):
    labels = load_digits().target[:120].tolist()
    labels[10:100:10] = [None] * 9
    path = write_digits(tmp_path / "c.parquet", range(120), pa.array(labels))
    with caplog.at_level("INFO", logger="curate"):
        train(path, **QUICK, out=tmp_path / "run")
    named = [r.getMessage() for r in caplog.records if "is left out: " in r.getMessage()]
    assert [m.split(" of ")[0] for m in named] == [f"row {i}" for i in (10, 20, 30, 40, 50)]
    assert caplog.text.count("more rows are left out; -v names them all") == 1
    assert "9 rows were left out of training; the first: row 10 of shard 0" in caplog.text


def test_bad_rows_found_in_a_stream_are_the_same(tmp_path, monkeypatch):
    labels = load_digits().target[:120].tolist()
    labels[17] = None
    path = write_digits(tmp_path / "c.parquet", range(120), pa.array(labels))
    train(path, **QUICK, out=tmp_path / "held")
    monkeypatch.setattr(encoded_rows, "HELD_BYTES", 0)
    train(path, **QUICK, out=tmp_path / "streamed")
    assert tree(tmp_path / "held") == tree(tmp_path / "streamed")


def test_divergence_names_step_and_row(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"diverged at step \d+: the loss of row \d+ of shard \d"):
        train(corpus, **QUICK, lr=1e30, optimizer="sgd", out=tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 0}, "epochs must be above 0"),
        ({"steps": -3}, "steps must be above 0"),
        ({"batch_size": 0}, "batch_size must be above 0"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; choose one of: adamw, sgd"),
        ({"schedule": "linear"}, "unknown schedule 'linear'"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
        ({"match": "tokens"}, "unknown match 'tokens'"),
        ({"engine": "spark"}, "unknown engine 'spark'"),
        ({"save_epochs": [3]}, "checkpoint at epoch 3: this training runs from epoch 0 to epoch 2"),
        ({"save_steps": [10**6]}, "checkpoint at step 1000000"),
        ({"seeds": 0}, "seeds must be"),
        ({"seeds": [1, 1]}, "seeds must be"),
        ({"warmup": 1.0}, "warmup is a fraction"),
        ({"pack": True}, "only documents"),
        ({"out": "memory://x"}, "local or mounted folder"),
        ({"model": "mlpp"}, "unknown model 'mlpp'"),
        ({"model": "gpt"}, "gpt"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(corpus, tmp_path, change, said):
    with pytest.raises(ValueError, match=said) as raised:
        train(corpus, **QUICK | {"out": tmp_path / "run"} | change)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused_and_shown(corpus, tmp_path):
    out = tmp_path / "run"
    train(corpus, **QUICK, out=out)
    with pytest.raises(ValueError, match=r"another configuration \(lr: 0.003 -> 0.1\)"):
        train(corpus, **QUICK, lr=0.1, out=out)
    train(corpus, **QUICK, lr=0.1, overwrite=True, out=out)
    train(corpus, **QUICK, lr=0.1, out=tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_folder_of_something_else_is_left_alone(corpus, tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds something else"):
            train(corpus, **QUICK, overwrite=overwrite, out=tmp_path)
    assert (tmp_path / "letters.txt").read_text() == "dear"


def test_a_manifest_of_another_corpus_is_refused(corpus, tmp_path):
    other = write_digits(tmp_path / "other.parquet", range(90))
    path = manifest(corpus, tmp_path / "m", range(30))
    with pytest.raises(ValueError, match=r"the data of .* is not usable"):
        train(other, **QUICK, manifest=path, out=tmp_path / "run")


def test_an_empty_selection_is_refused(corpus, tmp_path):
    path = manifest(corpus, tmp_path / "m", [])
    assert len(Manifest.read(path)) == 0
    with pytest.raises(ValueError, match="no rows to train on"):
        train(corpus, **QUICK, manifest=path, out=tmp_path / "run")


def test_random_state_and_threads_are_given_back():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with reproducible(2, "cpu"):
        assert torch.get_num_threads() == 2
        seed_all(1, "x")
        first = torch.rand(3)
        seed_all(1, "x")
        assert torch.equal(torch.rand(3), first)
    assert torch.get_num_threads() == 1
    assert torch.equal(torch.rand(1), expected)


def test_threads_come_from_the_environment(corpus, tmp_path, monkeypatch):
    assert settings_for(corpus, **IMAGES, out=tmp_path).threads == 1
    monkeypatch.setenv("CURATE_THREADS", "2")
    assert settings_for(corpus, **IMAGES, out=tmp_path).threads == 2
    monkeypatch.setenv("CURATE_THREADS", "many")
    with pytest.raises(ValueError, match="CURATE_THREADS"):
        settings_for(corpus, **IMAGES, out=tmp_path)


def test_the_configuration_is_written_first(corpus, tmp_path):
    train(corpus, **QUICK, out=tmp_path / "run")
    written = json.loads((tmp_path / "run/train.json").read_text())
    assert written["format"] == "curate.training"
    assert written["corpus"] == {"digest": open_corpus(corpus).digest, "rows": TRAIN_ROWS}
    assert os.path.basename(str(tmp_path)) not in json.dumps(written), "it may be moved"
