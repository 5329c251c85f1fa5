"""Files of stores: whole or absent, the same bytes after kills, refused by name when damaged."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from curate import cli
from curate.pipeline.models.checkpoint import find_checkpoints, save_checkpoint
from curate.pipeline.models.models import make_model
from curate.pipeline.reporting.inspect import inspect
from curate.pipeline.reporting.status import status
from curate.pipeline.reporting.verify import verify
from curate.pipeline.scoring import scoring_worker
from curate.pipeline.scoring.attempts import Attempt
from curate.pipeline.scoring.score_table import read_receipt
from curate.pipeline.scoring.store_plan import read_sketch
from curate.pipeline.stores.index import build_index, open_index
from curate.pipeline.stores.layout import check_comparable
from curate.pipeline.stores.store import open_store
from curate.pipeline.stores.writer import StoreFile
from curate.pipeline.storing.commit import _owner
from curate.pipeline.storing.lock import LOCK
from curate.pipeline.storing.storage import Folder

SETTINGS = {"sketch": "2x2", "store": "embedding,probs", "scorers": "loss", "unit_rows": 20}
CODE = (
    "import json, sys\n"
    "from curate.pipeline.scoring.score import score\n"
    "score(**json.loads(sys.argv[1]))\n"
)


def files(folder: str | Path) -> dict[str, bytes]:
    """Everything in the folder but the lock and temporary files."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.startswith(".tmp") and path.name != LOCK:
            found[name] = path.read_bytes()
    return found


def test_receipts_and_success_name_every_file(points: Any, point_target: str) -> None:
    table = points.score(**SETTINGS, target=point_target)
    names = [f"store/{n}/unit-{u:05d}.arrow" for n in ("sketch", "embedding", "probs")
             for u in range(3)]  # fmt: skip
    names += [f"target/store/{n}/unit-00000.arrow" for n in ("sketch", "embedding", "probs")]
    assert sorted(table.success["stores"]) == sorted(names)
    for unit in range(3):
        for entry in read_receipt(table.folder, unit)["stores"].values():
            assert table.success["stores"][entry["file"]] == entry["sha256"]
    assert verify(table.path)["problems"] == []
    shown = inspect(table.path)["stores"]
    assert shown["store/sketch"]["rows"] == 60 and shown["target/store/sketch"]["rows"] == 9


def test_a_kill_between_stores_and_part_changes_no_byte(
    points: Any, point_target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = points.score("whole", **SETTINGS, target=point_target)

    def killed(*args: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scoring_worker, "write_part", killed)
        with pytest.raises(KeyboardInterrupt):
            points.score("killed", **SETTINGS, target=point_target)
    left = files(points.out / "killed")
    assert "store/sketch/unit-00000.arrow" in left and "part-00000.parquet" not in left
    assert status(points.out / "killed")["scores"][0]["stores"] == ["embedding", "probs", "sketch"]
    scratch = Path(points.out, "killed/.tmp", f"x~{_owner()}~{2**22 + 1}~0~0")  # of a dead writer
    scratch.parent.mkdir(exist_ok=True)
    scratch.write_bytes(b"half a file")
    inode = (points.out / "killed/store/sketch/unit-00000.arrow").stat().st_ino
    points.score("killed", **SETTINGS, target=point_target)
    assert files(points.out / "killed") == files(whole.path)
    assert (points.out / "killed/store/sketch/unit-00000.arrow").stat().st_ino == inode
    assert not scratch.exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["write", "commit"])
def test_a_fault_while_vectors_are_written_leaves_nothing_half(
    points: Any, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    whole = points.score("whole", **SETTINGS)
    calls = {"n": 0}
    method = getattr(StoreFile, stage)

    def fails(self: StoreFile, *args: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 2:
            raise KeyboardInterrupt
        return method(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StoreFile, stage, fails)
        with pytest.raises(KeyboardInterrupt):
            points.score("killed", **SETTINGS)
    assert not list((points.out / "killed/.tmp").glob("unit-*"))
    assert not list((points.out / "killed").glob("part-*"))
    points.score("killed", **SETTINGS)
    assert files(points.out / "killed") == files(whole.path)


@pytest.mark.slow
def test_kill_9_in_the_middle_changes_no_byte(
    points: Any, point_target: str, curate_environment: dict[str, str]
) -> None:
    settings = {"checkpoints": points.checkpoints, "corpus": points.corpus, "batch_rows": 5}
    settings |= SETTINGS | {"target": point_target, "top_rows": 3, "engine": "local"}

    def start(out: str, sleep_s: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CODE, json.dumps({**settings, "out": out})]
        return subprocess.Popen(command, env=curate_environment | {"POINTS_SLEEP_S": str(sleep_s)})

    whole, killed = str(points.out / "whole"), str(points.out / "killed")
    assert start(whole, 0).wait() == 0
    for marker in ("units.parquet", "part-00000.parquet"):
        process = start(killed, 0.02)
        while not Path(killed, marker).exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(0.15)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not Path(killed, "_SUCCESS.json").exists()
    assert start(killed, 0).wait() == 0
    assert files(killed) == files(whole)


@pytest.mark.slow
def test_a_unit_that_was_given_up_has_no_vectors(points: Any) -> None:
    out = Folder(points.out / "scores")
    for number in range(3):
        Attempt(out, 0, number, "earlier").step("encode", "0")
    table = points.score(**SETTINGS, target=None)
    assert [q["unit"] for q in table.success["quarantined"]] == [0]
    for name in ("sketch", "probs"):
        got = np.concatenate(list(open_store(table, name).blocks()))
        assert np.isnan(got[:20]).all() and np.isfinite(got[20:]).all()
    assert verify(table.path)["problems"] == []


@pytest.mark.slow
def test_overwrite_clears_stores_and_what_was_made_of_them(points: Any, point_target: str) -> None:
    table = points.score(**SETTINGS, target=point_target, top_rows=2)
    assert Path(table.path, "top_rows.parquet").exists()
    with pytest.raises(ValueError, match=r"stores\.sketch\.k"):
        points.score(**{**SETTINGS, "sketch": "4x4"}, target=point_target, top_rows=2)
    again = points.score(scorers="loss", overwrite=True)
    left = files(again.path)
    assert set(left) == {
        "_meta.json", "_SUCCESS.json", "errors.parquet", "part-00000.parquet", "units.parquet"
    }  # fmt: skip


def test_a_damaged_file_is_refused_by_name(points: Any) -> None:
    table = points.score(**SETTINGS)
    other = points.score("other", **{**SETTINGS, "scorers": "el2n"})
    file = Path(table.path, "store/sketch/unit-00001.arrow")
    data = file.read_bytes()
    harms = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "gone": None,
        "foreign": Path(other.path, "store/sketch/unit-00001.arrow").read_bytes(),
        "other unit": Path(table.path, "store/sketch/unit-00002.arrow").read_bytes(),
        "parquet": Path(table.path, "part-00001.parquet").read_bytes(),
    }
    for harm in harms.values():
        file.unlink()
        if harm is not None:
            file.write_bytes(harm)
        with pytest.raises(ValueError, match=r"store/sketch/unit-00001\.arrow"):
            list(open_store(table, "sketch").blocks())
        if harm is None:
            file.write_bytes(b"")
    problems = verify(table.path)["problems"]
    assert len(problems) == 1 and "store/sketch/unit-00001.arrow" in problems[0]


def test_a_changed_byte_is_found_by_verify(points: Any) -> None:
    table = points.score(**SETTINGS)
    file = Path(table.path, "store/embedding/unit-00002.arrow")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    (problem,) = verify(table.path)["problems"]
    assert problem == f"{file} was changed after the run ended: another sha256"


@pytest.mark.slow
def test_a_file_that_vanishes_before_the_end_is_named(
    points: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*args: Any) -> dict[str, Any]:
        Path(points.out, "scores/store/sketch/unit-00001.arrow").unlink()
        return {}

    monkeypatch.setattr("curate.pipeline.scoring.score.aggregates", lost)
    with pytest.raises(ValueError, match=r"unit-00001\.arrow is missing: delete .*part-00001"):
        points.score(**SETTINGS)


def test_two_stores_made_apart_are_compared_only_if_alike(
    points: Any, make_points: Callable[..., str], points_checkpoints: Callable[..., str]
) -> None:
    ours = open_store(points.score("a", sketch="2x2"), "sketch")
    points.corpus = make_points([17], name="others")
    ours.check_comparable(open_store(points.score("b", sketch="2x2", unit_rows=5), "sketch"))
    for asked, said in (
        ("2x2(seed=1)", r"seed=0, .* with seed=1"),
        ("2x3", r"k=\[2, 2\], .* with k=\[2, 3\]"),
        ("16", "kind=two-sided, .* with kind=one-sided"),
        ("2x2(params=head)", "with params=head"),
    ):
        other = replace(ours.layout, how=read_sketch(asked))
        with pytest.raises(ValueError, match=said):
            check_comparable(ours.layout, other, "a", "b")
    points.checkpoints = points_checkpoints(seeds=1, name="one")
    other = open_store(points.score("d", sketch="2x2"), "sketch")
    with pytest.raises(
        ValueError, match=r"4 checkpoints of .* and 1 of .*: choose as many of each"
    ):
        ours.check_comparable(other)
    open_store(points.out / "a", "sketch", checkpoints=[0]).check_comparable(other)


def test_stores_of_other_models_are_not_compared(
    points: Any, points_code: Path, tmp_path: Path
) -> None:
    asked = {"sketch": "16", "store": "embedding"}
    ours = points.score("a", **asked, unit_rows=60)
    wide = tmp_path / "wide.py"
    wide.write_text(points_code.read_text().replace("8", "9"))  # hidden units
    for c in find_checkpoints(points.checkpoints):
        model = make_model(f"{wide}:factory", num_classes=3)
        save_checkpoint(
            tmp_path / "wide" / Path(c.path).name, model, spec=f"{wide}:factory",
            model_args=c.model_args, task=c.task or {}, seed=c.seed, step=c.step, lr=c.lr,
        )  # fmt: skip
    points.checkpoints = str(tmp_path / "wide")
    theirs = points.score("b", **asked, unit_rows=60)
    for name, said in (("sketch", "parameters=.* of one model"), ("embedding", "different models")):
        with pytest.raises(ValueError, match=said):
            open_store(ours, name).check_comparable(open_store(theirs, name))
    first, last = (open_store(ours, "embedding", checkpoints=[k]) for k in (0, 1))
    with pytest.raises(ValueError, match="are of different checkpoints"):
        first.check_comparable(last)  # another seed's hidden units mean something else


def test_what_to_delete_brings_a_lost_file_back(points: Any) -> None:
    table = points.score(**SETTINGS)
    whole = files(table.path)
    file = Path(table.path, "store/sketch/unit-00001.arrow")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"delete it, part-00001\.parquet and _SUCCESS\.json, and"):
        list(open_store(table, "sketch").blocks())
    for name in (file, "part-00001.parquet", "_SUCCESS.json"):
        Path(table.path, name).unlink()
    points.score(**SETTINGS)
    assert files(table.path) == whole


def test_stores_on_an_object_store_are_the_same(points: Any, point_target: str) -> None:
    settings = {**SETTINGS, "target": point_target, "top_rows": 2}
    here, out = points.score(**settings), f"memory://stores-{os.getpid()}/scores"
    there = points.score("there", **{**settings, "out": out})
    assert there.success["stores"] == here.success["stores"]
    assert there.notes["top_rows"] == here.notes["top_rows"]
    for name in ("sketch", "probs"):
        ours, theirs = (np.concatenate(list(open_store(t, name).blocks())) for t in (here, there))
        np.testing.assert_array_equal(ours, theirs)
    index = build_index(out, "sketch")
    assert open_index(out, "sketch").near(np.array([59]), 1)[1] == [[59]]
    assert index.said == build_index(here.path, "sketch").said
    assert verify(out)["problems"] == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"store": "logits"}, "unknown store 'logits'; choose from: sketch, embedding, probs"),
        ({"sketch": "0x4"}, "cannot read sketch '0x4'; write 32x32"),
        ({"sketch": "big"}, "cannot read sketch 'big'"),
        ({"sketch": "4x4(side=2)"}, "cannot read sketch"),
        ({"sketch": "48(jl=sparse)"}, "a sparse map needs a power of two"),
        ({"sketch": "4x4(jl=dense)"}, "jl belongs to a one-sided sketch"),
        ({"sketch": "4x4(seed=-1)"}, "seed must be a whole number from 0 on"),
        ({"sketch": "4x4(params=nothing)"}, "matches no trainable parameter"),
        ({"top_rows": 5}, "name it, --target"),
        ({"store": "embedding", "similarity": "dot"}, "give --top-rows too"),
        ({"top_rows": 0}, "top_rows must be at least 1, got 0"),
        ({"store": "probs", "similarity": "l2"}, "unknown similarity 'l2'"),
        ({}, "no scorer is named"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    points: Any, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        points.score(**settings)


def test_readers_refuse_what_is_not_there(points: Any) -> None:
    table = points.score(store="embedding")
    with pytest.raises(ValueError, match=r"no store 'sketch' \(it has: embedding\)"):
        open_store(table, "sketch")
    with pytest.raises(ValueError, match=r"without a target, .* `curate score --target CORPUS"):
        open_store(table, "embedding", target=True)
    with pytest.raises(ValueError, match="unknown store 'vectors'"):
        open_store(table, "vectors")
    with pytest.raises(ValueError, match="checkpoint 2 of 2"):
        open_store(table, "embedding", checkpoints=[2])
    with pytest.raises(ValueError, match="row 60 of 60"):
        open_store(table, "embedding").take(np.array([3, 60]))


def test_the_command_stores_and_says_so(points: Any, point_target: str) -> None:
    out = str(points.out / "cli")
    command = ["score", points.corpus, "--checkpoints", points.checkpoints, "-o", out]
    command += ["--store", "embedding,probs", "--sketch", "2x2", "--engine", "local"]
    done = CliRunner().invoke(cli.app, [*command, "--target", point_target, "--top-rows", "2"])
    assert done.exit_code == 0, done.output
    assert "target/store/sketch" in done.output and "first top rows" in done.output
    for name in ("sketch", "embedding", "probs"):
        assert open_store(out, name).rows == 60 and open_store(out, name, target=True).rows == 9
