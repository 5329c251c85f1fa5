"""Task options as they come from the command line, where everything may be text."""

from collections.abc import Sequence


def names(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return column names from `a,b` or a sequence."""
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(part.strip() for part in parts)


def sizes(value: str | int | Sequence[int], option: str) -> tuple[int, ...]:
    """Return positive integers from `28x28`, one integer or a sequence.

    Raises:
        ValueError: there is something else; the message names the option.
    """
    parts = value.lower().split("x") if isinstance(value, str) else value
    try:
        found = tuple(int(p) for p in ([parts] if isinstance(parts, int) else parts))
    except (TypeError, ValueError):
        found = ()
    if not found or min(found) < 1:
        raise ValueError(f"option {option}={value!r} is no size; write {option}=28x28")
    return found


def numbers(value: str | int | float | Sequence[float], option: str) -> tuple[float, ...]:
    """Return numbers from `0.5,0.5`, one number or a sequence."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(float(p) for p in ([parts] if isinstance(parts, int | float) else parts))
    except (TypeError, ValueError):
        raise ValueError(f"option {option}={value!r} is no number") from None


def flag(value: str | bool, option: str) -> bool:
    """Return a bool from `true`/`false` or a bool."""
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "1", "yes", "false", "0", "no"):
        return str(value).lower() in ("true", "1", "yes")
    raise ValueError(f"option {option}={value!r} is neither true nor false")
