"""A model made ready and put back: every flag is compared before, within and after."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curate.scorers.prepared import bare, canonical_name, named_parameters, prepared, unwrapped


def model() -> nn.Module:
    """Part frozen, part in evaluation mode, two modules with one setting for caches."""
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2), nn.BatchNorm1d(2))
    found[0].weight.requires_grad_(False)
    found[3].eval()
    found[0].config = found[2].config = SimpleNamespace(use_cache=True)
    found[3].config = SimpleNamespace(use_cache=None)
    return found


def state(of: nn.Module) -> dict[str, Any]:
    return {
        "training": [m.training for m in of.modules()],
        "gradients": [p.requires_grad for p in of.parameters()],
        "caches": [m.config.use_cache for m in of.modules() if "config" in vars(m)],
        "modules": [id(m) for m in of.modules()],
        "compiled": [m._compiled_call_impl for m in of.modules()],
    }


@contextmanager
def put_back(of: nn.Module, *names: str) -> Iterator[None]:
    before = state(of)
    with prepared(of, names):
        yield
    assert state(of) == before


def test_flags_within_and_after() -> None:
    of = model()
    with put_back(of):
        assert not any(m.training for m in of.modules())
        assert not any(p.requires_grad for p in of.parameters())
        assert state(of)["caches"] == [False, False, None]
    with put_back(of, "0.weight", "3.bias"):
        free = {n for n, p in of.named_parameters() if p.requires_grad}
        assert free == {"0.weight", "3.bias"}


def test_an_error_puts_the_model_back_too() -> None:
    of = torch.nn.Sequential(torch.compile(model(), backend="eager"))
    before = state(of)
    with pytest.raises(KeyError), prepared(of):
        raise KeyError
    assert state(of) == before


def test_what_is_compiled_runs_as_it_was_written() -> None:
    def never(*_: object) -> None:
        raise AssertionError("compiled")

    of = model()
    of[0] = torch.compile(of[0], backend=never)
    of[2].compile(backend=never)
    step = torch.compile(torch.sin, backend=never)
    with put_back(of):
        assert type(of[0]) is nn.Linear
        assert of(torch.ones(2, 3)).shape == (2, 2)
        assert step(torch.ones(1)) == torch.ones(1).sin()
    assert of[2]._compiled_call_impl is not None


def test_wrappers_are_taken_off() -> None:
    of = model()
    compiled = torch.compile(of, backend="eager")
    assert unwrapped(compiled) is of and unwrapped(of) is of
    assert bare(compiled) is of
    parallel = nn.DataParallel(torch.compile(of, backend="eager"))
    assert bare(torch.compile(parallel, backend="eager")) is of


def test_names_are_those_of_the_model_as_it_was_written() -> None:
    assert canonical_name("_orig_mod.a._orig_mod.weight") == "a.weight"
    assert canonical_name("a._orig_model.weight") == "a._orig_model.weight"
    of = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"), nn.Linear(2, 2))
    of[1].weight = of[0].weight
    names: dict[str, Tensor] = named_parameters(of)
    assert list(names) == ["0.weight", "0.bias", "1.bias"]  # a tied one under its first name
    assert names["0.weight"] is of[1].weight
