"""Training through MosaicML Streaming on MDS exports is training on the manifest's rows.

The library wants an older set of packages than ours, so it runs in a process of its own:
CURATE_STREAMING_PYTHON names an interpreter that has it. Else this one is tried, and the tests are
skipped where it is missing. Such an environment:

    python3.11 -m venv STREAMING
    STREAMING/bin/pip install mosaicml-streaming
    CURATE_STREAMING_PYTHON=STREAMING/bin/python pytest -k through_mds tests/pipeline/exporting

Where torch is a build for the CPU, torchvision's cannot be imported: uninstall torchvision there,
`streaming_driver.py` does without.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from curate.pipeline.exporting.export import export
from curate.pipeline.manifests.manifest import Manifest

PYTHON = os.environ.get("CURATE_STREAMING_PYTHON", sys.executable)
DRIVER = Path(__file__).with_name("streaming_driver.py")
FIND = "import sys; from importlib.util import find_spec; sys.exit(not find_spec('streaming'))"
SEEDS = (0, 7)
EPOCHS = 2
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

Item = tuple[int, list[float], float]  # x, array, weight

EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "loss": ("loss", {}),
    "repeat as rows": ("repeat", {}),
    "repeat as a column": ("repeat", {"repeats": "column"}),
    "repeat as streams": ("repeat", {"repeats": "streams"}),
    "sampling, an epoch": ("sampling", {"epoch": 1, "seed": 3}),
}


def rows_of(manifest: Manifest, options: dict[str, Any]) -> list[Item]:
    """What an epoch must show, from the manifest alone."""
    listed = [(r["x"], r["array"], r["weight"]) for r in manifest.rows(["x", "array"])]
    if "epoch" in options:
        drawn = manifest.as_torch(
            batch_size=7, columns=["x", "array"], collate=pa.Table.to_pylist, **options
        )
        return [(row["x"], row["array"], 1.0) for batch in drawn for row in batch]
    if manifest.weight_kind == "repeat" and options.get("repeats") != "column":
        return [(x, array, 1.0) for x, array, n in listed for _ in range(int(n))]
    return listed


def descended(items: list[Item], first: nn.Linear) -> torch.Tensor:
    """The weights after an epoch's step for each epoch, all rows at once, in float64."""
    model = nn.Linear(4, 3).double()
    model.load_state_dict(first.state_dict())
    x, array, weight = (torch.tensor(np.array(c)) for c in zip(*items, strict=True))
    for _ in range(EPOCHS):
        losses = nn.functional.cross_entropy(model(array / 1500), x % 3, reduction="none")
        (weight * losses).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= parameter.grad
                parameter.grad = None
    return model.weight.detach().float()


@pytest.fixture(scope="module")
def has_streaming() -> None:
    if subprocess.run([PYTHON, "-c", FIND], capture_output=True).returncode:
        pytest.skip("mosaicml-streaming is not installed; CURATE_STREAMING_PYTHON may name where")


def drive(folder: Path, cases: dict[str, Any]) -> dict[str, Any]:
    """What the driver answers, in its own process."""
    torch.save(cases, folder / "asked.pt")
    ran = subprocess.run(
        [PYTHON, DRIVER, "asked.pt", "answer.pt"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    answer: dict[str, Any] = torch.load(folder / "answer.pt", weights_only=False)
    return answer


def streams_of(out: Path) -> list[dict[str, Any]]:
    """The options of the library's `Stream`, as `streams.json` lists them."""
    if not (out / "streams.json").exists():
        return [{"local": str(out)}]
    listed = json.loads((out / "streams.json").read_text())["streams"]
    return [{**stream, "local": str(out / stream["local"])} for stream in listed]


@pytest.mark.slow
def test_each_row_comes_once_per_epoch_with_its_weight(has_streaming, make_selection, tmp_path):
    torch.manual_seed(0)
    first, cases, own = nn.Linear(4, 3), {}, {}
    for name, (kind, options) in EXPORTS.items():
        manifest, out = make_selection(kind), tmp_path / name
        export(manifest, "mds", out, columns=["x", "array", "text"], unit_rows=60, **options)
        own[name] = rows_of(manifest, options)
        start = {k: v.detach() for k, v in first.state_dict().items()}
        cases[name] = {
            "streams": streams_of(out),
            "columns": ["x", "array", "weight"],
            "seeds": SEEDS,
            **start,
        }
    assert len(cases["repeat as streams"]["streams"]) == 3
    at_once = {"shuffle_algo": "py1s", "num_canonical_nodes": 1}  # by default py1s repeats some
    cases["loss, py1s"], own["loss, py1s"] = {**cases["loss"], "options": at_once}, own["loss"]
    answer = drive(tmp_path, cases)
    for name, of_seed in answer.items():
        orders = [epoch for found in of_seed.values() for epoch in found["epochs"]]
        assert len(orders) == len(SEEDS) * EPOCHS
        for order in orders:
            assert sorted(order) == sorted(own[name]), name
        assert len({tuple(x for x, *_ in order) for order in orders}) == len(orders), name
        for found in of_seed.values():
            assert found["length"] == len(own[name]), name
            # Float32 sums of some hundred terms against float64.
            expected = descended(own[name], first)
            torch.testing.assert_close(found["weight"], expected, rtol=1e-5, atol=1e-6, msg=name)
            error = float((found["weight"] - expected).abs().max() / expected.abs().max())
            print(f"{name}: {len(own[name])} rows an epoch, weights differ by {error:.0e}")


@pytest.mark.slow
def test_the_library_reads_the_values_and_writes_the_same_bytes(
    has_streaming, make_selection, tmp_path
):
    rng, rows = np.random.default_rng(0), 7
    lengths = [2, 1, 255, 256, 65535, 65536, 3]  # a length takes one, two or four bytes
    numbers = {f"{d}": rng.integers(0, 100, rows).astype(d) for d in INTEGERS}
    floats = {f"{d}": rng.normal(size=rows).astype(d) for d in ("float16", "float32", "float64")}
    flat = pa.array(rng.normal(size=6 * rows).astype(np.float32))
    inner = pa.FixedSizeListArray.from_arrays(flat, 3)
    table = pa.table(
        {
            **numbers,
            **floats,
            "bool": rng.random(rows) < 0.5,
            "text": ["", "ä", "日本", "a\nb", "\0", "x" * 300, "z"],
            "bytes": [rng.bytes(n) for n in (0, 1, 2, 3, 300, 5, 6)],
            "list": [rng.integers(0, 9, n) for n in lengths],
            "halves": pa.array([rng.normal(size=n) for n in lengths], pa.list_(pa.float32())),
            "matrix": pa.FixedSizeListArray.from_arrays(inner, 2),
        }
    )
    # The library reads empty arrays but writes none, and spells JSON with spaces and escapes.
    read_only = pa.table(
        {
            "list": pa.array([[], [1]], pa.list_(pa.int64())),
            "struct": [{"a": 1, "b": ["é"]}, None],
            "texts": [["a", "b"], []],
        }
    )
    tables = {"both": table, "read": read_only}
    cases = {}
    for name, given in tables.items():
        (tmp_path / name).mkdir()
        pq.write_table(given, tmp_path / name / "a.parquet")
        made = dict(kept=len(given), data=name, shards=[len(given)], name=f"{name}-manifest")
        export(make_selection("none", **made), "mds", tmp_path / f"{name}-out")
        streams = [{"local": str(tmp_path / f"{name}-out")}]
        cases[name] = {"streams": streams, "write": name == "both"}
    found = drive(tmp_path, cases)
    for name, given in tables.items():
        assert found[name]["samples"] == [{**row, "weight": 1.0} for row in given.to_pylist()]
    files = found["both"]["files"]
    assert files.keys() == {"index.json", "shard.00000.mds"}
    for name, data in files.items():
        assert data == (tmp_path / "both-out" / name).read_bytes(), name
