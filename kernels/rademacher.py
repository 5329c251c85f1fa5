"""Random signs from a counter: the same on every device, none of them ever stored.

The sign of coordinate (r, c) in output j of stream (seed, name, side) is bit j % 32 of

    word(r, c, w) = F(F((F(c ^ key0) + r * 0x9E3779B1) ^ key1) + w * 0x85EBCA77),   w = j // 32

(1 -> +1, 0 -> -1), with F murmur3's 32-bit finaliser (Appleby, MurmurHash3, public domain):

    h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16

all modulo 2^32, and (key0, key1) the two little-endian 32-bit words of
blake2b("curate\\0<seed>\\0<side>\\0<name>", 8 bytes). One word serves 32 outputs.
"""

from functools import cache
from hashlib import blake2b
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.launch import jit, tl

Side = Literal["rows", "columns", "whole"]
_MASK = 0xFFFFFFFF


class Key(NamedTuple):
    """A stream of signs."""

    key0: int
    key1: int


def stream_key(seed: int, name: str, side: Side) -> Key:
    """Return the stream of one side of one parameter: `rows`, `columns`, or the `whole` of it."""
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
    words = torch.arange((k + 31) // 32, device=columns.device)
    h = _finalise(columns.long() ^ key.key0)
    if rows is not None:
        h = (h + rows.long() * 0x9E3779B1) & _MASK
    h = _finalise(h ^ key.key1)
    word = _finalise((h[:, None] + words * 0x85EBCA77) & _MASK)
    # Eight signs at a time, looked up by byte: a shift and a mask for each cost six times as much.
    byte = word.view(torch.uint8).view(*word.shape, 8)[..., :4].int()  # the low half comes first
    return F.embedding(byte.flatten(1), _signs_of_bytes(columns.device, dtype)).flatten(1)[:, :k]


@cache
def _signs_of_bytes(device: torch.device, dtype: torch.dtype) -> Float[Tensor, "256 8"]:
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(dtype)


def _finalise(h: Tensor) -> Tensor:
    """Murmur3's finaliser on values in [0, 2^32); int64 products wrap, their low 32 bits hold."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


@jit
def finalise(h):  # type: ignore[no-untyped-def]
    """Murmur3's finaliser of a block of uint32, in registers."""
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@jit
def sign_words(rows, columns, words, key0, key1):  # type: ignore[no-untyped-def]
    """word(r, c, w) of a block of coordinates, broadcast against one another, in registers.

    The keys are passed to a kernel as i64 and taken modulo 2^32 here.
    """
    h = finalise(columns.to(tl.uint32) ^ key0.to(tl.uint32))
    h = finalise((h + rows.to(tl.uint32) * 0x9E3779B1) ^ key1.to(tl.uint32))
    return finalise(h + words.to(tl.uint32) * 0x85EBCA77)


@jit
def block_signs(rows, columns, outputs, key0, key1):  # type: ignore[no-untyped-def]
    """The signs (+1 or -1, float32) of a block of coordinates in these outputs."""
    word = sign_words(rows, columns, outputs // 32, key0, key1)
    return ((word >> (outputs % 32).to(tl.uint32)) & 1).to(tl.float32) * 2 - 1
