"""Checkpoints: self-describing folders of weights, ours or the Hugging Face Trainer's.

`seed0-epoch005/` or `seed0-step000500/` holds `model.safetensors` and `curate.json`, and for a
Hugging Face model its configuration and tokenizer. Folders are local. An adapter's folder holds the
adapter alone; its base model is another folder.
"""

import glob
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn
from torch.optim import Optimizer

from curate.pipeline.models.adapters import (
    CONFIG,
    WEIGHTS,
    base_folder,
    is_adapter,
    load_adapted,
    load_adapter_weights,
    recorded_base,
)
from curate.pipeline.models.huggingface import (
    architecture,
    architecture_name,
    is_huggingface,
    is_transformer,
    pretrained,
)
from curate.pipeline.models.models import absolute_model, make_model
from curate.pipeline.models.moments import save_moments
from curate.pipeline.models.weights import (
    copy_weights,
    load_weights_file,
    save_weights,
    unwrapped,
    weight_files,
)
from curate.pipeline.storing.commit import explained
from curate.pipeline.tasks.tokenizers import TOKENIZER_FILES, tokenizer
from curate.pipeline.user_code import file_digest, is_user_code

FORMAT, VERSION = "curate.checkpoint", 1
META = "curate.json"
TRAINER_FOLDER = re.compile(r"checkpoint-(\d+)")
log = logging.getLogger("curate.checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder says about itself.

    `task` is None where the folder does not tell (the Hugging Face Trainer's). `lr` is the learning
    rate of the step that led here, None where unknown. `digest` covers weights and description.
    """

    path: str
    model: str
    model_args: dict[str, Any]
    task: dict[str, Any] | None
    seed: int
    epoch: int | float | None
    step: int
    lr: float | None
    rows_seen: int | None
    corpus: dict[str, Any] | None
    digest: str
    null_input: bool = False
    """Whether it was trained on empty inputs, so that it knows of the labels alone."""
    mean_lr: float | None = None
    """Mean learning rate of the steps since the run's checkpoint before, None where unknown."""


def checkpoint_name(seed: int, *, epoch: int | None = None, step: int | None = None) -> str:
    """Return `seed0-epoch005`, or `seed0-step000500` where no epoch is given."""
    assert epoch is not None or step is not None, "a checkpoint has an epoch or a step"
    return f"seed{seed}-epoch{epoch:03d}" if epoch is not None else f"seed{seed}-step{step:06d}"


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    spec: str,
    model_args: Mapping[str, Any],
    task: Mapping[str, Any],
    seed: int,
    step: int,
    epoch: int | float | None = None,
    lr: float | None = None,
    rows_seen: int | None = None,
    corpus: Mapping[str, Any] | None = None,
    null_input: bool = False,
    mean_lr: float | None = None,
    optimizer: Optimizer | None = None,
) -> Checkpoint:
    """Write a checkpoint to its folder, whole or not at all, replacing what was there.

    `spec` is what `make_model` was called with, `task` a task's description. With an `optimizer`,
    which is an Adam, its moments stand beside the weights.
    """
    target = Path(folder).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.*"):  # of a killed run
        shutil.rmtree(left, ignore_errors=True)
    made = target.with_name(f".{target.name}.{os.getpid()}.new")
    described: dict[str, Any] = json.loads(json.dumps(task))
    meta: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": absolute_model(spec),
        "model_args": dict(model_args),
        "task": described,
        "seed": seed,
        "epoch": epoch,
        "step": step,
        "lr": lr,
        "rows_seen": rows_seen,
        "corpus": None if corpus is None else dict(corpus),
    }
    if null_input:
        meta["null_input"] = True
    if mean_lr is not None:
        meta["mean_lr"] = mean_lr
    if is_user_code(spec):
        meta["model_digest"] = file_digest(spec)
    try:
        with explained(target):
            made.mkdir()
            _write(made, unwrapped(model), meta)
            if optimizer is not None:
                save_moments(made, model, optimizer)
            _put_in_place(made, target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return read_checkpoint(target)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Return what a checkpoint folder says, ours or one of the Hugging Face Trainer.

    Raises:
        ValueError: the folder is no checkpoint, or is one of a later version.
    """
    folder = Path(path).absolute()
    if not _is_checkpoint(folder):
        raise ValueError(
            f"{path} is no checkpoint: it has neither {META} nor config.json + weights"
        )
    if is_adapter(folder):
        return _of_trainer(folder, _digest([folder / WEIGHTS, folder / CONFIG]))
    files = weight_files(folder)
    if not files:
        raise ValueError(f"checkpoint {path} has no weights")
    described = [p for p in (folder / META, folder / "config.json") if p.is_file()]
    digest = _digest([*files, *described])
    if not (folder / META).is_file():
        return _of_trainer(folder, digest)
    meta = _json(folder / META)
    if meta.get("format") != FORMAT or not isinstance(meta.get("version"), int):
        raise ValueError(f"{folder / META} does not describe a checkpoint")
    if meta["version"] > VERSION:
        raise ValueError(f"{folder / META} has version {meta['version']}; update curate to read it")
    preprocess = (meta["task"] or {}).get("preprocess", {})
    if preprocess.get("tokenizer") == ".":
        preprocess["tokenizer"] = str(folder)
    if is_user_code(meta["model"]):
        _tell_if_changed(meta)
    names = ("model", "model_args", "task", "seed", "epoch", "step", "lr", "rows_seen", "corpus")
    try:
        told = {n: meta[n] for n in names}
        null_input, mean_lr = meta.get("null_input", False), meta.get("mean_lr")
        return Checkpoint(
            str(folder), **told, digest=digest, null_input=null_input, mean_lr=mean_lr
        )
    except KeyError as error:
        raise ValueError(f"{folder / META} lacks {error}") from None


def find_checkpoints(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> list[Checkpoint]:
    """Return all checkpoints at these folders, parents of folders, or globs, by (seed, step).

    Folders of the Hugging Face Trainer tell no seed: each parent folder counts as one, numbered
    by a `seed3` in its name, else in the order given.

    Raises:
        ValueError: a path leads to no checkpoint, one is given twice or stands for the same seed
            and step as another, or they belong to different tasks.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    folders = [folder for path in given for folder in _folders(os.fspath(path))]
    found = _with_seeds([read_checkpoint(folder) for folder in dict.fromkeys(folders)])
    found.sort(key=lambda c: (c.seed, c.step))
    for a, b in pairwise(found):
        if (a.seed, a.step) == (b.seed, b.step):
            raise ValueError(
                f"{a.path} and {b.path} are both seed {a.seed} step {a.step}; name one of them"
            )
    return _one_task(found)


def load_model(checkpoint: Checkpoint, model: str | None = None) -> nn.Module:
    """Return the checkpoint's model, or another `model` with its weights, in evaluation mode.

    Raises:
        ValueError: the model cannot be made, or the weights do not fit it.
    """
    if is_adapter(checkpoint.path):
        base = base_folder([(checkpoint.path, checkpoint.model)], model)
        return load_adapted(checkpoint.path, base).eval()
    # A factory may have changed what transformers would make of the configuration; a folder of
    # transformers tells no more than the checkpoint's own, and knows of no head put on later.
    has_config = (Path(checkpoint.path) / "config.json").is_file()
    is_own = not is_user_code(checkpoint.model) and (model is None or is_huggingface(model))
    if has_config and is_own:
        made = architecture(checkpoint.path)
    else:
        made = make_model(model or checkpoint.model, **checkpoint.model_args)
    load_weights(made, checkpoint)
    return made.eval()


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's weights into the model, in place.

    Raises:
        ValueError: they do not fit; the first names that do not are in the message.
    """
    if is_adapter(checkpoint.path):
        load_adapter_weights(model, checkpoint.path)
        return
    try:
        load_weights_file(model, checkpoint.path)
    except ValueError:
        if (Path(checkpoint.path) / META).is_file() or not is_transformer(model):
            raise
        # Transformers stores some architectures (mixtures of experts) under other names than it
        # computes with; it alone can translate.
        whole = pretrained(checkpoint.path, architecture_name(checkpoint.path), {}, whole=True)
        copy_weights(model, whole)


def records_path(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> str | None:
    """Return the training records beside these checkpoints, None where training left none."""
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    for path in given:
        for folder in _folders(os.fspath(path)):
            if (records := Path(folder).parent / "records.parquet").is_file():
                return str(records)
    return None


def _is_checkpoint(folder: Path) -> bool:
    if (folder / META).is_file() or is_adapter(folder):
        return True
    return (folder / "config.json").is_file() and bool(weight_files(folder))


def _folders(path: str) -> list[str]:
    """Return the checkpoint folders that a path, parent or glob means."""
    if "://" in path:
        raise ValueError(f"checkpoints are read from local folders only, not from {path}; copy it")
    matches = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
    if not matches or not all(os.path.exists(m) for m in matches):
        raise ValueError(f"no checkpoint at {path}: there is nothing")
    found = [os.path.abspath(f) for match in matches for f in _below(Path(match))]
    if not found and (adapter := next((m for m in matches if _is_described(Path(m))), None)):
        raise ValueError(
            f"{adapter} describes an adapter ({CONFIG}) but has no weights of it: save "
            f"{WEIGHTS} beside it"
        )
    if not found:
        raise ValueError(
            f"no checkpoint in {path}; expected folders such as seed0-epoch005 or checkpoint-500"
        )
    return found


def _below(folder: Path) -> list[Path]:
    if not folder.is_dir() or _is_checkpoint(folder):
        return [folder] if folder.is_dir() else []
    children = [c for c in sorted(folder.iterdir()) if c.is_dir() and not c.name.startswith(".")]
    found = [c for c in children if _is_checkpoint(c)]
    if not found and (folder / "checkpoints").is_dir():
        return _below(folder / "checkpoints")
    return found


def _is_described(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or any(folder.glob(f"*/{CONFIG}"))


def _of_trainer(folder: Path, digest: str) -> Checkpoint:
    """Return what a folder of the Hugging Face Trainer, or of any model or adapter, tells."""
    state = (
        _json(folder / "trainer_state.json") if (folder / "trainer_state.json").is_file() else {}
    )
    match = TRAINER_FOLDER.fullmatch(folder.name)
    step = int(state.get("global_step") or (match[1] if match else 0))
    rates = [e["learning_rate"] for e in state.get("log_history", []) if "learning_rate" in e]
    batch = state.get("train_batch_size")
    seed = re.search(r"seed[-_]?(\d+)", folder.parent.name)
    return Checkpoint(
        path=str(folder),
        model=recorded_base(folder) if is_adapter(folder) else str(folder),
        model_args={},
        task=None,
        seed=int(seed[1]) if seed else 0,
        epoch=state.get("epoch"),
        step=step,
        lr=float(rates[-1]) if rates else None,
        rows_seen=step * batch if batch else None,
        corpus=None,
        digest=digest,
        mean_lr=_mean_rate(folder, step, state.get("log_history", [])),
    )


def _mean_rate(folder: Path, step: int, logged: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean rate logged since the checkpoint before in the Trainer's folder."""
    others = (TRAINER_FOLDER.fullmatch(p.name) for p in folder.parent.iterdir())
    before = max((n for m in others if m is not None and (n := int(m[1])) < step), default=0)
    since = [e for e in logged if e.get("step", step) > before]
    rates = [e["learning_rate"] for e in since if "learning_rate" in e]
    return fmean(rates) if rates else None


def _with_seeds(found: list[Checkpoint]) -> list[Checkpoint]:
    """Number the runs of the Hugging Face Trainer where their folders' names do not."""
    parents = list(dict.fromkeys(os.path.dirname(c.path) for c in found if c.task is None))
    named = {os.path.dirname(c.path): c.seed for c in found if c.task is None}
    if len(set(named.values())) == len(parents):
        return found
    return [
        replace(c, seed=parents.index(os.path.dirname(c.path))) if c.task is None else c
        for c in found
    ]


def _one_task(found: list[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints with one description, so that equal tokenizers are read once."""
    first = found[0]
    for other in found[1:]:
        if _comparable(other.task) != _comparable(first.task):
            kinds = [c.task["kind"] if c.task else "no recorded task" for c in (first, other)]
            raise ValueError(
                f"{first.path} ({kinds[0]}) and {other.path} ({kinds[1]}) were trained for "
                "different tasks, columns or classes; score them apart"
            )
    return [replace(c, task=first.task) for c in found]


def _comparable(task: dict[str, Any] | None) -> dict[str, Any] | None:
    if task is None:
        return None
    places = ("tokenizer", "root")
    kept = {k: v for k, v in task.get("preprocess", {}).items() if k not in places}
    return {**task, "preprocess": kept}


def _write(folder: Path, model: Any, meta: dict[str, Any]) -> None:
    save_weights(folder / "model.safetensors", model)
    if is_transformer(model):
        model.config.architectures = [type(model).__name__]
        if classes := meta["task"].get("classes"):  # not those of the model that it started from
            model.config.id2label = {i: str(name) for i, name in enumerate(classes)}
            model.config.label2id = {str(name): i for i, name in enumerate(classes)}
        model.config.save_pretrained(folder)
    _save_tokenizer(folder, meta["task"])
    (folder / META).write_text(json.dumps(meta, indent=2, sort_keys=True, allow_nan=False) + "\n")


def _save_tokenizer(folder: Path, task: dict[str, Any]) -> None:
    """Copy the task's tokenizer into the checkpoint, which then needs no other folder."""
    source = task.get("preprocess", {}).get("tokenizer")
    if not source or source == "bytes":
        return
    if Path(source).is_dir():
        for name in TOKENIZER_FILES:
            if (file := Path(source) / name).is_file():
                shutil.copyfile(file, folder / name)
    else:
        tokenizer(source).save_pretrained(folder)
    task["preprocess"]["tokenizer"] = "."


def _put_in_place(made: Path, target: Path) -> None:
    for file in made.iterdir():
        _sync(file)
    _sync(made)
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        os.rename(target, old)
        os.rename(made, target)
        shutil.rmtree(old)
    else:
        os.rename(made, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object")
    return found


def _tell_if_changed(meta: dict[str, Any]) -> None:
    file = meta["model"].rpartition(":")[0]
    if os.path.isfile(file) and file_digest(meta["model"]) != meta.get("model_digest"):
        log.warning("%s has changed since the checkpoint was saved", file)
