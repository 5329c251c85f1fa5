"""Names of scorers, as text: listing them imports neither torch nor a scorer.

Plug-ins add names through the entry-point group `curate.scorers`.
"""

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, asdict, fields
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curate.scorers.protocol import Scorer

SCORERS = {
    "angle_concentration": "curate.scorers.angle_concentration:AngleConcentration",
    "aum": "curate.scorers.aum:AUM",
    "dsir": "curate.scorers.dsir:DSIR",
    "el2n": "curate.scorers.el2n:EL2N",
    "el2n_seq": "curate.scorers.el2n_seq:EL2NSeq",
    "entropy": "curate.scorers.entropy:Entropy",
    "forgetting": "curate.scorers.forgetting:Forgetting",
    "gio": "curate.scorers.gio:GIO",
    "grad_similarity": "curate.scorers.grad_similarity:GradSimilarity",
    "grand": "curate.scorers.grand:GraNd",
    "gsnr": "curate.scorers.gsnr:GSNR",
    "gwa": "curate.scorers.gwa:GWA",
    "influence": "curate.scorers.influence:Influence",
    "loss": "curate.scorers.loss:Loss",
    "loss_change": "curate.scorers.loss_change:LossChange",
    "margin": "curate.scorers.margin:Margin",
    "pvi": "curate.scorers.pvi:PVI",
    "rho": "curate.scorers.rho:RHO",
    "select_weights": "curate.scorers.select_weights:SelectWeights",
    "self_influence": "curate.scorers.self_influence:SelfInfluence",
    "vog": "curate.scorers.vog:VoG",
}

_REQUEST = re.compile(
    r"(?:(?P<alias>[A-Za-z_]\w*)=)?(?P<name>\w+)(?:\((?P<params>.*)\))?", re.DOTALL
)


def scorer_names() -> list[str]:
    """Return every known name: built-in first, then plug-ins."""
    return sorted(SCORERS) + sorted(_plugins().keys() - SCORERS.keys())


def make_scorers(requests: str | Sequence[str]) -> "dict[str, Scorer]":
    """Return scorers by alias, in the order asked for.

    A request is `name`, `name(field=value, ...)` or `alias=name(...)`; several may stand in one
    string, separated by commas, so `["el2n,grand", "si_head=self_influence(params=head)"]` works.

    Raises:
        ValueError: a name is unknown, a field is not the scorer's, an alias occurs twice.
    """
    texts = [requests] if isinstance(requests, str) else requests
    scorers: dict[str, Scorer] = {}
    for text in (part for t in texts for part in _split(t)):
        alias, scorer = _make(text)
        if alias in scorers:
            raise ValueError(
                f"scorer {alias!r} is asked for twice; name one with ALIAS={alias}(...)"
            )
        scorers[alias] = scorer
    if not scorers:
        raise ValueError(f"no scorer is named; choose from: {', '.join(scorer_names())}")
    return scorers


def scorer_spec(scorer: "Scorer") -> dict[str, Any]:
    """Return `{"name", "params"}` from which `scorer_from_spec` makes the scorer again."""
    where = f"{type(scorer).__module__}:{type(scorer).__qualname__}"
    homes = {home: name for name, home in {**_plugins(), **SCORERS}.items()}
    assert where in homes, f"{where} is not in the registry"
    return {"name": homes[where], "params": asdict(scorer)}


def scorer_from_spec(spec: dict[str, Any]) -> "Scorer":
    """Return the scorer that `scorer_spec` described.

    Raises:
        ValueError: the name is unknown or a parameter is not the scorer's.
    """
    home = {**_plugins(), **SCORERS}.get(spec["name"])
    if home is None:
        known = scorer_names()
        raise ValueError(
            f"unknown scorer {spec['name']!r}; choose from: {', '.join(known)}"
            + _did_you_mean(spec["name"], known)
        )
    module, _, name = home.partition(":")
    cls = getattr(import_module(module), name)
    known_fields = [f.name for f in fields(cls)]
    for key in spec["params"]:
        if key not in known_fields:
            takes = ", ".join(known_fields) or "no parameters"
            raise ValueError(
                f"scorer {spec['name']!r} has no parameter {key!r}; it takes: {takes}"
                + _did_you_mean(key, known_fields)
            )
    for absent in (f.name for f in fields(cls) if _is_required(f) and f.name not in spec["params"]):
        raise ValueError(
            f"scorer {spec['name']!r} needs {absent}: write {spec['name']}({absent}=VALUE)"
        )
    for field in fields(cls):  # numbers are the class's own to check
        value = spec["params"].get(field.name, "")
        if field.type is str and not isinstance(value, str):
            raise ValueError(f"scorer {spec['name']!r}: {field.name} must be a text, not {value!r}")
    scorer: Scorer = cls(**spec["params"])
    return scorer


def _plugins() -> dict[str, str]:
    return {e.name: e.value for e in entry_points(group="curate.scorers")}


def _is_required(field: "Field[Any]") -> bool:
    return field.init and field.default is MISSING and field.default_factory is MISSING


def _split(text: str) -> list[str]:
    """Return the requests in `text`: commas inside brackets or quotes separate nothing."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += (char in "([{") - (char in ")]}") if not quote else 0
        if char == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _make(request: str) -> "tuple[str, Scorer]":
    match = _REQUEST.fullmatch(request)
    if match is None:
        raise ValueError(
            f"cannot read scorer {request!r}; write NAME, NAME(field=value) or ALIAS=..."
        )
    params = _params(match["params"] or "", f"scorer {request!r}")
    scorer = scorer_from_spec({"name": match["name"], "params": params})
    return match["alias"] or match["name"], scorer


def parse_request(text: str, what: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the fields of `name(field=value, ...)`; `what` it is, for the error.

    Raises:
        ValueError: the text has another form.
    """
    match = _REQUEST.fullmatch(text.strip())
    if match is None or match["alias"]:
        raise ValueError(f"cannot read {what} {text!r}; write NAME or NAME(field=value)")
    return match["name"], _params(match["params"] or "", f"{what} {text!r}")


def _params(inside: str, where: str) -> dict[str, Any]:
    params = {}
    for item in _split(inside):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"cannot read {item!r} in {where}; write field=value")
        params[key.strip()] = _literal(value.strip())
    return params


def _literal(text: str) -> Any:
    """Return a Python literal, or the text itself: `0.1` is a number, `head` a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
