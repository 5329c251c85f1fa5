"""One training of an evaluation and its result: a plain function of (plan, arm, seed)."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from curate.pipeline.evaluation.measure import HeldOut
from curate.pipeline.evaluation.random_subset import random_manifest
from curate.pipeline.manifests.places import placed
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.storing.storage import Folder
from curate.pipeline.tasks.registry import task_from_description
from curate.pipeline.training.encoded_rows import HeldRows, PickedRows
from curate.pipeline.training.reproducible import reproducible
from curate.pipeline.training.train_settings import TrainSettings
from curate.pipeline.training.trainer import Report, SeedTraining, TrainingRows, training_source

Kind = Literal["full", "random", "subset"]


@dataclass(frozen=True)
class Arm:
    """What is trained on: all rows, a random subset of some size, or a manifest's rows."""

    name: str
    kind: Kind
    kept: int
    method: str
    manifest: str | None = None
    digest: str | None = None

    @property
    def key(self) -> str:
        """A file name that changes with the rows trained on."""
        if self.kind != "subset":
            return f"{self.kind}-{self.kept}"
        assert self.digest is not None, "a manifest has a digest"
        return f"subset-{self.digest[:16]}"

    def result_name(self, seed: int) -> str:
        return f"results/{self.key}-seed{seed}.json"


@dataclass(frozen=True)
class Plan:
    """How every arm is trained (`settings` are those of the full corpus) and tested."""

    settings: TrainSettings
    test: Corpus
    out: str


def run_arm(plan: Plan, arm: Arm, seed: int, report: Report | None = None) -> dict[str, Any]:
    """Train one arm on one seed, test it, commit the result and return it.

    Killed in between, it goes on from the last saved state when called again.
    """
    out = Folder(plan.out)
    settings = _arm_settings(plan, arm, seed)
    with reproducible(settings.threads, settings.device):
        bench = _bench(plan)
        training = SeedTraining(settings, seed, bench.rows(settings))
        training.resume()
        model = training.run(report or (lambda step, loss: None), save=False)
        measure = bench.test.measure(model, settings.precision)
    result = {
        "key": arm.key,
        "seed": seed,
        "steps": settings.length.steps,
        "presentations": settings.length.presentations,
        "value": measure.value,
        **asdict(measure),
    }
    out.create(arm.result_name(seed), json.dumps(result, indent=2, allow_nan=False).encode())
    shutil.rmtree(training.folder.uri, ignore_errors=True)
    return result


def _arm_settings(plan: Plan, arm: Arm, seed: int) -> TrainSettings:
    settings = replace(plan.settings, out=f"{plan.out}/training/{arm.key}")
    if arm.kind == "full":
        return settings
    if arm.manifest is not None:
        return settings.on_manifest(arm.manifest)
    folder = Folder(plan.out).child(f"random/{arm.kept}-seed{seed}")
    return settings.on_manifest(random_manifest(settings.corpus, arm.kept, seed, folder).path)


@dataclass(frozen=True)
class _Bench:
    """What all trainings of an evaluation share in one process: encoded rows."""

    whole: TrainingRows
    test: HeldOut

    def rows(self, settings: TrainSettings) -> TrainingRows | None:
        """Return an arm's rows, picked from those of the whole corpus if these are held."""
        held = self.whole.rows
        if settings.manifest is None:
            return self.whole
        if not isinstance(held, HeldRows):
            return None
        source = training_source(settings, task_from_description(settings.task, settings.corpus))
        first = np.cumsum([0, *(shard.rows for shard in settings.corpus.shards)])
        pieces = placed(source.places, 0, len(source))
        at = np.concatenate([first[p.shard] + p.row for p in pieces])
        return TrainingRows(source, PickedRows(held, at), self.whole.bad)


_benches: dict[str, _Bench] = {}


def _bench(plan: Plan) -> _Bench:
    settings = plan.settings
    parts = [settings.corpus.uri, settings.corpus.digest, plan.test.uri, plan.test.digest]
    named = json.dumps([*parts, settings.task, settings.device], sort_keys=True)
    key = hashlib.sha256(named.encode()).hexdigest()
    if key not in _benches:
        _benches.clear()
        _benches[key] = _new_bench(plan)
    return _benches[key]


def release_rows() -> None:
    """Forget the encoded rows that are held between trainings."""
    _benches.clear()


def _new_bench(plan: Plan) -> _Bench:
    settings = plan.settings
    tested = task_from_description(settings.task, plan.test)
    return _Bench(TrainingRows.of(settings), HeldOut(plan.test, tested, settings.device))
