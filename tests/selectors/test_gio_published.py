"""The `official` variant beside the published package itself, where that is installed.

`pip install --no-deps grad-info-opt==0.1.2` brings `GIO.GIOKL`. It wants JAX and Spark, of which it
needs a dozen array functions and a gradient: here they are torch's, in float64, so that what
differs would differ by more than rounding. (Where it is unpacked elsewhere: GIO_PACKAGE=FOLDER.)
"""

import importlib
import importlib.util
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from curate.selectors.gio_search import Descent, Found, Objective, search
from curate.selectors.gio_stop import Limits

FOLDER = os.environ.get("GIO_PACKAGE")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER and importlib.util.find_spec("GIO") is None,
        reason="grad-info-opt is not installed",
    ),
]


def tensor(values: object) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)


def grad(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def at(v: torch.Tensor) -> torch.Tensor:
        v = v.detach().clone().requires_grad_()
        return torch.autograd.grad(function(v), v)[0]

    return at


def without(rows: torch.Tensor, number: torch.Tensor, axis: int) -> torch.Tensor:
    assert axis == 0
    return torch.cat([rows[: int(number)], rows[int(number) + 1 :]])


def stand_ins() -> dict[str, types.ModuleType]:
    """Modules that answer for JAX and Spark."""
    jnp, lax = types.ModuleType("jax.numpy"), types.ModuleType("jax.lax")
    jax, linalg = types.ModuleType("jax"), types.ModuleType("jax.numpy.linalg")
    for name in ("sum", "matmul", "clip", "sqrt", "log", "mean"):
        setattr(jnp, name, getattr(torch, name))
    jnp.newaxis, jnp.array, jnp.delete = None, tensor, without
    jnp.sort = lambda x: torch.sort(x, dim=-1, stable=True).values
    jnp.argsort = lambda x: torch.argsort(x, stable=True)
    jnp.concatenate = torch.cat
    jnp.arange = lambda low, high: torch.arange(low, high, dtype=torch.float64)
    linalg.norm = lambda x, axis=None: torch.linalg.vector_norm(x, dim=axis)
    lax.top_k = torch.topk
    jnp.linalg, jax.numpy, jax.lax, jax.grad = linalg, jnp, lax, grad
    made = {"jax": jax, "jax.numpy": jnp, "jax.lax": lax}
    spark = ["pyspark", "pyspark.sql", "pyspark.sql.functions", "pyspark.sql.types"]
    for name in [*spark, "pyspark.ml", "pyspark.ml.clustering"]:
        made[name] = types.ModuleType(name)
    made["pyspark.sql"].functions = made["pyspark.sql.functions"]
    made["pyspark.sql"].SparkSession = MagicMock()
    made["pyspark.ml.clustering"].KMeans = MagicMock()
    return made


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    for name, module in stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)
    if FOLDER:
        monkeypatch.syspath_prepend(FOLDER)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of some hundred numbers
    yield importlib.import_module("GIO.GIOKL").GIOKL()
    torch.set_num_threads(threads)
    for name in ("GIO", "GIO.GIOKL", "GIO.GIO_super"):
        sys.modules.pop(name, None)


# The published scale makes long descents chaotic: after some hundred updates the last digit of a
# float64 decides which row is next. It is compared where v begins anew at the mean of a skewed
# target; the other cases take a smaller scale.
SMALL = {"scale_factor": 4.0}
CASES = [
    {},
    {"max_iter": 3},
    {"v_init": "prev_opt", **SMALL},
    {"v_init": "jump", **SMALL},
    {"v_init": "prev_opt", "resets_allowed": True, "max_resets": 3, **SMALL},
    {"v_init": "jump", "resets_allowed": True, **SMALL},
    {"discard_nearest_for_xy": True, "max_iter": 30, **SMALL},
    {"criterion": "sequential_increase_tolerance", "max_iter": 12, **SMALL},
    {"criterion": "sequential_increase_tolerance", "max_sequential_increases": 0},
    {"criterion": "max_resets", "resets_allowed": True, "max_iter": 9, **SMALL},
    {"criterion": "min_difference", "min_difference": 0.01},
    {"criterion": "min_kl", "min_kl": 1.5},
    {"criterion": "data_size", "max_data_size": 0.1},
    {"criterion": "data_size", "max_data_size": 0.1, "resets_allowed": True, **SMALL},
    {"lr": 0.05, "grad_desc_iter": 7, "scale_factor": 3.0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_rows_and_divergences(
    published: object, case: dict[str, object], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(seed)
    target = draw.exponential(size=(25, 8)) ** 2
    pool, start = draw.normal(size=(60, 8)) * 2 + 1, draw.uniform(-1, 1, (20, 8)) * 4
    theirs = fitted(published, pool, target, start, case, seed, monkeypatch)
    ours = ours_of(pool, target, start, case, seed)
    assert ours.rows or ours.refused is not None
    np.testing.assert_array_equal(pool[ours.rows], theirs[0])
    # Both in float64; theirs expands squared distances, which costs a few digits of 16.
    np.testing.assert_allclose(ours.trace[1:], theirs[1], rtol=1e-9, atol=1e-9)


def ours_of(
    pool: np.ndarray, target: np.ndarray, start: np.ndarray, case: dict[str, object], seed: int
) -> Found:
    def taken(cls: type) -> dict[str, object]:
        return {name: case[name] for name in cls.__dataclass_fields__ if name in case}

    return search(
        pool,
        target,
        start,
        Objective(**taken(Objective)),
        Descent(**taken(Descent)),
        Limits(**taken(Limits)),
        np.random.default_rng(seed),
    )


def fitted(
    published: object,
    pool: np.ndarray,
    target: np.ndarray,
    start: np.ndarray,
    case: dict[str, object],
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[np.ndarray, list[float]]:
    draws = np.random.default_rng(seed)

    def sample(rows: list[list[float]], count: int) -> list[list[float]]:
        assert count == 1
        return [rows[int(draws.integers(len(rows)))]]

    monkeypatch.setattr(random, "sample", sample)
    monkeypatch.setattr(random, "random", lambda: 1.0)
    renamed = {"stop_criterion" if k == "criterion" else k: v for k, v in case.items()}
    found, trace, _ = published.fit(tensor(pool), tensor(target), D=tensor(start), **renamed)
    return found[len(start) :].numpy(), [float(kl) for kl in trace]
