"""curate: score a training corpus, select the part worth training on, hand it to any trainer.

The public names load on first use, so `import curate` costs no torch and no ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "Batch": "curate.scorers.protocol",
    "Outputs": "curate.scorers.protocol",
    "Scorer": "curate.scorers.protocol",
    "Signal": "curate.scorers.protocol",
    "Selector": "curate.selectors.protocol",
    "Task": "curate.pipeline.tasks.task",
    "build_index": "curate.pipeline.stores.index",
    "evaluate": "curate.pipeline.evaluation.evaluate",
    "export": "curate.pipeline.exporting.export",
    "load_manifest": "curate.pipeline.manifests.loader",
    "open_corpus": "curate.pipeline.reading.corpus",
    "open_index": "curate.pipeline.stores.index",
    "open_store": "curate.pipeline.stores.store",
    "score": "curate.pipeline.scoring.score",
    "select": "curate.pipeline.manifests.select",
    "signals": "curate.scorers.signals",
    "train": "curate.pipeline.training.train",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from curate.pipeline.evaluation.evaluate import evaluate as evaluate
    from curate.pipeline.exporting.export import export as export
    from curate.pipeline.manifests.loader import load_manifest as load_manifest
    from curate.pipeline.manifests.select import select as select
    from curate.pipeline.reading.corpus import open_corpus as open_corpus
    from curate.pipeline.scoring.score import score as score
    from curate.pipeline.stores.index import build_index as build_index
    from curate.pipeline.stores.index import open_index as open_index
    from curate.pipeline.stores.store import open_store as open_store
    from curate.pipeline.tasks.task import Task as Task
    from curate.pipeline.training.train import train as train
    from curate.scorers.protocol import Batch as Batch
    from curate.scorers.protocol import Outputs as Outputs
    from curate.scorers.protocol import Scorer as Scorer
    from curate.scorers.protocol import Signal as Signal
    from curate.scorers.signals import signals as signals
    from curate.selectors.protocol import Selector as Selector


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'curate' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
