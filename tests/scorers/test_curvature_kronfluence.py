"""Parity with kronfluence, the reference implementation of EK-FAC, on the same weights and labels.

It runs in a process of its own, since it need not be installed beside curate: CURATE_PEERS_PYTHON
names an interpreter that has it and torch (`benchmarks/peers/requirements.txt`); else this one is
tried, and the tests are skipped where it is missing. All in float64.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curate.kernels.cross_entropy import IGNORE, token_cross_entropy
from curate.scorers.curvature import CurvatureSettings
from curate.scorers.curvature_estimate import CurvatureEstimate, made_curvature
from curate.scorers.curvature_labels import relabelled
from curate.scorers.engine import Engine
from curate.scorers.protocol import Batch, Outputs, Signal

PYTHON = os.environ.get("CURATE_PEERS_PYTHON", sys.executable)
ROWS, TARGETS = 24, 5

MODELS = """
import torch
from torch import nn


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6, bias=False), nn.ReLU(),
                         nn.Linear(6, 3))


def cnn():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 5, 2, stride=2),
                         nn.Tanh(), nn.Flatten(), nn.Linear(45, 3))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.query, self.mlp = nn.Linear(6, 6), nn.Linear(6, 7)
        self.out, self.head = nn.Linear(7, 6), nn.Linear(6, 11, bias=False)

    def forward(self, ids):
        h = self.embed(ids)
        weights = (self.query(h) @ h.mT).masked_fill(
            torch.ones(h.shape[1], h.shape[1]).triu(1).bool(), -torch.inf).softmax(-1)
        h = h + weights @ h
        return self.head(h + self.out(torch.tanh(self.mlp(h))))


def language():
    return Language()
"""

PEER = """
import logging, sys, tempfile
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
import models

given = torch.load(sys.argv[1], weights_only=False)
DTYPES = ("activation_covariance_dtype", "gradient_covariance_dtype", "per_sample_gradient_dtype",
          "lambda_dtype")


def loss(logits, y):
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=-100, reduction="sum")


class Rows(Task):
    def compute_train_loss(self, batch, model, sample=False):
        x, y, drawn = batch
        return loss(model(x), drawn if sample else y)

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_attention_mask(self, batch):
        x, y, _ = batch
        return (y != -100).long() if y.dim() == 2 else None


def scored(name, given):
    model = getattr(models, name)().double()
    model.load_state_dict(given["state"])
    task, found = Rows(), {}
    rows = list(zip(given["x"], given["y"], given["drawn"]))
    analyzer = Analyzer(name, prepare_model(model, task), task, cpu=True, disable_tqdm=True,
                        output_dir=tempfile.mkdtemp(), log_level=logging.ERROR)
    for kind, labels, damping in given["asked"]:
        factors = FactorArguments(strategy=kind, use_empirical_fisher=labels == "data",
                                  **dict.fromkeys(DTYPES, torch.float64))
        scores = ScoreArguments(damping_factor=damping, score_dtype=torch.float64,
                                per_sample_gradient_dtype=torch.float64,
                                precondition_dtype=torch.float64, compute_per_module_scores=True)
        analyzer.fit_all_factors(f"{kind}-{labels}", rows, per_device_batch_size=12,
                                 factor_args=factors, overwrite_output_dir=True)
        analyzer.compute_self_scores("s", f"{kind}-{labels}", rows, score_args=scores,
                                     per_device_train_batch_size=12, overwrite_output_dir=True)
        analyzer.compute_pairwise_scores(
            "p", f"{kind}-{labels}", rows[:given["targets"]], rows, score_args=scores,
            per_device_query_batch_size=3, per_device_train_batch_size=12,
            overwrite_output_dir=True)
        found[kind, labels, damping] = (analyzer.load_self_scores("s"),
                                        analyzer.load_pairwise_scores("p"))
    return found


torch.save({name: scored(name, of) for name, of in given.items()}, sys.argv[2])
"""
ASKED: list[tuple[str, str, float | None]] = [
    ("ekfac", "data", None),
    ("ekfac", "model", 1e-3),
    ("kfac", "model", None),
    ("diagonal", "data", 1e-3),
]
NAMES = "mlp", "cnn", "language"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What kronfluence gives for each model: by settings, self and pairwise scores by layer."""
    tried = subprocess.run([PYTHON, "-c", "import kronfluence"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip("kronfluence is not installed; CURATE_PEERS_PYTHON may name where it is")
    folder = tmp_path_factory.mktemp("peer")
    given = {}
    for name in NAMES:
        model, batch = made(name)
        drawn = relabelled(batch, outputs(model, batch), range(ROWS)).targets
        given[name] = {
            "state": model.state_dict(), "x": batch.inputs["x"], "y": batch.targets,
            "drawn": drawn, "targets": TARGETS, "asked": ASKED,
        }  # fmt: skip
    torch.save(given, folder / "in.pt")
    (folder / "models.py").write_text(MODELS)
    (folder / "peer.py").write_text(PEER)
    ran = subprocess.run(
        [PYTHON, "peer.py", "in.pt", "out.pt"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, Any] = torch.load(folder / "out.pt")
    return found


def made(name: str) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    space: dict[str, Any] = {}
    exec(MODELS, space)
    model: nn.Module = space[name]().double()
    return model, drawn_batch(name)


def outputs(model: nn.Module, batch: Batch) -> Outputs:
    logits = model(batch.inputs["x"])
    loss = token_cross_entropy(logits, batch.targets)
    return Outputs(loss.sum(1) if loss.dim() == 2 else loss, batch.targets, logits)


def drawn_batch(name: str) -> Batch:
    if name == "language":  # padding on the right, the first row whole
        x, y = torch.randint(0, 11, (2, ROWS, 6)).unbind()
        lengths = 6 - torch.arange(ROWS) % 4
        y = y.masked_fill(torch.arange(6) >= lengths[:, None], IGNORE)
        return Batch({"x": x}, y, ROWS)
    shape = (ROWS, 5) if name == "mlp" else (ROWS, 2, 6, 6)
    x = torch.randn(*shape, dtype=torch.float64)
    return Batch({"x": x}, torch.randint(0, 3, (ROWS,)), ROWS)


def ours(
    model: nn.Module, batch: Batch, asked: CurvatureSettings, params: str
) -> tuple[Tensor, Tensor]:
    own = Signal("grad_sq_norm", params, curvature=asked.text)
    cross = Signal("target_dot", params, curvature=asked.text)
    engine = Engine(model, outputs, [own, cross])
    engine.verify(batch)
    estimate = CurvatureEstimate(engine, asked, params)
    for _ in range(estimate.stages):
        assert estimate.add(batch, range(ROWS))
        estimate.end_stage()
    engine.curved.curvatures = {(params, asked.text): made_curvature(asked, *estimate.found())}
    each = [engine.summed_gradient(batch.select_rows([i]))[1] for i in range(TARGETS)]
    engine.directions = {n: torch.stack([g[n] for g in each]) for n in each[0]}
    found = engine(batch)
    return found[own], found[cross].T


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_kronfluences(name: str, theirs: dict[str, Any]) -> None:
    model, batch = made(name)
    for (kind, labels, damping), (own, cross) in theirs[name].items():
        if kind == "kfac":
            # Their Fisher information is of a token, ours of a row: it is larger by the mean
            # number of tokens of a row, which differs between layers.
            layers = {layer: f"^{layer}[.]" for layer in own}
            tokens = {layer: tokens_per_row(name, layer, batch) for layer in own}
        else:
            layers, tokens = {"all": "^(?!embed)"}, {"all": 1.0}  # Linear and Conv2d: no table
            own, cross = ({"all": torch.stack(list(of.values())).sum(0)} for of in (own, cross))
        for layer, params in layers.items():
            asked = CurvatureSettings(kind, damping, labels=labels)
            for x, y in zip(
                ours(model, batch, asked, params), (own[layer], cross[layer]), strict=True
            ):
                error = float((x * tokens[layer] - y).abs().max() / y.abs().max())
                print(f"{name} {kind} {labels} {damping} {layer}: {error:.0e}")
                # float64 on both sides: roundings of eigenvectors and sums.
                assert error < 1e-10, (kind, labels, damping, layer)


def tokens_per_row(name: str, layer: str, batch: Batch) -> float:
    if name == "language":
        return float((batch.targets != IGNORE).sum()) / ROWS
    return {("cnn", "0"): 36.0, ("cnn", "2"): 9.0}.get((name, layer), 1.0)
