"""Which class each output of a Hugging Face classifier stands for."""

import re
from collections.abc import Sequence

from curate.pipeline.tasks.texts import read_config

HEADS = ("ForSequenceClassification", "ForImageClassification")
UNNAMED = re.compile(r"LABEL_\d+")
"""What transformers calls classes that nobody named."""


def model_classes(model: str | None) -> tuple[str, ...] | None:
    """Return the names of a classifier's outputs in order; None for a model that is none."""
    config = read_config(model)
    if not any(name.endswith(HEADS) for name in config.get("architectures") or ()):
        return None
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def in_order(
    values: Sequence[str | int], outputs: Sequence[str]
) -> tuple[tuple[str | int, ...], bool] | None:
    """Return the outputs' classes, given the labels of a corpus, and whether numbers are positions.

    Words are the names of the outputs, numbers their names or else their positions. None where
    the labels are other classes than the model's.
    """
    if all(isinstance(value, str) for value in values):
        return (tuple(outputs), True) if set(values) <= set(outputs) else None
    numbers = [int(name) for name in outputs if re.fullmatch(r"-?\d+", name)]
    if len(numbers) == len(outputs) and set(values) <= set(numbers):
        return tuple(numbers), False
    if not set(values) <= set(range(len(outputs))):
        return None
    is_named = not all(UNNAMED.fullmatch(name) for name in outputs)
    return (tuple(outputs) if is_named else tuple(range(len(outputs)))), True
