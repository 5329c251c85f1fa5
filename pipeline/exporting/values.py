"""Arrow values as JSON holds them, and what it cannot hold."""

import datetime
import decimal
import json
import math
from typing import Any

import pyarrow as pa
import pyarrow.types as pt


def refuse_bytes(schema: pa.Schema, columns: tuple[str, ...], to: str) -> None:
    """Raise ValueError naming a column that has bytes somewhere in it."""
    for name in columns:
        if holds_bytes(schema.field(name).type):
            raise ValueError(
                f"column {name!r} holds bytes, which {to} cannot carry; leave it out with "
                "--columns or export to parquet, datasets, webdataset or mds"
            )


def holds_bytes(kind: pa.DataType) -> bool:
    """True if values of this type are or contain bytes."""
    if pt.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    if pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind):
        return True
    if pt.is_fixed_size_binary(kind):
        return True
    return any(holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def json_line(row: dict[str, Any], where: str) -> bytes:
    """Return the row as one line of JSON, UTF-8; times and decimals as text.

    Raises:
        ValueError: a number is not finite, for which JSON has no value.
    """
    try:
        text = json.dumps(
            row, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_as_text
        )
    except ValueError:
        name = next(name for name, value in row.items() if _has_nan(value))
        raise ValueError(
            f"{where}, column {name!r}: a number is not finite, and JSON has none such; export to "
            "parquet or leave the column out with --columns"
        ) from None
    return text.encode() + b"\n"


def _as_text(value: object) -> str:
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _has_nan(value: object) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, list):
        return any(_has_nan(v) for v in value)
    return isinstance(value, dict) and any(_has_nan(v) for v in value.values())
