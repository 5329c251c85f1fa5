"""Making a dataclass of settings from what a person wrote, with one sentence for what is wrong."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable

_TOWER = BeartypeConf(is_pep484_tower=True)  # a whole number is a number
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def made(what: str, cls: Any, settings: Mapping[str, Any], how: str = "--param {}=VALUE") -> Any:
    """Return `cls(**settings)`; `what` names it in errors, such as "method 'ccs'".

    `how` says how a setting is given, where one is missing.

    The class says first what is wrong; what it does not look at is checked against its
    annotations, so that no text passes for "true" and no fraction for a count.

    Raises:
        ValueError: a setting is missing, or its value is of another type.
    """
    if absent := [name for name in _required(cls) if name not in settings]:
        given = " ".join(how.format(name) for name in absent)
        raise ValueError(f"{what} needs {' and '.join(absent)}: give {given}")
    try:
        built = cls(**settings)
    except TypeError as problem:
        _check_types(what, cls, settings)
        text = str(problem)
        raise ValueError(f"{what}: {text.partition('() ')[2] or text}") from None
    _check_types(what, cls, settings)
    return built


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error that names the closest of the known names, "" if none is."""
    close = get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _required(cls: Any) -> list[str]:
    """Return the names of the settings that have no default."""
    return [
        f.name
        for f in fields(cls)
        if f.init and f.default is MISSING and f.default_factory is MISSING
    ]


def _check_types(what: str, cls: Any, settings: Mapping[str, Any]) -> None:
    hints = get_type_hints(cls)
    for name, value in settings.items():
        hint = hints.get(name, Any)
        # True is a whole number to Python, never to somebody who writes it.
        is_stray = isinstance(value, bool) and hint is not Any and "bool" not in str(hint)
        if is_stray or not is_bearable(value, hint, conf=_TOWER):
            raise ValueError(f"{what}: {name} must be {_in_words(hint)}, not {value!r}")


def _in_words(hint: Any) -> str:
    parts = [part for part in getattr(hint, "__args__", (hint,)) if part is not type(None)]
    if float in parts:
        parts = [part for part in parts if part is not int]
    words = [_WORDS[part] for part in parts if part in _WORDS]
    if len(words) < len(parts) or not words:
        return str(hint)
    return " or ".join(dict.fromkeys(words))
