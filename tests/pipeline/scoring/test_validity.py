"""Scorers outside their settings: each condition, when it is said, and that it is said once."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from curate import cli
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.validity import CHECKS, REFUSED
from curate.pipeline.training.train import train
from curate.scorers.registry import SCORERS, make_scorers


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a target, models of two layers and of one trained on the corpus for two epochs
    and for one, and one trained on the target."""
    root = tmp_path_factory.mktemp("validity")
    rng = np.random.default_rng(0)
    for name, rows in (("data", 40), ("target", 20)):
        x = rng.normal(size=(rows, 3))
        columns = {f"x{i}": x[:, i] for i in range(3)}
        (root / name).mkdir()
        table = pa.table({**columns, "label": (x[:, 0] > 0).astype(int)})
        pq.write_table(table, root / name / "a.parquet")
    for name, corpus, hidden, epochs in (
        ("deep", "data", [6], 2),
        ("linear", "data", [], 2),
        ("brief", "data", [6], 1),
        ("of_target", "target", [6], 2),
    ):
        saves: dict[str, Any] = {"save_epochs": list(range(epochs + 1))}
        if name == "deep":
            saves = {"save_steps": [0, 1, 2, 4], "batch_size": 20}  # epochs of two steps
        train(
            str(root / corpus), model="mlp", model_options={"hidden": hidden}, epochs=epochs,
            seeds=[0], task="tabular_classification", out=str(root / name), threads=1,
            **saves,
        )  # fmt: skip
    return root


def warnings_of(job: Path, scorer: str, checkpoints: str, out: Path, **more: Any) -> dict[str, Any]:
    table = score(
        job / "data", checkpoints=str(job / checkpoints), scorers=scorer, out=out, progress=False,
        **more,
    )  # fmt: skip
    found: dict[str, Any] = table.notes.get("warnings", {})
    return found


@pytest.mark.parametrize(
    ("scorer", "checkpoints", "said"),
    [
        ("el2n", "deep/*1", "of seed0-step000001, from before the end of the first epoch"),
        ("el2n_seq", "deep/*0", "of seed0-step000000, from before the end of the first epoch"),
        ("el2n", "deep/*2", None),
        ("grand", "deep/*1", "of seed0-step000001, from before the end of the first epoch"),
        ("grand", "deep/*0", None),  # said by step_zero.py
        ("gwa", "deep/*0", "of seed0-step000000, which is not trained yet"),
        ("gwa", "deep/*1", None),
        ("vog", "deep/*4", "of one checkpoint is 0 for every row"),
        ("vog", "deep/*[24]", None),
        ("vog", "linear/*[12]", "of a linear model tells the label alone"),
        ("self_influence", "deep/*4", "sums over the training of a run, but seed 0 has one"),
        ("self_influence", "deep/*[24]", None),
        ("forgetting", "brief/*1", "counts over several epochs, but training saw no row more"),
        ("aum", "brief/*1", "counts over several epochs, but training saw no row more"),
        ("aum", "linear/*2", None),
        ("loss", "deep/*0", None),
    ],
)
def test_a_scorer_outside_its_setting_says_so(
    job: Path, tmp_path: Path, scorer: str, checkpoints: str, said: str | None
) -> None:
    found = warnings_of(job, scorer, checkpoints, tmp_path / "s")
    if said is None:
        assert found == {}
    else:
        ((alias, (sentence,)),) = found.items()
        assert alias == scorer and sentence.startswith(said) and "\n" not in sentence


@pytest.mark.parametrize(
    ("scorer", "checkpoints", "said"),
    [
        ("grad_similarity", "deep/*[24]", []),
        ("grad_similarity", "deep/*4", ["sums over the training of a run"]),
        ("grad_similarity(mode=dvgs)", "of_target/*2", []),
        ("grad_similarity(mode=dvgs)", "deep/*4", ["is defined by a model that is trained on the"]),
        ("grad_similarity(similarity=dot)", "deep/*[24]", ["takes inner products, in which long"]),
        (
            "influence(curvature=none,groups=max)",
            "deep/*4",
            ["takes the class that a row helps most"],
        ),
        ("influence(curvature=none)", "deep/*4", []),
    ],
)
def test_similarities_know_what_their_checkpoints_were_trained_on(
    job: Path, tmp_path: Path, scorer: str, checkpoints: str, said: list[str]
) -> None:
    found = warnings_of(job, f"x={scorer}", checkpoints, tmp_path / "s", target=job / "target")
    sentences = found.get("x", [])
    assert len(sentences) == len(said)
    assert all(s.startswith(start) for s, start in zip(sentences, said, strict=True))


@pytest.mark.parametrize("group", ["x0", "none"])
def test_the_best_of_groups_that_are_no_classes_is_let_be(
    job: Path, tmp_path: Path, group: str
) -> None:
    scorer, target = "influence(curvature=none,groups=max)", job / "target"
    more = {"target": target, "target_group": group}
    assert not warnings_of(job, scorer, "deep/*4", tmp_path / "s", **more)


def test_fine_tuned_texts_hear_of_their_own_study(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    table = pa.table({"text": [f"word {i}" for i in range(8)]})
    pq.write_table(table, tmp_path / "c" / "a.parquet")
    train(
        str(tmp_path / "c"), model="gpt", model_options={"layers": 1, "heads": 1, "dim": 8},
        epochs=1, batch_size=2, save_steps=[1], seeds=[0], out=str(tmp_path / "k"), threads=1,
    )  # fmt: skip
    table = score(
        tmp_path / "c", checkpoints=str(tmp_path / "k"), scorers="el2n", out=tmp_path / "s",
        progress=False,
    )  # fmt: skip
    assert "worse than random (Fayyaz et al. 2022)" in table.notes["warnings"]["el2n"][0]


def test_it_is_said_once_for_all_and_printed_later(
    job: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "curate"):
        warnings_of(job, "a=el2n,b=el2n,el2n_seq", "deep/*1", tmp_path / "s", unit_rows=5)
    told = [r.getMessage() for r in caplog.records if "first epoch" in r.getMessage()]
    assert len(told) == 1 and told[0].startswith("a, b, el2n_seq of seed0-step000001")
    shown = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "s"), "--json"])
    assert len(json.loads(shown.stdout)["warnings"]) == 3


def test_what_cannot_be_computed_is_refused(job: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gsnr compares the gradients of several checkpoints"):
        warnings_of(job, "gsnr", "deep/*4", tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_every_scorer_asks_for_what_can_be_checked(name: str) -> None:
    scorer = make_scorers(name)[name]
    assert set(scorer.direction.asks) <= CHECKS.keys() | REFUSED.keys()
    if scorer.direction.asks:
        assert scorer.direction.valid != "any task"


def test_inner_products_do_not_claim_to_help() -> None:
    (scorer,) = make_scorers("grad_similarity(similarity=dot)").values()
    assert "wrong labels are at the top" in scorer.direction.high_means
    (mean,) = make_scorers("grad_similarity(similarity=dot,groups=mean)").values()
    assert "at the top" not in mean.direction.high_means
    (cosine,) = make_scorers("grad_similarity").values()
    assert replace(cosine.direction, asks=()) != replace(scorer.direction, asks=())


def test_the_direction_table_is_printed_in_full(job: Path, tmp_path: Path) -> None:
    warnings_of(job, "el2n,margin", "deep/*4", tmp_path / "s")
    shown = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "s")]).stdout
    for name in ("el2n", "margin"):
        direction = make_scorers(name)[name].direction
        for sentence in (direction.high_means, direction.source, direction.valid):
            assert sentence in " ".join(shown.split())
    found = json.loads(
        CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "s"), "--json"]).stdout
    )
    assert found["directions"]["margin"]["keep"] == "low"
