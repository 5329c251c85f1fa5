"""Seeds in parallel as Ray tasks over the same `train_seed`."""

import logging
from collections.abc import Sequence

import ray

from curate.pipeline.train_settings import TrainSettings
from curate.pipeline.trainer import SeedReceipt, train_seed

MAX_RETRIES = 3

log = logging.getLogger("curate.train")


def train_with_ray(
    settings: TrainSettings, seeds: Sequence[int], address: str | None = None
) -> list[SeedReceipt]:
    """Return the receipts of these seeds, trained as many at a time as the cluster holds.

    A task whose worker dies is tried again and goes on from its last saved state; the folder
    `settings.out` must be visible from every node.
    """
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    try:
        return _receipts(settings, seeds)
    finally:
        if started_here:
            ray.shutdown()


def _receipts(settings: TrainSettings, seeds: Sequence[int]) -> list[SeedReceipt]:
    on_gpu = settings.device.startswith("cuda")
    held = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus = min(settings.threads, int(held.get("CPU", 1)))
    unit = ray.remote(num_cpus=cpus, num_gpus=int(on_gpu), max_retries=MAX_RETRIES)(train_seed)
    waiting = {unit.remote(settings, seed): seed for seed in seeds}
    receipts: dict[int, SeedReceipt] = {}
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        seed = waiting.pop(done)
        try:
            receipts[seed] = ray.get(done)
        except ray.exceptions.RayTaskError as failed:
            for other in waiting:
                ray.cancel(other)
            raise failed.cause from None
        log.info(
            "seed %d: %d steps in %.1f s (%d of %d seeds)",
            seed,
            receipts[seed].steps,
            receipts[seed].seconds,
            len(receipts),
            len(seeds),
        )
    return [receipts[seed] for seed in seeds]
