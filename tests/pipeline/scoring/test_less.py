"""LESS from the command line: a LoRA warm-up by the Hugging Face Trainer, scored by brute force."""

import json
import logging
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

from curate import cli
from curate.pipeline.models.checkpoint import find_checkpoints, load_model
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.reporting.verify import verify
from curate.pipeline.scoring import signal_pass, target_gradients
from curate.pipeline.scoring.adam_targets import AdamTargets
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_setup import Request, set_up
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.scoring.signal_pass import SignalPass
from curate.pipeline.training.train import train
from curate.scorers.parts import Full, Gradient
from curate.scorers.readouts import Projection, TwoSidedSketch

peft = pytest.importorskip("peft")

VOCABULARY, CONTEXT, RANK = 30, 12, 2
ROWS, TARGET_ROWS, PARTS = 13, 8, ("x", "y", "z")
# float32 forward and backward passes of two layers; a cosine has no scale of its own to lose.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
LESS = "grad_similarity(mode=less)"
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Warmup:
    """A run's folder, and by step what the optimizer held, by identity of its parameters."""

    root: Path
    kept: dict[int, dict[str, Any]]


def documents(rows: int, seed: int) -> pa.Table:
    """Return documents of 2 to 30 tokens: padding in a batch, and windows of a document."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, VOCABULARY, n).tolist() for n in rng.integers(2, 30, rows)]
    parts = [PARTS[i % 3] for i in range(rows)]
    return pa.table({"tokens": pa.array(ids, pa.list_(pa.int32())), "part": parts})


@pytest.fixture(scope="module")
def warmup(tmp_path_factory: pytest.TempPathFactory) -> Warmup:
    root = tmp_path_factory.mktemp("less")
    for name, rows, seed in (("corpus", ROWS, 0), ("target", TARGET_ROWS, 1)):
        (root / name).mkdir()
        pq.write_table(documents(rows, seed), root / name / "a.parquet")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=8, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(root / "base")
    base = transformers.GPT2LMHeadModel.from_pretrained(root / "base")
    lora = peft.LoraConfig(
        r=RANK, task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj"], lora_dropout=0.1
    )
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(VOCABULARY, (8,), generator=draw) for _ in range(12)]
    kept: dict[int, dict[str, Any]] = {}

    class Keep(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            own = getattr(given["optimizer"], "optimizer", given["optimizer"])
            kept[state.global_step] = {
                n: {k: v.clone() for k, v in own.state[p].items()}
                for n, p in given["model"].named_parameters()
                if p in own.state
            }

    arguments = transformers.TrainingArguments(
        output_dir=str(root / "run"), max_steps=4, save_steps=2, per_device_train_batch_size=4,
        report_to=[], disable_tqdm=True, use_cpu=True, seed=0, logging_steps=1, learning_rate=3e-2,
    )  # fmt: skip
    transformers.Trainer(
        model=peft.get_peft_model(base, lora), args=arguments, callbacks=[Keep()],
        train_dataset=[{"input_ids": x, "labels": x} for x in ids],  # type: ignore[arg-type]
    ).train()  # fmt: skip
    assert sorted(kept) == [2, 4]
    return Warmup(root, kept)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def gradients(model: nn.Module, rows: pa.Table) -> list[Named]:
    """Return each document's gradients over the adapter: of its mean token loss, alone."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = []
    for ids in rows["tokens"].to_pylist():
        total, count = torch.zeros((), dtype=torch.float64), 0
        for start in range(0, len(ids) - 1, CONTEXT):
            targets = torch.tensor(ids[start + 1 : start + 1 + CONTEXT])
            window = torch.tensor(ids[start : start + len(targets)])
            logits = model(window[None]).logits[0]
            total = total + nn.functional.cross_entropy(logits, targets, reduction="sum")
            count += len(targets)
        grads = torch.autograd.grad(total / count, list(own.values()))
        found.append(dict(zip(own, grads, strict=True)))
    return found


def step(grads: Named, state: dict[str, Any], textbook: bool) -> Named:
    """Return Γ by the formulas of LESS's code, or of Kingma and Ba."""
    found = {}
    for name, g in grads.items():
        m = 0.9 * state[name]["exp_avg"].double() + 0.1 * g
        v = 0.999 * state[name]["exp_avg_sq"].double() + 0.001 * g * g
        if textbook:
            t = int(state[name]["step"]) + 1
            found[name] = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        else:
            found[name] = m / (v + 1e-8).sqrt()
    return found


def flat(parts: Named) -> Tensor:
    return torch.cat([parts[n].flatten() for n in sorted(parts)])


def brute_force(
    warmup: Warmup, *, textbook: bool = False, read: Any = None, exact_length: bool = False
) -> np.ndarray:
    """Return [N, M]: learning-rate weighted, averaged over the target rows of each group.

    `read` maps a row's named numbers to what is compared in their place, [numbers]. With
    `exact_length` the length is of the numbers themselves.
    """
    read = read or flat
    checkpoints = find_checkpoints(str(warmup.root / "run"))
    # Linear to 0 in 4 steps: each checkpoint counts by the mean rate of the 2 steps behind it.
    rates = np.array([(1 + 3 / 4) / 2, (2 / 4 + 1 / 4) / 2])
    total = np.zeros((ROWS, len(PARTS)))
    for checkpoint, weight in zip(checkpoints, rates / rates.sum(), strict=True):
        model = load_model(checkpoint).double()
        state = warmup.kept[checkpoint.step]
        steps = [step(g, state, textbook) for g in gradients(model, documents(ROWS, 0))]
        targets = gradients(model, documents(TARGET_ROWS, 1))

        def unit(parts: Named) -> Tensor:
            return read(parts) / (flat(parts) if exact_length else read(parts)).norm()

        mine = torch.stack([unit(s) for s in steps])
        theirs = torch.stack([unit(t) for t in targets])
        cosines = (mine @ theirs.T).numpy()
        for m in range(len(PARTS)):
            total[:, m] += weight * cosines[:, m::3].mean(1)
    return total


def columns(out: Path) -> dict[str, np.ndarray]:
    table = ScoreTable.open(out)
    whole = pa.Table.from_batches(list(table.scan()), table.schema)
    return {n: whole[n].to_numpy() for n in whole.column_names}


def scored(warmup: Warmup, out: Path, scorers: str, **changes: Any) -> dict[str, np.ndarray]:
    given: dict[str, Any] = {
        "corpus": str(warmup.root / "corpus"), "checkpoints": str(warmup.root / "run"),
        "task": "causal_lm", "target": str(warmup.root / "target"), "target_group": "part",
        "batch_rows": 4, "progress": False,
    }  # fmt: skip
    score(**{**given, **changes}, scorers=scorers, out=out)
    return columns(out)


def test_scores_equal_brute_force_in_float64(warmup: Warmup, tmp_path: Path) -> None:
    requests = (
        "less=grad_similarity(mode=less),mean=grad_similarity(mode=less,groups=mean),"
        "book=grad_similarity(mode=less,adam=textbook),tracin=grad_similarity,grand"
    )
    arguments = [
        "score", warmup.root / "corpus", "--checkpoints", warmup.root / "run",
        "--task", "causal_lm", "--target", warmup.root / "target", "--target-group", "part",
        "--scorer", requests, "--batch-rows", 5, "--unit-rows", 9, "-o", tmp_path / "s",
    ]  # fmt: skip
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    found, by_group = columns(tmp_path / "s"), brute_force(warmup)
    np.testing.assert_allclose(found["less"], by_group.max(1), **CLOSE)
    np.testing.assert_allclose(found["mean"], by_group.mean(1), **CLOSE)
    textbook = brute_force(warmup, textbook=True)
    np.testing.assert_allclose(found["book"], textbook.max(1), **CLOSE)
    assert np.abs(found["book"] - found["less"]).max() > 1e-3, "the variants differ here"
    told = verify(str(tmp_path / "s"))
    assert not told["problems"]
    assert sum("moments of" in c for c in told["checked"]) == 2
    assert sum("target/unit-" in c for c in told["checked"]) == 2


@pytest.mark.parametrize("how", ["one row at a time", "models in turn"])
def test_batches_and_what_is_held_change_nothing(
    how: str, warmup: Warmup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = scored(warmup, tmp_path / "a", LESS)["grad_similarity"]
    if how == "models in turn":
        monkeypatch.setattr(signal_pass, "RESIDENT_BYTES", 0)
        monkeypatch.setattr("curate.pipeline.scoring.adam_targets.MOST_BYTES", 0)
    rows = 1 if how == "one row at a time" else 4
    again = scored(warmup, tmp_path / "b", LESS, batch_rows=rows)
    np.testing.assert_allclose(again["grad_similarity"], plain, rtol=1e-5, atol=1e-6)


def test_the_target_is_let_go_where_it_takes_too_much(
    warmup: Warmup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(
        open_corpus(warmup.root / "corpus"), str(warmup.root / "run"), LESS, task="causal_lm",
        target=str(warmup.root / "target"), out=str(tmp_path / "s"),
    )  # fmt: skip
    work = set_up(request).work
    first = SignalPass(work)
    size = 4 * sum(p.numel() for p in first.model.parameters() if p.requires_grad)
    # One checkpoint's direction fits, two do not; their moments do.
    monkeypatch.setattr(target_gradients, "MOST_BYTES", size)
    held = AdamTargets(work, torch.device("cpu"), keeps=False)
    (comparison,) = held.at(0, first.engines[0]).values()
    direction = weakref.ref(next(iter(comparison.directions.values())))
    del comparison
    assert direction() is not None
    held.at(1, first.engines[1])
    assert direction() is None


def sketched(read: Projection | TwoSidedSketch) -> Any:
    """Return a map from a row's named numbers to their sketches, end to end, or their sum."""

    def of(parts: Named) -> Tensor:
        found = [
            read(Gradient(n, parts[n].shape, full=Full(parts[n][None])))[0] for n in sorted(parts)
        ]
        return torch.stack(found).sum(0) if isinstance(read, Projection) else torch.cat(found)

    return of


@pytest.mark.slow
def test_projections_are_compared_as_the_published_code_compares_them(
    warmup: Warmup, tmp_path: Path
) -> None:
    few_many = {"few": 64, "many": 4096}
    requests = [f"{n}=grad_similarity(mode=less,projection={k})" for n, k in few_many.items()]
    found = scored(warmup, tmp_path / "s", ",".join(requests))
    few = brute_force(warmup, read=sketched(Projection(0, 64)))
    np.testing.assert_allclose(found["few"], few.max(1), **CLOSE)
    # A projected cosine is off by about 1/√k: 4 of these at most, over 13 rows and their maxima.
    assert np.abs(found["many"] - brute_force(warmup).max(1)).max() < 4 / np.sqrt(4096)


def test_sketches_stand_for_gradients_that_take_too_much(
    warmup: Warmup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sketch = TwoSidedSketch(0, (3, 3))
    monkeypatch.setattr(target_gradients, "SKETCH", sketch)
    monkeypatch.setattr(target_gradients, "MOST_BYTES", 3000)  # sketches take 3 x 16 x 9 x 4 less
    found = scored(warmup, tmp_path / "s", LESS)
    expected = brute_force(warmup, read=sketched(sketch), exact_length=True)
    np.testing.assert_allclose(found["grad_similarity"], expected.max(1), **CLOSE)
    told = json.loads((tmp_path / "s" / "_SUCCESS.json").read_text())["notes"]["sketch_error"]
    assert len(told) == 2 and all(error > 0 for error in told.values())


@pytest.mark.slow
def test_moments_are_part_of_what_a_run_is(warmup: Warmup, tmp_path: Path) -> None:
    shutil.copytree(warmup.root / "run", tmp_path / "run")

    def identity(scorer: str) -> str:
        scored(warmup, tmp_path / "s", scorer, checkpoints=str(tmp_path / "run"), overwrite=True)
        told: str = json.loads((tmp_path / "s" / "_meta.json").read_text())["run"]
        return told

    before = identity(LESS), identity("grad_similarity")
    path = tmp_path / "run" / "checkpoint-4" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    state["state"][0]["exp_avg"] *= 2
    torch.save(state, path)
    after = identity(LESS), identity("grad_similarity")
    assert before[0] != after[0] and before[1] == after[1]


@pytest.mark.parametrize("lacks", ["optimizer.pt", "target", "params"])
def test_what_is_missing_is_one_sentence(lacks: str, warmup: Warmup, tmp_path: Path) -> None:
    shutil.copytree(warmup.root / "run", tmp_path / "run")
    if lacks == "optimizer.pt":
        (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").unlink()
    given = {"target": None, "target_group": None} if lacks == "target" else {}
    said = {
        "optimizer.pt": "checkpoint-2 has no Adam moments",
        "target": "name it by --target",
        "params": "matches no trainable parameter",
    }[lacks]
    scorer = "grad_similarity(mode=less,params=wte)" if lacks == "params" else LESS
    with pytest.raises(ValueError, match=said) as caught:
        scored(warmup, tmp_path / "s", scorer, checkpoints=str(tmp_path / "run"), **given)
    assert "\n" not in str(caught.value)


def test_own_training_saves_what_less_needs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, rows in (("corpus", 30), ("target", 9)):
        table = {"a": rng.normal(size=rows), "b": rng.normal(size=rows)}
        label = (np.array(table["a"]) > 0).astype(np.int64)
        pq.write_table(pa.table({**table, "label": label}), tmp_path / f"{name}.parquet")
    train(
        str(tmp_path / "corpus.parquet"), model="mlp", task="tabular_classification", seeds=2,
        steps=6, save_steps=[2, 6], batch_size=8, save_moments=True, progress=False,
        out=tmp_path / "run",
    )  # fmt: skip
    given: dict[str, Any] = {
        "corpus": str(tmp_path / "corpus.parquet"), "target": str(tmp_path / "target.parquet"),
        "checkpoints": str(tmp_path / "run"), "progress": False,
    }  # fmt: skip
    score(**given, scorers="g=grad_similarity(mode=less)", out=tmp_path / "s")
    found = columns(tmp_path / "s")
    assert np.isfinite(found["g"]).all() and (np.abs(found["g"]) <= 1).all()
    assert np.isfinite(found["g_std"]).all()
