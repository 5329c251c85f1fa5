"""Every parameter of a zoo of models against autograd on one row at a time, in float64."""

import re

import pytest
import torch

from curate.scorers.engine import Engine
from curate.scorers.protocol import Signal
from curate.scorers.signals import signals

ANALYTIC_ONLY = ("mlp", "bert", "gpt2 tied", "llama", "lora", "encoder", "encoder, tokens first")


@pytest.fixture
def case(case, kit):
    case.truth = kit.brute_force(case.model, case.batch, case.loss)
    return case


def test_every_parameter_agrees_with_autograd_on_the_row_alone(case) -> None:
    truth = case.truth
    engine = Engine(
        case.model, case.loss, [Signal("grad_sq_norm", f"^{re.escape(n)}$") for n in truth]
    )
    got = engine(case.batch)
    scale = sum(g.reshape(len(g), -1).square().sum(1) for g in truth.values())
    for signal, value in got.items():
        name = signal.params[1:-1].replace("\\", "")
        torch.testing.assert_close(
            value,
            truth[name].reshape(len(value), -1).square().sum(1),
            rtol=1e-9,
            atol=1e-13 * scale.max(),
            msg=name,
        )
    assert set(engine.paths) == set(truth)


def test_common_models_take_the_analytic_path(case) -> None:
    engine = Engine(case.model, case.loss, [Signal("grad_sq_norm")])
    engine(case.batch)
    slow = {n: p for n, p in engine.paths.items() if not p.startswith("analytic")}
    if case.name in ANALYTIC_ONLY:
        assert not slow
    else:
        assert len(slow) < len(engine.paths)


def test_sketches_dots_and_projections_are_those_of_the_true_gradient(sampled) -> None:
    """Sketching is linear: the sketch of the brute force's gradients, through the plain kernels."""
    from curate.kernels.projection import project_matrix
    from curate.kernels.rademacher import stream_key
    from curate.kernels.sketch import sketch_matrix, sketch_vector
    from curate.kernels.sparse_projection import sparse_project_matrix

    directions = [{n: torch.randn_like(g[0]) for n, g in sampled.truth.items()} for _ in range(2)]
    wants = ("sketch", "grad_dot")
    got = signals(
        sampled.model,
        sampled.batch,
        sampled.loss,
        wants,
        sketch_dim=(3, 4),
        seed=5,
        directions=directions,
    )
    dense, sparse = (
        signals(
            sampled.model, sampled.batch, sampled.loss, ["sketch"], sketch_dim=(8,), seed=5, jl=jl,
            probe=False,
        )["sketch"]
        for jl in ("dense", None)
    )  # fmt: skip
    sketches, projection, scattered, dots = [], 0, 0, 0
    for name, g in sampled.truth.items():
        keys = {side: stream_key(5, name, side) for side in ("rows", "columns", "whole", "sparse")}
        matrix = g.reshape(len(g), g.shape[1] if g.dim() > 2 else 1, -1)
        if g.dim() > 2:
            sketches.append(sketch_matrix(matrix, (keys["rows"], keys["columns"]), (3, 4)))
        else:
            sketches.append(sketch_vector(matrix[:, 0], keys["whole"], 12))
        projection = projection + project_matrix(matrix, keys["whole"], 8)
        scattered = scattered + sparse_project_matrix(matrix, keys["sparse"], 8)
        dots = dots + torch.stack([(g * d[name]).reshape(len(g), -1).sum(1) for d in directions], 1)
    torch.testing.assert_close(got["sketch"], torch.cat(sketches, 1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got["grad_dot"], dots, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dense, projection, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sparse, scattered, rtol=1e-9, atol=1e-12)


def test_neither_batch_size_nor_order_matters(sampled) -> None:
    engine = Engine(sampled.model, sampled.loss, [Signal("grad_sq_norm"), Signal("el2n")])
    together = engine(sampled.batch)
    order = [4, 1, 5, 0, 3, 2]
    permuted = engine(sampled.batch.select_rows(order))
    for signal, value in together.items():
        alone = [engine(sampled.batch.select_rows([i]))[signal] for i in range(sampled.batch.rows)]
        torch.testing.assert_close(torch.cat(alone), value)
        torch.testing.assert_close(permuted[signal], value[order])


def test_float32_agrees_with_float64(sampled) -> None:
    """To the reference tolerance: 1e-4 relative."""
    truth = sum(g.reshape(len(g), -1).square().sum(1) for g in sampled.truth.values()).sqrt()
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in sampled.batch.inputs.items()}
    batch = type(sampled.batch)(inputs, sampled.batch.targets, sampled.batch.rows)
    got = signals(sampled.model.float(), batch, sampled.loss)["grad_norm"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=0)
