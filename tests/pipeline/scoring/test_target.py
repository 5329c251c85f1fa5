"""Scores against a target: values by brute force through the command line, kills, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
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
from curate.pipeline.reporting.verify import verify
from curate.pipeline.scoring import signal_pass, target_gradients
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.scoring.target_gradients import TargetGradients
from curate.pipeline.tasks.registry import make_task, task_from_description
from curate.scorers.readouts import TwoSidedSketch
from curate.scorers.signals import signals

Make = Callable[..., str]
MODELS = """
from torch import nn


def image(num_classes, input_shape, **_):
    c, h, w = input_shape
    return nn.Sequential(
        nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(4 * h * w, num_classes),
    )


def table(num_classes, input_shape, **_):
    return nn.Sequential(nn.Linear(*input_shape, 8), nn.Tanh(), nn.Linear(8, num_classes))
"""
CONTEXT = 12
ROWS, TARGET_ROWS = 23, 11
RATES = (0.3, 0.1)
# float32 forward and backward passes of shallow models; a cosine has no scale of its own to lose.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# -- values


def drawn(kind: str, rows: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    part = pa.array(rng.choice(["a", "b", "c"], rows))
    if kind == "gpt":  # some longer than the context: cut into windows
        ids = [rng.integers(0, 17, n).tolist() for n in rng.integers(2, 3 * CONTEXT, rows)]
        return pa.table({"tokens": pa.array(ids, pa.list_(pa.int32())), "part": part})
    label = pa.array(rng.integers(0, 3, rows))
    if kind == "image":
        pixels = rng.integers(0, 256, (rows, 5, 4, 3), dtype=np.uint8).tolist()
        column = pa.array(pixels, pa.list_(pa.list_(pa.list_(pa.uint8(), 3), 4), 5))
        return pa.table({"image": column, "label": label, "part": part})
    return pa.table({"a": rng.normal(size=rows), "b": rng.normal(size=rows), "label": label})


def made(root: Path, kind: str) -> Path:
    """Write a corpus, a target, and two checkpoints of a model with random weights."""
    for name, rows, seed in (("corpus", ROWS, 0), ("target", TARGET_ROWS, 1)):
        (root / name).mkdir(parents=True)
        table = drawn(kind, rows, seed)
        pq.write_table(table.slice(0, 7), root / name / "a.parquet")
        pq.write_table(table.slice(7), root / name / "b.parquet")
    (root / "models.py").write_text(MODELS)
    corpus = open_corpus(root / "corpus")
    if kind == "gpt":
        spec: Any = "gpt"
        task = make_task("causal_lm", corpus, inputs="tokens", context=CONTEXT, vocab_size=17)
        args = model_args(task, corpus) | {"layers": 1, "heads": 2, "dim": 8}
    else:
        spec = f"{root / 'models.py'}:{kind}"
        options = {"inputs": "image"} if kind == "image" else {"inputs": "a,b"}
        task = make_task(
            "image_classification" if kind == "image" else "tabular_classification",
            corpus, label="label", classes=[0, 1, 2], **options,
        )  # fmt: skip
        args = model_args(task, corpus)
    for step, rate in enumerate(RATES, start=1):
        torch.manual_seed(step)
        model = make_model(spec, **args)
        for p in model.parameters():  # away from zero biases and unit scales
            nn.init.normal_(p, std=0.4)
        save_checkpoint(
            root / "checkpoints" / checkpoint_name(0, step=step),
            model, spec=spec, model_args=args, task=task.describe(), seed=0, step=step, lr=rate,
        )  # fmt: skip
    return root


def curate(*arguments: object) -> None:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output


def whole(out: Path) -> pa.Table:
    table = ScoreTable.open(out)
    return pa.Table.from_batches(list(table.scan()), table.schema)


def gradients(root: Path, folder: str, params: str) -> list[Tensor]:
    """Return each row's gradient in float64 at each checkpoint, [N, P], from passes of its own."""
    corpus, found = open_corpus(root / folder), []
    for checkpoint in find_checkpoints(str(root / "checkpoints")):
        assert checkpoint.task is not None
        task = task_from_description(checkpoint.task, corpus)
        model = load_model(checkpoint).double().eval()
        wanted = [p for n, p in model.named_parameters() if params in n]
        rows = []
        for shard in range(len(corpus.shards)):
            for read in corpus.read(shard, batch_rows=1):
                batch = task.collate(task.encode(pa.Table.from_batches([read])))
                (inputs,) = batch.inputs.values()
                logits = model(inputs.double() if inputs.is_floating_point() else inputs)
                loss = nn.functional.cross_entropy(
                    logits.flatten(0, -2), batch.targets.flatten(), ignore_index=-100
                )
                grads = torch.autograd.grad(loss, wanted)
                rows.append(torch.cat([g.flatten() for g in grads]))
        found.append(torch.stack(rows))
    return found


def brute_force(root: Path, groups: list[Any], *, params: str = "", weights: Any = None) -> Any:
    """Return cosines and dot products averaged over the checkpoints, [N, M] each."""
    weights = weights or (0.75, 0.25)
    names = sorted(set(groups))
    dots, cosines = [], []
    corpus, target = gradients(root, "corpus", params), gradients(root, "target", params)
    for rows_np, all_np in zip(corpus, target, strict=True):
        mean_mp = torch.stack(
            [all_np[[i for i, g in enumerate(groups) if g == name]].mean(0) for name in names]
        )
        dots.append(rows_np @ mean_mp.T)
        cosines.append(dots[-1] / (rows_np.norm(dim=1)[:, None] * mean_mp.norm(dim=1)))
    average = torch.tensor(weights, dtype=torch.float64)
    return [torch.einsum("k,knm->nm", average, torch.stack(v)).numpy() for v in (cosines, dots)]


REQUESTS = (
    "grad_similarity,mean=grad_similarity(groups=mean),dot=grad_similarity(similarity=dot),"
    "dvgs=grad_similarity(mode=dvgs),norms=grad_similarity(params=bias),loss,grand"
)


@pytest.mark.parametrize("kind", ["image", "table", "gpt"])
def test_scores_equal_brute_force_in_float64(kind: str, tmp_path: Path) -> None:
    root = made(tmp_path, kind)
    curate(
        "score", root / "corpus", "--checkpoints", root / "checkpoints",
        "--target", root / "target",
        "--scorer", REQUESTS, "--batch-rows", 4, "--unit-rows", 9, "-o", root / "scores",
    )  # fmt: skip
    found = whole(root / "scores")
    labels = drawn(kind, TARGET_ROWS, 1)
    groups = labels["label"].to_pylist() if kind != "gpt" else [0] * TARGET_ROWS
    cosines, dots = brute_force(root, groups)
    for name, expected in {
        "grad_similarity": cosines.max(1),
        "mean": cosines.mean(1),
        "dot": dots.max(1),
        "dvgs": brute_force(root, groups, weights=(0.5, 0.5))[0].max(1),
        "norms": brute_force(root, groups, params="bias")[0].max(1),
    }.items():
        np.testing.assert_allclose(found[name].to_numpy(), expected, **CLOSE, err_msg=name)
    assert found["error"].null_count == ROWS
    meta = json.loads((root / "scores" / "_meta.json").read_text())
    assert meta["target"]["rows"] == TARGET_ROWS and meta["target"]["shards"][0]["path"]
    if kind == "gpt":
        assert (meta["target"]["group"], meta["target"]["groups"]) == (None, {"all": 11})
    else:
        assert meta["target"]["group"] == "label"
        assert meta["target"]["groups"] == {str(k): n for k, n in sorted(Counter(groups).items())}


@pytest.mark.parametrize(("kind", "group"), [("gpt", "part"), ("image", "part"), ("image", "none")])
def test_groups_come_from_a_column_or_are_one(kind: str, group: str, tmp_path: Path) -> None:
    root = made(tmp_path, kind)
    curate(
        "score", root / "corpus", "--checkpoints", root / "checkpoints",
        "--target", root / "target",
        "--target-group", group, "--scorer", "grad_similarity", "-o", root / "scores",
    )  # fmt: skip
    parts = (
        drawn(kind, TARGET_ROWS, 1)["part"].to_pylist() if group == "part" else [0] * TARGET_ROWS
    )
    expected = brute_force(root, parts)[0].max(1)
    found = whole(root / "scores")["grad_similarity"].to_numpy()
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_several_seeds_are_averaged_and_each_checkpoint_has_its_value(
    make_points: Make, points_checkpoints: Make, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "corpus": make_points([20, 10]), "target": make_points([9], name="target"),
        "scorers": "grad_similarity(similarity=dot, groups=mean)", "progress": False,
    }  # fmt: skip
    checkpoints = points_checkpoints(seeds=2, steps=(1, 2))
    score(**settings, checkpoints=checkpoints, keep_checkpoints=True, out=tmp_path / "all")
    both = whole(tmp_path / "all")
    found = np.array(both["grad_similarity_by_checkpoint"].to_pylist())
    for k, path in enumerate(sorted(Path(checkpoints).iterdir())):
        score(**settings, checkpoints=str(path), out=tmp_path / f"{k}")
        alone = whole(tmp_path / f"{k}")["grad_similarity"].to_numpy()
        np.testing.assert_allclose(found[:, k], alone, rtol=1e-6, atol=1e-9)
    rates = np.array([0.1 / 2, 0.1 / 3])
    runs = found.reshape(30, 2, 2) @ (rates / rates.sum())
    np.testing.assert_allclose(both["grad_similarity"].to_numpy(), runs.mean(1), rtol=1e-5)
    spread = runs.std(1, ddof=1)
    np.testing.assert_allclose(both["grad_similarity_std"].to_numpy(), spread, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("how", ["similarity=dot, groups=max", "groups=mean"])
def test_each_group_alone_is_kept_where_asked(
    make_points: Make, points_checkpoints: Make, tmp_path: Path, how: str
) -> None:
    settings: dict[str, Any] = {
        "corpus": make_points([20, 10]), "target": make_points([9], name="target"),
        "checkpoints": points_checkpoints(seeds=2, steps=(1, 2)), "progress": False,
    }  # fmt: skip
    score(**settings, scorers=f"g=grad_similarity({how})", keep_groups=True, out=tmp_path / "s")
    found = whole(tmp_path / "s")
    each = np.array(found["g_by_group"].to_pylist())
    groups = json.loads((tmp_path / "s" / "_meta.json").read_text())["target"]["groups"]
    assert each.shape == (30, len(groups)) and len(groups) > 1
    if "mean" in how:
        np.testing.assert_allclose(each.mean(1), found["g"].to_numpy(), rtol=1e-5, atol=1e-7)
    else:  # of two seeds the mean of the greatest is not below the greatest mean
        assert (found["g"].to_numpy() >= each.max(1) - 1e-6).all()
    with pytest.raises(ValueError, match="--keep-groups"):
        score(settings["corpus"], checkpoints=settings["checkpoints"], scorers="el2n",
              keep_groups=True, out=tmp_path / "t", progress=False)  # fmt: skip


# -- cost


@pytest.mark.parametrize(("more", "backward"), [("", 12), (",vog", 24)])
def test_the_corpus_takes_one_forward_and_one_backward_per_batch_and_checkpoint(
    make_points: Make,
    points_checkpoints: Make,
    tmp_path: Path,
    passes_seen: list[tuple[int, int, int]],
    more: str,
    backward: int,
) -> None:
    """Whatever the scorers, and another of the logits for VoG; the target is run apart."""
    score(
        make_points([40]), target=make_points([9], name="target"),
        checkpoints=points_checkpoints(steps=(1, 2, 3)), batch_rows=10, progress=False,
        scorers="el2n,grand,self_influence,grad_similarity,dot=grad_similarity(similarity=dot),"
        f"head=grad_similarity(params=head),loss,margin,entropy{more}", out=tmp_path / "s",
    )  # fmt: skip
    assert passes_seen == [(4, 12, backward)]


def test_the_targets_gradients_are_made_once_per_checkpoint(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], TargetGradients._made
    monkeypatch.setattr(
        TargetGradients, "_made", lambda self, engine: made.append(1) or make(self, engine)
    )
    score(**settings, out=tmp_path / "s")
    assert len(made) == 4
    names = sorted(p.name for p in (tmp_path / "s" / "target").iterdir())
    assert [name[:16] for name in names] == [
        f"seed{seed}-step{step:06d}" for seed in (0, 1) for step in (1, 2)
    ]
    (tmp_path / "s" / "_SUCCESS.json").unlink()
    (tmp_path / "s" / "part-00001.parquet").unlink()
    score(**settings, out=tmp_path / "s")
    assert len(made) == 4


# -- what must not change a byte


@pytest.fixture
def settings(make_points: Make, points_checkpoints: Make) -> dict[str, Any]:
    return {
        "corpus": make_points([50, 40, 30]),
        "target": make_points([17, 8], name="target"),
        "checkpoints": points_checkpoints(seeds=2, steps=(1, 2)),
        "scorers": "grad_similarity,head=grad_similarity(params=head),el2n",
        "batch_rows": 16,
        "unit_rows": 30,
        "progress": False,
    }


def files(folder: Path) -> dict[str, bytes]:
    found = [*folder.iterdir(), *(folder / "target").iterdir()]
    return {p.name: p.read_bytes() for p in found if p.is_file() and p.name != "_lock.json"}


def test_swapped_weights_and_reread_gradients_give_the_same_bytes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(**settings, out=tmp_path / "resident")
    monkeypatch.setattr("curate.pipeline.scoring.signal_pass.RESIDENT_BYTES", 0)
    score(**settings, out=tmp_path / "cached")
    monkeypatch.setattr("curate.pipeline.scoring.signal_pass.CACHED_BYTES", 0)
    most = 3 * 4 * (5 * 8 + 9 * 3)  # of one checkpoint, not of several
    monkeypatch.setattr("curate.pipeline.scoring.target_gradients.MOST_BYTES", most)
    score(**settings, out=tmp_path / "read")
    assert files(tmp_path / "resident") == files(tmp_path / "cached") == files(tmp_path / "read")


def test_a_target_row_that_does_not_fit_with_others_is_run_with_fewer(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(**settings, out=tmp_path / "whole")
    once = signal_pass.Engine.summed_gradient

    def small(self: Any, batch: Any) -> Any:
        if batch.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return once(self, batch)

    monkeypatch.setattr(signal_pass.Engine, "summed_gradient", small)
    monkeypatch.setattr("curate.pipeline.scoring.target_gradients.gc.collect", lambda: 0)  # slow
    score(**settings, out=tmp_path / "split")
    for name in ("grad_similarity", "head"):
        split, plain = (whole(tmp_path / n)[name].to_numpy() for n in ("split", "whole"))
        np.testing.assert_allclose(split, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "most"), [("image", 3600), ("gpt", 8400)])
def test_sketches_stand_for_gradients_that_take_too_much_and_tell_their_error(
    kind: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of sketches as `curate.signals` makes them, with exact norms of the rows."""
    root, sides = made(tmp_path, kind), (6, 6)
    monkeypatch.setattr(target_gradients, "SKETCH", TwoSidedSketch(0, sides))
    monkeypatch.setattr(target_gradients, "MOST_BYTES", most)
    monkeypatch.setattr("curate.pipeline.scoring.target_sketch.NUMBERS", 50)  # in many portions
    settings: dict[str, Any] = {
        "corpus": str(root / "corpus"), "target": str(root / "target"), "progress": False,
        "checkpoints": str(root / "checkpoints"), "batch_rows": 4, "target_group": "part",
        "scorers": "grad_similarity,dot=grad_similarity(similarity=dot)",
    }  # fmt: skip
    table = score(**settings, out=root / "s")
    assert isinstance(table, ScoreTable)

    def sketched(folder: str, k: int) -> tuple[Tensor, Tensor]:
        """Return each row's sketch, [N, numbers], and its gradient's norm."""
        corpus, checkpoint = (
            open_corpus(root / folder),
            find_checkpoints(str(root / "checkpoints"))[k],
        )
        task = task_from_description(checkpoint.task or {}, corpus)
        model, found = load_model(checkpoint).eval(), []
        for shard in range(len(corpus.shards)):
            for read in corpus.read(shard):
                batch = task.collate(task.encode(pa.Table.from_batches([read])))
                found.append(
                    signals(model, batch, task.outputs, ("sketch", "grad_norm"), sketch_dim=sides)
                )
        return tuple(torch.cat([f[n] for f in found]).double() for n in ("sketch", "grad_norm"))  # type: ignore[return-value]

    parts = np.array(drawn(kind, TARGET_ROWS, 1)["part"].to_pylist())
    cosines, dots = torch.zeros(ROWS, 3).double(), torch.zeros(ROWS, 3).double()
    errors = []
    for k, weight in enumerate((0.75, 0.25)):
        (mine, norms), (theirs, _) = sketched("corpus", k), sketched("target", k)
        means = torch.stack([theirs[torch.from_numpy(parts == p)].mean(0) for p in "abc"])
        product = mine @ means.T
        dots += weight * product
        cosine = product / (norms[:, None] * means.norm(dim=1))
        cosines += weight * cosine.clamp(-1, 1)  # an estimate may go beyond
        exact = gradients(root, "target", "")[k]
        (sample,) = np.nonzero(parts[:7] == "a")  # the first batch: of one group and one shard
        assert 2 <= len(sample) <= 4
        lengths = exact[sample].norm(dim=1)[:, None] * exact[sample].norm(dim=1)
        off = (theirs[sample] @ theirs[sample].T - exact[sample] @ exact[sample].T) / lengths
        pairs = torch.triu_indices(len(sample), len(sample), 1)
        errors.append(off[pairs[0], pairs[1]].square().mean().sqrt().item())
    found = whole(root / "s")
    np.testing.assert_allclose(found["dot"].to_numpy(), dots.amax(1), **CLOSE)
    np.testing.assert_allclose(found["grad_similarity"].to_numpy(), cosines.amax(1), **CLOSE)
    told = table.success["notes"]["sketch_error"]
    assert [n[:16] for n in told] == ["seed0-step000001", "seed0-step000002"]
    np.testing.assert_allclose(list(told.values()), errors, rtol=1e-3)
    before = files(root / "s")
    (root / "s" / "_SUCCESS.json").unlink()
    (root / "s" / "part-00000.parquet").unlink()
    score(**settings, out=root / "s")
    assert files(root / "s") == before


CODE = (
    "import json, sys\n"
    "from curate.pipeline.scoring.score import score\n"
    "score(**json.loads(sys.argv[1]))\n"
)


@pytest.mark.parametrize(
    "awaited", ["target", pytest.param("part-00000.parquet", marks=pytest.mark.slow)]
)
def test_a_kill_changes_no_byte(
    settings: dict[str, Any], curate_environment: dict[str, str], tmp_path: Path, awaited: str
) -> None:
    score(**settings, out=tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", CODE, json.dumps({**settings, "out": str(out)})]
    environment = curate_environment | {"POINTS_SLEEP_S": "0.02"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    while not (out / awaited).exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "_SUCCESS.json").exists()
    score(**settings, out=out)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.usefixtures("ray_session")
def test_workers_on_ray_give_the_same_bytes(settings: dict[str, Any], tmp_path: Path) -> None:
    score(**settings, engine="local", out=tmp_path / "local")
    score(**settings, engine="ray", workers=2, out=tmp_path / "ray")
    assert files(tmp_path / "ray") == files(tmp_path / "local")


def test_scores_and_gradients_can_be_written_to_an_object_store(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    table = score(**settings, out=f"memory://target-{tmp_path.name}")
    assert isinstance(table, ScoreTable)
    score(**settings, out=tmp_path / "local")
    names = [*table.folder.names(), *table.folder.names("target/")]
    local = files(tmp_path / "local")
    assert {n.removeprefix("target/"): table.folder.read(n) for n in names} == local


def test_a_dry_run_writes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    plan = score(**settings, out=tmp_path / "s", dry_run=True)
    assert not isinstance(plan, ScoreTable) and plan.rows == 120
    assert not (tmp_path / "s").exists()


# -- refusals


def test_a_changed_target_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    score(**settings, out=tmp_path / "s")
    assert score(**settings, out=tmp_path / "s").success  # finished already
    for change in ({"target": settings["corpus"]}, {"target_group": "none"}):
        with pytest.raises(ValueError, match=r"another configuration \(target\.(corpus|group): "):
            score(**{**settings, **change}, out=tmp_path / "s")
    shard = Path(settings["target"]) / "s1.parquet"
    table = pq.read_table(shard)
    pq.write_table(table.set_column(1, "label", pa.array([0] * 8)), shard)
    (tmp_path / "s" / "_SUCCESS.json").unlink()
    with pytest.raises(ValueError, match=r"another configuration \(target\.corpus: "):
        score(**settings, out=tmp_path / "s")
    score(**settings, out=tmp_path / "s", overwrite=True)
    assert len(list((tmp_path / "s" / "target").iterdir())) == 4


def test_a_target_that_changes_while_it_is_read_is_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    opened = open_corpus(settings["target"])
    shard = Path(settings["target"]) / "s1.parquet"
    pq.write_table(pq.read_table(shard).slice(0, 5), shard)
    with pytest.raises(ValueError, match=r"s1\.parquet changed since the corpus was opened"):
        score(**{**settings, "target": opened}, out=tmp_path / "s")


def test_damaged_gradients_are_named(settings: dict[str, Any], tmp_path: Path) -> None:
    score(**settings, out=tmp_path / "s")
    (tmp_path / "s" / "_SUCCESS.json").unlink()
    (tmp_path / "s" / "part-00001.parquet").unlink()
    path = sorted((tmp_path / "s" / "target").iterdir())[2]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    for wrong in (bytes(data), bytes(data[:100]), b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"{path.name} is damaged: delete it and run the same"):
            score(**settings, out=tmp_path / "s")
    path.unlink()
    assert score(**settings, out=tmp_path / "s").success
    assert verify(tmp_path / "s")["problems"] == []
    path.write_bytes(bytes(data))
    (problem,) = verify(tmp_path / "s")["problems"]
    assert f"{path.name} is damaged" in problem
    shard = Path(settings["target"]) / "s1.parquet"
    pq.write_table(pq.read_table(shard).slice(0, 5), shard)
    _, other = sorted(verify(tmp_path / "s")["problems"], key=lambda p: "target/seed" not in p)
    assert "s1.parquet changed" in other


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"target": None}, "grad_similarity compares rows with a target: name it by --target"),
        ({"scorers": "el2n"}, "none of the scorers compares rows with a target: add grad_sim"),
        (
            {"scorers": "el2n", "target": None, "target_group": "x"},
            "target group 'x' is given, but no --target",
        ),
        ({"target_group": "part"}, "the target has no column 'part' to group by; it has: x, label"),
        ({"target_group": "x"}, "target column 'x' holds .*list.*, which makes no groups"),
        ({"target": "nowhere"}, "nowhere"),
        ({"scorers": "grad_similarity(mode=less)"}, "has no Adam moments"),
        ({"scorers": "grad_similarity(params=nosuch)"}, "matches no trainable parameter"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_input_is_one_sentence(
    settings: dict[str, Any], tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        score(**{**settings, **change}, out=tmp_path / "s")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "s").glob("part-*"))


def test_targets_that_do_not_suit_are_refused(
    settings: dict[str, Any], make_points: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(table: pa.Table | str, sentence: str) -> None:
        name = table if isinstance(table, str) else str(tmp_path / "bad.parquet")
        if not isinstance(table, str):
            pq.write_table(table, name)
        with pytest.raises(ValueError, match=sentence) as caught:
            score(**{**settings, "target": name}, out=tmp_path / "s")
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "s").glob("part-*"))

    good = pq.read_table(f"{settings['target']}/s0.parquet")
    refused(good.slice(0, 0), "has no rows")
    refused(good.select(["label"]), "x")
    refused(
        make_points([9], labels={4: 7}, name="unknown"),
        r"row 4 of s0.parquet in the target cannot be used: label 7 is none of the 3 classes",
    )
    refused(
        make_points([9], first={4: 661.0}, name="refused"),
        r"row 4 of s0.parquet in the target cannot be used: x is refused",
    )
    refused(
        make_points([9], first={4: float("nan")}, name="nan"),
        r"row 4 of s0.parquet in the target cannot be used: its loss is nan",
    )
    refused(
        make_points([9], first={4: 662.0}, name="chokes"),
        "the target's gradients cannot be taken: RuntimeError: the model chokes",
    )
    nulls = good.set_column(1, "label", pa.array([None, *([0] * 16)], pa.int64()))
    refused(nulls, "target column 'label' is null in a row; every row needs a group")
    monkeypatch.setattr("curate.pipeline.scoring.target_gradients.MOST_BYTES", 100)
    refused(settings["target"], r"take 0.0 GiB \(3 groups\), and sketches of them too much still")
