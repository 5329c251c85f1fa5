"""Models by name: built in, a Hugging Face folder, or the user's own factory."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from curate.pipeline.models.huggingface import OFFERED, auto_class, few, is_huggingface, pretrained
from curate.pipeline.models.small_models import CNN, GPT, MLP
from curate.pipeline.tasks.task import Task
from curate.pipeline.user_code import absolute_spec, is_user_code, load_named
from curate.selectors.settings import did_you_mean

BUILT_IN: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "cnn": CNN, "gpt": GPT}


def make_model(spec: str, **kw: Any) -> nn.Module:
    """Return a model with fresh weights, or a Hugging Face folder's own, in training mode.

    `spec` is `mlp`, `cnn`, `gpt`, a Hugging Face folder (or hub name, when online), or
    `file.py:factory`. Fresh weights depend on torch's random state alone. Hugging Face weights come
    as float32.

    Raises:
        ValueError: the name is unknown, or the model cannot be made from these arguments.
    """
    if spec in BUILT_IN:
        try:
            built: nn.Module = _call(BUILT_IN[spec], spec, kw)
        except (TypeError, RuntimeError) as error:  # what torch says of an odd size
            given = ", ".join(f"{key}={value!r}" for key, value in kw.items())
            raise ValueError(f"model {spec!r} cannot be made of {given}: {error}") from None
        return built
    if is_user_code(spec):
        factory = load_named(spec)
        if not callable(factory):
            raise ValueError(f"{spec} is no function or class that makes a model")
        model = _call(factory, spec, kw)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{spec} returned {type(model).__name__}, not a torch module")
        return model
    if is_huggingface(spec):
        return pretrained(spec, auto_class(kw), kw)
    raise ValueError(
        f"unknown model {spec!r}; choose one of {', '.join(BUILT_IN)}, a folder with config.json, "
        f"or file.py:factory{did_you_mean(spec, BUILT_IN)}"
    )


def absolute_model(spec: str) -> str:
    """Return the spec with any path in it absolute, as checkpoints record it."""
    if spec in BUILT_IN:
        return spec
    if is_user_code(spec):
        return absolute_spec(spec)
    return str(Path(spec).absolute()) if Path(spec).is_dir() else spec


def model_args(task: Task, corpus: object = None) -> dict[str, Any]:
    """Return the task's own arguments for its model: `num_classes` or `vocab_size`, and shapes.

    A user's task may define `model_args() -> dict`; otherwise it offers its number of classes.
    `corpus` is not read: what a model must know of it, the task has recorded.
    """
    own = getattr(task, "model_args", None)
    if own is not None:
        return dict(own())
    return {"num_classes": len(task.classes)} if task.classes else {}


def _call(factory: Callable[..., object], spec: str, kw: dict[str, Any]) -> Any:
    """Call a factory with what it takes of `kw`."""
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    extra = [k for k in kw if k not in parameters and k not in OFFERED]
    if extra and not takes_any:
        raise ValueError(f"model {spec!r} takes no {few(extra)}; it takes {', '.join(parameters)}")
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and name not in kw
    ]
    if missing:
        offered = ", ".join(f"{k}={v}" for k, v in kw.items()) or "nothing"
        raise ValueError(f"model {spec!r} needs {few(missing)}, but the task offers {offered}")
    return factory(**{k: v for k, v in kw.items() if takes_any or k in parameters})
