"""Signs: the documented function in plain integers, balance, independence of streams."""

from hashlib import blake2b

import pytest
import torch

from curate.kernels.launch import HAS_TRITON, IS_INTERPRETED, jit, tl
from curate.kernels.rademacher import (
    Key,
    sign_words,
    signs,
    spread_signs,
    stream_key,
    thirds,
    unpacked,
)

GOLDEN = [2401661219, 3864614826]


def _plain(seed: int, name: str, side: str, r: int, c: int, j: int) -> int:
    """The module's docstring in Python integers."""

    def f(h: int) -> int:
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    digest = blake2b(f"curate\0{seed}\0{side}\0{name}".encode(), digest_size=8).digest()
    key0, key1 = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    h = f(((f(c ^ key0) + r * 0x9E3779B1) % 2**32) ^ key1)
    return 1 if f((h + (j // 32) * 0x85EBCA77) % 2**32) >> (j % 32) & 1 else -1


def test_finaliser_is_murmur3s() -> None:
    """Known values of fmix32."""
    from curate.kernels.rademacher import _finalise

    got = _finalise(torch.tensor([0, 1, 2, -1], dtype=torch.int32))
    assert [h % 2**32 for h in got.tolist()] == [0, 0x514E28B7, 0x30F4C306, 0x81F16F39]


@pytest.mark.parametrize("side", ["rows", "columns", "whole"])
def test_signs_are_the_documented_function(side) -> None:
    columns, rows = torch.tensor([0, 1, 77, 2**31, 2**32 - 1]), torch.tensor([0, 3, 9, 2**20, 1])
    got = signs(stream_key(7, "h.0.weight", side), columns, 70, rows=rows)
    for n, (r, c) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        want = [_plain(7, "h.0.weight", side, r, c, j) for j in range(70)]
        assert got[n].tolist() == want


def test_golden_signs() -> None:
    """Sketches are compared across machines and versions: these bits may never change."""
    got = signs(stream_key(0, "weight", "rows"), torch.arange(2), 32)
    words = [int("".join("1" if s > 0 else "0" for s in reversed(row.tolist())), 2) for row in got]
    assert words == GOLDEN


def test_streams_differ_and_signs_balance() -> None:
    at = torch.arange(4096)
    streams = [
        signs(stream_key(seed, name, side), at, 64)
        for seed, name, side in [(0, "a", "rows"), (1, "a", "rows"), (0, "b", "rows"),
                                 (0, "a", "columns")]
    ]  # fmt: skip
    flat = torch.stack([s.flatten() for s in streams])
    correlation = flat @ flat.T / flat.shape[1]
    assert torch.all((correlation - torch.eye(4)).abs() < 5 / flat.shape[1] ** 0.5)
    assert flat.mean(1).abs().max() < 5 / flat.shape[1] ** 0.5
    # Outputs of one stream are uncorrelated too, and so are neighbouring coordinates.
    gram = streams[0].T @ streams[0] / 4096 - torch.eye(64)
    assert gram.abs().max() < 6 / 4096**0.5
    assert (streams[0][1:] * streams[0][:-1]).mean(0).abs().max() < 6 / 4096**0.5


@jit
def _store_signs(p_out, key0, key1, N: tl.constexpr, K: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    o_n, o_w = tl.arange(0, N), tl.arange(0, K // 32)
    rows = (o_n * 977).to(tl.int64)[:, None]
    word = sign_words(rows, o_n[:, None] * 65537, o_w[None, :], unpacked(key0), unpacked(key1))
    o_out = o_n[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(p_out + o_out, spread_signs(word, N, K, p_out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.skipif(not HAS_TRITON, reason="no Triton on this platform")
def test_signs_in_registers_are_those_of_torch(dtype) -> None:
    """Bit for bit, in rows and columns beyond 16 bits; keys reach a kernel whole."""
    device = torch.device("cpu" if IS_INTERPRETED else "cuda")
    key = Key(0xFFFFFFFF, 0x80000001)
    out = torch.empty(64, 128, dtype=dtype, device=device)
    _store_signs[(1,)](out, *key.arguments, N=64, K=128)
    at = torch.arange(64)
    want = signs(key, at * 65537, 128, rows=at * 977, dtype=dtype)
    assert torch.equal(out.cpu(), want)


@jit
def _store_thirds(p_x, p_out, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    o_n = tl.arange(0, N)
    high, middle, low = thirds(tl.load(p_x + o_n))
    tl.store(p_out + o_n, high.to(tl.float32))
    tl.store(p_out + N + o_n, middle.to(tl.float32))
    tl.store(p_out + 2 * N + o_n, low.to(tl.float32))


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton on this platform")
def test_a_float32_is_the_sum_of_its_thirds() -> None:
    """Exactly, wherever the low third is a normal number, as it is of numbers beyond 2^-100."""
    device = torch.device("cpu" if IS_INTERPRETED else "cuda")
    x = torch.randn(256) * 2.0 ** torch.randint(-90, 100, (256,))
    out = torch.empty(3, 256, device=device)
    _store_thirds[(1,)](x.to(device), out, N=256)
    assert torch.equal(out.double().cpu().sum(0), x.double())
