"""The built-in models, the user's own, and what is refused."""

import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from curate.pipeline.models.models import absolute_model, make_model


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_the_mlp_has_the_layers_asked_for() -> None:
    model = make_model("mlp", input_shape=[1, 8, 8], num_classes=10)
    sizes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(128, 64), (64, 128), (10, 64)]
    assert model(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    shallow = make_model("mlp", input_shape=(5,), num_classes=2, hidden=[])
    assert [tuple(p.shape) for p in shallow.parameters()] == [(2, 5), (2,)]


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 32, 32), (3, 64, 64), (4, 28, 28), (1, 3, 5), (1, 1, 1), (2, 9, 70)]
)
def test_the_cnn_takes_images_of_any_size(shape: Sequence[int]) -> None:
    model = make_model("cnn", input_shape=shape, num_classes=3, width=4)
    assert model(torch.rand(2, *shape)).shape == (2, 3)
    model.eval()
    images = torch.rand(4, *shape)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)


def test_the_gpt_never_looks_ahead_and_ties_its_embeddings() -> None:
    model = make_model("gpt", vocab_size=17, context=9, layers=2, heads=2, dim=8).eval()
    ids = torch.randint(0, 17, (2, 9))
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 17
    logits, other = model(ids), model(changed)
    torch.testing.assert_close(logits[:, :5], other[:, :5])
    assert not torch.allclose(logits[:, 5:], other[:, 5:])
    assert model.head.weight is model.tokens.weight
    with pytest.raises(ValueError, match="10 tokens do not fit the model's context of 9"):
        model(torch.zeros(1, 10, dtype=torch.long))


def test_an_untrained_gpt_is_about_uniform() -> None:
    torch.manual_seed(0)
    logits = make_model("gpt", vocab_size=257)(torch.randint(0, 257, (2, 64)))
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    assert entropy.item() == pytest.approx(torch.tensor(257.0).log().item(), abs=0.05)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mlp", {"input_shape": (4,), "num_classes": 2}),
        ("cnn", {"input_shape": (1, 8, 8), "num_classes": 2}),
        ("gpt", {"vocab_size": 9}),
    ],
)
def test_weights_depend_on_the_seed_alone(name: str, args: dict[str, Any]) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in make_model(name, **args).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


FACTORIES = """
from torch import nn
from neighbour import WIDTH

def linear(num_classes, input_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * WIDTH, num_classes))

def deep(num_classes, input_shape, depth=1):
    return nn.Sequential(*[nn.Linear(1, 1)] * depth)

def anything(**kw):
    model = nn.Identity()
    model.kw = kw
    return model

def needy(num_classes, secret):
    return nn.Identity()

def wrong(num_classes):
    return "a model"

class Module(nn.Module):
    def __init__(self, num_classes):
        super().__init__()

constant = 3
"""


@pytest.fixture
def factories(tmp_path: Path) -> str:
    (tmp_path / "neighbour.py").write_text("WIDTH = 2")
    (tmp_path / "factories.py").write_text(FACTORIES)
    return str(tmp_path / "factories.py")


def test_a_factory_gets_what_it_takes_of_what_the_task_offers(factories: str) -> None:
    offered = {"num_classes": 3, "input_shape": (4,), "vocab_size": 7, "context": 5}
    model = make_model(f"{factories}:linear", **offered)
    assert prod(model(torch.rand(1, 8)).shape) == 3
    assert len(make_model(f"{factories}:deep", **offered, depth=4)) == 4
    assert make_model(f"{factories}:anything", **offered, extra=1).kw == {**offered, "extra": 1}
    assert isinstance(make_model(f"{factories}:Module", **offered), nn.Module)


@pytest.mark.parametrize(
    ("name", "args", "complaint"),
    [
        ("needy", {"num_classes": 3}, "needs secret, but the task offers num_classes=3"),
        ("deep", {"num_classes": 3, "input_shape": (1,), "wide": 1}, "takes no wide; it takes num"),
        ("wrong", {"num_classes": 3}, "returned str, not a torch module"),
        ("constant", {}, "is no function or class"),
        ("absent", {}, "defines no 'absent'; it defines .*linear"),
    ],
)
def test_a_factory_that_does_not_fit_is_named(
    factories: str, name: str, args: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_model(f"{factories}:{name}", **args)


@pytest.mark.parametrize(
    ("spec", "args", "complaint"),
    [
        ("mlpp", {}, "unknown model 'mlpp'; choose one of mlp, cnn, gpt, a folder"),
        ("mlp", {"vocab_size": 5}, "'mlp' needs input_shape, num_classes, but the task offers voc"),
        ("cnn", {"input_shape": (8,), "num_classes": 2}, "'cnn' takes images"),
        ("gpt", {"vocab_size": 5, "dim": 9, "heads": 2}, "dim=9 is no multiple of heads=2"),
        ("mlp", {"input_shape": (8,), "num_classes": 2, "hidden": "x"}, "made of .*hidden='x'"),
        ("mlp", {"input_shape": (8,), "num_classes": 2, "hidden": 5}, "made of .*hidden=5: "),
        ("mlp", {"input_shape": (8,), "num_classes": 2, "hidden": [-5]}, "dimension"),
        ("gpt", {"vocab_size": 5, "colour": 1}, "'gpt' takes no colour; it takes vocab_size, con"),
    ],
)
def test_a_wrong_model_is_answered_in_one_sentence(
    spec: str, args: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_model(spec, **args)


def test_a_folder_that_is_not_there_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curate.pipeline.tasks.tokenizers.is_reachable", lambda _: False)
    start = time.monotonic()
    with pytest.raises(ValueError, match="models/gone is no folder; as a name on the hub it needs"):
        make_model("models/gone", num_classes=3)
    assert time.monotonic() - start < 10


def test_paths_in_a_spec_become_absolute(
    tmp_path: Path, factories: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_model("mlp") == "mlp"
    assert absolute_model("factories.py:linear") == f"{factories}:linear"
    assert absolute_model(".") == str(tmp_path)
    assert absolute_model("some/hub-name") == "some/hub-name"
