"""No tensor of a batch outlives its pass: what listens to a graph must not keep the graph."""

import gc
from collections import Counter

import pytest
import torch
from torch import Tensor

from curate.scorers.signals import signals

WANTS = [
    "loss",
    "el2n",
    "el2n_seq",
    "grad_norm",
    "sketch",
    "weight_alignment",
    "embedding",
    "input_grad",
]


def alive() -> Counter[tuple[int, ...]]:
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return Counter(tuple(x.shape) for x in found)


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("mlp", False),
        ("bert", False),
        ("bert", True),
        *(
            pytest.param(name, recompute, marks=pytest.mark.slow)
            for name in ("cnn", "gpt2 tied", "lstm", "encoder", "bare parameters")
            for recompute in (False, True)
        ),
    ],
)
def test_nothing_is_left_of_a_batch(kit, name, recompute) -> None:
    case = kit.make(name)
    wants = WANTS if name != "bare parameters" else WANTS[:5]

    def run() -> None:
        signals(case.model, case.batch, case.loss, wants, sketch_dim=(3, 4), recompute=recompute)

    run()  # what the model or a kernel keeps from its first call on
    before = alive()
    for _ in range(2):
        run()
    assert alive() - before == Counter()


def test_nothing_is_left_of_a_batch_that_fails(kit) -> None:
    case = kit.make("bert")

    def run() -> None:
        def loss(model, batch):
            found = case.loss(model, batch)
            found.loss.register_hook(lambda g: torch.full((2, 2), 0.0) @ torch.zeros(3))
            return found

        with pytest.raises(RuntimeError):
            signals(case.model, case.batch, loss, WANTS, sketch_dim=(3, 4), probe=False)

    run()
    before = alive()
    for _ in range(2):
        run()
    assert alive() - before == Counter()
