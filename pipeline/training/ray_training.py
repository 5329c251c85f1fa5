"""Trainings in parallel as Ray tasks over the same plain functions that run without Ray."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

import ray

from curate.pipeline.training.train_settings import TrainSettings

MAX_RETRIES = 3

Ts = TypeVarTuple("Ts")
R = TypeVar("R")


@dataclass(frozen=True)
class RayShare:
    """What one training takes of which cluster."""

    threads: int
    num_gpus: int | float
    address: str | None

    @classmethod
    def of(
        cls, settings: TrainSettings, num_gpus: int | float | None, address: str | None
    ) -> "RayShare":
        """Return the share of one training: its threads, and a GPU where it runs on one."""
        usual = 1.0 if settings.device.startswith("cuda") else 0.0
        return cls(settings.threads, usual if num_gpus is None else num_gpus, address)


def results_on_ray(
    work: Callable[[*Ts], R], jobs: Sequence[tuple[*Ts]], share: RayShare
) -> Iterator[tuple[tuple[*Ts], R]]:
    """Yield each job with its result, as they finish, as many at a time as the cluster holds.

    A task whose worker dies is tried again and goes on from its last saved state. The folders that
    jobs write to must be visible from every node. An error of a job is raised here as it is.
    """
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address=share.address, include_dashboard=False)
    try:
        yield from _results(work, jobs, share)
    finally:
        if started_here:
            ray.shutdown()


def _results(
    work: Callable[[*Ts], R], jobs: Sequence[tuple[*Ts]], share: RayShare
) -> Iterator[tuple[tuple[*Ts], R]]:
    held = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus = min(share.threads, int(held.get("CPU", 1)))
    made: Any = ray.remote(work)  # its stub allows at most ten fixed arguments
    unit = made.options(num_cpus=cpus, num_gpus=share.num_gpus, max_retries=MAX_RETRIES)
    waiting = {unit.remote(*job): job for job in jobs}
    try:
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as failed:
                raise failed.cause from None
            yield job, result
    finally:
        for left in waiting:
            ray.cancel(left)
