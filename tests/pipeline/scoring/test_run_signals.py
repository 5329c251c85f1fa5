"""gsnr and angle_concentration of whole corpora: by plain autograd and plain models, row by row."""

import sys
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
from curate.pipeline.tasks.registry import make_task

ROWS, CONTEXT = 21, 8


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of token ids, some longer than the context, with prompts; two runs of a gpt."""
    root = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    kind = pa.list_(pa.int32())
    table = pa.table(
        {
            "tokens": pa.array(
                [rng.integers(0, 17, n).tolist() for n in rng.integers(2, 20, ROWS)], kind
            ),
            "asked": pa.array(
                [rng.integers(0, 17, n).tolist() for n in rng.integers(0, 12, ROWS)], kind
            ),
        }
    )
    (root / "data").mkdir()
    pq.write_table(table, root / "data" / "a.parquet")
    corpus = open_corpus(root / "data")
    task = make_task(
        "causal_lm", corpus, inputs="tokens", prompt="asked", context=CONTEXT, vocab_size=17
    )
    args = model_args(task, corpus) | {"layers": 2, "heads": 2, "dim": 8}
    for seed, step in ((0, 1), (0, 2), (0, 3), (1, 1), (1, 2)):
        torch.manual_seed(10 * seed + step)
        model = make_model("gpt", **args)
        for p in model.parameters():  # away from zero biases and unit scales
            nn.init.normal_(p, std=0.4)
        save_checkpoint(
            root / "checkpoints" / checkpoint_name(seed, step=step),
            model, spec="gpt", model_args=args, task=task.describe(), seed=seed, step=step, lr=0.1,
        )  # fmt: skip
    return root


def windows(job: Path) -> list[tuple[Tensor, int]]:
    """Return each row's tokens, prompt first, and how many of them are the prompt's."""
    table = pq.read_table(job / "data" / "a.parquet")
    return [
        (torch.tensor(asked + tokens), len(asked))
        for tokens, asked in zip(
            table["tokens"].to_pylist(), table["asked"].to_pylist(), strict=True
        )
    ]


def row_loss(model: nn.Module, tokens: Tensor, prompt: int) -> Tensor:
    """Return the mean loss of the row's own tokens, window by window."""
    losses = []
    for start in range(0, len(tokens) - 1, CONTEXT):
        inputs = tokens[start : start + CONTEXT][: len(tokens) - 1 - start]
        logits = model(input_ids=inputs[None])
        logits = getattr(logits, "logits", logits)[0]
        goals = tokens[start + 1 : start + 1 + len(inputs)]
        each = nn.functional.cross_entropy(logits, goals, reduction="none")
        place = torch.arange(start + 1, start + 1 + len(inputs))
        losses.append(each[place >= max(prompt, 1)])
    return torch.cat(losses).mean()


@pytest.fixture(scope="module")
def truth_of_gsnr(job: Path) -> np.ndarray:
    found = find_checkpoints(str(job / "checkpoints"))
    runs = []
    for seed in (0, 1):
        models = [load_model(c).double() for c in found if c.seed == seed]
        rows = []
        for tokens, prompt in windows(job):
            g = torch.stack(
                [
                    torch.cat(
                        [
                            v.flatten()
                            for v in torch.autograd.grad(
                                row_loss(m, tokens, prompt), list(m.parameters())
                            )
                        ]
                    )
                    for m in models
                ]
            )
            mean = g.mean(0)
            rows.append((mean.square().sum() / (g - mean).square().sum(1).mean()).item())
        runs.append(rows)
    return np.mean(runs, 0)


def column(folder: Path, name: str) -> np.ndarray:
    batches = ScoreTable.open(folder).scan([name])
    return np.array([v for batch in batches for v in batch.column(0).to_pylist()], float)


@pytest.mark.parametrize(
    "memory",
    ["resident", *(pytest.param(m, marks=pytest.mark.slow) for m in ("swapped", "cached"))],
)
def test_gsnr_is_that_of_plain_autograd(
    job: Path,
    truth_of_gsnr: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: str,
) -> None:
    if memory != "resident":
        monkeypatch.setattr(signal_pass, "RESIDENT_BYTES", 0)
        monkeypatch.setattr(score_unit, "STATE_BYTES", 40_000)  # a few rows' gradients
    if memory == "swapped":
        monkeypatch.setattr(signal_pass, "CACHED_BYTES", 0)
    score(
        job / "data", checkpoints=str(job / "checkpoints"), scorers="gsnr,loss", out=tmp_path / "s",
        batch_rows=3, unit_rows=8, progress=False,
    )  # fmt: skip
    # float32 passes of a two-layer transformer.
    np.testing.assert_allclose(column(tmp_path / "s", "gsnr"), truth_of_gsnr, rtol=2e-4)


def test_both_share_the_pass_of_the_others(job: Path, tmp_path: Path) -> None:
    """Beside el2n and grand: a forward and a backward for each batch and checkpoint, no more."""
    counts, found = {"forward": 0, "backward": 0}, []
    grad = torch.autograd.grad

    def counted(*arguments: Any, **kwargs: Any) -> Any:
        if "curate/scorers/passes" in sys._getframe(1).f_code.co_filename:
            counts["backward"] += 1
        return grad(*arguments, **kwargs)

    pass_ = signal_pass.Engine.__call__

    def called(self: Any, batch: Any) -> Any:
        counts["forward"] += 1
        return pass_(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counted)
        patch.setattr(signal_pass.Engine, "__call__", called)
        for scorers in ("el2n,grand", "el2n,grand,gsnr,angle_concentration"):
            counts.update(forward=0, backward=0)
            score(
                job / "data", checkpoints=str(job / "checkpoints"), scorers=scorers,
                out=tmp_path / f"{len(scorers)}", batch_rows=64, progress=False,
            )  # fmt: skip
            found.append(dict(counts))
    assert found[0] == found[1] and found[0]["forward"] > 0


def truth_of_angles(job: Path, weight: float) -> np.ndarray:
    model = load_model(find_checkpoints(str(job / "checkpoints"))[0])
    rows = []
    for tokens, prompt in windows(job):
        seen: list[Tensor] = []
        hook = model.get_submodule("blocks.1.widen").register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(args[0][0].detach())
        )
        for start in range(0, len(tokens) - 1, CONTEXT):
            model(input_ids=tokens[None, start : start + CONTEXT][:, : len(tokens) - 1 - start])
        hook.remove()
        h = nn.functional.normalize(torch.cat(seen).double(), dim=1)
        cosines = h @ h.T
        across = cosines[prompt:, :prompt].mean().item() if prompt else 0.0
        own = cosines[prompt:, prompt:]
        rows.append(own.mean().item() + weight * across if len(own) else np.nan)
    return np.array(rows)


@pytest.mark.parametrize("weight", [1, 4])
def test_angles_are_those_between_what_enters_the_last_mlp(
    job: Path, tmp_path: Path, weight: int
) -> None:
    first = job / "checkpoints" / "seed0-step000001"
    result = CliRunner().invoke(
        cli.app,
        ["score", str(job / "data"), "--checkpoints", str(first), "-o", str(tmp_path / "s"),
         "--scorer", f"angle_concentration(prompt_weight={weight})", "--batch-rows", "4"],
    )  # fmt: skip
    assert result.exit_code in (0, 3), result.output
    found, want = column(tmp_path / "s", "angle_concentration"), truth_of_angles(job, weight)
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_the_prompt_is_read_and_no_target(job: Path, tmp_path: Path) -> None:
    first = job / "checkpoints" / "seed0-step000001"
    score(job / "data", checkpoints=str(first), scorers="loss", out=tmp_path / "s", progress=False)
    model = load_model(find_checkpoints(str(first))[0])
    want = [row_loss(model, tokens, prompt).item() for tokens, prompt in windows(job)]
    np.testing.assert_allclose(column(tmp_path / "s", "loss"), want, rtol=1e-5)
    counted = column(tmp_path / "s", "tokens")
    own = [len(t) - max(p, 1) for t, p in windows(job)]
    assert counted.tolist() == own
