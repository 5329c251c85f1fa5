"""What a selection kept, beside what a random one of the same size would have kept, as text."""

from typing import Any

SHOWN_GROUPS = 12


def summary_text(manifest: dict[str, Any]) -> str:
    """Return a few lines for people from `Manifest.describe()`."""
    selection, total = manifest["selection"], manifest["corpus"]["rows"]
    kept = selection["selected"]
    by = f" by {selection['by']}" if selection["by"] else ""
    if selection["direction"]:
        by += f" ({selection['direction']} first)"
    lines = [
        f"{kept} of {total} rows ({kept / total:.1%}) selected by method {selection['method']}{by}"
        f", seed {selection['seed']}",
        f"manifest: {manifest['path']}",
    ]
    if tied := selection["params"].get("ties", {}).get("at_cut"):
        lines.append(f"{tied} rows share the score at the cut; the first in row order are kept")
    return "\n".join([*lines, *_beside_random(manifest.get("summary") or {})])


def _beside_random(summary: dict[str, Any]) -> list[str]:
    lines = []
    if summary:
        share = summary["random"]["overlap"]
        lines.append(f"a random selection of this size would share {share:.1%} of these rows")
    if score := summary.get("score"):
        lines.append(
            f"mean {score['column']}: {score['kept_mean']:.6g} kept "
            f"({score['kept_lowest']:.6g} to {score['kept_highest']:.6g}), "
            f"{score['random_mean']:.6g} random"
        )
    if tokens := summary.get("tokens"):
        lines.append(f"tokens: {tokens['kept']} of {tokens['of']}")
    if groups := summary.get("groups"):
        lines.append(f"{'group':<20} {'corpus':>10} {'kept':>10} {'random':>12}")
        lines += [
            f"{value:<20} {n['of']:>10} {n['kept']:>10} {n['random']:>12.1f}"
            for value, n in list(groups.items())[:SHOWN_GROUPS]
        ]
        if len(groups) > SHOWN_GROUPS:
            lines.append(f"... and {len(groups) - SHOWN_GROUPS} more groups")
    return lines
