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
    lines += _weights(manifest["weight_kind"], selection["params"].get("weights"))
    summary = manifest.get("summary") or {}
    return "\n".join([*lines, *_beside_random(summary, selection.get("budget") or {})])


def _weights(kind: str, weights: dict[str, Any] | None) -> list[str]:
    if not weights:
        return []
    lines = [
        f"{kind} weights from {weights['smallest']:.4g} to {weights['largest']:.4g}; "
        f"as good as {weights['effective_rows']:.1f} rows of equal weight"
    ]
    if clip := weights.get("clip"):
        lines.append(
            f"clipped at {clip['largest']:g} times the mean: {clip['rows']} rows lost "
            f"{clip['removed']:.2%} of all weight, which biases what the weights estimate"
        )
    return lines


def _beside_random(summary: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    lines = []
    if summary:
        share = summary["random"]["overlap"]
        lines.append(f"a random selection of this size would share {share:.1%} of these rows")
    if score := summary.get("score"):
        lines.append(
            f"mean {score['column']}: {score['kept_mean']:.6g} kept "
            f"({score['kept_lowest']:.6g} to {score['kept_highest']:.6g}), "
            f"{score['random_mean']:.6g} ± {score['random_sd']:.2g} random"
        )
        if (weighted := score.get("kept_weighted_mean")) is not None:
            lines.append(f"mean {score['column']} of the kept rows by weight: {weighted:.6g}")
    if tokens := summary.get("tokens"):
        line = f"tokens: {tokens['kept']} of {tokens['of']}"
        if budget.get("kind") == "tokens":  # rows are whole, so some of it stays
            line += (
                f", {tokens['kept'] / budget['value']:.1%} of the budget of {budget['value']:.0f}"
            )
        lines.append(line)
    if groups := summary.get("groups"):
        lines.append(f"{'group':<20} {'corpus':>10} {'kept':>10} {'random':>18}")
        lines += [
            f"{value:<20} {n['of']:>10} {n['kept']:>10} "
            f"{n['random']:>10.1f} ± {n['random_sd']:<5.1f}"
            for value, n in list(groups.items())[:SHOWN_GROUPS]
        ]
        if len(groups) > SHOWN_GROUPS:
            lines.append(f"... and {len(groups) - SHOWN_GROUPS} more groups")
    return lines
