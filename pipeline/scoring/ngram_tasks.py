"""The n-grams of a corpus and a target counted by Ray's workers, a portion of rows each.

Counts are whole numbers: their sum does not depend on who counted what, or in which order.
"""

from typing import Any

import ray
from ray import exceptions

from curate.pipeline.ray_cluster import Cluster
from curate.pipeline.scoring.score_run import ScoringRun
from curate.pipeline.scoring.score_unit import RunError
from curate.pipeline.scoring.text_weights import (
    Portion,
    TextWeights,
    Totals,
    add_counts,
    zero_counts,
)
from curate.pipeline.scoring.work import Work, text_signals

TICK_S = 1.0


def count_on_ray(run: ScoringRun, cluster: Cluster) -> None:
    """Count what the run's scorers need of n-grams, unless that is done, and keep it.

    A portion whose worker dies is counted again by another, up to three times.

    Raises:
        ValueError: a shard is damaged or changed, or there is nothing to count.
        RunError: workers keep dying.
    """
    if not text_signals(run.work.made):
        return
    texts = TextWeights(run.work, keeps=True)
    if not texts.missing:
        return
    counting: Any = ray.remote(num_cpus=cluster.cpus, max_retries=3)(_counted)
    work, left = ray.put(run.work), texts.portions()
    waiting: dict[Any, Portion] = {}
    totals = zero_counts(texts.signals)
    while left or waiting:
        while left and len(waiting) < 2 * cluster.workers:
            portion = left.pop(0)
            waiting[counting.remote(work, portion)] = portion
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=TICK_S)
        run.lock.check()
        for ref in ready:
            add_counts(totals, _got(ref, waiting.pop(ref)))
    texts.keep(totals)


def _counted(work: Work, portion: Portion) -> Totals:
    return TextWeights(work, keeps=False).counted(portion)


def _got(ref: Any, portion: Portion) -> Totals:
    try:
        counts: Totals = ray.get(ref)
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError | OSError):
            raise error.cause from None
        raise RunError(f"counting n-grams failed: {error.cause}") from error
    except exceptions.RayError as error:
        raise RunError(
            f"workers keep dying while counting the n-grams of rows from {portion.start} on of "
            f"shard {portion.shard} of the {portion.of} ({type(error).__name__}): see their logs"
        ) from None
    return counts
