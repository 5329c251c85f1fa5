"""Models from Hugging Face folders: weights, architectures, and how we set them up.

No code from a folder is run; weights are safetensors or pickles read with `weights_only`.
"""

import json
import logging
import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from curate.pipeline.tasks.tokenizers import located

OFFERED = frozenset({"num_classes", "vocab_size", "input_shape", "context"})
"""What a task offers to any model: left out for a model that does not take it."""
log = logging.getLogger("curate.models")


def is_huggingface(spec: str) -> bool:
    """Tell whether `spec` is a folder with config.json, or may be a name on the hub."""
    if Path(spec).is_dir():
        return (Path(spec) / "config.json").is_file()
    return re.fullmatch(r"[\w.-]+/[\w.-]+", spec) is not None and not Path(spec).exists()


def auto_class(kw: dict[str, Any]) -> str:
    """Return the transformers class that suits what the task offers."""
    if "vocab_size" in kw and "num_classes" not in kw:
        return "AutoModelForCausalLM"
    if "input_shape" in kw:
        if len(kw["input_shape"]) != 3:
            raise ValueError("a Hugging Face model reads text or images, not a table; use mlp")
        return "AutoModelForImageClassification"
    return "AutoModelForSequenceClassification"


def pretrained(
    folder: str,
    class_name: str,
    kw: dict[str, Any],
    *,
    whole: bool = False,
    given: Collection[str] = (),
) -> nn.Module:
    """Return a Hugging Face model with its own weights; a head it lacks is fresh, and said so.

    No code from the folder is run, and a pickle is read with `weights_only`. With `whole`, nothing
    may be lacking but what is `given` from elsewhere.

    Raises:
        ValueError: there is no such folder or weights, or they do not fit the architecture.
    """
    import transformers

    arguments = {k: v for k, v in kw.items() if k not in OFFERED}
    folder = located(folder)
    if "num_classes" in kw:
        arguments |= {"num_labels": kw["num_classes"], "ignore_mismatched_sizes": True}
    try:
        with _quiet():
            model, info = getattr(transformers, class_name).from_pretrained(
                folder,
                trust_remote_code=False,
                local_files_only=Path(folder).is_dir(),
                output_loading_info=True,
                dtype="float32",
                **arguments,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        said = f"model {folder} cannot be loaded with {class_name}: {_first_line(error)}"
        raise ValueError(said) from error
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])} - {*given})
    if fresh and whole:
        raise ValueError(f"{folder} has no weights for {few(fresh)} of {class_name}")
    if fresh:
        log.warning("%s has no weights for %s: they start fresh", folder, few(fresh))
    return prepared(model)


def architecture(folder: str) -> nn.Module:
    """Return the model that a folder's config.json describes, with fresh float32 weights.

    Raises:
        ValueError: transformers has no such architecture.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}/config.json cannot be used: {_first_line(error)}") from error
    name = architecture_name(folder)
    return prepared(getattr(transformers, name)(config))


def architecture_name(folder: str) -> str:
    """Return the transformers class that a folder's config.json names.

    Raises:
        ValueError: there is no such class, or it has no head that predicts anything.
    """
    import transformers

    names = json.loads((Path(folder) / "config.json").read_text()).get("architectures") or [""]
    if not names[0] or not hasattr(transformers, names[0]):
        raise ValueError(
            f"{folder}/config.json names no architecture of transformers ({names[0]!r})"
        )
    if "For" not in names[0] and not names[0].endswith("LMHeadModel"):
        raise ValueError(
            f"{folder} holds a bare {names[0]}, which predicts nothing; train a head first: "
            "curate train --model FOLDER"
        )
    return str(names[0])


def is_transformer(model: nn.Module) -> bool:
    """Tell whether the model is one of transformers'."""
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def prepared(model: nn.Module) -> nn.Module:
    """Return a Hugging Face model set up for training and scoring on whole batches."""
    config: Any = model.config
    config.use_cache = False
    # A decoder that classifies looks for the last token that is no padding.
    classifies = "SequenceClassification" in type(model).__name__
    if classifies and getattr(config, "pad_token_id", None) is None:
        eos = getattr(config, "eos_token_id", None)
        config.pad_token_id = (eos[0] if isinstance(eos, list) else eos) or 0
    return model.train()


def few(names: Iterable[str], count: int = 3) -> str:
    """Return the first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class _quiet:
    """Keeps transformers' progress bars and loading reports off; we report what is fresh."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf

        self.level, self.bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
        hf.set_verbosity_error()  # type: ignore[no-untyped-call]
        hf.disable_progress_bar()  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as hf

        hf.set_verbosity(self.level)
        if self.bars:
            hf.enable_progress_bar()  # type: ignore[no-untyped-call]
