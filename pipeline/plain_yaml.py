"""YAML as people write settings: 1e-3 is a number, as version 1.2 has it, and not a text."""

import re
from typing import Any

import yaml


def load_yaml(text: str) -> Any:
    """Return what a YAML text says, of plain values only.

    Raises:
        yaml.YAMLError: it is not valid.
    """
    return yaml.load(text, _Values)


class _Values(yaml.SafeLoader):
    """Version 1.1 wants a point in a number that has an exponent."""


_Values.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
