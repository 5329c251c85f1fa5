"""What a run folder holds: checkpoints, a score table, manifests, evaluations."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec

from curate.pipeline.manifests.manifest import NAME as MANIFEST
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.models.checkpoint import Checkpoint, find_checkpoints
from curate.pipeline.scoring.score_table import META as SCORES
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.storing.storage import Folder

log = logging.getLogger("curate.run_folder")
P = ParamSpec("P")


@dataclass
class RunFolder:
    """The parts of a run that are there and whole; `notes` say which are not, and why."""

    folder: Folder
    checkpoints: list[Checkpoint] = field(default_factory=list)
    scores: ScoreTable | None = None
    manifests: list[Manifest] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> "RunFolder":
        """Return what is in `path`: `checkpoints/`, `scores/`, `manifest*/`, `evaluate*/`."""
        run = cls(Folder(path))
        folder = run.folder
        if folder.folders("checkpoints"):
            run._try(run._add_checkpoints)
        if folder.child("scores").exists(SCORES):
            run._try(run._add_scores)
        for name in folder.folders("manifest"):
            if folder.child(name).exists(MANIFEST):
                run._try(run._add_manifest, name)
        for name in folder.folders("evaluate"):
            for file in folder.names(f"{name}/"):
                if file.endswith(".json"):
                    run._try(run._add_evaluation, file)
        return run

    @property
    def is_empty(self) -> bool:
        return not (self.checkpoints or self.scores or self.manifests or self.evaluations)

    @property
    def name(self) -> str:
        return self.folder.uri.rstrip("/").rsplit("/", 1)[-1]

    def manifest_name(self, manifest: Manifest) -> str:
        """Return the manifest's path as seen from the run folder."""
        return manifest.path.removeprefix(self.folder.uri).lstrip("/")

    def _full(self, name: str) -> str:
        return self.folder.full_name(name)

    def _add_checkpoints(self) -> None:
        self.checkpoints = find_checkpoints([self._full("checkpoints")])

    def _add_scores(self) -> None:
        self.scores = ScoreTable.open(self._full("scores"))

    def _add_manifest(self, name: str) -> None:
        self.manifests.append(Manifest.read(self._full(name)))

    def _add_evaluation(self, name: str) -> None:
        content = self.folder.read_json(name)
        if isinstance(content, dict) and content.get("format") == "curate.evaluation":
            self.evaluations.append(content)

    def _try(self, read: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Read a part; one that cannot be read becomes a note."""
        try:
            read(*args, **kwargs)
        except ValueError as unreadable:
            log.warning("%s", unreadable)
            self.notes.append(str(unreadable))
