"""Parity with traker (TRAK, Park et al. 2023): its gradients, and its scores from ours.

TRAK differentiates f = log(p / (1 - p)), p the probability of the label, and scores a row z for a
query x by

    tau(z, x) = (1 - p(z)) [Phi (Phi' Phi + lambda I)^-1 grad f(x)]_z,  Phi = grad f of all rows.

grad loss = -(1 - p) grad f, so inner products of loss gradients give K = Phi Phi', and the same
score is (1 - p) (K + lambda I)^-1 K_x; without lambda, and with fewer parameters than rows, the
pseudo-inverse stands for the inverse. traker divides its inverse by the mean size of its entries,
so its scores have no scale: both sides are brought to norm 1. Nothing is projected.

It runs in a process of its own, since it need not be installed beside curate: CURATE_PEERS_PYTHON
names an interpreter that has it and torch (`benchmarks/peers/requirements.txt`); else this one is
tried, and the tests are skipped where it is missing.

Shapes: N rows, M queries, P parameters.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

import curate

PYTHON = os.environ.get("CURATE_PEERS_PYTHON", sys.executable)
ROWS, QUERIES = 60, 7
FEW = {"digits": "1.bias", "text": "bert.encoder.layer.0.output.LayerNorm.weight"}
"""Eight parameters, fewer than there are rows, so that TRAK needs no lambda."""
PARTS = "all", "few"
NET = """
from torch import nn


def net():  # tanh: a unit that no row wakes would make TRAK's matrix singular
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
"""
PEER = """
import json, logging, sys, tempfile
import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from trak import TRAKer
from trak.projectors import NoOpProjector

torch.set_num_threads(1)
kind, checkpoint, given, asked, out = sys.argv[1:]
data = [torch.tensor(v) for v in np.load(given).values()]
asked = json.loads(asked)
rows = asked["rows"]
if kind == "text":
    from transformers import BertForSequenceClassification

    class Logits(BertForSequenceClassification):
        def forward(self, attention_mask, **inputs):  # a mask of two axes is branched on: no vmap
            mask = (1 - attention_mask.float())[:, None, None] * torch.finfo(torch.float32).min
            return super().forward(attention_mask=mask, **inputs).logits

    model = Logits.from_pretrained(checkpoint, attn_implementation="eager")
    task = "text_classification"
else:
    from net import net

    model = net()
    model.load_state_dict(load_file(checkpoint + "/model.safetensors"))
    task = "image_classification"
found = {}
for name, (prefix, shrink) in asked["cases"].items():
    wrt = [n for n, _ in model.named_parameters() if n.startswith(prefix)]
    size = sum(p.numel() for n, p in model.named_parameters() if n in wrt)
    trak = TRAKer(
        model=model, task=task, train_set_size=rows, device="cpu", use_half_precision=False,
        projector=NoOpProjector(device="cpu"), grad_wrt=wrt, logging_level=logging.ERROR,
        save_dir=tempfile.mkdtemp(), lambda_reg=shrink / size,  # it divides gradients by sqrt(P)
    )
    state = {k: v.clone() for k, v in model.state_dict().items()}
    trak.load_checkpoint(state, model_id=0)
    trak.featurize(batch=[v[:rows] for v in data], num_samples=rows)
    store = trak.saver.current_store
    found[name + "_grads"] = np.array(store["grads"]) * float(trak.normalize_factor)
    found[name + "_size"] = np.array(store["grads"].shape[1])
    found[name + "_q"] = np.array(store["out_to_loss"])[:, 0]
    trak.finalize_features()
    queries = [v[rows:] for v in data]
    trak.start_scoring_checkpoint("q", state, 0, num_targets=len(queries[0]))
    trak.score(batch=queries, num_samples=len(queries[0]))
    found[name + "_scores"] = np.array(trak.finalize_scores("q"))
np.savez(out, **found)
"""


@dataclass(frozen=True)
class Case:
    """A checkpoint, its rows and queries as a corpus, and as the arrays that traker takes."""

    checkpoint: str
    corpus: str
    both: str
    arrays: dict[str, np.ndarray]
    task: str


def has_traker() -> bool:
    ran = subprocess.run([PYTHON, "-c", "import trak, safetensors"], capture_output=True)
    return ran.returncode == 0


def written(folder: Path, columns: dict[str, object]) -> tuple[str, str]:
    """Write the rows, and rows and queries together, with an id each."""
    table = pa.table({"id": [f"{i:03d}" for i in range(ROWS + QUERIES)], **columns})
    pq.write_table(table.slice(0, ROWS), folder / "rows.parquet")
    pq.write_table(table, folder / "both.parquet")
    return str(folder / "rows.parquet"), str(folder / "both.parquet")


def digits(folder: Path) -> Case:
    data = load_digits()
    x, y = (data.data / 16).astype(np.float32), data.target
    features = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 64)
    train = pa.table({"features": features, "label": y}).slice(100, 400)
    pq.write_table(train, folder / "train.parquet")
    (folder / "net.py").write_text(NET)
    (made,) = curate.train(
        str(folder / "train.parquet"), model=f"{folder}/net.py:net", seeds=1, epochs=5,
        save_epochs=[5], out=folder / "run", progress=False,
    )  # fmt: skip
    x, y = x[: ROWS + QUERIES], y[: ROWS + QUERIES]
    seen = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 64)
    corpus, both = written(folder, {"features": seen, "label": y})
    return Case(made.path, corpus, both, {"x": x, "y": y}, "image_classification")


def text(folder: Path) -> Case:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    rng = np.random.default_rng(0)
    words = [f"w{chr(97 + i)}" for i in range(20)]
    texts = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(ROWS + QUERIES)]
    labels = rng.integers(0, 3, len(texts))
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    tokens = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=25, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=12, num_labels=3, initializer_range=0.4,
    )  # fmt: skip
    checkpoint = folder / "bert"
    BertForSequenceClassification(config).save_pretrained(checkpoint)
    tokens.save_pretrained(checkpoint)
    ids = tokens(texts, padding=True, return_tensors="np")
    arrays = {k: ids[k] for k in ("input_ids", "token_type_ids", "attention_mask")}
    corpus, both = written(folder, {"text": texts, "label": labels})
    return Case(str(checkpoint), corpus, both, {**arrays, "y": labels}, "text_classification")


CASES = {"digits": digits, "text": text}


@pytest.mark.slow
@pytest.mark.skipif(not has_traker(), reason="traker is not installed: set CURATE_PEERS_PYTHON")
@pytest.mark.parametrize("kind", CASES)
def test_gradients_and_scores_agree_with_traker(kind: str, tmp_path: Path) -> None:
    case = CASES[kind](tmp_path)
    few = "^" + FEW[kind].replace(".", "[.]")
    table = curate.score(
        case.corpus, checkpoints=case.checkpoint, task=case.task, target=case.both,
        target_group="id", keep_groups=True, engine="local", out=tmp_path / "scores",
        progress=False, scorers=[
            "all_norm=grand", f"few_norm=grand(params={few})",
            "all=grad_similarity(similarity=dot)",
            f"few=grad_similarity(similarity=dot,params={few})",
        ],
    )  # fmt: skip
    columns = [f"{p}_{c}" for p in PARTS for c in ("norm", "by_group")]
    ours = pa.Table.from_batches(list(table.scan(columns)))
    dots = {p: np.stack(ours[f"{p}_by_group"].to_numpy(zero_copy_only=False)) for p in PARTS}
    wrong = -np.expm1(-losses(case, tmp_path))  # 1 - p, of rows and queries
    kernels = {p: (dots[p] / wrong[:ROWS, None] / wrong).astype(np.float64) for p in PARTS}
    # TRAK has lambda for all parameters, more than rows; it is of traker's gradients / sqrt(P).
    shrink = 0.01 * float(np.diag(kernels["all"]).mean())
    theirs = asked_of_traker(kind, case, shrink, tmp_path)
    found = {
        "out to loss": error(wrong[:ROWS], theirs["all_q"]),
        "scores": error(*unit(trak(kernels["all"], wrong, shrink), theirs["all_scores"])),
        "scores, few": error(
            *unit(trak(kernels["few"], wrong, 0, int(theirs["few_size"])), theirs["few_scores"])
        ),
    }
    for part in PARTS:
        g = (theirs[f"{part}_grads"] * theirs[f"{part}_q"][:, None]).astype(np.float64)
        norms = ours[f"{part}_norm"].to_numpy()
        found[f"norms, {part}"] = np.abs(norms / np.linalg.norm(g, axis=1) - 1).max()
        found[f"dots, {part}"] = error(dots[part][:, :ROWS], g @ g.T)
    print(kind, {k: f"{v:.0e}" for k, v in found.items()})
    for name, value in found.items():
        # float32 on both sides; traker also inverts its matrix in float32, whose condition is at
        # most some 4000 here: 4000 roundings of 1e-7.
        assert value < (1e-3 if name.startswith("scores") else 1e-5), (name, value)


def losses(case: Case, folder: Path) -> np.ndarray:
    """Return the loss of every row and query, in float64."""
    table = curate.score(
        case.both, checkpoints=case.checkpoint, task=case.task, scorers=["loss"], engine="local",
        out=folder / "losses", progress=False,
    )  # fmt: skip
    found: np.ndarray = pa.Table.from_batches(list(table.scan(["loss"])))["loss"].to_numpy()
    return found.astype(np.float64)


def asked_of_traker(kind: str, case: Case, shrink: float, folder: Path) -> dict[str, np.ndarray]:
    np.savez(folder / "rows.npz", **case.arrays)  # type: ignore[arg-type]
    (folder / "peer.py").write_text(PEER)
    asked = {"rows": ROWS, "cases": {"all": ["", shrink], "few": [FEW[kind], 0.0]}}
    ran = subprocess.run(
        [PYTHON, "peer.py", kind, case.checkpoint, "rows.npz", json.dumps(asked), "out.npz"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    with np.load(folder / "out.npz") as found:
        return dict(found)


def trak(kernel: np.ndarray, wrong: np.ndarray, shrink: float, rank: int = ROWS) -> np.ndarray:
    """Return TRAK's scores [N, M] from K = <grad f, grad f> [N, N + M] of rows with all."""
    values, vectors = np.linalg.eigh(kernel[:, :ROWS])
    values, vectors = values[-rank:], vectors[:, -rank:]
    inverse = vectors / (values + shrink) @ vectors.T
    found: np.ndarray = wrong[:ROWS, None] * (inverse @ kernel[:, ROWS:])
    return found


def unit(*scores: np.ndarray) -> list[np.ndarray]:
    return [s / np.linalg.norm(s) for s in scores]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest number expected."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
