"""Real Hugging Face folders, from --model to a checkpoint and back, against transformers itself."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from curate.pipeline.models.checkpoint import (
    find_checkpoints,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from curate.pipeline.models.models import make_model, model_args
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.scoring.score_setup import Request, set_up
from curate.pipeline.tasks.registry import make_task, task_from_description
from curate.pipeline.tasks.tokenizers import tokenizer

Write = Callable[..., Corpus]


@pytest.fixture(params=["gpt2_folder", "llama_folder"])
def lm_folder(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def test_a_causal_lm_row_has_the_loss_that_transformers_gives_it(
    lm_folder: str, corpus: Write, read_all: Callable, sentences: list[str]
) -> None:
    opened = corpus({"text": sentences})
    task = make_task("causal_lm", opened, model=lm_folder)
    assert task.context == (8 if "gpt2" in lm_folder else 2048), "the model's own, up to a limit"
    model = make_model(lm_folder, **model_args(task)).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    batch = task.collate(task.encode(read_all(opened)))
    losses = task.outputs(model, batch).loss
    tokens = tokenizer(lm_folder)
    compared = 0
    for text, loss in zip(sentences, losses, strict=True):
        ids = torch.tensor([tokens(text)["input_ids"]])
        if ids.shape[1] <= task.context:
            assert loss.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), 1e-5)
            compared += 1
    assert compared >= 1


def test_a_causal_lm_checkpoint_describes_itself(
    lm_folder: str, corpus: Write, read_all: Callable, sentences: list[str], tmp_path: Path
) -> None:
    opened = corpus({"text": sentences})
    task = make_task("causal_lm", opened, model=lm_folder, context=8)
    args = model_args(task)
    model = make_model(lm_folder, **args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    for seed in (0, 1):
        save_checkpoint(
            tmp_path / f"seed{seed}-epoch001",
            model,
            spec=lm_folder,
            model_args=args,
            task=task.describe(),
            seed=seed,
            step=3,
            epoch=1,
        )
    first, second = find_checkpoints(str(tmp_path))
    assert first.task == second.task, "one tokenizer serves checkpoints that have equal ones"
    again = task_from_description(first.task)
    assert again.tokenizer == first.path
    loaded = load_model(second)
    assert type(loaded) is type(model) and not loaded.training
    if "gpt2" in lm_folder:
        assert loaded.lm_head.weight is loaded.transformer.wte.weight, "tied weights stay tied"
    batch = again.collate(again.encode(read_all(opened)))
    expected = task.outputs(model, batch).loss
    torch.testing.assert_close(again.outputs(loaded, batch).loss, expected, rtol=0, atol=0)


def test_an_encoder_without_a_head_gets_a_seeded_one(
    bert_folder: str, corpus: Write, caplog: pytest.LogCaptureFixture, sentences: list[str]
) -> None:
    task = make_task(
        "text_classification",
        corpus({"text": sentences, "label": [0, 1, 2, 0, 1]}),
        model=bert_folder,
    )
    weights = []
    for _ in range(2):
        torch.manual_seed(5)
        model = make_model(bert_folder, **model_args(task))
        assert isinstance(model, transformers.BertForSequenceClassification)
        weights.append(model.classifier.weight.detach().clone())
    assert weights[0].shape == (3, 16)
    assert torch.equal(*weights)
    assert "classifier" in caplog.text and "start fresh" in caplog.text
    encoder = transformers.BertModel.from_pretrained(bert_folder)
    torch.testing.assert_close(
        model.bert.embeddings.word_embeddings.weight, encoder.embeddings.word_embeddings.weight
    )


@pytest.fixture(params=["bert_folder", "gpt2_folder", "llama_folder"])
def classifier_folder(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def test_a_classified_text_has_the_loss_that_transformers_gives_it_alone(
    classifier_folder: str, corpus: Write, read_all: Callable, sentences: list[str], tmp_path: Path
) -> None:
    labels = ["x", "y", "x", "y", "x"]
    opened = corpus({"text": sentences, "label": labels})
    task = make_task("text_classification", opened, model=classifier_folder)
    args = model_args(task)
    model = make_model(classifier_folder, **args).eval()
    batch = task.collate(task.encode(read_all(opened)))
    outputs = task.outputs(model, batch)
    tokens = tokenizer(classifier_folder)
    for text, label, loss in zip(sentences, labels, outputs.loss, strict=True):
        made = tokens(text, return_tensors="pt", truncation=True, max_length=task.max_length)
        alone = model(**made, labels=torch.tensor([["x", "y"].index(label)]))
        assert loss.item() == pytest.approx(alone.loss.item(), 1e-5)
    save_checkpoint(
        tmp_path / "seed0-step000002",
        model,
        spec=classifier_folder,
        model_args=args,
        task=task.describe(),
        seed=0,
        step=2,
    )
    (found,) = find_checkpoints([str(tmp_path / "seed0-*")])
    again = task_from_description(found.task)
    loaded = load_model(found)
    torch.testing.assert_close(
        again.outputs(loaded, again.collate(again.encode(read_all(opened)))).loss, outputs.loss
    )


def test_a_checkpoint_of_the_hugging_face_trainer_is_taken_as_it_is(
    gpt2_folder: str, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2_folder)
    ids = torch.randint(0, 50, (8, 8)).tolist()
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            save_steps=2,
            logging_steps=1,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            learning_rate=1e-3,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}),
    )
    trainer.train()
    found = find_checkpoints(str(tmp_path / "out"))
    assert [(c.seed, c.step, c.epoch) for c in found] == [(0, 2, 1.0), (0, 4, 2.0)]
    assert found[0].lr is not None and 0 < found[1].lr < found[0].lr <= 1e-3
    # Linear to 0 in 4 steps: 4/4, 3/4 and 2/4, 1/4 of the rate, whichever of them is asked for.
    assert [c.mean_lr for c in found] == pytest.approx([7 / 8 * 1e-3, 3 / 8 * 1e-3])
    assert read_checkpoint(found[1].path).mean_lr == found[1].mean_lr
    assert found[0].task is None and found[0].rows_seen == 8
    assert found[0].digest != found[1].digest
    loaded = load_model(found[1])
    for (name, a), (_, b) in zip(
        loaded.named_parameters(), trainer.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=0, msg=name)


def test_a_trainers_folder_keeps_its_tokenizer_where_a_file_makes_the_model(
    bert_folder: str, corpus: Write, sentences: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(bert_folder, folder)
    config = transformers.AutoConfig.from_pretrained(bert_folder, num_labels=2)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    (tmp_path / "frozen.py").write_text(f"""
from transformers import AutoConfig, BertForSequenceClassification


def make(**_):
    model = BertForSequenceClassification(AutoConfig.from_pretrained({str(folder)!r}))
    return model.requires_grad_(False)
""")
    opened = corpus({"text": sentences, "label": [0, 1, 0, 1, 0]})
    request = Request(opened, str(folder), "grand", model=f"{tmp_path / 'frozen.py'}:make",
                      task="text_classification", out=str(tmp_path / "s"))  # fmt: skip
    assert set_up(request).work.task["preprocess"]["tokenizer"] == str(folder)


def test_weights_that_transformers_stores_under_other_names_are_translated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "checkpoint-7")
    (found,) = find_checkpoints(str(tmp_path))
    assert found.step == 7
    ids = torch.randint(0, 20, (2, 5))
    torch.testing.assert_close(load_model(found)(ids).logits, model(ids).logits)


def test_an_encoder_is_no_checkpoint_to_score_with(bert_folder: str) -> None:
    (found,) = find_checkpoints(bert_folder)
    with pytest.raises(ValueError, match="holds a bare BertModel, which predicts nothing"):
        load_model(found)


def test_text_without_a_tokenizer_is_refused_in_one_sentence(corpus: Write) -> None:
    opened = corpus({"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(ValueError, match="needs a tokenizer: a Hugging Face folder as --model"):
        make_task("text_classification", opened, model="mlp")


def test_a_folder_that_is_no_model_of_this_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ValueError, match="cannot be loaded with AutoModelForCausalLM"):
        make_model(str(tmp_path), vocab_size=5)
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        tokenizer(str(tmp_path))
