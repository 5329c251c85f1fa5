"""Which of the things that curate reads and writes a path is."""

from enum import Enum
from pathlib import Path

from curate.pipeline.exporting.export import PLAN as EXPORT
from curate.pipeline.manifests.manifest import NAME as MANIFEST
from curate.pipeline.models.checkpoint import META as CHECKPOINT
from curate.pipeline.scoring.score_table import META as SCORES
from curate.pipeline.storing.storage import Folder


class Kind(Enum):
    """What a path is; the value is how people call it."""

    CORPUS = "corpus"
    CHECKPOINTS = "checkpoints"
    SCORES = "score table"
    MANIFEST = "manifest"
    EXPORT = "export"
    RUN = "run"


def kind_of(path: str | Path) -> Kind:
    """Return what `path` is, from the names in it; what is nothing of ours counts as a corpus."""
    folder = Folder(path)
    if folder.exists(SCORES):
        return Kind.SCORES
    if folder.exists(MANIFEST):
        return Kind.MANIFEST
    if folder.exists(EXPORT):
        return Kind.EXPORT
    if _holds_weights(folder):
        return Kind.CHECKPOINTS
    children = [folder.child(name) for name in folder.folders()]
    if any(child.exists(SCORES) or child.exists(MANIFEST) for child in children):
        return Kind.RUN
    if folder.child("checkpoints").exists():
        return Kind.RUN
    if any(_holds_weights(child) for child in children):
        return Kind.CHECKPOINTS
    return Kind.CORPUS


def _holds_weights(folder: Folder) -> bool:
    """True for our checkpoints and for Hugging Face model folders."""
    if folder.exists(CHECKPOINT):
        return True
    return folder.exists("config.json") and any(
        name.endswith((".safetensors", ".bin", ".index.json")) for name in folder.names()
    )
