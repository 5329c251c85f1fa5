"""What stores hold: against `curate.signals`, plain forward passes and autograd row by row."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.ipc as ipc
import pytest
import torch
from torch import nn

from curate.pipeline.manifests.select import select
from curate.pipeline.models.checkpoint import find_checkpoints
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.stores.store import Store, open_store
from curate.scorers.passes import Passes
from curate.scorers.signals import signals

HALF = 2.0**-11
"""Rounding of float16: half a unit in its last place, relative."""


def stored(store: Store) -> np.ndarray:
    return np.concatenate(list(store.blocks()))


@pytest.mark.parametrize(
    "sketch", ["3x2", "64", pytest.param("48(jl=dense)", marks=pytest.mark.slow)]
)
def test_sketches_are_those_of_signals(points: Any, sketch: str) -> None:
    table = points.score(sketch=sketch)
    k = {"3x2": (3, 2), "64": (64,), "48(jl=dense)": (48,)}[sketch]
    store = open_store(table, "sketch")
    layers = store.layout.layers
    norms = np.concatenate(list(store.norms()))
    for at, model in enumerate(points.models()):
        want = signals(model, points.batch(), points.outputs, ("sketch",), sketch_dim=k)["sketch"]
        want = want.double().numpy()
        got = stored(open_store(table, "sketch", checkpoints=[at]))
        for i, layer in enumerate(layers):
            part = slice(layer.offset, layer.offset + layer.size)
            length = np.linalg.norm(want[:, part], axis=1)
            # Norms are of the float32 sketch, before anything is rounded to float16.
            np.testing.assert_allclose(norms[:, at, i], length, rtol=1e-5)
            # Each entry is rounded once, below 6e-5 of the norm to a multiple of 6e-8.
            bound = HALF * np.abs(want[:, part]) + 6e-8 * length[:, None] + 1e-6 * length[:, None]
            assert (np.abs(got[:, part] - want[:, part]) <= bound).all()


def test_layers_name_the_parameters_in_order(points: Any) -> None:
    store = open_store(points.score(sketch="2x2"), "sketch")
    own = {n: tuple(p.shape) for n, p in points.models()[0].named_parameters()}
    assert {x.name: x.shape for x in store.layout.layers} == own
    assert [x.offset for x in store.layout.layers] == [0, 4, 8, 12]
    assert store.layout.how == {
        "kind": "two-sided", "jl": None, "k": [2, 2], "seed": 0, "params": ""
    }  # fmt: skip
    head = open_store(points.score("head", sketch="2x2(params=head,seed=5)"), "sketch")
    assert [x.name for x in head.layout.layers] == list(own)[2:]
    assert head.layout.how["seed"] == 5


def test_checkpoints_weigh_by_learning_rate_and_seeds_alike(points: Any) -> None:
    table = points.score(sketch="2x2", store="embedding")
    rates = np.array([0.1 / 2, 0.1 / 3])
    want = np.tile(rates / rates.sum() / 2, 2)
    store = open_store(table, "sketch")
    np.testing.assert_allclose(store.weights, want)
    assert [(c.seed, c.step) for c in store.layout.checkpoints] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    last = open_store(table, "embedding")
    assert [(c.seed, c.step) for c in last.layout.checkpoints] == [(0, 2), (1, 2)]
    np.testing.assert_allclose(last.weights, [0.5, 0.5])
    alone = [stored(open_store(table, "sketch", checkpoints=[k])) for k in range(4)]
    joined = np.concatenate([v * np.sqrt(w) for v, w in zip(alone, want, strict=True)], 1)
    np.testing.assert_allclose(stored(store), joined, rtol=1e-6)


def test_inner_products_estimate_those_of_gradients(points: Any) -> None:
    """Mean over checkpoints of cosines: off by at most 5 standard deviations in 1770 pairs."""
    table = points.score(sketch="4096")
    got = stored(open_store(table, "sketch", unit=True)).astype(np.float64)
    store, want = open_store(table, "sketch"), np.zeros((60, 60))
    for model, weight in zip(points.models(), store.weights, strict=True):
        g = nn.functional.normalize(points.gradients(model)).numpy()
        want += weight * g @ g.T
    error = got @ got.T - want
    pairs = np.triu_indices(60, 1)
    # One checkpoint's error has a standard deviation of at most sqrt(2/k), the mean no more.
    assert np.abs(error[pairs]).max() <= 5 * np.sqrt(2 / 4096) + 1e-3
    assert np.sqrt((error[pairs] ** 2).mean()) <= np.sqrt(2 / 4096)
    assert np.abs(np.diag(error)).max() <= 1e-5  # of length 1 by themselves


@pytest.mark.slow
def test_two_sided_errors_stay_within_the_stated_bound(points: Any) -> None:
    k = 8
    exact = nn.functional.normalize(points.gradients(points.models()[0])).numpy()
    errors = []
    for seed in range(6):
        table = points.score(f"s{seed}", sketch=f"{k}x{k}(seed={seed})")
        got = stored(open_store(table, "sketch", checkpoints=[0]))
        lengths = points.gradients(points.models()[0]).norm(dim=1).numpy()
        got = got / lengths[:, None]
        errors.append(got @ got.T - exact @ exact.T)
    off = np.array(errors)[:, *np.triu_indices(60, 1)]
    assert off.std() <= np.sqrt(2 / k + 2 / k + 4 / k**2)
    # Unbiased: the mean over seeds is smaller than one seed's error.
    assert np.sqrt((off.mean(0) ** 2).mean()) <= 0.6 * np.sqrt((off**2).mean())


def test_embedding_and_probs_are_those_of_a_forward_pass(points: Any) -> None:
    table = points.score(store="embedding,probs")
    assert list(table.scorers) == []
    for at, place in enumerate((1, 3)):  # the seeds' last
        model = points.models()[place]
        with torch.no_grad():
            hidden = model[:2](points.x).numpy()
            probs = model(points.x).double().softmax(1).numpy()
        got = stored(open_store(table, "embedding", checkpoints=[at]))
        norms = np.linalg.norm(hidden, axis=1, keepdims=True)
        assert (np.abs(got - hidden) <= HALF * np.abs(hidden) + 1e-6 * norms).all()
        got = stored(open_store(table, "probs", checkpoints=[at]))
        np.testing.assert_allclose(got, probs, rtol=1e-5)
        np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)


@pytest.mark.slow
def test_tiny_probabilities_keep_their_digits(points: Any, tmp_path: Any) -> None:
    points.x *= 0
    with torch.no_grad():
        for checkpoint in find_checkpoints(points.checkpoints):
            from safetensors.torch import load_file, save_file

            weights = load_file(f"{checkpoint.path}/model.safetensors")
            weights["2.bias"] = torch.tensor([0.0, -60.0, 20.0])
            weights["2.weight"] *= 0
            save_file(weights, f"{checkpoint.path}/model.safetensors")
    got = stored(open_store(points.score(store="probs"), "probs", checkpoints=[0]))
    want = torch.tensor([0.0, -60.0, 20.0], dtype=torch.float64).softmax(0).numpy()
    assert want[1] < 1e-34
    np.testing.assert_allclose(got[0], want, rtol=1e-5)


def test_labels_are_weighed_by_stored_probabilities_of_all_seeds(points: Any) -> None:
    """RENT by hand; nobody has to say the classes, which the task knows."""
    table = points.score(store="probs")
    params = {"label": "label", "noise": 0.3}
    made = select(table, method="rent", vectors="probs", budget=1.0, params=params,
                  out=points.out / "rent")  # fmt: skip
    with torch.no_grad():
        ends = [points.models()[place](points.x).double().softmax(1) for place in (1, 3)]
    probs = torch.stack(ends).mean(0).numpy()
    own = probs[np.arange(60), points.y.numpy()]
    weights = own / (0.7 * own + 0.15 * (1 - own))  # three classes
    # Stored probabilities and weights are float32.
    got = np.concatenate([b["weight"].to_numpy() for b in made.batches(["weight"])])
    np.testing.assert_allclose(got / got.sum(), weights / weights.sum(), rtol=1e-5)


def test_batches_and_units_change_nothing_beyond_rounding(points: Any) -> None:
    settings = {"sketch": "3x3", "store": "embedding,probs"}
    whole = points.score("whole", batch_rows=64, **settings)
    cut = points.score("cut", batch_rows=7, unit_rows=13, **settings)
    assert cut.success["units"] == 6
    for name in ("sketch", "embedding", "probs"):
        a, b = stored(open_store(whole, name)), stored(open_store(cut, name))
        # Sums in another order, then possibly the neighbouring float16.
        assert np.abs(a - b).max() <= 4 * HALF * np.abs(a).max()
        numbers = np.array([59, 0, 13, 12, 40])
        np.testing.assert_array_equal(open_store(cut, name).take(numbers), b[numbers])


def test_blocks_of_any_size_are_the_same_rows(points: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(points.score(sketch="3x3", unit_rows=25), "sketch")
    want = stored(store)
    monkeypatch.setattr("curate.pipeline.stores.store.BLOCK_BYTES", 4 * store.dimension * 7)
    sizes = [len(block) for block in store.blocks()]
    assert max(sizes) == 7 and sum(sizes) == 60
    np.testing.assert_array_equal(stored(store), want)


def test_rows_with_errors_have_no_vector(
    make_points: Callable[..., str], points: Any, points_code: Any
) -> None:
    points.corpus = make_points([30, 10], first={7: 661.0, 33: 662.0}, name="bad")
    table = points.score(sketch="2x2", store="embedding,probs", scorers="loss")
    assert table.success["bad_rows"] == 2
    for name in ("sketch", "embedding", "probs"):
        store = open_store(table, name)
        absent = np.isnan(stored(store)).all(1)
        assert np.flatnonzero(absent).tolist() == [7, 33]
        assert np.isnan(store.take(np.array([33]))).all()
    with ipc.open_file(f"{table.path}/store/sketch/unit-00000.arrow") as file:
        rows = file.read_all()
    assert rows["vector"].null_count == rows["norm"].null_count == 2


def test_one_pass_serves_scores_and_stores(points: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(name: str, **settings: Any) -> tuple[int, int, ScoreTable]:
        counts = {"pass": 0, "backward": 0}
        run, grad = Passes.run, torch.autograd.grad

        def count_run(self: Passes, batch: Any, needs: Any) -> Any:
            counts["pass"] += 1
            return run(self, batch, needs)

        def count_grad(*args: Any, **kwargs: Any) -> Any:
            counts["backward"] += 1
            return grad(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Passes, "run", count_run)
            patch.setattr(torch.autograd, "grad", count_grad)
            table = points.score(name, scorers="el2n,grand", **settings)
        return counts["pass"], counts["backward"], table

    alone = counted("alone", unit_rows=60)
    together = counted("together", unit_rows=60, sketch="4x4", store="embedding,probs")
    assert together[:2] == alone[:2]
    for name in ("el2n", "grand"):
        a, b = (
            np.concatenate([batch[name].to_numpy() for batch in t.scan([name])])
            for t in (alone[2], together[2])
        )
        np.testing.assert_allclose(a, b, rtol=1e-6)
