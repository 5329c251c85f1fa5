"""`curvature=adam` and `adam_root` by the command line, against v̂ followed step by step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
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
from curate.pipeline.models.moments import save_moments
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.reporting.verify import verify
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable

Make = Callable[..., str]
BETA2, EPS, RATES = 0.9, 1e-3, {2: 0.03, 5: 0.01}
# float32 passes against float64; damping keeps the division from enlarging it much.
CLOSE: dict[str, Any] = {"rtol": 5e-4, "atol": 1e-5}


@dataclass(frozen=True)
class Run:
    """A corpus, a target, checkpoints with moments, and by step v̂ of each parameter."""

    corpus: str
    target: str
    checkpoints: Path
    v_hat: dict[int, dict[str, Tensor]]


def read(folder: str) -> tuple[Tensor, Tensor]:
    corpus = open_corpus(folder)
    reads = [pa.Table.from_batches([b]) for s in range(len(corpus.shards)) for b in corpus.read(s)]
    table = pa.concat_tables(reads)
    return torch.tensor(table["x"].to_pylist()), torch.tensor(table["label"].to_pylist())


@pytest.fixture
def run(tmp_path: Path, make_points: Make, points_checkpoints: Make) -> Run:
    """Two checkpoints of one AdamW run by hand, which says what each gradient squared was."""
    torch.set_num_threads(1)
    corpus, target = make_points([30, 14]), make_points([9], name="target")
    (start,) = find_checkpoints(points_checkpoints(name="start"))
    model = load_model(start).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.8, BETA2), eps=EPS)
    x, y = read(corpus)
    v = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    v_hat = {}
    for step in range(1, 6):
        some = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:7]
        loss = nn.functional.cross_entropy(model(x[some]), y[some])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for (n, p), g in zip(model.named_parameters(), grads, strict=True):
            p.grad, v[n] = g, BETA2 * v[n] + (1 - BETA2) * g.double() ** 2
        optimizer.step()
        if step in RATES:
            v_hat[step] = {n: value / (1 - BETA2**step) for n, value in v.items()}
            save_checkpoint(
                tmp_path / "run" / checkpoint_name(0, step=step), model, spec=start.model,
                model_args=start.model_args, task=start.task or {}, seed=0, step=step,
                lr=RATES[step], mean_lr=1 / step, optimizer=optimizer,
            )  # fmt: skip
    return Run(corpus, target, tmp_path / "run", v_hat)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    """Return each row's gradient by plain autograd."""
    model = model.double()
    names, params = zip(*model.named_parameters(), strict=True)
    found = []
    for a, b in zip(x.double(), y, strict=True):
        loss = nn.functional.cross_entropy(model(a[None]), b[None])
        found.append(dict(zip(names, torch.autograd.grad(loss, params), strict=True)))
    return found


def expected(run: Run, kind: str, damping: float | None, only: str = "") -> tuple[Any, Any]:
    """Return self-influences [N] and influences [N, M], by the definition."""
    (x, y), (tx, ty) = read(run.corpus), read(run.target)
    own, cross = np.zeros(len(x)), np.zeros((len(x), len(set(ty.tolist()))))
    for checkpoint in find_checkpoints(str(run.checkpoints)):
        model = load_model(checkpoint).requires_grad_(True)
        rows, targets = gradients(model, x, y), gradients(model, tx, ty)
        eta = RATES[checkpoint.step] / sum(RATES.values())
        v_hat = run.v_hat[checkpoint.step]
        for layer in {n.rpartition(".")[0] for n in v_hat}:
            names = [n for n in v_hat if n.startswith(f"{layer}.") and only in n]
            if not names:
                continue
            share = 0.1 * torch.cat([v_hat[n].flatten() for n in names]).mean()
            for n in names:
                if kind == "adam":
                    total = v_hat[n] + (share if damping is None else damping)
                else:
                    total = v_hat[n].sqrt() + (EPS if damping is None else damping)
                g = torch.stack([row[n] for row in rows])
                f = torch.stack([row[n] for row in targets])
                groups = torch.stack([f[ty == c].mean(0) for c in sorted(set(ty.tolist()))])
                own += eta * (g**2 / total).flatten(1).sum(1).numpy()
                cross += eta * ((g / total).flatten(1) @ groups.flatten(1).T).numpy()
    return own, cross


def whole(out: Path) -> pa.Table:
    table = ScoreTable.open(out)
    return pa.Table.from_batches(list(table.scan()), table.schema)


def test_scores_equal_brute_force(run: Run, tmp_path: Path) -> None:
    asked = {
        "a": ("self_influence(curvature=adam)", "adam", None),
        "b": ("self_influence(curvature=adam,damping=0.02)", "adam", 0.02),
        "c": ("influence(curvature=adam,groups=max)", "adam", None),
        "d": ("influence(curvature=adam_root)", "adam_root", None),
        "e": ("self_influence(curvature=adam_root)", "adam_root", None),
        "f": ("self_influence(curvature=adam_root,damping=0.1,params=bias)", "adam_root", 0.1),
    }
    arguments = ["score", run.corpus, "--checkpoints", str(run.checkpoints)]
    arguments += ["--target", run.target, "--batch-rows", "8", "--unit-rows", "20"]
    arguments += ["--scorer", ",".join(f"{k}={v[0]}" for k, v in asked.items())]
    result = CliRunner().invoke(cli.app, [*arguments, "-o", str(tmp_path / "s")])
    assert result.exit_code == 0, result.output
    found = whole(tmp_path / "s")
    for name, (request, kind, damping) in asked.items():
        own, cross = expected(run, kind, damping, "bias" if name == "f" else "")
        of_groups = cross.max(1) if "max" in request else cross.mean(1)
        want = own if request.startswith("self") else of_groups
        np.testing.assert_allclose(found[name].to_numpy(), want, **CLOSE, err_msg=name)
    assert verify(tmp_path / "s")["problems"] == []


def test_other_moments_are_another_run(run: Run, tmp_path: Path) -> None:
    """They are no part of the checkpoint's digest, and they decide the values."""
    asked: dict[str, Any] = {
        "corpus": run.corpus, "checkpoints": str(run.checkpoints), "progress": False,
        "scorers": "self_influence(curvature=adam)", "out": tmp_path / "s",
    }  # fmt: skip
    score(**asked)
    before = [p.read_bytes() for p in sorted((tmp_path / "s").glob("part-*"))]
    score(**asked | {"batch_rows": 5, "out": tmp_path / "other"})
    one, two = (whole(tmp_path / n)["self_influence"].to_numpy() for n in ("s", "other"))
    np.testing.assert_allclose(one, two, rtol=1e-5)  # float32 sums in another order
    first, second = sorted(run.checkpoints.glob("*/moments.safetensors"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match="moments"):
        score(**asked)
    assert verify(tmp_path / "s")["problems"]
    score(**asked, overwrite=True)
    assert [p.read_bytes() for p in sorted((tmp_path / "s").glob("part-*"))] != before


def test_checkpoints_without_usable_moments_are_refused_by_name(run: Run, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "corpus": run.corpus, "checkpoints": str(run.checkpoints), "progress": False,
        "scorers": "self_influence(curvature=adam)", "out": tmp_path / "s",
    }  # fmt: skip
    moments = sorted(run.checkpoints.glob("*/moments.safetensors"))[1]
    moments.unlink()
    with pytest.raises(ValueError, match=f"{moments.parent.name} has no Adam.*--save-moments"):
        score(**asked)
    model = load_model(find_checkpoints(str(run.checkpoints))[1]).requires_grad_(True)
    save_moments(moments.parent, model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=f"{moments.parent.name}: .* before the first: leave"):
        score(**asked)


def test_the_rate_of_a_checkpoint_is_its_own_and_not_that_of_less(run: Run, tmp_path: Path) -> None:
    """LESS alone averages the rate over an epoch, also where both are asked for."""
    score(
        run.corpus, checkpoints=str(run.checkpoints), target=run.target, progress=False,
        scorers="si=self_influence(curvature=adam),grad_similarity(mode=less)", out=tmp_path / "s",
    )  # fmt: skip
    own, _ = expected(run, "adam", None)
    np.testing.assert_allclose(whole(tmp_path / "s")["si"].to_numpy(), own, **CLOSE)
