"""Parity with dattri's TracIn on the checkpoints of a run: inner products and cosines of rows.

It runs in a process of its own, since it need not be installed beside curate: CURATE_PEERS_PYTHON
names an interpreter that has it and torch (`benchmarks/peers/requirements.txt`); else this one is
tried, and the test is skipped where it is missing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

import curate

PYTHON = os.environ.get("CURATE_PEERS_PYTHON", sys.executable)
PEER = """
import json, sys
import numpy as np
import torch
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)
given = np.load(sys.argv[1])
paths, rates = json.loads(sys.argv[2]), json.loads(sys.argv[3])
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).double()


def loss(params, data):
    x, y = data  # a row, without its axis
    logits = torch.func.functional_call(model, params, x.reshape(1, 64))
    return nn.functional.cross_entropy(logits, y.reshape(1))


task = AttributionTask(loss_func=loss, model=model, checkpoints=[
    {n: v.double() for n, v in load_file(p + "/model.safetensors").items()} for p in paths])
loaders = [
    DataLoader(TensorDataset(torch.tensor(given[x]).double(), torch.tensor(given[y])), batch_size=8)
    for x, y in (("x", "y"), ("tx", "ty"))
]
out = {}
for name, normalised in (("dot", False), ("cosine", True)):
    attributor = TracInAttributor(task=task, weight_list=torch.tensor(rates).double(),
                                  normalized_grad=normalised)
    attributor.projector_kwargs = None  # None to the constructor is a random projection
    out[name] = attributor.attribute(*loaders).double().numpy()
np.savez(sys.argv[4], **out)
"""


def has_dattri() -> bool:
    ran = subprocess.run([PYTHON, "-c", "import dattri, safetensors"], capture_output=True)
    return ran.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_dattri(), reason="dattri is not installed: set CURATE_PEERS_PYTHON")
def test_tracin_agrees_with_dattri(tmp_path: Path) -> None:
    digits = load_digits()
    x, y = (digits.data / 16).astype(np.float32), digits.target

    def write(name: str, rows: slice) -> str:
        features = pa.FixedSizeListArray.from_arrays(pa.array(x[rows].ravel()), 64)
        ids = [f"{i:03d}" for i in range(rows.stop - rows.start)]
        table = pa.table({"id": ids, "features": features, "label": y[rows]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        return str(tmp_path / f"{name}.parquet")

    corpus, target = write("corpus", slice(0, 60)), write("target", slice(60, 67))
    made = curate.train(
        write("train", slice(0, 200)), model="mlp", model_options={"hidden": [16]}, seeds=1,
        epochs=4, save_epochs=[1, 3, 4], out=tmp_path / "run", progress=False,
    )  # fmt: skip
    rates = np.array([c.lr for c in made], dtype=np.float64)
    assert len(set(rates)) == 3  # or the weights would not be seen
    table = curate.score(
        corpus, checkpoints=str(tmp_path / "run"), target=target, target_group="id",
        scorers=["dot=grad_similarity(similarity=dot)", "cosine=grad_similarity"],
        keep_groups=True, engine="local", out=tmp_path / "scores", progress=False,
    )  # fmt: skip
    ours = pa.Table.from_batches(list(table.scan(["dot_by_group", "cosine_by_group"])))
    np.savez(tmp_path / "rows.npz", x=x[:60], y=y[:60], tx=x[60:67], ty=y[60:67])
    weights = (rates / rates.sum()).tolist()
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    paths = [c.path for c in made]
    arguments = [
        str(tmp_path / "rows.npz"),
        json.dumps(paths),
        json.dumps(weights),
        str(tmp_path / "o.npz"),
    ]
    subprocess.run([PYTHON, str(script), *arguments], check=True, capture_output=True)
    with np.load(tmp_path / "o.npz") as theirs:
        for name in ("dot", "cosine"):
            found = np.stack(ours[f"{name}_by_group"].to_numpy(zero_copy_only=False))
            # float32 sums of 1200 products against float64: 1e-5 of the largest.
            scale = np.abs(theirs[name]).max()
            print(f"{name}: {np.abs(found - theirs[name]).max() / scale:.0e}")
            np.testing.assert_allclose(found, theirs[name], rtol=0, atol=1e-5 * scale)
