"""Opening a manifest for training."""

from pathlib import Path

from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.manifests.order import order as order
from curate.pipeline.manifests.row_source import RowSource as RowSource

__all__ = ["Manifest", "RowSource", "load_manifest", "order"]


def load_manifest(path: str | Path, corpus: str | None = None) -> Manifest:
    """Return the manifest in `path`, checked against its files and against its corpus.

    `corpus` says where the data is now, if it moved since; it must be the same data.

    Raises:
        ValueError: there is no manifest, a part was changed, or the corpus is missing or was
            changed (the shard is named).
    """
    return Manifest.open(path, corpus)
