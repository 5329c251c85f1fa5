"""Scores against other checkpoints: values by brute force, passes counted, refusals, kills."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from curate import cli
from curate.pipeline.models.checkpoint import checkpoint_name, load_model, save_checkpoint
from curate.pipeline.models.models import make_model, model_args
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.scoring import reference_pass, score_unit
from curate.pipeline.scoring.score import ScorePlan, score
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.scoring.signal_pass import SignalPass
from curate.pipeline.tasks.registry import make_task, task_from_description

ROWS, CLASSES = 29, 3
MODELS = """
import torch
from torch import nn


class Scored(nn.Sequential):
    pass


class Other(nn.Sequential):
    pass


class Breaks(nn.Sequential):
    def forward(self, x):
        return super().forward(x).masked_fill(x[:, :1] > 1.5, float("nan"))


class Null(nn.Sequential):
    pass


def scored(num_classes, input_shape, **_):
    return Scored(nn.Linear(*input_shape, 5), nn.Tanh(), nn.Linear(5, num_classes))


def other(num_classes, input_shape, **_):
    return Other(nn.Linear(*input_shape, num_classes))


def breaks(num_classes, input_shape, **_):
    return Breaks(nn.Linear(*input_shape, num_classes))


def null(num_classes, input_shape, **_):
    return Null(nn.Linear(*input_shape, num_classes))
"""
# float32 forward passes of two small layers, against the same in float64.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def drawn(seed: int, rows: int, scale: float = 1.0) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "a": rng.normal(size=rows) * scale + scale,
            "b": rng.normal(size=rows),
            "word": np.where(np.arange(rows) % 2, "yes", "no"),
            "label": np.arange(rows) % CLASSES,
        }
    )


class Place:
    """A folder with two corpora, the second drawn otherwise, and checkpoints of its models."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "models.py").write_text(MODELS)
        (root / "corpus").mkdir()
        pq.write_table(drawn(0, 12), root / "corpus" / "a.parquet")
        pq.write_table(drawn(1, ROWS - 12), root / "corpus" / "b.parquet")
        pq.write_table(drawn(2, 40, scale=3.0), root / "other.parquet")

    def task(self, data: str = "corpus", inputs: str = "a,b") -> Any:
        corpus = open_corpus(str(self.root / data))
        return make_task(
            "tabular_classification", corpus, label="label", inputs=inputs, classes=[0, 1, 2]
        )

    def checkpoint(
        self, place: str, model: str = "scored", *, seed: int = 0, step: int = 1, draw: int = 0,
        task: Any = None, change: Callable[[nn.Module], object] | None = None, **more: Any,
    ) -> str:  # fmt: skip
        task = task or self.task()
        spec, args = f"{self.root / 'models.py'}:{model}", model_args(task)
        torch.manual_seed(1000 * draw + 10 * seed + step)
        made = make_model(spec, **args)
        for p in made.parameters():
            nn.init.normal_(p, std=0.7)
        if change is not None:
            with torch.no_grad():
                change(made)
        folder = self.root / place / checkpoint_name(seed, step=step)
        save_checkpoint(
            folder, made, spec=spec, model_args=args, task=task.describe(), seed=seed, step=step,
            lr=0.1, **more,
        )  # fmt: skip
        return str(folder)

    def score(self, scorers: str, out: str = "scores", **settings: Any) -> pa.Table:
        table = score(
            str(self.root / "corpus"),
            **{
                "checkpoints": str(self.root / "run"), "scorers": scorers, "progress": False,
                "out": str(self.root / out), "engine": "local", "batch_rows": 4, "unit_rows": 9,
                **settings,
            },
        )  # fmt: skip
        return whole(table)

    def losses(self, checkpoint: str, *, blank: bool = False) -> np.ndarray:
        """Return every row's loss in float64, each row alone, by the checkpoint's own task."""
        from curate.pipeline.models.checkpoint import read_checkpoint

        told = read_checkpoint(checkpoint)
        corpus = open_corpus(str(self.root / "corpus"))
        assert told.task is not None
        task, model = task_from_description(told.task, corpus), load_model(told).double()
        found = []
        for shard in range(len(corpus.shards)):
            for read in corpus.read(shard, batch_rows=1):
                batch = task.collate(task.encode(pa.Table.from_batches([read])))
                x = batch.inputs["features"].double()
                logits = model(torch.zeros_like(x) if blank else x)
                found.append(nn.functional.cross_entropy(logits, batch.targets).item())
        return np.array(found)


def whole(table: object) -> pa.Table:
    assert isinstance(table, ScoreTable)
    return pa.Table.from_batches(list(table.scan()), table.schema)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Two runs of two checkpoints, two references of another model, two of empty inputs."""
    made = Place(tmp_path)
    for seed in (0, 1):
        for step in (1, 2):
            made.checkpoint("run", seed=seed, step=step)
    for seed in (0, 1):
        made.checkpoint("hold", "other", seed=seed, task=made.task("other.parquet"), draw=1)
        made.checkpoint("null", "null", seed=seed, draw=2, null_input=True)
    return made


def runs(place: Place) -> np.ndarray:
    """Losses at the checkpoints, [seed, step, row]."""
    paths = [place.root / "run" / checkpoint_name(s, step=t) for s in (0, 1) for t in (1, 2)]
    return np.stack([place.losses(str(p)) for p in paths]).reshape(2, 2, ROWS)


# -- values


def test_scores_are_differences_of_mean_losses_each_read_by_its_own_task(place: Place) -> None:
    """The holdout model is another one, and standardises tables by its own corpus."""
    args = [
        "score", place.root / "corpus", "--checkpoints", place.root / "run",
        "--reference", place.root / "hold", "--reference", place.root / "null",
        "--scorer", "rho,pvi,loss_change,first=loss_change(since=first)",
        "--batch-rows", 4, "--unit-rows", 9, "--keep-checkpoints", "-o", place.root / "scores",
    ]  # fmt: skip
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    found = whole(ScoreTable.open(place.root / "scores"))
    model = runs(place)
    hold = np.mean([place.losses(str(p)) for p in sorted((place.root / "hold").iterdir())], 0)
    null = np.mean(
        [place.losses(str(p), blank=True) for p in sorted((place.root / "null").iterdir())], 0
    )
    by_seed = model.mean(1)
    for name, each in {
        "rho": by_seed - hold,
        "loss_change": hold - by_seed,
        "pvi": (null - by_seed) / math.log(2),
        "first": model[:, 0] - model[:, 1],
    }.items():
        np.testing.assert_allclose(found[name], each.mean(0), **CLOSE, err_msg=name)
        np.testing.assert_allclose(found[f"{name}_std"], each.std(0, ddof=1), **CLOSE)
    at = np.array(found["rho_by_checkpoint"].to_pylist()).T
    np.testing.assert_allclose(at, model.reshape(4, ROWS) - hold, **CLOSE)
    assert "first_by_checkpoint" not in found.column_names
    meta = json.loads((place.root / "scores" / "_meta.json").read_text())
    assert [r["null_input"] for r in meta["reference"]] == [False, False, True, True]
    assert all(r["digest"] in meta["config"]["reference"] for r in meta["reference"])
    assert meta["scorers"]["loss_change"]["params"] == {"since": "reference"}


def test_pvi_of_a_null_model_that_knows_the_prior_alone(place: Place) -> None:
    """f[∅] is then the classes' shares whatever its weights say of inputs, as there is none."""
    prior = torch.tensor([0.7, 0.2, 0.1])
    null = place.checkpoint(
        "prior", "null", null_input=True, change=lambda m: m[0].bias.copy_(prior.log())
    )
    found = place.score("pvi,loss", checkpoints=str(place.root / "run"), reference=null)
    labels = np.array(found["label"])
    want = -np.log2(prior.numpy()[labels]) - runs(place).mean((0, 1)) / math.log(2)
    np.testing.assert_allclose(found["pvi"], want, **CLOSE)


def test_a_model_has_nothing_to_reduce_against_itself(place: Place) -> None:
    one = str(place.root / "run" / checkpoint_name(0, step=1))
    found = place.score("rho,loss_change", checkpoints=one, reference=one)
    assert np.abs(found["rho"]).max() < 1e-6 and np.abs(found["loss_change"]).max() < 1e-6


def test_of_a_references_run_the_last_checkpoint_counts(place: Place) -> None:
    last = [str(place.root / "run" / checkpoint_name(s, step=2)) for s in (0, 1)]
    one = str(place.root / "run" / checkpoint_name(0, step=1))
    folder = place.score("rho", "folder", checkpoints=one, reference=str(place.root / "run"))
    named = place.score("rho", "named", checkpoints=one, reference=last)
    assert folder.equals(named)


def test_neither_batches_nor_swapped_models_change_scores(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "scorers": "rho,pvi", "reference": [str(place.root / "hold"), str(place.root / "null")]
    }  # fmt: skip
    want = place.score(**settings)
    for name, size in (("RESIDENT_BYTES", 0), ("CACHED_BYTES", 0)):
        monkeypatch.setattr(reference_pass, name, size)
        assert place.score(**settings, out=name).equals(want)
    other = place.score(**settings, out="other", batch_rows=13, unit_rows=100)
    for name in ("rho", "pvi"):
        np.testing.assert_allclose(other[name], want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("params", ["head", ""])
def test_select_weights_beside_a_target_equals_autograd(place: Place, params: str) -> None:
    expert = place.checkpoint("expert", draw=5)
    request = f"select_weights(params='{params}'),grad_similarity"
    found = place.score(
        request, reference=expert, target=str(place.root / "other.parquet"), keep_checkpoints=True
    )
    alone = place.score(f"select_weights(params='{params}')", "alone", reference=expert)
    np.testing.assert_allclose(found["select_weights"], alone["select_weights"], rtol=1e-5)
    at = np.array(found["select_weights_by_checkpoint"].to_pylist()).T
    paths = [place.root / "run" / checkpoint_name(s, step=t) for s in (0, 1) for t in (1, 2)]
    for k, path in enumerate(paths):
        np.testing.assert_allclose(at[k], cosines(place, str(path), expert, params), **CLOSE)
    np.testing.assert_allclose(found["select_weights"], at.mean(0), **CLOSE)


def cosines(place: Place, base: str, expert: str, params: str) -> np.ndarray:
    from curate.pipeline.models.checkpoint import read_checkpoint

    told = read_checkpoint(base)
    model, other = (load_model(read_checkpoint(p)).double() for p in (base, expert))
    assert told.task is not None
    corpus = open_corpus(str(place.root / "corpus"))
    task = task_from_description(told.task, corpus)
    names = [n for n, _ in model.named_parameters() if not params or n.startswith("2.")]
    own, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    delta = torch.cat([(own[n] - theirs[n]).detach().flatten() for n in names])
    found = []
    for shard in range(len(corpus.shards)):
        for read in corpus.read(shard, batch_rows=1):
            batch = task.collate(task.encode(pa.Table.from_batches([read])))
            logits = model(batch.inputs["features"].double())
            loss = nn.functional.cross_entropy(logits, batch.targets)
            grads = torch.autograd.grad(loss, [own[n] for n in names])
            g = torch.cat([x.flatten() for x in grads])
            found.append(torch.cosine_similarity(g, delta, 0).item())
    return np.array(found)


# -- passes


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count models run and gradients taken inside `SignalPass.__call__`, and its batches."""
    counts: Counter[str] = Counter()
    call, grad, inside = SignalPass.__call__, torch.autograd.grad, [False]

    def scoring(self: SignalPass, batches: Any, begin: Any) -> Any:
        counts["batches"] += len(batches)
        inside[0] = True
        try:
            return call(self, batches, begin)
        finally:
            inside[0] = False

    def taken(*args: Any, **kwargs: Any) -> Any:
        counts["grad"] += inside[0]
        return grad(*args, **kwargs)

    def ran(module: nn.Module, args: object, out: object) -> None:
        if type(module).__name__ in ("Scored", "Other", "Null"):
            counts[type(module).__name__] += inside[0]
            counts["null rows"] += (
                isinstance(out, Tensor)
                and inside[0]
                and (len(out) if type(module).__name__ == "Null" else 0)
            )

    handle = torch.nn.modules.module.register_module_forward_hook(ran)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(SignalPass, "__call__", scoring)
            patch.setattr(torch.autograd, "grad", taken)
            yield counts
    finally:
        handle.remove()


def test_a_reference_costs_one_forward_per_batch_and_a_null_model_one_row_per_label(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = [str(place.root / "hold"), str(place.root / "null")]
    with counted(monkeypatch) as counts:
        place.score("rho,pvi,loss_change,loss", reference=references)
    assert counts["batches"] >= ROWS / 4
    assert counts["Scored"] == 4 * counts["batches"]
    assert counts["Other"] == 2 * counts["batches"]
    assert counts["grad"] == 0
    assert counts["Null"] == counts["null rows"] <= 2 * CLASSES
    with counted(monkeypatch) as plain:
        place.score("grand,el2n", "plain")
    with counted(monkeypatch) as both:
        place.score("grand,el2n,rho", "both", reference=references[0])
    assert both["Other"] == 2 * both["batches"]
    assert (both["Scored"], both["grad"]) == (plain["Scored"], plain["grad"])


def test_the_plan_counts_references(place: Place) -> None:
    plan = score(
        str(place.root / "corpus"), checkpoints=str(place.root / "run"), scorers="rho",
        reference=str(place.root / "hold"), out=str(place.root / "scores"), dry_run=True,
    )  # fmt: skip
    assert isinstance(plan, ScorePlan)
    assert (plan.checkpoints, plan.references) == (4, 2) and plan.seconds >= 0
    assert not (place.root / "scores").exists()


# -- runs


def results(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_a_run_that_was_cut_short_ends_with_the_same_bytes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "scorers": "rho,pvi,select_weights", "reference": [place.checkpoint("expert", draw=5),
        str(place.root / "null")],
    }  # fmt: skip
    place.score(**settings, out="whole")
    store, calls = score_unit._Scoring._store, [0]

    def dies(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return store(*args)

    with monkeypatch.context() as patch:
        patch.setattr(score_unit._Scoring, "_store", dies)
        with pytest.raises(KeyboardInterrupt):
            place.score(**settings, out="cut")
    assert len(list((place.root / "cut").glob("part-*"))) == 2
    place.score(**settings, out="cut")
    assert results(place.root / "cut") == results(place.root / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_two_workers_on_ray_give_the_same_bytes(place: Place) -> None:
    references = [place.checkpoint("expert", draw=5), str(place.root / "null")]
    for out, more in (("local", {}), ("ray", {"engine": "ray", "workers": 2})):
        place.score("rho,pvi,select_weights", out, reference=references, **more)
    assert results(place.root / "ray") == results(place.root / "local")


def test_another_reference_is_another_run(place: Place) -> None:
    place.score("rho", reference=str(place.root / "hold"))
    with pytest.raises(ValueError, match=r"another configuration .*reference"):
        place.score("rho", reference=place.checkpoint("else", "other", draw=9))


def test_rows_that_a_reference_cannot_score_name_it(place: Place) -> None:
    breaks = place.checkpoint("breaks", "breaks", draw=3)
    words = place.checkpoint(
        "words", "other", task=only_yes(place), draw=4,
    )  # fmt: skip
    values = np.concatenate([np.array(drawn(s, n)["a"]) for s, n in ((0, 12), (1, ROWS - 12))])
    high = (values - values.mean()) / values.std() > 1.5
    assert 0 < high.sum() < 5
    found = place.score("rho,loss", reference=breaks)
    assert [e is not None for e in found["error"].to_pylist()] == high.tolist()
    assert f"the loss is nan at reference {breaks}" in found["error"].drop_null().to_pylist()
    assert found["rho"].null_count == high.sum()
    found = place.score("rho", "unread", reference=words, max_bad_rows=100)
    odd = np.array([e is None for e in found["error"].to_pylist()])
    assert odd.sum() == 14 and found["error"][0].as_py().startswith("reference seed0-step000001:")
    assert "'no', which the task does not know" in found["error"][0].as_py()


def only_yes(place: Place) -> Any:
    table = drawn(0, 12).filter(pa.array(np.arange(12) % 2 == 1))
    pq.write_table(table, place.root / "yes.parquet")
    return place.task("yes.parquet", inputs="a,b,word")


# -- refusals


def test_what_does_not_fit_is_refused_in_one_sentence(place: Place) -> None:
    hold, null = str(place.root / "hold"), str(place.root / "null")
    run = str(place.root / "run")
    wrong: Any = place.task()
    wrong.labels = type(wrong.labels)((2, 1, 0), wrong.labels.by_index)
    swapped = place.checkpoint("swapped", "other", task=wrong)
    for scorers, settings, message in (
        ("rho", {}, "rho compares with another model: name its checkpoint by --reference DIR"),
        ("pvi", {}, "train one with `curate train --null-input`"),
        ("rho", {"reference": null}, "rho compares with a model that sees the rows, but the ref"),
        ("pvi", {"reference": hold}, "was not trained on them: train one with"),
        ("loss", {"reference": hold}, "none of the scorers compares with the reference"),
        ("pvi", {"reference": [null, hold]}, "none of the scorers compares with the reference"),
        ("rho", {"reference": [null, hold]}, "which none of the scorers asks for: add pvi"),
        ("loss_change(since=reference)", {}, "loss_change compares with another model"),
        ("loss", {"checkpoints": null}, "was trained on empty inputs and says nothing of rows"),
        ("rho", {"reference": swapped}, "knows other classes than the checkpoints"),
        ("rho", {"reference": "nowhere"}, "no checkpoint at nowhere"),
        ("select_weights", {"reference": hold}, "name one"),
        ("select_weights", {"reference": hold[:-4] + "hold/seed0-step000001"}, "cannot be comp"),
        (
            "select_weights",
            {"reference": run + "/seed0-step000001"},
            "is one of the checkpoints, and nothing leads from it to itself",
        ),
    ):
        with pytest.raises(ValueError) as error:
            place.score(scorers, "refused", **settings)
        assert message in str(error.value), scorers
        assert "\n" not in str(error.value)
        assert not (place.root / "refused" / "_SUCCESS.json").exists()


def test_an_expert_with_a_checkpoints_weights_is_refused_before_any_unit(place: Place) -> None:
    """A copy in another folder: seed 1's second checkpoint, which is not the first to be tried."""
    twin = place.checkpoint("twin", seed=1, step=2)
    with pytest.raises(ValueError, match="nothing leads from one to the other"):
        place.score("select_weights", reference=twin)
    assert not list((place.root / "scores").glob("part-*"))


def test_a_reference_trained_on_the_rows_themselves_is_told(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    seen = {"uri": "x", "digest": open_corpus(str(place.root / "corpus")).digest, "rows": ROWS}
    memory = place.checkpoint("memory", "other", corpus=seen)
    with caplog.at_level("WARNING", "curate.score"):
        place.score("rho", reference=memory)
    assert "was trained on rows of the corpus that is scored" in caplog.text


# -- language


def language(root: Path, name: str, tokenizer: str, context: int, draw: int) -> str:
    task = make_task(
        "causal_lm", open_corpus(str(root / "texts.parquet")), inputs="text",
        tokenizer=tokenizer, context=context,
    )  # fmt: skip
    args = model_args(task) | {"layers": 1, "heads": 2, "dim": 8}
    torch.manual_seed(draw)
    save_checkpoint(
        root / name / "seed0-step000001", make_model("gpt", **args), spec="gpt", model_args=args,
        task=task.describe(), seed=0, step=1, lr=0.1,
    )  # fmt: skip
    return str(root / name)


def test_language_models_are_compared_where_tokens_are_the_same(tmp_path: Path) -> None:
    """The reference may cut documents elsewhere; another tokenizer is refused."""
    from curate.pipeline.models.checkpoint import read_checkpoint

    texts = ["a rose is a rose", "to be or not to be, that is", "so it goes", "no", "x" * 40]
    pq.write_table(pa.table({"text": texts}), tmp_path / "texts.parquet")
    model = language(tmp_path, "model", "bytes", 8, 0)
    reference = language(tmp_path, "reference", "bytes", 12, 1)
    settings: dict[str, Any] = {"checkpoints": model, "progress": False}
    for row_loss in ("mean", "sum"):
        table = score(
            str(tmp_path / "texts.parquet"), scorers="rho,loss", reference=reference,
            out=str(tmp_path / row_loss), task_options={"row_loss": row_loss}, **settings,
        )  # fmt: skip
        corpus = open_corpus(str(tmp_path / "texts.parquet"))
        each = []
        for folder in (model, reference):
            told = read_checkpoint(folder + "/seed0-step000001")
            assert told.task is not None
            task = task_from_description({**told.task, "row_loss": row_loss}, corpus)
            batch = task.collate(task.encode(pa.table({"text": texts})))
            each.append(task.outputs(load_model(told), batch).loss.detach().numpy())
        np.testing.assert_allclose(whole(table)["rho"], each[0] - each[1], rtol=1e-4, atol=1e-5)
    folder = wordpieces(tmp_path)
    other = language(tmp_path, "other", folder, 8, 2)
    with pytest.raises(ValueError, match="another tokenizer than the checkpoints"):
        score(
            str(tmp_path / "texts.parquet"), scorers="rho", reference=other,
            out=str(tmp_path / "refused"), **settings,
        )  # fmt: skip


def answering(root: Path, name: str, *, draw: int, model: bool = True, **options: Any) -> str:
    """Return the folder of an untrained causal model, `model`: of a plain run, not a null one."""
    corpus = open_corpus(str(root / "asked.parquet"))
    task = make_task("causal_lm", corpus, **{"inputs": "answer", "vocab_size": 23, **options})
    args = model_args(task) | {"layers": 1, "heads": 2, "dim": 8}
    torch.manual_seed(draw)
    save_checkpoint(
        root / name / "seed0-step000001", make_model("gpt", **args), spec="gpt", model_args=args,
        task=task.describe(), seed=0, step=1, lr=0.1, null_input=not model,
    )  # fmt: skip
    return str(root / name)


def asked(root: Path) -> list[tuple[list[int], list[int]]]:
    """Write a corpus of prompts and answers in token ids, and return it."""
    rng = np.random.default_rng(3)
    lengths = [(3, 5), (1, 1), (9, 2), (2, 17), (4, 4), (12, 1), (0, 6)]
    rows = [(rng.integers(1, 23, q).tolist(), rng.integers(1, 23, a).tolist()) for q, a in lengths]
    columns = {"question": [q for q, _ in rows], "answer": [a for _, a in rows]}
    tokens = pa.list_(pa.int32())
    pq.write_table(
        pa.table({k: pa.array(v, tokens) for k, v in columns.items()}), root / "asked.parquet"
    )
    return rows


@pytest.mark.parametrize("row_loss", ["mean", "sum"])
def test_pvi_of_answers_blanks_the_prompt(tmp_path: Path, row_loss: str) -> None:
    """log p(answer | question) at the checkpoint less log p(answer | token 0) at the null model;
    documents are taken token by token, and a model sees no more than its context."""
    from curate.pipeline.models.checkpoint import read_checkpoint

    rows = asked(tmp_path)
    model = answering(tmp_path, "model", draw=0, prompt="question", context=32)
    null = answering(tmp_path, "null", draw=1, prompt="question", context=8, model=False)

    def bits(folder: str, before: list[int], answer: list[int], size: int, skip: int) -> float:
        told = read_checkpoint(folder + "/seed0-step000001")
        net, total = load_model(told).double(), 0.0
        tokens = before + answer
        for at in range(len(before) + skip, len(tokens)):
            window = tokens[(at - 1) // size * size : at]  # predicted by place at - 1
            with torch.no_grad():
                logits = net(torch.tensor([window]))[0, -1]
            total -= logits.log_softmax(0)[tokens[at]].item() / math.log(2)
        return total / (len(answer) - skip if row_loss == "mean" else 1)

    want = [
        bits(null, [0], a, 8, not q) - bits(model, q, a, 32, not q) for q, a in rows
    ]  # where the prompt is empty, nothing predicts the answer's first token
    for batch_rows in (1, 5):
        table = score(
            str(tmp_path / "asked.parquet"), scorers="pvi", reference=null, checkpoints=model,
            batch_rows=batch_rows, task_options={"row_loss": row_loss}, progress=False,
            out=str(tmp_path / f"scores{batch_rows}"),
        )  # fmt: skip
        np.testing.assert_allclose(whole(table)["pvi"], want, rtol=1e-4, atol=1e-4)


def test_references_of_other_target_tokens_are_refused(tmp_path: Path) -> None:
    asked(tmp_path)
    model = answering(tmp_path, "model", draw=0, prompt="question")
    options: dict[str, Any]
    for name, options, message in (
        ("plain", {}, "the prompt None, the checkpoints with 'question'"),
        ("other", {"inputs": "question", "prompt": "answer"}, "the document 'question', the"),
    ):
        reference = answering(tmp_path, name, draw=1, **options)
        with pytest.raises(ValueError, match=message):
            score(
                str(tmp_path / "asked.parquet"), scorers="rho", reference=reference,
                checkpoints=model, progress=False, out=str(tmp_path / "refused"),
            )  # fmt: skip


def wordpieces(root: Path) -> str:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(["a rose is a rose"], vocab_size=60, show_progress=False)
    (root / "pieces").mkdir()
    trained.save_model(str(root / "pieces"))
    BertTokenizerFast(vocab=str(root / "pieces" / "vocab.txt")).save_pretrained(root / "pieces")
    return str(root / "pieces")
