"""Arrow columns as dense NumPy arrays and back, without a Python loop over rows."""

import numpy as np
import pyarrow as pa
import pyarrow.types as pt


def combined(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return the column as one array of its storage type (extensions and dictionaries undone)."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks keeps extension types chunked
        array = pa.concat_arrays(array.chunks)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if pt.is_dictionary(array.type) else array


def storage_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that `combined` gives for a column of this type."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pt.is_dictionary(kind) else kind


def is_list(kind: pa.DataType) -> bool:
    """Tell whether the type is a list of any sort."""
    return bool(pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind))


def is_string(kind: pa.DataType) -> bool:
    """Tell whether the type is text."""
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def is_binary(kind: pa.DataType) -> bool:
    """Tell whether the type is bytes."""
    return bool(pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind))


def is_number(kind: pa.DataType) -> bool:
    """Tell whether the type is an integer, a floating-point number or a bool."""
    return bool(pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind))


def leaf_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values inside (nested) lists."""
    kind = storage_type(kind)
    while is_list(kind):
        kind = kind.value_type
    return kind


def list_shape(kind: pa.DataType) -> tuple[int | None, ...]:
    """Return the lengths of (nested) lists, None where the type leaves the length open."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return tuple(kind.shape)
    kind, shape = storage_type(kind), []
    while is_list(kind):
        shape.append(kind.list_size if pt.is_fixed_size_list(kind) else None)
        kind = kind.value_type
    return tuple(shape)


def dense(column: pa.ChunkedArray | pa.Array, name: str) -> np.ndarray:
    """Return (nested) lists of equal length as one array [n, ...].

    Copies nothing where the column is one chunk of fixed-size lists.

    Raises:
        ValueError: a list or a value is null, or lists differ in length.
    """
    array = combined(column)
    shape = [len(array)]
    while is_list(array.type):
        if array.null_count:
            raise ValueError(f"column {name!r} is null")
        shape.append(_length(array, name))
        array = array.flatten()
    if array.null_count:
        raise ValueError(f"column {name!r} holds a null value")
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(shape)


def _length(array: pa.Array, name: str) -> int:
    if pt.is_fixed_size_list(array.type):
        return int(array.type.list_size)
    lengths = np.diff(array.offsets.to_numpy())
    if lengths.size == 0:
        return 0
    if (lengths != lengths[0]).any():
        other = lengths[lengths != lengths[0]][0]
        raise ValueError(
            f"column {name!r} holds lists of different lengths ({lengths[0]}, {other})"
        )
    return int(lengths[0])


def fixed_lists(values: np.ndarray) -> pa.FixedSizeListArray:
    """Return the rows of an array [n, ...] as flat fixed-size lists, sharing its memory."""
    width = int(np.prod(values.shape[1:]))
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    if width == 0:
        raise ValueError("rows of no values cannot be stored")
    return pa.FixedSizeListArray.from_arrays(flat, width)


def ragged(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of all lists end to end, and the offsets [n + 1] that part them."""
    array = combined(column)
    offsets = array.offsets.to_numpy().astype(np.int64)
    return array.flatten().to_numpy(zero_copy_only=False), offsets - offsets[0]


def lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Return consecutive stretches of `values` as lists of these lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def end_to_end(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return ragged rows, each the first's followed by the second's."""
    offsets = first[1] + second[1]
    values = np.empty(offsets[-1], dtype=np.result_type(first[0], second[0]))
    for part, starts in ((first, offsets[:-1]), (second, offsets[:-1] + np.diff(first[1]))):
        lengths = np.diff(part[1])
        within = np.arange(len(part[0])) - np.repeat(part[1][:-1], lengths)
        values[np.repeat(starts, lengths) + within] = part[0]
    return values, offsets


def padded(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray, fill: int) -> np.ndarray:
    """Return int64 [n, max(lengths)]: stretches of `values`, filled up on the right."""
    width = int(lengths.max(initial=0))
    columns = np.arange(width)
    inside = columns < lengths[:, None]
    index = np.where(inside, starts[:, None] + columns, 0)
    out = np.full(index.shape, fill, dtype=np.int64)
    out[inside] = values[index[inside]]
    return out
