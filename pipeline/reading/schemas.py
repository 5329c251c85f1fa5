"""One schema for a corpus from the schemas of its shards.

Shards of one corpus are often written by different runs: nullability, metadata, string widths and
integer widths differ where the values do not. Those differences are widened away. What could
change a value's meaning is refused, with both shards and the column named.
"""

import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.types as pt


class Conflict(Exception):
    """Two types that do not hold the same kind of value."""


def unify_schemas(schemas: Iterable[tuple[str, pa.Schema]], loose: bool = False) -> pa.Schema:
    """Return the schema that every shard can be cast to: the first one's columns, types widened.

    `loose` is for inferred types (JSON): columns and struct fields may be missing (null there),
    and integers meet floats as float64. Column order and metadata are the first shard's.

    Raises:
        ValueError: columns differ; names the first shard, the other one and the column.
    """
    iterator = iter(schemas)
    first_name, merged = next(iterator)
    for name, schema in iterator:
        if schema.equals(merged, check_metadata=True):
            continue
        _refuse_renamed_classes(first_name, merged, name, schema)
        if not loose:
            _refuse_missing(first_name, merged, name, schema)
        merged = _merge(first_name, merged, name, schema, loose)
    return merged


def cast_batch(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return the columns of `schema`, in its order and types; those not in `batch` are null."""
    columns = []
    for field in schema:
        at = batch.schema.get_field_index(field.name)
        if at < 0:
            columns.append(pa.nulls(batch.num_rows, field.type))
        elif batch.schema.field(at).type.equals(field.type):
            columns.append(batch.column(at))
        else:
            columns.append(batch.column(at).cast(field.type))
    if not columns:
        return batch.select([])
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def unify_types(a: pa.DataType, b: pa.DataType, loose: bool) -> pa.DataType:
    """Return the narrowest type that holds every value of both. Raises Conflict if none does."""
    if a.equals(b):
        return a
    if pt.is_null(a) or pt.is_null(b):
        return b if pt.is_null(a) else a
    if pt.is_dictionary(a) or pt.is_dictionary(b):
        return unify_types(_plain(a), _plain(b), loose)
    for family in (_is_text, _is_bytes):
        if family(a) and family(b):
            return pa.large_string() if family is _is_text else pa.large_binary()
    if pt.is_floating(a) and pt.is_floating(b):
        return a if a.bit_width >= b.bit_width else b
    if pt.is_integer(a) and pt.is_integer(b):
        return _wider_integer(a, b)
    if loose and _is_number(a) and _is_number(b):
        return pa.float64()
    if _is_list(a) and _is_list(b):
        return _unify_lists(a, b, loose)
    if pt.is_struct(a) and pt.is_struct(b):
        return _unify_structs(a, b, loose)
    raise Conflict


def _merge(
    first_name: str, first: pa.Schema, name: str, schema: pa.Schema, loose: bool
) -> pa.Schema:
    fields = []
    for field in first:
        other = field if (i := schema.get_field_index(field.name)) < 0 else schema.field(i)
        try:
            unified = unify_types(field.type, other.type, loose)
        except Conflict:
            raise ValueError(
                f"shards have different schemas: column {field.name!r} is {field.type} in "
                f"{first_name} but {other.type} in {name}; rewrite one of them"
            ) from None
        fields.append(field.with_type(unified).with_nullable(field.nullable or other.nullable))
    fields += [field for field in schema if first.get_field_index(field.name) < 0]
    return pa.schema(fields, metadata=first.metadata or schema.metadata)


def _refuse_missing(first_name: str, first: pa.Schema, name: str, schema: pa.Schema) -> None:
    pairs = ((first, schema, name, first_name), (schema, first, first_name, name))
    for here, there, lacking, having in pairs:
        for column in here.names:
            if there.get_field_index(column) < 0:
                raise ValueError(
                    f"shards have different schemas: {having} has a column {column!r} that "
                    f"{lacking} lacks; make them alike, or name the shards to read"
                )


def _refuse_renamed_classes(
    first_name: str, first: pa.Schema, name: str, schema: pa.Schema
) -> None:
    """The same label number must not mean two classes."""
    ours, theirs = class_names(first), class_names(schema)
    for column in ours.keys() & theirs.keys():
        if ours[column] != theirs[column]:
            raise ValueError(
                f"shards have different schemas: the classes of column {column!r} in {name} are "
                f"not those in {first_name}; give both the same class names in the same order"
            )


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the class names of each `datasets.ClassLabel` column, in label order."""
    features = features_metadata(schema)
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict)
        and feature.get("_type") == "ClassLabel"
        and feature.get("names")
    }


def features_metadata(schema: pa.Schema) -> dict[str, Any]:
    """Return what `datasets` wrote into the schema about its columns, {} if it did not."""
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None:
        return {}
    features = json.loads(written).get("info", {}).get("features", {})
    return features if isinstance(features, dict) else {}


def _plain(a: pa.DataType) -> pa.DataType:
    return a.value_type if pt.is_dictionary(a) else a


def _is_text(a: pa.DataType) -> bool:
    return bool(pt.is_string(a) or pt.is_large_string(a) or pt.is_string_view(a))


def _is_bytes(a: pa.DataType) -> bool:
    return bool(pt.is_binary(a) or pt.is_large_binary(a) or pt.is_binary_view(a))


def _is_number(a: pa.DataType) -> bool:
    return bool(pt.is_integer(a) or pt.is_floating(a))


def _is_list(a: pa.DataType) -> bool:
    return bool(pt.is_list(a) or pt.is_large_list(a) or pt.is_fixed_size_list(a))


def _wider_integer(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    if pt.is_signed_integer(a) == pt.is_signed_integer(b):
        return a if a.bit_width >= b.bit_width else b
    signed, unsigned = (a, b) if pt.is_signed_integer(a) else (b, a)
    width = max(signed.bit_width, unsigned.bit_width * 2)
    if width > 64:  # uint64 beside a signed type: no integer holds both
        raise Conflict
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}[width]


def _unify_lists(a: pa.DataType, b: pa.DataType, loose: bool) -> pa.DataType:
    item = unify_types(a.value_type, b.value_type, loose)
    if pt.is_fixed_size_list(a) and pt.is_fixed_size_list(b) and a.list_size == b.list_size:
        return pa.list_(item, a.list_size)
    if pt.is_large_list(a) or pt.is_large_list(b):
        return pa.large_list(item)
    return pa.list_(item)


def _unify_structs(a: pa.DataType, b: pa.DataType, loose: bool) -> pa.DataType:
    if not loose and {f.name for f in a} != {f.name for f in b}:
        raise Conflict
    fields = []
    for field in a:
        if b.get_field_index(field.name) >= 0:
            other = b.field(field.name)
            unified = unify_types(field.type, other.type, loose)
            field = field.with_type(unified).with_nullable(field.nullable or other.nullable)
        fields.append(field)
    return pa.struct(fields + [f for f in b if a.get_field_index(f.name) < 0])
