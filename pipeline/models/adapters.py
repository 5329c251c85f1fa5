"""Adapters of peft: a folder with `adapter_config.json` and `adapter_model.safetensors`.

The base model is another folder; its weights stay frozen, so that what is trainable, and has
gradients, is the adapter alone. peft is an extra: `pip install 'curate[lora]'`.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from curate.pipeline.models.huggingface import architecture_name, few, pretrained
from curate.pipeline.models.weights import weight_files
from curate.pipeline.tasks.tokenizers import located

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}
_PREFIX = "base_model.model."
"""What peft puts before the names of the base model."""


def is_adapter(folder: str | Path) -> bool:
    """Tell whether the folder holds an adapter and its weights."""
    return all((Path(folder) / name).is_file() for name in (CONFIG, WEIGHTS))


def recorded_base(folder: str | Path) -> str:
    """Return the base model that the adapter was made for, as it says; "" where it does not."""
    base = _config(folder).get("base_model_name_or_path") or ""
    return str(Path(base).absolute()) if base and Path(base).is_dir() else str(base)


def base_folder(adapters: Sequence[tuple[str, str]], model: str | None) -> str:
    """Return the folder of the base model of some adapters, (folder, recorded base) each.

    `model`, where given, is that folder.

    Raises:
        ValueError: it is not here, or the adapters are of different ones.
    """
    folder, base = adapters[0]
    if model is None and (other := next((a for a in adapters if a[1] != base), None)):
        raise ValueError(
            f"{folder} adapts {base!r} and {other[0]} adapts {other[1]!r}: score them apart, or "
            "name the base model of both by --model BASE_FOLDER"
        )
    try:
        found = located(model or base)
        is_there = bool(model or base) and (Path(found) / "config.json").is_file()
    except ValueError:
        is_there = False
    if not is_there:
        raise ValueError(
            f"{folder} holds an adapter of {model or base or 'an unnamed model'}, whose folder is "
            "not here: name it by --model BASE_FOLDER"
        )
    return found


@cache
def base_digest(folder: str) -> str:
    """Return the sha256 over a base model's weights and configuration."""
    total = hashlib.sha256()
    for file in (*weight_files(folder), Path(folder) / "config.json"):
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def load_adapted(folder: str, base: str) -> nn.Module:
    """Return the base model with the adapter on it: that trainable, all else frozen.

    Raises:
        ValueError: peft is not installed, the base model lacks weights or does not fit, or the
            adapter is one that changes what the model reads.
    """
    if find_spec("peft") is None:
        raise ValueError(f"{folder} holds an adapter: pip install 'curate[lora]' to read it")
    import peft

    weights, config = _weights(folder), _config(folder)
    if peft.PeftConfig.from_pretrained(folder).is_prompt_learning:
        raise ValueError(
            f"{folder} holds prompts that are put before the input, which are not scored; adapters "
            "such as LoRA are"
        )
    name = _CLASSES.get(str(config.get("task_type"))) or architecture_name(base)
    given = {key.removeprefix(_PREFIX) for key in weights}
    classes = _classes(weights)
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    model = pretrained(base, name, options, whole=True, given=given)
    try:
        with warnings.catch_warnings():  # about how peft makes it, which is as it was trained
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        said = str(error).strip().split("\n")[0]
        raise ValueError(f"adapter {folder} does not fit its base model {base}: {said}") from error
    _refuse_misfit(adapted, weights, folder)
    return adapted


def load_adapter_weights(model: nn.Module, folder: str) -> None:
    """Copy an adapter's weights into a model that has another of the same form.

    Raises:
        ValueError: they are of another form.
    """
    import peft

    weights = _weights(folder)
    _refuse_misfit(model, weights, folder)
    peft.set_peft_model_state_dict(model, weights)


def _refuse_misfit(model: nn.Module, weights: dict[str, Tensor], folder: str) -> None:
    import peft

    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = sorted(own.keys() ^ weights.keys())
    odd += [n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape]
    if odd:
        raise ValueError(f"the weights in {folder} do not fit the adapted model: {few(odd)}")


def _classes(weights: dict[str, Tensor]) -> int | None:
    """Return the outputs of the classifier that was saved with the adapter, None without one."""
    heads = [
        tensor
        for name, tensor in weights.items()
        if name.endswith("weight")
        and tensor.dim() == 2
        and {"classifier", "score"} & set(name.split("."))
        and "lora_" not in name
    ]
    return len(heads[-1]) if heads else None


def _config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / CONFIG
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return found


def _weights(folder: str) -> dict[str, Tensor]:
    path = Path(folder) / WEIGHTS
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
