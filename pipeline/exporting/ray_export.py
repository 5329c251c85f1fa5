"""Export units as tasks on Ray: a bounded number at work, only receipts come back."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import ray
from ray import exceptions

from curate.pipeline.exporting.plan import Export, Unit, Wish
from curate.pipeline.exporting.unit import export_unit
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.ray_cluster import connected, resources
from curate.pipeline.storing.storage import Folder

log = logging.getLogger("curate.export")

RETRIES = 3
"""How often Ray starts a unit again whose worker died."""


def export_on_ray(
    job: Export,
    todo: Sequence[Unit],
    units: int,
    folder: Folder,
    workers: int | None,
    address: str | None,
) -> None:
    """Export these units on the cluster at `address`, or on one made here.

    Nodes must see corpus, manifest and output under the same paths. A unit that fails with an
    error stops the export; those at work are waited for, so that nothing writes on afterwards.

    Raises:
        ValueError: the cluster cannot be joined, or a value does not fit the format.
        RuntimeError: a unit's worker died again and again.
    """
    with connected(address, folder.uri):
        at_once = workers or max(1, int(resources()[0]))
        log.info("%d units on Ray, %d at a time", len(todo), at_once)
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(_export)
        moved_to = job.manifest.corpus.uri
        arguments = (job.manifest.path, moved_to, job.manifest.digest, job.wish)
        waiting, busy = list(todo), dict[Any, Unit]()
        try:
            while waiting or busy:
                while waiting and len(busy) < at_once:
                    unit = waiting.pop(0)
                    busy[task.remote(*arguments, unit, units, folder.uri)] = unit
                done, _ = ray.wait(list(busy), num_returns=1)
                for ref in done:
                    _result(ref, busy.pop(ref))
        finally:
            if busy:
                ray.wait(list(busy), num_returns=len(busy))


def _result(ref: Any, unit: Unit) -> None:
    try:
        ray.get(ref)
    except exceptions.RayTaskError as failed:
        raise failed.cause from None
    except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError) as died:
        said = " ".join(str(died).split())
        raise RuntimeError(
            f"the worker that exported unit {unit.number} died {RETRIES + 1} times: {said}"
        ) from None


def _export(
    path: str, corpus: str, digest: str, wish: Wish, unit: Unit, units: int, out: str
) -> int:
    """Export a unit in a worker; the manifest is opened once per process."""
    export_unit(_opened(path, corpus, digest, wish), unit, units, Folder(out))
    return unit.number


@lru_cache(maxsize=2)
def _opened(path: str, corpus: str, digest: str, wish: Wish) -> Export:
    manifest = Manifest.open(path, corpus)
    if manifest.digest != digest:
        raise ValueError(f"{path} is another manifest here than where the export was started")
    return Export(manifest, wish)
