"""Selecting rows of a score table under a budget and writing the manifest."""

import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from curate.pipeline.manifests.among import Among, manifest_of
from curate.pipeline.manifests.census import CODE, Census, attached
from curate.pipeline.manifests.claim import found_again, of_manifests, refuse_operand, taking_place
from curate.pipeline.manifests.grouping import Grouping
from curate.pipeline.manifests.manifest import Manifest, write_manifest, write_parts
from curate.pipeline.manifests.rescheduled import Wish
from curate.pipeline.manifests.schedules import refuse_rates
from curate.pipeline.manifests.score_columns import (
    direction_of,
    group_column,
    hard_end,
    kept_end,
    known_classes,
    score_column,
)
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder
from curate.pipeline.vectors.resolve import with_vectors
from curate.selectors.budget import need_columns, parse_budget
from curate.selectors.composite import Composite
from curate.selectors.protocol import Budget, Selection, Selector, Table
from curate.selectors.registry import (
    make_selector,
    needs_setting,
    selector_fields,
    uses_vectors,
)
from curate.selectors.weights import Weighting, check_weighting

log = logging.getLogger("curate.select")

_NOT_PARAMS = ("by", "direction", "carry", "ranked")
_NO_BUDGET = ("threshold", "semdedup", "exact", "gio")
"""Methods with a limit of their own; for them a budget is a bound."""


def select(
    scores: str | Path | ScoreTable = "run/scores",
    *,
    by: str | None = None,
    budget: float | int | str | None = None,
    method: str = "keep",
    out: str | Path = "run/manifest",
    seed: int = 0,
    overwrite: bool = False,
    drop_top: float | int = 0,
    offset: float | int | None = None,
    include_errors: bool = False,
    params: dict[str, Any] | None = None,
    direction: Literal["high", "low"] | None = None,
    by_group: str | None = None,
    among: str | Path | None = None,
    weight_kind: str | None = None,
    clip_weights: float | None = None,
    schedule: str | None = None,
    epochs: int | None = None,
    schedule_params: dict[str, Any] | None = None,
    vectors: str | None = None,
    target_vectors: str | None = None,
    target: str | None = None,
) -> Manifest:
    """Choose rows by their scores and return the manifest written to `out`.

    `by` is the score column, by default the only one, or an expression over scores such as
    "0.7*rank(el2n) + 0.3*z(aum)" (`selectors/expression.py`). `direction` is the end to keep
    where the method asks; by default the scorer's, or of an expression the end on which all its
    scorers agree. `budget`: see `parse_budget`; a threshold needs none. `method` is a name of
    `selectors/registry.py`, `params` its hyper-parameters; `drop_top`, `offset`,
    `include_errors` and `by_group` are such parameters too. `among` is a manifest of the same data:
    only rows that it keeps are chosen, and ranks and z of an expression are among them; shares of
    a budget are of all rows of the corpus still, and its weights are not carried over. Weights are
    written as `weight_kind` (by default as the method makes them) and cut at `clip_weights` times
    their mean. `schedule`, a rule with `schedule_params`, says what each of `epochs` shows; its
    `by_group` is a column of the table. `vectors` and `target_vectors` name what methods of
    geometry compare (`pipeline/vectors/resolve.py`), `target` the corpus of the latter; such
    methods use a score only where they are given one. The same call again finds its manifest and
    returns it. The returned manifest has a `summary`: what was kept beside what a random selection
    would have kept.

    Raises:
        ValueError: the table is missing or unfinished, a column, method, parameter, budget or
            kind of weights is wrong, nothing is selected, or `out` holds something else (unless
            `overwrite`).
    """
    table = scores if isinstance(scores, ScoreTable) else ScoreTable.open(scores)
    check_weighting(weight_kind, clip_weights)
    asked = {**(params or {})}
    by = asked.pop("by", None) if by is None else by
    if drop_top:
        asked["drop_top"] = drop_top
    if offset is not None:  # a window from 0 is not a window from the hard end
        asked["offset"] = offset
    for name, text in (("direction", direction), ("by_group", by_group)):
        if text is not None:
            asked[name] = text
    if include_errors:
        asked["include_errors"] = True
    if vectors == "probs" and {"label", "classes"} <= {*selector_fields(method), *asked}:
        asked = known_classes(table, asked["label"]) | asked
    wish = _wish(schedule, seed, epochs, schedule_params)
    written: dict[str, Any] = {"weight_kind": weight_kind, "clip_weights": clip_weights}
    written["scheduled"] = None if wish is None else wish.content()
    earlier = None if among is None else _earlier(str(among), table, asked)
    request = _request(table, by, budget, method, seed, asked, written, earlier)
    request = replace(request, wish=wish)
    _need_groups(table, wish)
    request = _seeing(request, table, method, vectors, target_vectors, target)
    folder = Folder(str(out))
    refuse_operand(folder, _operands(among, request))
    found = found_again(folder, lambda there: _differences(there, request.content), overwrite)
    return _write(request, folder) if found is None else found


@dataclass(frozen=True)
class Request:
    """What is asked of a table, checked; `content` is what the manifest says of it.

    `table` is the score table, with one more column where `by` is an expression.
    """

    table: Table
    selector: Selector
    budget: Budget
    by: str | None
    group: str | None
    content: dict[str, Any]
    wish: Wish | None = None

    @property
    def seed(self) -> int:
        return int(self.content["selection"]["seed"])


def _seeing(
    request: Request,
    scores: ScoreTable,
    method: str,
    vectors: str | None,
    target_vectors: str | None,
    target: str | None,
) -> Request:
    """Return the request with the vectors that its method compares."""
    named = (vectors, target_vectors, target)
    table, content = with_vectors(request.table, scores, request.selector, method, *named)
    request.content["selection"]["params"] |= content
    return replace(request, table=table)


def _wish(
    rule: str | None, seed: int, epochs: int | None, params: dict[str, Any] | None
) -> Wish | None:
    if rule is not None:
        return Wish(rule, seed, epochs, dict(params or {}))
    if epochs is not None or params:
        raise ValueError("epochs and parameters of a schedule need its rule: --schedule RULE")
    return None


def _earlier(path: str, table: ScoreTable, asked: dict[str, Any]) -> Manifest:
    """Return the manifest to choose among; say what of it is left behind."""
    if asked.get("include_errors"):
        raise ValueError("rows that could not be scored are in no earlier choice; leave one out")
    earlier = manifest_of(path, table)
    if earlier.weight_kind != "none":
        log.warning("the %s weights of %s are not carried over", earlier.weight_kind, path)
    if earlier.content["schedule"] is not None:
        log.warning("the schedule of %s is not carried over", path)
    return earlier


def _operands(among: str | Path | None, request: Request) -> list[Folder]:
    """Return the folders of the manifests that the request is made from."""
    weights = request.content["selection"]["params"].get("weights_of", {}).get("source")
    return [Folder(path) for path in (among, weights) if path is not None]


def _need_groups(table: ScoreTable, wish: Wish | None) -> None:
    by_group = None if wish is None else wish.by_group
    if by_group is not None and by_group not in table.schema.names:
        raise ValueError(
            f"the score table has no column {by_group!r} for the schedule's groups; score again "
            f"with --keep {by_group}, or give the selection its schedule by `curate manifest "
            "schedule`, which reads the corpus"
        )


def _request(
    table: ScoreTable,
    by: str | None,
    budget: float | int | str | None,
    method: str,
    seed: int,
    asked: dict[str, Any],
    written: dict[str, Any],
    earlier: Manifest | None = None,
) -> Request:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"the seed must be a whole number from 0, not {seed!r}")
    fields = selector_fields(method)
    for name, text in (("by", by), ("by_group", asked.get("by_group"))):
        if not isinstance(text, str | None):
            raise ValueError(f"{name} must name a column of the score table, not {text!r}")
    if "carry" in asked:
        raise ValueError("carry is no setting of a selection; manifests carry what they need")
    if budget is None and method not in _NO_BUDGET:
        raise ValueError("say how much to keep: --budget 0.5, 50%, 10000 or 2e9tok")
    amount = parse_budget(1.0 if budget is None else budget)
    # Methods of geometry that can do without a score use one only if it is named.
    takes_by = "by" in fields and (
        by is not None or not uses_vectors(method) or needs_setting(method, "by")
    )
    column, composite = score_column(table, by, is_needed=takes_by)
    source: Table = table if earlier is None else Among(table, earlier)
    source = source if composite is None else Composite(source, composite)
    needs_group = method == "balanced"
    group = group_column(table, asked.get("by_group"), needs_group)
    if needs_group and "by_group" not in asked:
        if group is None:
            raise ValueError(
                f"method {method!r} needs a column of groups, --param by_group=COLUMN; the score "
                f"table has none; score again with --keep COLUMN"
            )
        asked["by_group"] = group
    if takes_by:
        asked.setdefault("by", column)
    if "direction" in fields and "direction" not in asked and asked.get("by") is not None:
        is_needed = method == "keep" or composite is not None
        end = hard_end if method == "ccs" else kept_end
        direction = direction_of(table, asked["by"], composite, is_needed, end)
        asked |= {"direction": direction} if direction else {}
    selector = make_selector(method, **asked)
    need_columns(source, selector.needs)
    carry = _carried(source, column, group) if "carry" in fields else ()
    whole = make_selector(method, **asked, carry=carry) if carry else selector
    content = _content(table, selector, amount, method, seed)
    content["selection"]["params"] |= {k: v for k, v in written.items() if v is not None}
    if earlier is not None:
        content["selection"]["params"]["among"] = of_manifests([earlier])[0]
    return Request(source, whole, amount, column, group, content)


def _content(
    table: ScoreTable, selector: Selector, budget: Budget, method: str, seed: int
) -> dict[str, Any]:
    settings = json.loads(json.dumps(_settings(selector)))  # as it will be read back
    value = budget.value if budget.kind == "fraction" else int(budget.value)
    return {
        "corpus": table.corpus,
        "selection": {
            "method": method,
            "by": settings.get("by"),
            "direction": _said_direction(method, settings),
            "budget": {"kind": budget.kind, "value": value},
            "seed": seed,
            "params": {k: v for k, v in settings.items() if k not in _NOT_PARAMS and v is not None},
        },
        "scores": [
            {
                "run": table.meta["run"],
                "digest": table.success["digest"],
                "scorers": table.scorers,
            }
        ],
    }


def _settings(selector: Selector) -> dict[str, Any]:
    settings: dict[str, Any] = asdict(selector)  # type: ignore[call-overload]
    return settings


def _said_direction(method: str, settings: dict[str, Any]) -> str | None:
    if method in ("top", "bottom"):
        return "high" if method == "top" else "low"
    if settings.get("offset") is not None:
        return "low"
    return settings.get("direction") if settings.get("by") else None


def _carried(table: Table, by: str | None, group: str | None) -> tuple[str, ...]:
    wanted = dict.fromkeys(("id", "tokens", by, group))
    return tuple(name for name in wanted if name is not None and name in table.schema.names)


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Return in words what a manifest's request and a new one do not share."""
    found = []
    settings = {
        *selector_fields(asked["selection"]["method"]),
        "weight_kind",
        "clip_weights",
        "scheduled",
        "among",
        "vectors",
        "target_vectors",
        "weights_of",
    }
    for key, new in asked["selection"].items():
        pairs = {key: (there["selection"].get(key), new)}
        if key == "params":  # what came out stands there, too
            old = there["selection"].get(key) or {}
            pairs = {name: (old.get(name), new.get(name)) for name in sorted(settings)}
        for name, (before, now) in pairs.items():
            if before != now:
                found.append(f"{name} {json.dumps(before)}, now {json.dumps(now)}")
    if there["corpus"] != asked["corpus"]:
        found.append("another corpus")
    elif there["scores"] != asked["scores"]:
        found.append("another score table")
    return found


def _write(request: Request, folder: Folder) -> Manifest:
    by_tokens = request.budget.kind == "tokens"
    include_errors = bool(getattr(request.selector, "include_errors", False))
    census = Census(request.table, request.by, request.group, by_tokens, include_errors)
    rng = np.random.default_rng(request.seed)
    selection = request.selector.select(census, request.budget, rng)
    made = str(selection.params.get("weight_kind", "none"))
    asked = request.content["selection"]["params"]
    if request.wish is not None:
        refuse_rates(request.wish.rule, asked.get("weight_kind") or made)
    with taking_place(folder) as place:
        with tempfile.TemporaryDirectory(prefix="curate-weights-") as name:
            batches = _with_columns(selection, census, request)
            grouping = _grouping(request)
            if grouping is not None:
                batches = _coded(batches, grouping, request.table)
            kind, clip = asked.get("weight_kind"), asked.get("clip_weights")
            weighting = Weighting(batches, made, Path(name), kind, clip)
            files, rows = write_parts(place, map(_named, census.keep(iter(weighting))))
        if not rows:
            raise ValueError("no row fits the budget: the first one already exceeds it")
        content = _finished(request, selection, census, files, rows, weighting)
        if request.wish is not None:
            with open_parquet(place, min(files)) as part:
                has_ranks = "rank" in part.schema_arrow.names
            content["schedule"] = request.wish.fulfilled(content, has_ranks, folder.uri, grouping)
        content = write_manifest(place, content)
    manifest = Manifest(folder, content)
    manifest.summary = census.summary()
    return manifest


def _with_columns(
    selection: Selection, census: Census, request: Request
) -> Iterator[pa.RecordBatch]:
    """Yield the selection's batches with the columns that the manifest and the census need."""
    carried = _carried(census, request.by, request.group)
    if getattr(request.selector, "carry", None) == carried:
        return iter(selection.batches)
    return attached(iter(selection.batches), census, carried)


def _grouping(request: Request) -> Grouping | None:
    by_group = None if request.wish is None else request.wish.by_group
    return None if by_group is None else Grouping(by_group)


def _coded(
    batches: Iterator[pa.RecordBatch], grouping: Grouping, table: Table
) -> Iterator[pa.RecordBatch]:
    """Yield the batches with the number of each row's group."""
    for batch in attached(batches, table, [grouping.column]):
        yield batch.append_column(CODE, pa.array(grouping.codes(batch)))


def _named(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.rename_columns(["group" if n == CODE else n for n in batch.schema.names])


def _finished(
    request: Request,
    selection: Selection,
    census: Census,
    files: dict[str, str],
    rows: int,
    weighting: Weighting,
) -> dict[str, Any]:
    results = dict(selection.params)
    results.pop("weight_kind", None)
    if weighting.report is not None:
        results["weights"] = weighting.report
    if request.group is not None:
        results["group_column"] = request.group
    chosen = request.content["selection"]
    return {
        **request.content,
        "selection": {**chosen, "selected": rows, "params": {**chosen["params"], **results}},
        "weight_kind": weighting.kind,
        "schedule": None,
        "groups": census.groups() or {},
        "files": files,
    }
