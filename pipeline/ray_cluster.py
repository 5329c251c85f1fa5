"""The Ray cluster that a run works on: made here, joined, or found running."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from curate.pipeline.scoring.work import Work
from curate.pipeline.storing.storage import Folder
from curate.pipeline.wheel import write_wheel

log = logging.getLogger("curate.score")

JOB_ENVIRONMENT = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in a process that `ray job submit` started: its runtime environment is the job's."""


@dataclass(frozen=True)
class Cluster:
    """How many workers to run, and what each takes."""

    workers: int
    cpus: float
    gpus: float

    def actor_class(self, cls: type) -> Any:
        """Return the class as a Ray actor that Ray never restarts by itself."""
        options: dict[str, Any] = {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {"watch": 1},
        }
        return ray.remote(**options)(cls)


@contextlib.contextmanager
def connected(
    address: str | None,
    work: Work,
    workers: int | None,
    num_gpus: float | None,
    units: int,
) -> Iterator[Cluster]:
    """Give the cluster while the block runs. A cluster that was running before stays as it was.

    Raises:
        ValueError: no cluster answers at `address`, or it lacks what a worker needs.
    """
    was_running = ray.is_initialized()
    if not was_running:
        _join(address)
    try:
        _warn_of_local_folder(work)
        yield _cluster(work, workers, num_gpus, units)
    finally:
        if not was_running:
            ray.shutdown()


def _join(address: str | None) -> None:
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        log.info("starting Ray on this machine")
        ray.init(include_dashboard=False, logging_level=logging.WARNING)
        return
    options: dict[str, Any] = {"address": address, "logging_level": logging.WARNING}
    with tempfile.TemporaryDirectory(prefix="curate-") as folder:
        if JOB_ENVIRONMENT not in os.environ:
            wheel = write_wheel(Path(folder))
            options["runtime_env"] = {"py_modules": [str(wheel)]}
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError) as error:
            said = str(error).strip().partition("\n")[0]
            raise ValueError(f"cannot join a Ray cluster at {address}: {said}") from None


def _cluster(work: Work, workers: int | None, num_gpus: float | None, units: int) -> Cluster:
    """Return the split of the cluster: one GPU a worker where there are GPUs, else CPUs."""
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = num_gpus if num_gpus is not None else min(1.0, total.get("GPU", 0.0))
    if gpus > total.get("GPU", 0):
        raise ValueError(
            f"a worker asks for {gpus:g} GPUs, but the cluster has {total.get('GPU', 0):g}; "
            f"lower --num-gpus or leave it out"
        )
    cpus = total.get("CPU", 1)
    if workers is None:
        workers = int(total["GPU"] // gpus) if gpus else int(cpus // work.threads)
    workers = max(1, min(workers, units))
    each = max(1.0, min(work.threads, cpus // workers)) if workers <= cpus else cpus / workers
    log.info(
        "%d workers on Ray, each with %d threads%s",
        workers,
        work.threads,
        f" and {gpus:g} GPUs" if gpus else "",
    )
    return Cluster(workers, each if each >= 1 else round(each, 4), gpus)


def _warn_of_local_folder(work: Work) -> None:
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    if len(nodes) > 1 and not Folder(work.out).is_remote:
        log.warning("every node must see %s: it has to lie on a shared file system", work.out)
