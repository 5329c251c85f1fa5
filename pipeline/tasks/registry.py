"""Tasks by name, by guess, and from a checkpoint's description."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.custom import custom_from_corpus, custom_from_description
from curate.pipeline.tasks.guess import guess_task as guess_task
from curate.pipeline.tasks.task import Task
from curate.pipeline.user_code import is_user_code
from curate.selectors.settings import did_you_mean

TASKS = {
    "image_classification": "curate.pipeline.tasks.image_classification:ImageClassification",
    "text_classification": "curate.pipeline.tasks.text_classification:TextClassification",
    "causal_lm": "curate.pipeline.tasks.causal_lm:CausalLM",
    "tabular_classification": "curate.pipeline.tasks.tabular_classification:TabularClassification",
}


def make_task(name: str, corpus: Corpus, *, model: str | None = None, **options: Any) -> Task:
    """Return the task of this name, or of `file.py:Class`, for a corpus.

    `model` is the model the task will feed: text tasks take tokenizer and context length from its
    folder unless options say otherwise.

    Raises:
        ValueError: the name or an option is unknown, or the corpus does not suit the task.
    """
    if is_user_code(name):
        return custom_from_corpus(name, corpus, options)
    make = _task_class(name).from_corpus
    parameters = inspect.signature(make).parameters
    takes = [p for p in parameters if p not in ("corpus", "model")]
    for option in options:
        if option not in takes:
            raise ValueError(f"task {name} takes no option {option!r}; it takes {', '.join(takes)}")
    if "model" in parameters:
        options["model"] = model
    task: Task = make(corpus, **options)
    task.columns(corpus.schema)
    return task


def task_from_description(description: Mapping[str, Any], corpus: Corpus | None = None) -> Task:
    """Return the task that a checkpoint describes, without looking at any row.

    With `corpus`, relative image paths start at that corpus instead of the one it was made for.

    Raises:
        ValueError: the description names a task that is not known here.
    """
    if "path" in description:
        return custom_from_description(description)
    task: Task = _task_class(str(description.get("kind"))).from_description(description)
    if corpus is not None and hasattr(task, "root"):
        task.root = corpus.root
    return task


def _task_class(name: str) -> Any:
    if name not in TASKS:
        raise ValueError(
            f"unknown task {name!r}; choose one of {', '.join(TASKS)}, or file.py:Class"
            + did_you_mean(name, TASKS)
        )
    module, _, cls = TASKS[name].partition(":")
    return getattr(import_module(module), cls)
