"""RENT and DWS: the card's limits, transitions from files and estimates, draws in the mean."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaincinv

from curate.selectors.dws import Dws, gammas, uniforms
from curate.selectors.protocol import Budget
from curate.selectors.rent import Rent, label_weights, mean_probs
from curate.selectors.transition import anchored, confident, read_transition, symmetric
from curate.selectors.vectors import ArrayVectors

C = 4


def some_probs(n=50, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(C), n)


def test_without_noise_all_weights_are_one():
    """ALGORITHMS 5.3: T = I gives w = 1; a T that says nothing gives w = C p."""
    probs, labels = some_probs(), np.arange(50) % C
    np.testing.assert_allclose(label_weights(probs, labels, np.eye(C)), 1.0, rtol=1e-8)
    nothing = label_weights(probs, labels, np.full((C, C), 1 / C))
    np.testing.assert_allclose(nothing, C * probs[np.arange(50), labels])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0, 0.7))
def test_each_weight_is_the_ratio_written_out(seed, rate):
    probs = some_probs(10, seed)
    labels = np.random.default_rng(seed).integers(0, C, 10)
    found = label_weights(probs, labels, symmetric(rate, C))
    for p, y, w in zip(probs, labels, found, strict=True):
        below = sum((1 - rate if k == y else rate / (C - 1)) * p[k] for k in range(C)) + 1e-12
        assert w == pytest.approx(p[y] / below)


def test_weights_undo_the_noise_of_labels():
    """With the true p and T, the weighted share of each label is the clean share."""
    draw = np.random.default_rng(1)
    probs = some_probs(20_000, 2)
    clean = np.array([draw.choice(C, p=p) for p in probs])
    moved = draw.random(20_000) < 0.4
    noisy = np.where(moved, (clean + draw.integers(1, C, 20_000)) % C, clean)
    weights = label_weights(probs, noisy, symmetric(0.4, C))
    assert weights.mean() == pytest.approx(1, abs=0.02)
    right = noisy == clean
    assert weights[right].mean() > 1.2 * weights[~right].mean()
    # E[w f(x, noisy)] = E[f(x, clean)], here for f = the probability of the label.
    rows = np.arange(20_000)
    weighted = (weights * probs[rows, noisy]).mean()
    assert weighted == pytest.approx(probs[rows, clean].mean(), abs=0.01)
    assert abs(probs[rows, noisy].mean() - weighted) > 0.05


def test_probabilities_of_checkpoints_are_averaged_by_their_weights():
    a, b = some_probs(6, 3), some_probs(6, 4)
    stored = np.hstack([np.sqrt(0.25) * a, np.sqrt(0.75) * b]).astype(np.float32)
    np.testing.assert_allclose(mean_probs(stored, C), 0.25 * a + 0.75 * b, atol=1e-6)
    with pytest.raises(ValueError, match="no probabilities of 3 classes"):
        mean_probs(stored, 3)
    with pytest.raises(ValueError, match="do not sum to 1"):
        mean_probs(2 * stored, C)


def test_anchor_points_are_the_rows_surest_of_each_class():
    t = symmetric(0.3, 3)
    probs = np.vstack([np.full((5, 3), 1 / 3), t.T])  # row 5 + y is p(noisy | clean y)
    np.testing.assert_allclose(anchored(probs), t)


def test_the_confident_joint_counts_a_worked_case():
    # Labelled 0: sure of 0, 0 and 1. Labelled 1: sure of 1 and 1. Thresholds .6 and .85.
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.1, 0.9], [0.2, 0.8]])
    labels = np.array([0, 0, 0, 1, 1])
    # The last row is of neither: .2 < .6 and .8 < .85. Joint [[2, 1], [0, 1]] scaled to 3 and 2.
    np.testing.assert_allclose(confident(probs, labels), [[1.0, 1 / 3], [0.0, 2 / 3]])
    with pytest.raises(ValueError, match="labelled class 1"):
        confident(probs, np.zeros(5, dtype=np.int64))


def test_the_confident_joint_finds_the_noise_that_was_made():
    draw = np.random.default_rng(5)
    clean = draw.integers(0, 3, 6000)
    noisy = np.where(draw.random(6000) < 0.3, (clean + draw.integers(1, 3, 6000)) % 3, clean)
    probs = np.full((6000, 3), 0.1)
    probs[np.arange(6000), clean] = 0.8  # a model that sees through the noise
    np.testing.assert_allclose(confident(probs, noisy), symmetric(0.3, 3), atol=0.03)


def test_transitions_are_read_and_checked(tmp_path):
    t = np.array([[0.9, 0.3], [0.1, 0.7]])
    np.save(tmp_path / "t.npy", t)
    np.savetxt(tmp_path / "t.csv", t, delimiter=",")
    for name in ("t.npy", "t.csv"):
        np.testing.assert_allclose(read_transition(str(tmp_path / name)), t)
    np.save(tmp_path / "turned.npy", t.T)
    np.save(tmp_path / "flat.npy", np.ones(3))
    np.save(tmp_path / "below.npy", np.array([[1.5, 0.0], [-0.5, 1.0]]))
    (tmp_path / "words.csv").write_text("a,b\n")
    for name, said in (
        ("turned.npy", "transpose it"),
        ("flat.npy", "not classes x classes"),
        ("below.npy", "no shares"),
        ("words.csv", "is no matrix"),
        ("none.npy", "there is no file"),
    ):
        with pytest.raises(ValueError, match=said):
            read_transition(str(tmp_path / name))


@pytest.fixture
def table(make_table):
    labels = np.random.default_rng(6).integers(0, C, 50)
    made = make_table(np.zeros(50), errors=[3], label=pa.array(labels))
    probs = some_probs()
    probs[8] = np.nan
    made.vectors, made.target = ArrayVectors(probs), None
    return made


def run(table, method, budget=None, seed=0):
    budget = budget or Budget("fraction", 1.0)
    selection = method.select(table, budget, np.random.default_rng(seed))
    found = pa.Table.from_batches(list(selection.batches))
    place = found["shard"].to_numpy() * 10 + found["row"].to_numpy()
    return place, found["weight"].to_numpy(zero_copy_only=False), selection.params


def test_over_a_table(table):
    place, weight, params = run(table, Rent("label", noise=0.3))
    assert place.tolist() == [i for i in range(50) if i not in (3, 8)]
    labels = table.data["label"].to_numpy()[place]
    wanted = label_weights(table.vectors.array[place], labels, symmetric(0.3, C))
    np.testing.assert_allclose(weight, wanted, rtol=1e-5)
    assert params["weight_kind"] == "sampling"
    assert params["matrix"]["kept"] == pytest.approx(0.7)
    by_matrix = run(table, Rent("label", transition=symmetric(0.3, C).tolist()))
    np.testing.assert_allclose(by_matrix[1], weight, rtol=1e-6)
    for estimate in ("anchor", "confident"):
        _, weight, params = run(table, Rent("label", estimate=estimate))
        said = np.array(params["matrix"]["noisy_by_clean"])
        wanted = label_weights(table.vectors.array[place], labels, said)
        np.testing.assert_allclose(weight, wanted, rtol=1e-5)


def test_names_of_classes_put_labels_in_the_order_of_the_probabilities(table, make_table):
    names = ["d", "b", "a", "c"]
    _, wanted, _ = run(table, Rent("label", noise=0.3))
    text = [names[i] for i in table.data["label"].to_pylist()]
    named = make_table(np.zeros(50), errors=[3], label=pa.array(text))
    named.vectors, named.target = table.vectors, None
    _, weight, _ = run(named, Rent("label", noise=0.3, classes=names))
    assert weight.tolist() == wanted.tolist()
    with pytest.raises(ValueError, match="give their names in the order"):
        run(named, Rent("label", noise=0.3))


def test_dirichlet_weights_are_rents_in_the_mean_and_at_their_limits():
    w = np.random.default_rng(7).gamma(2, size=40)
    share, total = w / w.sum(), 2.0 * w.sum()
    uniform = np.random.default_rng(8).random((4000, 40))
    draws = np.stack([gammas(2.0 * w, u) for u in uniform])
    draws /= draws.sum(axis=1, keepdims=True)
    # A Dirichlet share has variance m (1 - m) / (total + 1).
    variance = share * (1 - share) / (total + 1)
    assert (np.abs(draws.mean(axis=0) - share) < 4.5 * np.sqrt(variance / 4000)).all()
    np.testing.assert_allclose(draws.var(axis=0), variance, rtol=0.2)
    sharp = gammas(1e8 * w, uniform[0])
    np.testing.assert_allclose(sharp / sharp.sum(), share, rtol=2e-3)
    one = gammas(1e-3 * w, uniform[1])
    assert one.max() / one.sum() > 0.99


def test_a_concentration_near_zero_leaves_one_row_and_not_none():
    w, uniform = np.full(40, 1.0), np.random.default_rng(9).random((400, 40))
    for alpha in (1e-4, 1e-9, 1e-300):
        draws = np.stack([gammas(alpha * w, u) for u in uniform])
        assert (draws.max(axis=1) == 1).all()
        # Each row is the one as often as any other: 400 draws of 40, 5 sigma.
        counts = np.bincount(draws.argmax(axis=1), minlength=40)
        assert counts.max() < 10 + 5 * np.sqrt(10)
    # The logarithm's series meets the inverse where one takes over from the other.
    ratios = gammas(np.full(3, 0.5), np.array([1e-11, 1.5e-10, 0.5]))
    exact = gammaincinv(0.5, [1e-11, 1.5e-10, 0.5])
    np.testing.assert_allclose(ratios, exact / exact[2], rtol=1e-9)


def test_dirichlet_weights_are_a_function_of_the_seed_and_the_row(table):
    method = Dws("label", noise=0.3, alpha=3.0)
    place, weight, params = run(table, method)
    assert params["weight_kind"] == "loss" and len(place) == 48
    assert weight.sum() == pytest.approx(1, rel=1e-5)  # float32 shares of a Dirichlet draw
    table.batch_rows = 50
    assert run(table, method)[1].tolist() == weight.tolist()
    assert run(table, method, seed=1)[1].tolist() != weight.tolist()
    wanted = Rent("label", noise=0.3).weights(table)[0]
    drawn = gammas(
        3.0 * wanted, uniforms(table, int(np.random.default_rng(0).bit_generator.random_raw()))
    )
    np.testing.assert_allclose(weight, drawn[place] / drawn[place].sum(), rtol=1e-6)


def test_ragged_matrices_and_classes_named_twice_are_refused(table):
    with pytest.raises(ValueError, match="differ in length"):
        run(table, Rent("label", transition=[[1, 0], [0]]))
    with pytest.raises(ValueError, match="names a class twice"):
        run(table, Rent("label", noise=0.1, classes=["a", "a", "b", "c"]))


def test_wrong_settings_are_refused():
    for settings_, said in (
        ({}, "by one of noise"),
        ({"noise": 0.1, "estimate": "anchor"}, "by one of noise"),
        ({"noise": 1.5}, "noise rate must be"),
        ({"estimate": "guess"}, "estimate must be"),
        ({"noise": 0.1, "classes": "abc"}, "a list of names"),
    ):
        with pytest.raises(ValueError, match=said):
            Rent("label", **settings_)
    with pytest.raises(ValueError, match="alpha must be"):
        Dws("label", noise=0.1, alpha=0)
