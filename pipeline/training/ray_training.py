"""Trainings in parallel as Ray tasks over the same plain functions that run without Ray."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

import ray

from curate.pipeline.ray_cluster import check_gpus, connected, resources
from curate.pipeline.training.train_settings import TrainSettings

MAX_RETRIES = 3
TICK_S = 1.0
"""How long a wait may keep signals waiting."""

Ts = TypeVarTuple("Ts")
R = TypeVar("R")


@dataclass(frozen=True)
class RayShare:
    """What one training takes of which cluster."""

    threads: int
    num_gpus: int | float
    address: str | None
    out: str

    @classmethod
    def of(
        cls, settings: TrainSettings, num_gpus: int | float | None, address: str | None
    ) -> "RayShare":
        """Return the share of one training: its threads, and a GPU where it runs on one."""
        usual = 1.0 if settings.device.startswith("cuda") else 0.0
        return cls(settings.threads, usual if num_gpus is None else num_gpus, address, settings.out)


def results_on_ray(
    work: Callable[[*Ts], R], jobs: Sequence[tuple[*Ts]], share: RayShare
) -> Iterator[tuple[tuple[*Ts], R]]:
    """Yield each job with its result, as they finish, as many at a time as the cluster holds.

    A task whose worker dies is tried again and goes on from its last saved state. The folders that
    jobs write to must be visible from every node. An error of a job is raised here as it is.

    Raises:
        ValueError: no cluster answers, or it lacks what a training needs.
    """
    with connected(share.address, share.out):
        check_gpus(share.num_gpus, "a training")
        yield from _results(work, jobs, share)


def _results(
    work: Callable[[*Ts], R], jobs: Sequence[tuple[*Ts]], share: RayShare
) -> Iterator[tuple[tuple[*Ts], R]]:
    cpus = min(share.threads, int(resources()[0]))
    made: Any = ray.remote(work)  # its stub allows at most ten fixed arguments
    unit = made.options(num_cpus=cpus, num_gpus=share.num_gpus, max_retries=MAX_RETRIES)
    waiting = {unit.remote(*job): job for job in jobs}
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=TICK_S)
            if not ready:
                continue
            (done,) = ready
            job = waiting.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as failed:
                raise failed.cause from None
            except ray.exceptions.RayError as died:
                said = str(died).strip().partition("\n")[0]
                raise RuntimeError(
                    f"a training's worker died {MAX_RETRIES + 1} times, the last: {said}; free "
                    f"memory or take fewer --threads, and run the same command to go on"
                ) from None
            yield job, result
    finally:
        for left in waiting:
            ray.cancel(left)
