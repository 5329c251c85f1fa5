"""Names of selectors, as text: listing them imports no selector.

Plug-ins add names through the entry-point group `curate.selectors`.
"""

from dataclasses import MISSING, fields
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from curate.selectors.protocol import Selector
from curate.selectors.settings import did_you_mean, made

SELECTORS = {
    "balanced": "curate.selectors.balanced:Balanced",
    "bottom": "curate.selectors.bottom:Bottom",
    "ccs": "curate.selectors.ccs:Ccs",
    "craig": "curate.selectors.craig:Craig",
    "d2": "curate.selectors.d2:D2",
    "density_ratio": "curate.selectors.density_ratio:DensityRatio",
    "diverse_top": "curate.selectors.diverse_top:DiverseTop",
    "gio": "curate.selectors.gio:Gio",
    "exact": "curate.selectors.exact:Exact",
    "facility_location": "curate.selectors.facility_location:FacilityLocation",
    "dws": "curate.selectors.dws:Dws",
    "glister": "curate.selectors.glister:Glister",
    "gradmatch": "curate.selectors.gradmatch:GradMatch",
    "greedy_alignment": "curate.selectors.greedy_alignment:GreedyAlignment",
    "gsr": "curate.selectors.gsr:Gsr",
    "gumbel": "curate.selectors.gumbel:Gumbel",
    "herding": "curate.selectors.herding:Herding",
    "importance": "curate.selectors.importance:Importance",
    "kcenter": "curate.selectors.kcenter:KCenter",
    "keep": "curate.selectors.keep:Keep",
    "kmm": "curate.selectors.kmm:Kmm",
    "leverage": "curate.selectors.leverage:Leverage",
    "moderate": "curate.selectors.moderate:Moderate",
    "moderate_center": "curate.selectors.moderate_center:ModerateCenter",
    "pa_da": "curate.selectors.pa_da:PaDa",
    "propagate": "curate.selectors.propagate:Propagate",
    "random": "curate.selectors.random:Random",
    "semdedup": "curate.selectors.semdedup:SemDeDup",
    "rent": "curate.selectors.rent:Rent",
    "softmax": "curate.selectors.softmax:Softmax",
    "stratified": "curate.selectors.stratified:Stratified",
    "threshold": "curate.selectors.threshold:Threshold",
    "top": "curate.selectors.top:Top",
    "window": "curate.selectors.window:Window",
}


_INNER = ("carry", "ranked")
"""Fields that the pipeline fills in; nobody sets them."""


def selector_names() -> list[str]:
    """Return every known name: built-in first, then plug-ins."""
    return sorted(SELECTORS) + sorted(_plugins().keys() - SELECTORS.keys())


def selector_fields(name: str) -> list[str]:
    """Return the names of the method's hyper-parameters. Raises ValueError as `make_selector`."""
    return [f.name for f in fields(_selector_class(name))]


def needs_setting(name: str, setting: str) -> bool:
    """Tell whether the method has this hyper-parameter without a default."""
    found = [f for f in fields(_selector_class(name)) if f.name == setting]
    return bool(found) and found[0].default is MISSING and found[0].default_factory is MISSING


def uses_vectors(name: str) -> bool:
    """Tell whether the method compares the rows' vectors (`selectors/vectors.py`)."""
    return bool(getattr(_selector_class(name), "uses_vectors", False))


def make_selector(name: str, **params: Any) -> Selector:
    """Return the selector of that name with these hyper-parameters.

    Raises:
        ValueError: the name is unknown, a parameter is not the method's, wrong or missing.
    """
    cls = _selector_class(name)
    known = [f.name for f in fields(cls)]
    for key in params:
        if key not in known:
            takes = [field for field in known if field not in _INNER]
            raise ValueError(
                f"method {name!r} has no parameter {key!r}; it takes: {', '.join(takes)}"
                + did_you_mean(key, takes)
            )
    selector: Selector = made(f"method {name!r}", cls, params)
    return selector


def _selector_class(name: str) -> Any:
    home = {**_plugins(), **SELECTORS}.get(name)
    if home is None:
        known = selector_names()
        raise ValueError(
            f"unknown method {name!r}; choose from: {', '.join(known)}{did_you_mean(name, known)}"
        )
    module, _, cls = home.partition(":")
    return getattr(import_module(module), cls)


def _plugins() -> dict[str, str]:
    return {e.name: e.value for e in entry_points(group="curate.selectors")}
