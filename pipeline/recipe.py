"""A recipe: the stages of one run in a YAML file, run in order, each resuming where it stopped.

    corpus: data/train.parquet
    run: run
    train: {model: mlp, seeds: 3, epochs: 5}
    score: {scorers: [el2n, grand]}
    select: {by: el2n, budget: 0.5}
    evaluate: {test: data/test.parquet, model: mlp}

The keys of a stage are the parameters of the Python function of that name.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from curate.pipeline.plain_yaml import load_yaml

STAGES = ("train", "score", "select", "evaluate", "report")
_WIRED: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "train": lambda corpus, run: {"corpus": corpus, "out": f"{run}/checkpoints"},
    "score": lambda corpus, run: {
        "corpus": corpus,
        "checkpoints": f"{run}/checkpoints",
        "out": f"{run}/scores",
    },
    "select": lambda corpus, run: {"scores": f"{run}/scores", "out": f"{run}/manifest"},
    "evaluate": lambda corpus, run: {
        "corpus": corpus,
        "manifests": [f"{run}/manifest"],
        "out": f"{run}/evaluate",
    },
    "report": lambda corpus, run: {"run": run},
}
_HOME = {
    "train": "curate.pipeline.training.train:train",
    "score": "curate.pipeline.scoring.score:score",
    "select": "curate.pipeline.manifests.select:select",
    "evaluate": "curate.pipeline.evaluation.evaluate:evaluate",
    "report": "curate.pipeline.reporting.report:write_report",
}


def run_recipe(path: str) -> dict[str, str]:
    """Run every stage that the recipe names and return each stage's output folder or file.

    Raises:
        ValueError: the file is no recipe, or a stage or one of its parameters is unknown; all of
            it is checked before the first stage starts.
    """
    corpus, run, stages = _read(path)
    calls = {
        name: _call(path, name, corpus, run, stages[name]) for name in STAGES if name in stages
    }
    outputs = {}
    for name, (function, arguments) in calls.items():
        result = function(**arguments)
        outputs[name] = str(result) if name == "report" else str(arguments["out"])
    return outputs


def _read(path: str) -> tuple[str, str, dict[str, dict[str, Any]]]:
    try:
        recipe = load_yaml(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot read recipe {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        place = " ".join(str(error).split())
        raise ValueError(f"recipe {path} is not valid YAML: {place}") from None
    if not isinstance(recipe, dict) or "corpus" not in recipe:
        raise ValueError(f"recipe {path} must be a mapping with at least the key 'corpus'")
    unknown = sorted(recipe.keys() - {"corpus", "run", *STAGES})
    if unknown:
        known = ", ".join(("corpus", "run", *STAGES))
        raise ValueError(f"recipe {path} has an unknown key {unknown[0]!r}; it takes: {known}")
    stages = {name: recipe[name] or {} for name in STAGES if name in recipe}
    for name, stage in stages.items():
        if not isinstance(stage, dict):
            raise ValueError(f"recipe {path}: {name} must be a mapping of its parameters")
    return recipe["corpus"], recipe.get("run", "run"), stages


def _call(
    path: str, name: str, corpus: str, run: str, given: dict[str, Any]
) -> tuple[Callable[..., object], dict[str, Any]]:
    """Return the stage's function and its arguments: those of the run, then those given."""
    module, _, attribute = _HOME[name].partition(":")
    function = getattr(import_module(module), attribute)
    signature = inspect.signature(function)
    arguments = {**_WIRED[name](corpus, run), **given}
    for key in arguments:
        if key not in signature.parameters:
            takes = ", ".join(signature.parameters)
            raise ValueError(f"recipe {path}: {name} has no parameter {key!r}; it takes: {takes}")
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"recipe {path}: {name}: {error}") from None
    return function, arguments
