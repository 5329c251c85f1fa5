"""A model made ready for scoring, and put back as it was."""

import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile` and the wrappers of data-parallel training.

    Those wait after every pass for gradients of their weights, which are never made here.
    """
    inner = unwrapped(model)
    if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return bare(inner.module)
    return inner


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`; inside compiled code no tap would ever fire."""
    inner = getattr(model, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def canonical_name(name: str) -> str:
    """Return a parameter's or module's name as it is without `torch.compile`'s wrappers."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return each parameter once, a tied one under its first name."""
    return {canonical_name(name): p for name, p in model.named_parameters()}


@contextmanager
def prepared(model: nn.Module, differentiable: Collection[str] = ()) -> Iterator[None]:
    """Within: evaluation mode, nothing compiled, all weights but the differentiable ones frozen.

    Evaluation mode gives batch norm its running statistics, turns dropout off and leaves
    Hugging Face's gradient checkpointing inactive. Keys and values are not cached: one pass has
    no use of them, and a block that is run twice would meet its own. Training flags,
    `requires_grad` flags, compiled wrappers and `use_cache` are restored on leaving.
    """
    modules = list(model.modules())
    wrapped = [
        (parent, name, child)
        for parent in modules
        for name, child in parent._modules.items()
        if child is not None and "_orig_mod" in child._modules
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = unwrapped(child)
    modules = list(model.modules()) if wrapped else modules
    # Only what is not so already: this runs before every batch, over all modules of the model.
    compiled = [(m, m._compiled_call_impl) for m in modules if m._compiled_call_impl]
    training = [m for m in modules if m.training]
    flags = {p: name in differentiable for name, p in named_parameters(model).items()}
    changed = [p for p, flag in flags.items() if p.requires_grad != flag]
    caching = _caching(modules)
    try:
        for config in caching:
            config.use_cache = False
        for module, _ in compiled:
            module._compiled_call_impl = None
        if training:
            model.eval()
        for p in changed:
            p.requires_grad_(flags[p])
        with _uncompiled():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for p in changed:
            p.requires_grad_(not flags[p])
        for module in training:
            module.training = True
        for module, call in compiled:
            module._compiled_call_impl = call
        for parent, name, child in wrapped:
            parent._modules[name] = child


def _caching(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the settings of Hugging Face models that ask for a cache, each once."""
    configs = {id(c): c for m in modules if (c := vars(m).get("config")) is not None}
    return [c for c in configs.values() if getattr(c, "use_cache", False) is True]


def _uncompiled() -> AbstractContextManager[object]:
    """Within: functions given to `torch.compile` run as they were written.

    Entering it would import the compiler, seconds of work; without it nothing is compiled.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager
