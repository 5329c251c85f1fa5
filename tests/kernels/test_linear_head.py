"""The linear head from hidden states against float64 autograd on logits that are stored."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curate.kernels import linear_head
from curate.kernels.linear_head import (
    HeadSums,
    HeadWants,
    head_error,
    head_gram_sq_norm,
    head_pass,
    head_sq_norm,
    head_sums,
    linear_cross_entropy,
)
from curate.kernels.rademacher import signs, stream_key

KEY = stream_key(3, "head.weight", "rows")


def _case(b: int, t: int, v: int, d: int, seed: int, *, has_bias: bool, dtype: Any) -> Any:
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(b, t, d, generator=gen).to(dtype)
    weight = (torch.randn(v, d, generator=gen) * 2 / d**0.5).to(dtype)
    bias = torch.randn(v, generator=gen).to(dtype) if has_bias else None
    targets = torch.randint(0, v, (b, t), generator=gen)
    # Rows with different numbers of targets, some with none.
    keep = torch.rand(b, t, generator=gen) < torch.rand(b, 1, generator=gen) * 1.5
    targets = targets.masked_fill(~keep, -100)
    hidden[targets == -100] = torch.nan
    return hidden, weight, bias, targets


def _truth(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, wants: HeadWants
) -> dict[str, Tensor]:
    """Everything from the stored logits and the stored error, in float64."""
    ignored = targets == -100
    h = hidden.double().masked_fill(ignored[..., None], 0.0)
    w, y = weight.double(), targets.clamp(min=0)
    z = h @ w.T + (0 if bias is None else bias.double())
    p = z.softmax(-1)
    e = (p - F.one_hot(y, len(w))).masked_fill(ignored[..., None], 0.0)
    rest = z.scatter(-1, y[..., None], -torch.inf)
    z_y = z.gather(-1, y[..., None])[..., 0]
    out = {
        "loss": z.logsumexp(-1) - z_y,
        "error_target": p.gather(-1, y[..., None])[..., 0] - 1,
        "lse": z.logsumexp(-1),
        "error_sq": e.square().sum(-1),
        "el2n": e.norm(dim=-1),
        "entropy": torch.special.entr(p).sum(-1),
        "margin": z_y - rest.amax(-1),
        "correct": (z.argmax(-1) == y).double(),
        "hidden_grad": e @ w,
        "gram": e @ e.mT,
        "aligned": (e * (h @ w.T)).sum(-1),
    }
    if wants.columns is not None:
        out["columns"] = e.gather(2, wants.columns[:, None].expand(-1, e.shape[1], -1))
    if wants.sketch is not None:
        out["sketch"] = e @ signs(KEY, torch.arange(len(w)), wants.sketch[1], dtype=w.dtype)
    if wants.directions is not None:
        products = torch.einsum("mvd,btd->btmv", wants.directions.double(), h)
        out["dots"] = torch.einsum("btv,btmv->btm", e, products)
    return {
        k: x.masked_fill(ignored.view(*ignored.shape, *(1,) * (x.dim() - 2)), 0.0)
        for k, x in out.items()
    }


def _named(sums: HeadSums) -> dict[str, Tensor]:
    flat = sums._asdict()
    statistics = flat.pop("statistics")
    if statistics is not None:
        flat |= statistics._asdict()
    return {name: x for name, x in flat.items() if x is not None}


def _all_wants(b: int, t: int, v: int, d: int, seed: int) -> HeadWants:
    gen = torch.Generator().manual_seed(seed + 1)
    return HeadWants(
        statistics=True,
        gram=True,
        columns=torch.randint(0, v, (b, t + 2), generator=gen),
        sketch=(KEY, 5),
        directions=torch.randn(2, v, d, generator=gen),
        aligned=True,
        hidden_grad=True,
    )


@settings(deadline=None, max_examples=30)
@given(
    shape=st.sampled_from([(1, 1, 2, 1), (3, 7, 13, 5), (4, 5, 257, 8), (2, 33, 64, 16)]),
    has_bias=st.booleans(),
    has_grad=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    scratch=st.sampled_from([64, 1000, 1 << 20]),
    seed=st.integers(0, 999),
)
def test_everything_agrees_with_float64(shape, has_bias, has_grad, dtype, scratch, seed) -> None:
    hidden, weight, bias, targets = _case(*shape, seed, has_bias=has_bias, dtype=dtype)
    wants = _all_wants(*shape, seed)
    if not has_grad:
        wants = linear_head.replace(wants, hidden_grad=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_head, "SCRATCH_CPU", scratch)
        patch.setattr(linear_head, "TOKENS_CPU", 11)
        got = _named(head_sums(hidden, weight, bias, targets, wants))
    truth = _truth(hidden, weight, bias, targets, wants)
    assert set(got) == set(truth) - (set() if has_grad else {"hidden_grad"})
    for name, value in got.items():
        tol = 1e-5 if name != "hidden_grad" or dtype != torch.bfloat16 else 2**-8
        torch.testing.assert_close(
            value.double(), truth[name], rtol=tol, atol=tol * max(1, float(truth[name].abs().max())),
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip
