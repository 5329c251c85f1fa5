"""The Ray cluster that a run works on: made here, joined, or found running."""

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from curate.pipeline.storing.storage import Folder
from curate.pipeline.wheel import write_wheel

log = logging.getLogger("curate.ray")

JOB_ENVIRONMENT = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in a process that `ray job submit` started: its runtime environment is the job's."""


@dataclass(frozen=True)
class Cluster:
    """How many workers to run, and what each takes."""

    workers: int
    cpus: float
    gpus: float

    @classmethod
    def split(
        cls, threads: int, workers: int | None, num_gpus: float | None, units: int
    ) -> "Cluster":
        """Return the split of the cluster: one GPU a worker where there are GPUs, else CPUs.

        Raises:
            ValueError: the cluster lacks what a worker needs.
        """
        cpus, all_gpus = resources()
        gpus = num_gpus if num_gpus is not None else min(1.0, all_gpus)
        check_gpus(gpus, "a worker")
        if workers is None:
            workers = int(all_gpus // gpus) if gpus else int(cpus // threads)
        workers = max(1, min(workers, units))
        each = max(1.0, min(threads, cpus // workers)) if workers <= cpus else cpus / workers
        log.info(
            "%d workers on Ray, each with %d threads%s",
            workers,
            threads,
            f" and {gpus:g} GPUs" if gpus else "",
        )
        return cls(workers, each if each >= 1 else round(each, 4), gpus)

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
def connected(address: str | None, out: str) -> Iterator[None]:
    """Be on a cluster while the block runs: the one at `address`, or one made here.

    A cluster that was running before stays as it was. `out` is where workers will write.

    Raises:
        ValueError: no cluster answers at `address`.
    """
    was_running = ray.is_initialized()
    if not was_running:
        with _signals_kept():
            _join(address)
    try:
        _warn_of_local_folder(out)
        yield
    finally:
        if not was_running:
            ray.shutdown()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep what SIGTERM does: Ray would make it end the process without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_cluster(address: str | None, num_gpus: float | None, who: str, out: str) -> None:
    """Join the cluster that `connected` would, see that it can do the work, and leave it again.

    A cluster made here for work without GPUs could do it: none is started then.

    Raises:
        ValueError: no cluster answers, or it lacks the GPUs that `who` asks for.
    """
    if address or os.environ.get("RAY_ADDRESS") or num_gpus:
        with connected(address, out):
            check_gpus(num_gpus or 0.0, who)


def resources() -> tuple[float, float]:
    """Return the CPUs and GPUs of the cluster."""
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return total.get("CPU", 1.0), total.get("GPU", 0.0)


def check_gpus(wanted: float, who: str) -> None:
    """Raise ValueError when `who` would wait for ever for GPUs that the cluster lacks."""
    _, gpus = resources()
    if wanted > gpus:
        raise ValueError(
            f"{who} asks for {wanted:g} GPUs, but the cluster has {gpus:g}; lower --num-gpus or "
            f"leave it out"
        )


def _join(address: str | None) -> None:
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # an advert each start
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        log.info("starting Ray on this machine")
        try:
            ray.init(include_dashboard=False, logging_level=logging.WARNING)
        except Exception as error:  # Ray has no name for it: a full disk, ports, processes
            said = str(error).strip().partition("\n")[0]
            named = (os.environ.get(key) for key in ("RAY_TMPDIR", "TMPDIR"))
            place = next((n for n in named if n), None) or tempfile.gettempdir()
            raise RuntimeError(
                f"Ray did not start on this machine; see that {place} has room for its files, or "
                f"take --engine local ({said})"
            ) from error
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


def _warn_of_local_folder(out: str) -> None:
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    if len(nodes) > 1 and not Folder(out).is_remote:
        log.warning("every node must see %s: it has to lie on a shared file system", out)
