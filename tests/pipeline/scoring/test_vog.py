"""VoG of whole corpora: values against autograd row by row, and what it costs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from curate import cli
from curate.pipeline.models.checkpoint import (
    checkpoint_name,
    find_checkpoints,
    load_model,
    save_checkpoint,
)
from curate.pipeline.models.models import make_model, model_args
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.scoring import score_unit, signal_pass
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.tasks.registry import make_task, task_from_description
from curate.scorers.engine import Engine
from curate.scorers.protocol import IGNORE

MODELS = '''
import torch
from torch import nn


class Text(nn.Module):
    """A class per text: a mean over real tokens between two layers."""

    def __init__(self, vocab_size, num_classes):
        super().__init__()
        self.table, self.inner = nn.Embedding(vocab_size, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, input_ids, attention_mask):
        h = self.inner(self.table(input_ids)).tanh() * attention_mask[..., None]
        return self.head(h.sum(1) / attention_mask.sum(1, keepdim=True))


class Language(nn.Module):
    """Each token sees those before it. Scaled logits are no output of a linear layer."""

    def __init__(self, vocab_size, scale, bias=True):
        super().__init__()
        self.table, self.inner = nn.Embedding(vocab_size, 6), nn.Linear(6, 5)
        self.head, self.scale = nn.Linear(5, vocab_size, bias=bias), scale

    def forward(self, input_ids):
        logits = self.head(self.inner(self.table(input_ids).cumsum(1)).tanh())
        return logits if self.scale == 1 else logits * self.scale


def image(num_classes, input_shape, **_):
    c, h, w = input_shape
    return nn.Sequential(
        nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(4 * h * w, num_classes),
    )


def table(num_classes, input_shape, **_):
    return nn.Sequential(nn.Linear(*input_shape, 8), nn.Tanh(), nn.Linear(8, num_classes))


def text(num_classes, vocab_size, **_):
    return Text(vocab_size, num_classes)


def fused(vocab_size, **_):
    return Language(vocab_size, 1)


def scaled(vocab_size, **_):
    return Language(vocab_size, 0.5, bias=False)
'''
VARIANTS = "vog,vog_var=vog(variant=var),vog_printed=vog(variant=printed)"
KINDS = ("image", "table", "text", "fused", "scaled")
ROWS = 23
# float32 forward and backward of shallow models, and moments in float32.
CLOSE = {"rtol": 2e-5, "atol": 1e-8}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _rows(kind: str) -> tuple[str, pa.Table, dict[str, Any]]:
    rng = np.random.default_rng(0)
    label = pa.array(rng.integers(0, 3, ROWS))
    if kind == "image":
        pixels = rng.integers(0, 256, (ROWS, 5, 4, 3), dtype=np.uint8).tolist()
        column = pa.array(pixels, pa.list_(pa.list_(pa.list_(pa.uint8(), 3), 4), 5))
        return "image_classification", pa.table({"image": column, "label": label}), {}
    if kind == "table":
        columns = {"a": rng.normal(size=ROWS), "b": rng.normal(size=ROWS)}
        columns["c"] = rng.choice(["x", "y"], ROWS).tolist()
        return "tabular_classification", pa.table({**columns, "label": label}), {}
    if kind == "text":
        words = ["ab" * n for n in rng.integers(1, 9, ROWS)]
        table = pa.table({"text": words, "label": label})
        return "text_classification", table, {"tokenizer": "bytes"}
    # Of two to fourteen tokens, in windows of five.
    tokens = [rng.integers(0, 11, n).tolist() for n in rng.integers(2, 15, ROWS)]
    return "causal_lm", pa.table({"tokens": tokens}), {"context": 5}


Job = tuple[str, str]


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """A factory of corpora and checkpoints with random weights: `make_job("image", steps=(1,))`."""

    def make(kind: str, seeds: int = 1, steps: tuple[int, ...] = (1, 2, 4)) -> Job:
        name, rows, options = _rows(kind)
        corpus, checkpoints = tmp_path / f"{kind}", tmp_path / f"{kind}-checkpoints"
        corpus.mkdir()
        for shard, start in enumerate((0, 9)):
            pq.write_table(
                rows.slice(start, 9 if start == 0 else None), corpus / f"{shard}.parquet"
            )
        (tmp_path / "models.py").write_text(MODELS)
        opened, spec = open_corpus(str(corpus)), f"{tmp_path}/models.py:{kind}"
        task = make_task(name, opened, **options)
        arguments = model_args(task, opened)
        for seed in range(seeds):
            for step in steps:
                torch.manual_seed(100 * seed + step)
                model = make_model(spec, **arguments)
                save_checkpoint(
                    checkpoints / checkpoint_name(seed, step=step), model, spec=spec,
                    model_args=arguments, task=task.describe(), seed=seed, step=step, lr=0.1,
                )  # fmt: skip
        return str(corpus), str(checkpoints)

    return make


def run(job: Job, out: Path, scorers: str = VARIANTS, **settings: Any) -> dict[str, np.ndarray]:
    table = score(
        job[0], checkpoints=job[1], scorers=scorers, out=str(out), progress=False, **settings
    )
    assert isinstance(table, ScoreTable)
    return frame(table)


def frame(table: ScoreTable) -> dict[str, np.ndarray]:
    whole = pa.Table.from_batches(list(table.scan()), table.schema)
    return {n: whole.column(n).to_numpy(zero_copy_only=False) for n in whole.schema.names}


def truth(job: Job) -> dict[str, np.ndarray]:
    """Return the variants by autograd in float64, one sequence of one row at a time, [N]."""
    corpus, found = open_corpus(job[0]), find_checkpoints(job[1])
    task = task_from_description(found[0].task, corpus)
    rows = pa.Table.from_batches(
        [b for s in range(len(corpus.shards)) for b in corpus.read(s)], corpus.schema
    )
    encoded = task.encode(rows)
    models = [load_model(checkpoint).double().eval() for checkpoint in found]
    out: dict[str, list[float]] = {"vog": [], "vog_var": [], "vog_printed": []}
    for row in range(ROWS):
        batch = task.collate(encoded.slice(row, 1))
        at = torch.stack([_gradient(model, dict(batch.inputs), batch.targets) for model in models])
        squares = (at - at.mean(0)).square()
        out["vog"].append(squares.mean(0).sqrt().mean().item())
        out["vog_var"].append(squares.mean(0).mean().item())
        out["vog_printed"].append((squares.sum(0) / len(models) ** 0.5).mean().item())
    return {name: np.array(values) for name, values in out.items()}


def _gradient(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Return the gradient of the row's target logits at all its own coordinates, flat."""
    seen: list[Tensor] = []
    table = getattr(model, "table", None)
    if table is None:
        (name,) = inputs
        inputs[name] = inputs[name].double().requires_grad_()
        seen.append(inputs[name])
    else:
        table.register_forward_hook(lambda *a: seen.append(a[2]))
    logits = model(*inputs.values())
    pairs = zip(logits.reshape(-1, logits.shape[-1]), targets.flatten().tolist(), strict=True)
    logit = torch.stack([z[y] for z, y in pairs if y != IGNORE]).sum()
    (g,) = torch.autograd.grad(logit, seen[0])
    if table is not None:
        table._forward_hooks.clear()
    if g.dim() == 4:
        return g.mean(1).flatten()
    if g.dim() == 2:
        return g.flatten()
    real = inputs["attention_mask"] != 0 if "attention_mask" in inputs else targets != IGNORE
    return g[real].flatten()


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_autograd_row_by_row(
    kind: str, make_job: Callable[..., Job], tmp_path: Path
) -> None:
    job = make_job(kind)
    found = run(job, tmp_path / "s")
    for name, values in truth(job).items():
        assert values.min() > 1e-6, "an example that could go wrong"
        np.testing.assert_allclose(found[name], values, **CLOSE)


def test_from_the_command_line(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, checkpoints = job = make_job("image")
    command = ["curate", "score", corpus, "--checkpoints", checkpoints, "-o", str(tmp_path / "s")]
    monkeypatch.setattr(sys, "argv", [*command, "--scorer", "vog,var=vog(variant=var)"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
        raise SystemExit(0)
    assert not stop.value.code
    found, want = frame(ScoreTable.open(tmp_path / "s")), truth(job)
    np.testing.assert_allclose(found["vog"], want["vog"], **CLOSE)
    np.testing.assert_allclose(found["var"], want["vog_var"], **CLOSE)


@pytest.mark.parametrize("kind", ["image", "fused"])
def test_batches_units_and_swapped_weights_change_no_row(
    kind: str, make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(kind)
    usual = run(job, tmp_path / "a")
    for i, settings in enumerate(({"batch_rows": 1}, {"batch_rows": 5, "unit_rows": 7})):
        other = run(job, tmp_path / f"b{i}", **settings)
        for name in ("vog", "vog_var", "vog_printed"):
            np.testing.assert_allclose(other[name], usual[name], **CLOSE)
    monkeypatch.setattr(signal_pass, "RESIDENT_BYTES", 0)
    swapped = run(job, tmp_path / "c")
    monkeypatch.setattr(score_unit, "STATE_BYTES", 0)  # one batch at a time
    alone = run(job, tmp_path / "d", batch_rows=5)
    for name in ("vog", "vog_var", "vog_printed"):
        assert (swapped[name] == usual[name]).all()
        np.testing.assert_allclose(alone[name], usual[name], **CLOSE)


def test_seeds_are_runs_of_their_own(make_job: Callable[..., Job], tmp_path: Path) -> None:
    corpus, checkpoints = make_job("table", seeds=2)
    found = run((corpus, checkpoints), tmp_path / "s", keep_checkpoints=True)
    runs = []
    for seed in (0, 1):
        own = [c.path for c in find_checkpoints(checkpoints) if c.seed == seed]
        runs.append(run((corpus, own), tmp_path / f"s{seed}", "vog")["vog"].astype(float))  # type: ignore[arg-type]
    np.testing.assert_allclose(found["vog"], np.mean(runs, 0), rtol=1e-6)
    np.testing.assert_allclose(found["vog_std"], np.std(runs, 0, ddof=1), rtol=1e-5)
    assert "vog_by_checkpoint" not in found


def test_one_checkpoint_gives_0_and_a_warning(
    make_job: Callable[..., Job], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = run(make_job("table", steps=(3,)), tmp_path / "s", "vog")
    assert not found["vog"].any()
    assert "vog of one checkpoint is 0" in caplog.text


def test_recovery_gives_the_same_values(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the second checkpoint a row does not fit, neither among others nor alone."""
    job = make_job("image")
    usual = run(job, tmp_path / "a", "vog,grand", batch_rows=8)
    second = next(load_model(find_checkpoints(job[1])[1]).parameters())
    large = pq.read_table(f"{job[0]}/1.parquet")["image"][5].as_py()  # not of the probe's rows
    large = torch.tensor(large).permute(2, 0, 1) / 255
    call, tries = Engine.__call__, list[tuple[int, bool]]()

    def short(self: Engine, batch: Any) -> Any:
        (images,) = batch.inputs.values()
        is_second = torch.equal(next(self._core.passes.model.parameters()), second)
        if is_second and torch.isclose(images, large).flatten(1).all(1).any():
            tries.append((batch.rows, self.recompute))
            if not self.recompute:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, batch)

    monkeypatch.setattr(Engine, "__call__", short)
    monkeypatch.setattr("curate.pipeline.scoring.signal_pass.gc.collect", lambda: 0)  # slow
    found = run(job, tmp_path / "b", "vog,grand", batch_rows=8)
    assert tries == [(8, False), (4, False), (2, False), (1, False), (1, True)]
    for name in ("vog", "grand"):
        np.testing.assert_allclose(found[name], usual[name], **CLOSE)


def test_a_row_that_raises_alone_leaves_the_others_as_they_were(
    make_points: Callable[..., str], points_checkpoints: Callable[..., str], tmp_path: Path
) -> None:
    checkpoints = points_checkpoints(steps=(1, 4, 9))
    usual = run((make_points([24]), checkpoints), tmp_path / "a", "vog", batch_rows=8)
    broken = make_points([24], labels={13: 7}, name="broken")
    found = run((broken, checkpoints), tmp_path / "b", "vog", batch_rows=8)
    others = np.arange(24) != 13
    assert found["error"][13] is not None and np.isnan(found["vog"][13])
    np.testing.assert_allclose(found["vog"][others], usual["vog"][others], **CLOSE)


@pytest.mark.parametrize("kind", ["image", "fused"])
def test_all_scorers_together_cost_one_pass(
    kind: str, make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per batch and checkpoint one forward, one backward of the loss and one of the logit.

    The target's own gradients, taken once per run, are not among them.
    """
    job = make_job(kind)
    counts: dict[str, int] = {"batches": 0, "forward": 0, "backward": 0}
    call, backward, is_counting = Engine.__call__, torch.autograd.grad, [False]

    def counted(self: Engine, batch: Any) -> Any:
        core = self._core  # the probe's own passes are not counted
        core.ready(batch)
        counts["batches"] += 1
        is_counting[0] = True
        handle = core.passes.model.register_forward_hook(
            lambda *_: counts.__setitem__("forward", counts["forward"] + 1)
        )
        try:
            return call(self, batch)
        finally:
            handle.remove()
            is_counting[0] = False

    def asked(*arguments: Any, **settings: Any) -> Any:
        counts["backward"] += is_counting[0]
        return backward(*arguments, **settings)

    monkeypatch.setattr(Engine, "__call__", counted)
    monkeypatch.setattr(torch.autograd, "grad", asked)
    scorers = "el2n,grand,self_influence,vog,v=vog(variant=var),grad_similarity"
    run(job, tmp_path / "s", scorers, batch_rows=8, target=job[0])
    # Three batches of 23 rows at each of three checkpoints; before them one row, to see whether
    # the outputs hold what is asked for: at the first checkpoint, then again by the worker.
    assert counts["batches"] == counts["forward"]
    assert counts["backward"] == 2 * counts["batches"]
    assert counts["batches"] == 3 * 3 + 2
