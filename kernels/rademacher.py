"""Random signs from a counter: the same on every device, none of them ever stored.

The sign of coordinate (r, c) in output j of stream (seed, name, side) is bit j % 32 of

    word(r, c, w) = F(F((F(c ^ key0) + r * 0x9E3779B1) ^ key1) + w * 0x85EBCA77),   w = j // 32

(1 -> +1, 0 -> -1), with F murmur3's 32-bit finaliser (Appleby, MurmurHash3, public domain):

    h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16

all modulo 2^32, and (key0, key1) the two little-endian 32-bit words of
blake2b("curate\\0<seed>\\0<side>\\0<name>", 8 bytes). One word serves 32 outputs.

`kernels/sparse_projection.py` says what it takes of the words of its own side, `sparse`.
"""

from collections import OrderedDict
from functools import cache
from hashlib import blake2b
from threading import Lock
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from curate.kernels.launch import jit, tl
from curate.kernels.summation import dot

Side = Literal["rows", "columns", "whole", "sparse"]
# Bytes of sign matrices that the torch form keeps. Measured on one core of an AMD EPYC (AVX-512),
# 2026-11: a side of 1024 x 32 takes 0.10 ms to make (nearly all of it calls), as long as projecting
# 150 tokens by it. 32 MiB hold the sides of 24 layers of width 1024.
KEPT_BYTES = 32 << 20


class Key(NamedTuple):
    """A stream of signs."""

    key0: int
    key1: int

    @property
    def arguments(self) -> tuple[int, int]:
        """The key as a kernel takes it (`unpacked` there): odd numbers beyond 32 bits, so that
        Triton, which compiles anew for multiples of 16 and for short numbers, compiles once."""
        return self.key0 << 1 | 1 | 1 << 40, self.key1 << 1 | 1 | 1 << 40


def stream_key(seed: int, name: str, side: Side) -> Key:
    """Return the stream of one side of one parameter: its `rows`, its `columns`, or the `whole`
    of it, dense or `sparse`."""
    digest = blake2b(f"curate\0{seed}\0{side}\0{name}".encode(), digest_size=8).digest()
    return Key(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def signs(
    key: Key,
    columns: Int[Tensor, " n"],
    k: int,
    *,
    rows: Int[Tensor, " n"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "n k"]:
    """Return the k signs (+1 or -1) of each coordinate (row, column); rows default to 0."""
    every = torch.arange((k + 31) // 32, device=columns.device)
    word = words(key, columns[:, None], every, rows=None if rows is None else rows[:, None])
    return signs_of_words(word, dtype)[:, :k]


def signs_of_words(word: Int32[Tensor, "n w"], dtype: torch.dtype) -> Float[Tensor, "n 32*w"]:
    """Return the 32 signs in each word, eight at a time, looked up by byte: a shift and a mask for
    each of them cost more."""
    if word.numel() == 0:
        return torch.zeros(word.shape[0], 32 * word.shape[1], dtype=dtype, device=word.device)
    index = word.contiguous().view(torch.uint8).view(-1).int()  # little-endian: low byte first
    found = _signs_of_bytes(word.device, dtype).index_select(0, index)
    return found.view(word.shape[0], 32 * word.shape[1])


def words(
    key: Key,
    columns: Int[Tensor, "..."],
    word: int | Int[Tensor, "..."],
    *,
    rows: Int[Tensor, "..."] | None = None,
) -> Int32[Tensor, "..."]:
    """Return word(r, c, w), the arguments broadcast against one another; rows default to 0.

    The 32 bits are those of an int32, whose products wrap.
    """
    h = _finalise(columns.to(torch.int32) ^ _signed(key.key0))
    if rows is not None:
        h = h + rows.to(torch.int32) * _signed(0x9E3779B1)
    h = _finalise(h ^ _signed(key.key1))
    if isinstance(word, int):
        return _finalise(h + _signed(word * 0x85EBCA77 & 0xFFFFFFFF))
    return _finalise(h + word.to(torch.int32) * _signed(0x85EBCA77))


def _finalise(h: Int32[Tensor, "..."]) -> Int32[Tensor, "..."]:
    """Murmur3's finaliser; the shift of a signed number brings its sign along, hence the masks."""
    h = h ^ (h >> 16 & 0xFFFF)
    h = h * _signed(0x85EBCA6B)
    h ^= h >> 13 & 0x7FFFF
    h *= _signed(0xC2B2AE35)
    h ^= h >> 16 & 0xFFFF
    return h


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


@cache
def _signs_of_bytes(device: torch.device, dtype: torch.dtype) -> Float[Tensor, "256 8"]:
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(dtype)


class _Kept(OrderedDict[tuple[object, ...], Tensor]):
    """Sign matrices, the least recently used first."""

    nbytes = 0


_kept = _Kept()
_kept_lock = Lock()


def side_signs(
    key: Key, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "n k"]:
    """Return the signs of coordinates 0 … n - 1, of the torch form's sides: the least recently used
    are dropped beyond KEPT_BYTES. Not to be written to."""
    name = (key, n, k, dtype, device)
    with _kept_lock:
        if (found := _kept.get(name)) is not None:
            _kept.move_to_end(name)
            return found
    made = signs(key, torch.arange(n, device=device), k, dtype=dtype).contiguous()
    if made.nbytes > KEPT_BYTES // 4:  # one large matrix would drive out all others
        return made
    with _kept_lock:
        if name not in _kept:
            _kept[name] = made
            _kept.nbytes += made.nbytes
        while _kept.nbytes > KEPT_BYTES:
            _kept.nbytes -= _kept.popitem(last=False)[1].nbytes
    return made


@jit
def finalise(h):  # type: ignore[no-untyped-def]
    """Murmur3's finaliser of a block of uint32, in registers."""
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@jit
def unpacked(key):  # type: ignore[no-untyped-def]
    """One number of `Key.arguments` as the 32-bit word that it is."""
    return (key >> 1).to(tl.uint32)


@jit
def sign_words(rows, columns, words, key0, key1):  # type: ignore[no-untyped-def]
    """word(r, c, w) of a block of coordinates, broadcast against one another, in registers.

    The keys are passed to a kernel as i64 and taken modulo 2^32 here.
    """
    h = coordinate_hash(rows, columns, key0, key1)
    return finalise(h + words.to(tl.uint32) * 0x85EBCA77)


@jit
def coordinate_hash(rows, columns, key0, key1):  # type: ignore[no-untyped-def]
    """What all words of a coordinate have in common: word w is finalise(this + w * 0x85EBCA77)."""
    h = finalise(columns.to(tl.uint32) ^ key0.to(tl.uint32))
    return finalise((h + rows.to(tl.uint32) * 0x9E3779B1) ^ key1.to(tl.uint32))


@jit
def block_signs(rows, columns, outputs, key0, key1):  # type: ignore[no-untyped-def]
    """The signs (+1 or -1, float32) of a block of coordinates in these outputs."""
    word = sign_words(rows, columns, outputs // 32, key0, key1)
    return ((word >> (outputs % 32).to(tl.uint32)) & 1).to(tl.float32) * 2 - 1


@jit
def spread_words(word, N: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words [N, K / 32] so that word j // 32 stands at j: [N, K]. Words [N, 1] as they are."""
    if K > 32:
        word = tl.reshape(tl.broadcast_to(word[:, :, None], [N, K // 32, 32]), [N, K])
    return word


@jit
def spread_signs(word, N: tl.constexpr, K: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The signs [N, K] in words [N, K / 32] (or [N, 1] for K up to 32), one hash for 32 of them.

    `dtype` is float32, float16 or bfloat16: 1.0 with the sign bit set where the word's is not.
    """
    bit = (spread_words(word, N, K) >> (tl.arange(0, K) % 32).to(tl.uint32)[None, :]) & 1
    if dtype == tl.float32:
        signs = (((bit ^ 1) << 31) | 0x3F800000).to(tl.float32, bitcast=True)
    elif dtype == tl.bfloat16:
        signs = (((bit ^ 1) << 15) | 0x3F80).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        signs = (((bit ^ 1) << 15) | 0x3C00).to(tl.uint16).to(tl.float16, bitcast=True)
    return signs


@jit
def thirds(x):  # type: ignore[no-untyped-def]
    """A float32 as three bfloat16, high to low, whose sum it is.

    A product with 1 or -1 is exact, so tensor cores give what float32 arithmetic does, at several
    times its speed.
    """
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low


@jit
def dot_signs(x, word, acc, N: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc [M, K] + x [M, N] @ the signs in words [N, K / 32]."""
    if x.dtype == tl.float32:
        signs = spread_signs(word, N, K, tl.bfloat16)
        high, middle, low = thirds(x)
        acc = dot(low, signs, acc, "ieee")
        acc = dot(middle, signs, acc, "ieee")
        acc = dot(high, signs, acc, "ieee")
    else:
        acc = dot(x, spread_signs(word, N, K, x.dtype), acc, "ieee")
    return acc
