"""Which vectors a run stores beside its scores, as asked for by --sketch, --store and --top-rows.

Shapes: K checkpoints, W numbers of a vector at one checkpoint.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from curate.pipeline.models.checkpoint import Checkpoint
from curate.pipeline.models.weights import weight_files
from curate.pipeline.stores.layout import STORES
from curate.pipeline.tasks.task import Task
from curate.scorers.protocol import Signal
from curate.scorers.readouts import TwoSidedSketch
from curate.scorers.registry import parse_request
from curate.scorers.row_vectors import Sketch, sketch_kind

DEFAULT_SKETCH = "32x32"
TOP_ROWS_SKETCH = "4096"
"""What --top-rows finds candidates by where no --sketch is named: 8 KiB per row and checkpoint."""
MOST_CLASSES = 32_768
"""Beyond that a row's probabilities are a vocabulary's, not a classifier's."""
WINDOW_BYTES = 256 << 20
"""What the vectors of a window may take, in memory, until they are written."""
UNIT_BYTES = 2 << 30
"""About what a unit's files may take."""
SIMILARITIES = "cosine", "dot"
ASSUMED_LAYERS = 300
"""Of weights that are no safetensors, whose header would tell."""


@dataclass(frozen=True)
class StorePlan:
    """What is stored. `sketch` is {} where no sketches are; `top_rows` 0 for no such table.

    A sketch has `kind` (two-sided or one-sided), `k`, `jl` (sparse, dense or null), `seed` and
    `params`, the pattern of the parameters that it is of.
    """

    names: tuple[str, ...]
    sketch: dict[str, Any]
    top_rows: int = 0
    similarity: str = "cosine"

    @property
    def signals(self) -> dict[str, Signal]:
        """The engine's name of each store's vectors."""
        found: dict[str, Signal] = {}
        for name in self.names:
            params = self.sketch["params"] if name == "sketch" else ""
            found[name] = Signal(name, params)  # type: ignore[arg-type]  # a kind by its name
        return found

    @property
    def kind(self) -> Sketch | None:
        """The engine's sketch."""
        if not self.sketch:
            return None
        return sketch_kind(tuple(self.sketch["k"]), self.sketch["jl"], self.sketch["seed"])

    def config(self) -> dict[str, Any]:
        """Return what decides the numbers."""
        return {
            "names": list(self.names),
            "sketch": self.sketch,
            "top_rows": self.top_rows,
            "similarity": self.similarity if self.top_rows else None,
        }


def plan_stores(
    store: str | Sequence[str] | None,
    sketch: str | None,
    top_rows: int | None,
    similarity: str | None,
    task: Task,
    has_target: bool,
) -> StorePlan | None:
    """Return what is to be stored; None where nothing is.

    Raises:
        ValueError: a name, size or number that makes no sense, or top rows without a target.
    """
    texts = [store] if isinstance(store, str) else store or []
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    for name in names:
        if name not in STORES:
            raise ValueError(f"unknown store {name!r}; choose from: {', '.join(STORES)}")
    if similarity not in (None, *SIMILARITIES):
        raise ValueError(f"unknown similarity {similarity!r}; choose cosine or dot")
    if similarity is not None and top_rows is None:
        raise ValueError(
            "similarity says how top rows are compared, and none are asked for: give --top-rows "
            "too. A scorer has a setting of its own, such as grad_similarity(similarity=dot)"
        )
    if top_rows is not None:
        if top_rows < 1:
            raise ValueError(f"top_rows must be at least 1, got {top_rows}")
        if not has_target:
            raise ValueError("top_rows finds what is nearest to a target's rows: name it, --target")
    if sketch is None and (top_rows or "sketch" in names):
        sketch = DEFAULT_SKETCH if "sketch" in names else TOP_ROWS_SKETCH
    if sketch is not None:
        names.append("sketch")
    if not names:
        return None
    if "probs" in names:
        _check_classes(task)
    return StorePlan(
        names=tuple(name for name in STORES if name in names),
        sketch={} if sketch is None else read_sketch(sketch),
        top_rows=top_rows or 0,
        similarity=similarity or "cosine",
    )


def read_sketch(text: str) -> dict[str, Any]:
    """Return what `32x32`, `4096` or `4096(jl=dense,seed=1,params=head)` asks for.

    Raises:
        ValueError: the text is none of these.
    """
    size, params = parse_request(text, "sketch")
    unknown = sorted(set(params) - {"params", "seed", "jl"})
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", size)
    if match is None or unknown:
        raise ValueError(
            f"cannot read sketch {text!r}; write 32x32 (every parameter two-sided), 4096 (the "
            f"whole gradient), or such as 4096(params=head,seed=1,jl=dense)"
        )
    k = tuple(int(side) for side in match.groups() if side)
    jl, seed, pattern = params.get("jl"), params.get("seed", 0), params.get("params", "")
    if not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ValueError(f"sketch {text!r}: seed must be a whole number from 0 on, not {seed!r}")
    if jl is not None and len(k) == 2:
        raise ValueError(f"sketch {text!r}: jl belongs to a one-sided sketch, such as 4096")
    kind = sketch_kind(k, jl, seed)
    if isinstance(kind, TwoSidedSketch):
        said = {"kind": "two-sided", "jl": None}
    else:
        said = {"kind": "one-sided", "jl": "sparse" if kind.is_sparse else "dense"}
    return {**said, "k": list(k), "seed": seed, "params": str(pattern)}


def _check_classes(task: Task) -> None:
    if task.kind in ("causal_lm", "seq2seq"):
        raise ValueError(
            f"probs of the task {task.kind} would be a vocabulary for every token: store "
            f"embedding or sketch instead"
        )
    if task.classes is not None and len(task.classes) > MOST_CLASSES:
        raise ValueError(
            f"probs of {len(task.classes):,} classes are more than {MOST_CLASSES:,} numbers for "
            f"each row: store embedding or sketch instead"
        )


def window_limit(plan: StorePlan | None, found: Sequence[Checkpoint]) -> int | None:
    """Return how many rows a window may have for its vectors to stay in WINDOW_BYTES, about."""
    if plan is None or not plan.sketch:
        return None
    width = 1
    for side in plan.sketch["k"]:
        width *= side
    if plan.sketch["kind"] == "two-sided":
        width *= _layers(found[0].path)
    return max(1, WINDOW_BYTES // (2 * width * len(found)))


def _layers(path: str) -> int:
    """Return how many tensors the weights hold."""
    count = 0
    for file in weight_files(Path(path)):
        try:
            with safe_open(file, framework="pt") as opened:
                count += len(opened.keys())
        except (SafetensorError, OSError):
            return ASSUMED_LAYERS
    return count or ASSUMED_LAYERS


def described(plan: StorePlan | None) -> dict[str, Any] | None:
    """Return the plan as `_meta.json` has it."""
    if plan is None:
        return None
    content: dict[str, Any] = json.loads(json.dumps(plan.config()))
    return content
