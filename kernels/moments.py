"""The spread of a tensor over checkpoints, one checkpoint at a time.

Shapes: B samples, D entries of each (pixels, features).

Welford's update (Welford 1962, Technometrics 4(3)) keeps each entry's mean and M2, the sum of its
squared deviations, so that a mean of 10^4 does not swallow a deviation of 1. VoG (Agarwal, D'souza
and Hooker 2022, section 3) is the mean over entries of what the deviations come to:

    count = K:   var = M2 / (K - ddof),   std = sqrt(var)

At the last checkpoint nobody needs the new mean and M2: they are made in registers and reduced.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curate.kernels.launch import Config, Variant, jit, tl, uses_triton
from curate.kernels.summation import accumulable, chunks, on_device, sum_partials

Spread = Literal["std", "var"]

# Elements at a time on a CPU: several passes are made over them, so they should stay in a cache.
TILE = 1 << 17


def update_moments(
    mean: Float[Tensor, "B D"], m2: Float[Tensor, "B D"], x: Float[Tensor, "B D"], count: int
) -> None:
    """Take checkpoint number `count` (from 1) into mean and M2, in place.

    With count 1 both are overwritten: they need not be initialised. Both are of the dtype that sums
    over x are taken in: float32, or float64 for float64.

    Raises:
        ValueError: count is below 1.
    """
    if count < 1:
        raise ValueError(
            f"count is the number of checkpoints with this one, at least 1; got {count}"
        )
    if uses_triton(mean, m2, x):
        _launch(mean, m2, x, count, None, 0)
        return
    for rows in chunks(len(x), x.shape[1], TILE):
        new = accumulable(x[rows])
        if count == 1:
            mean[rows], m2[rows] = new, 0
            continue
        before = new - mean[rows]
        mean[rows].add_(before, alpha=1 / count)
        m2[rows].addcmul_(before, new - mean[rows])


def finish_moments(
    mean: Float[Tensor, "B D"],
    m2: Float[Tensor, "B D"],
    x: Float[Tensor, "B D"],
    count: int,
    spread: Spread = "std",
    ddof: int = 0,
) -> Float[Tensor, " B"]:
    """Return the mean over entries of the spread over `count` checkpoints, x being the last.

    mean and M2 are those of the count - 1 checkpoints before (of none if count is 1) and are left
    as they are. The divisor is count - ddof: 0 for VoG, 1 for an unbiased variance.

    Raises:
        ValueError: count is not above ddof, or below 1.
    """
    if count < 1 or count <= ddof:
        raise ValueError(
            f"the spread of {count} checkpoints with ddof={ddof} is undefined: "
            f"take at least {max(1, ddof + 1)}"
        )
    if uses_triton(mean, m2, x):
        return _launch(mean, m2, x, count, spread, ddof)
    out = mean.new_zeros(len(x))
    for rows in chunks(len(x), x.shape[1], TILE):
        if count == 1:
            continue
        before = accumulable(x[rows]) - mean[rows]
        # M2 grows by before * (x - new mean) = before^2 (count - 1) / count.
        var = before.square_().mul_((count - 1) / count).add_(m2[rows]).div_(count - ddof)
        out[rows] = (var.sqrt_() if spread == "std" else var).mean(1)
    return out if x.shape[1] else mean.new_full((len(x),), torch.nan)


# -- Triton --------------------------------------------------------------------------------------


def _launch(
    mean: Tensor, m2: Tensor, x: Tensor, count: int, spread: Spread | None, ddof: int
) -> Tensor:
    """Update in place (no spread), or return the mean spread per sample."""
    b, d = x.shape
    tiles = -(-d // _CONFIG.blocks["ENTRIES"])
    partials = torch.empty(b, tiles if spread else 1, dtype=torch.float32, device=x.device)
    if x.numel():
        assert mean.dtype == m2.dtype == torch.float32, "moments are kept in float32"
        with on_device(x):
            _moments_kernel[(b * tiles,)](
                mean, m2, x, partials, d, tiles, *mean.stride(), *m2.stride(), *x.stride(),
                1 / count, 1 / (count - ddof),
                FIRST=count == 1, SPREAD=spread or "", **_CONFIG.options,
            )  # fmt: skip
    return sum_partials(partials) / d if spread and d else partials.new_full((b,), torch.nan)


@jit
def _moments_kernel(  # type: ignore[no-untyped-def]
    p_mean, p_m2, p_x, p_out, d, tiles, mean_b, mean_d, m2_b, m2_d, x_b, x_d, per_count, per_free,
    FIRST: tl.constexpr, SPREAD: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_b = (pid // tiles).to(tl.int64)
    o_d = ((pid % tiles) * ENTRIES + tl.arange(0, ENTRIES)).to(tl.int64)
    m_d = o_d < d
    p_mean += i_b * mean_b + o_d * mean_d
    p_m2 += i_b * m2_b + o_d * m2_d
    x = tl.load(p_x + i_b * x_b + o_d * x_d, mask=m_d, other=0.0).to(tl.float32)
    if FIRST:  # what is in mean and M2 was never written
        mean, m2 = x, tl.zeros((ENTRIES,), tl.float32)
    else:
        mean = tl.load(p_mean, mask=m_d, other=0.0)
        before = x - mean
        mean += before * per_count
        m2 = tl.load(p_m2, mask=m_d, other=0.0) + before * (x - mean)
    if SPREAD == "":
        tl.store(p_mean, mean, mask=m_d)
        tl.store(p_m2, m2, mask=m_d)
    else:
        spread = tl.where(m2 < 0, 0.0, m2) * per_free  # a maximum would drop NaN
        if SPREAD == "std":
            spread = tl.sqrt(spread)
        tl.store(p_out + pid.to(tl.int64), tl.sum(tl.where(m_d, spread, 0.0)))


# Reading is all that the kernel does. Estimated, not yet tuned on a device (2026-11-22).
_CONFIG = Config({"ENTRIES": 1024}, 4, 3)


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every configuration that may be launched."""
    for dtype in ("fp32", "bf16", "fp16"):
        for is_first in (False, True):
            for spread in ("", "std", "var"):
                name = f"moments_{'first_' if is_first else ''}{spread or 'update'}_{dtype}"
                flags = {"FIRST": is_first, "SPREAD": spread}
                yield Variant(name, _moments_kernel, _types(dtype), {**flags, **_CONFIG.blocks})


def _types(dtype: str) -> Mapping[str, Any]:
    names = [name for name in _moments_kernel.arg_names if not name.isupper()]
    known = {
        "p_x": f"*{dtype}",
        "d": "i32",
        "tiles": "i32",
        "per_count": "fp32",
        "per_free": "fp32",
    }
    return {n: known.get(n, "*fp32" if n.startswith("p_") else "i64") for n in names}
