"""Adam's moments beside weights: what training saves, and what the Trainer's numbers stand for."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch import nn

from curate.pipeline.models.checkpoint import (
    find_checkpoints,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from curate.pipeline.models.moments import (
    FILE,
    moments_digest,
    moments_file,
    read_moments,
    save_moments,
)
from curate.pipeline.training import trainer
from curate.pipeline.training.train import run_training, settings_for
from curate.pipeline.training.trainer import SeedTraining

QUICK = {"model": "mlp", "task": "tabular_classification", "batch_size": 8, "threads": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("moments") / "rows.parquet"
    rng = np.random.default_rng(0)
    table = {"a": rng.normal(size=40), "b": rng.normal(size=40), "label": rng.integers(0, 3, 40)}
    pq.write_table(pa.table(table), path)
    return str(path)


def settings(corpus: str, out: Path, **changes: Any) -> Any:
    given = {**QUICK, "steps": 6, "save_steps": [0, 3, 6], "save_moments": True, **changes}
    return settings_for(corpus, out=out, **given)


def expected(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's own state by the model's names, matched by identity."""
    return {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}


def same(found: Any, kept: dict[str, Any]) -> None:
    assert found.mean.keys() == found.square.keys() == kept.keys() and kept
    for name, state in kept.items():
        assert torch.equal(found.mean[name], state["exp_avg"].cpu()), name
        assert torch.equal(found.square[name], state["exp_avg_sq"].cpu()), name
        assert found.steps[name] == int(state["step"])


class TestOurs:
    def test_a_checkpoint_holds_the_optimizers_own_moments(
        self, corpus: str, tmp_path: Path
    ) -> None:
        training = SeedTraining(settings(corpus, tmp_path), 0)
        model = training.run(lambda step, loss: None)
        found = read_moments(tmp_path / "seed0-step000006", model)
        same(found, expected(model, training.optimizer))
        assert (found.beta1, found.beta2, found.eps) == (0.9, 0.999, 1e-8)
        assert set(found.steps.values()) == {6}
        start = read_moments(tmp_path / "seed0-step000000", model)
        assert set(start.steps.values()) == {0}
        assert not any(v.any() for v in (*start.mean.values(), *start.square.values()))

    def test_the_checkpoint_is_the_same_with_and_without_them(
        self, corpus: str, tmp_path: Path
    ) -> None:
        with_them = run_training(settings(corpus, tmp_path / "a"), [0], progress=False)
        without = run_training(
            settings(corpus, tmp_path / "b", save_moments=False), [0], progress=False
        )
        assert [c.digest for c in with_them] == [c.digest for c in without]
        assert not list((tmp_path / "b").glob(f"*/{FILE}"))
        # and a run of before there was a choice goes on as it is
        assert "save_moments" not in json.loads((tmp_path / "b" / "train.json").read_text())

    def test_a_run_that_stops_and_goes_on_saves_the_same_bytes(
        self, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_training(settings(corpus, tmp_path / "whole"), [0], progress=False)

        def stop(*given: Any, **named: Any) -> Any:
            if named["step"] == 6:
                raise KeyboardInterrupt
            return save_checkpoint(*given, **named)

        cut = settings(corpus, tmp_path / "cut")
        monkeypatch.setattr(trainer, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):  # it goes on from the state of step 3
            run_training(cut, [0], progress=False)
        monkeypatch.undo()
        assert not (tmp_path / "cut" / "seed0-step000006").exists()
        run_training(cut, [0], progress=False)
        for folder in sorted((tmp_path / "whole").glob("seed0-*")):
            for file in folder.iterdir():
                again = tmp_path / "cut" / folder.name / file.name
                assert file.read_bytes() == again.read_bytes(), again

    def test_only_adam_has_them(self, corpus: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="moments are saved of adamw, which sgd is not"):
            settings(corpus, tmp_path, optimizer="sgd")

    def test_frozen_parameters_have_none(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        model[0].requires_grad_(False)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        save_moments(tmp_path, model, optimizer)
        same(read_moments(tmp_path, model), expected(model, optimizer))
        model.requires_grad_(True)
        with pytest.raises(ValueError, match=r"has no moments of 0\.weight, which can be trained"):
            read_moments(tmp_path, model)

    def test_what_is_wrong_is_said(self, tmp_path: Path) -> None:
        model = nn.Linear(3, 2)
        with pytest.raises(ValueError, match=r"has no Adam moments .* train with --save-moments"):
            read_moments(tmp_path, model)
        save_moments(tmp_path, model, torch.optim.AdamW(model.parameters()))
        with pytest.raises(ValueError, match=r"shape \[2, 3\] for weight, which is \[2, 5\]"):
            read_moments(tmp_path, nn.Linear(5, 2))
        whole = (tmp_path / FILE).read_bytes()
        (tmp_path / FILE).write_bytes(whole[:-3])
        with pytest.raises(ValueError, match="is damaged"):
            read_moments(tmp_path, model)


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def tiny_bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=3, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def trained(model: nn.Module, out: Path, **changes: Any) -> transformers.Trainer:
    """Train with the Hugging Face Trainer for three steps, saving each."""
    rng = np.random.default_rng(1)
    is_lm = "LMHead" in type(model).__name__
    rows = []
    for _ in range(12):
        ids = torch.tensor(rng.integers(0, 20, 6))
        rows.append({"input_ids": ids, "labels": ids if is_lm else torch.tensor(int(ids[0]) % 3)})
    arguments = transformers.TrainingArguments(
        output_dir=str(out), max_steps=3, save_steps=1, per_device_train_batch_size=4,
        report_to=[], disable_tqdm=True, use_cpu=True, seed=0, logging_steps=1, **changes,
    )  # fmt: skip
    run = transformers.Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    run.train()
    return run


class TestTheTrainers:
    @pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
    def test_numbers_are_the_parameters_that_the_trainer_numbered(
        self, make: Any, tmp_path: Path
    ) -> None:
        run = trained(make(), tmp_path, weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-6)
        groups = run.optimizer.param_groups
        assert len(groups) == 2 and all(g["params"] for g in groups), "both kinds are there"
        checkpoint = find_checkpoints(str(tmp_path))[-1]
        assert checkpoint.step == 3
        found = read_moments(checkpoint.path, load_model(checkpoint))
        own = run.optimizer
        same(found, expected(run.model, getattr(own, "optimizer", own)))
        assert (found.beta1, found.beta2, found.eps) == (0.9, 0.95, 1e-6)

    def test_an_adapters_numbers_are_its_own(self, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        base = tiny_bert()
        base.save_pretrained(tmp_path / "base")
        base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
        config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"])
        run = trained(peft.get_peft_model(base, config), tmp_path / "run")
        checkpoint = find_checkpoints(str(tmp_path / "run"))[-1]
        found = read_moments(checkpoint.path, load_model(checkpoint))
        own = run.optimizer
        same(found, expected(run.model, getattr(own, "optimizer", own)))
        assert all("lora_" in n or "classifier" in n for n in found.mean)

    def test_another_optimizer_or_another_model_is_refused(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))

        def saved(optimizer: Any) -> None:
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

        saved(torch.optim.SGD(model.parameters(), momentum=0.9))
        with pytest.raises(ValueError, match="holds no plain Adam's state"):
            read_moments(tmp_path, model)
        weights = [p for p in model.parameters() if p.dim() > 1]
        saved(torch.optim.AdamW([{"params": weights}, {"params": [model[0].bias]}]))
        with pytest.raises(ValueError, match=r"groups 2 \+ 1 of them, the Trainer would group"):
            read_moments(tmp_path, model)
        (tmp_path / "optimizer.pt").write_bytes(b"nothing")
        with pytest.raises(ValueError, match="cannot be read as an optimizer's state"):
            read_moments(tmp_path, model)

    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("exp_avg", float("nan"), "not finite"),
            ("exp_avg_sq", float("inf"), "not finite"),
            ("exp_avg_sq", -1.0, "negative"),
        ],
    )
    def test_moments_that_give_no_step_are_refused(
        self, key: str, value: float, said: str, tmp_path: Path
    ) -> None:
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.state[model.weight][key][0, 0] = value
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        with pytest.raises(ValueError, match=rf"optimizer.pt .*weight.*{said}"):
            read_moments(tmp_path, model)

    def test_names_that_an_optimizer_was_given_are_used(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        backwards = list(model.named_parameters())[::-1]
        optimizer = torch.optim.AdamW(backwards)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        same(read_moments(tmp_path, model), expected(model, optimizer))

    def test_ours_come_first_and_the_digest_is_of_the_file(self, tmp_path: Path) -> None:
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        before = moments_digest(tmp_path)
        save_moments(tmp_path, model, optimizer)
        assert moments_file(tmp_path).name == FILE and moments_digest(tmp_path) != before


def test_the_format_is_what_the_documentation_says(corpus: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    run_training(settings(corpus, tmp_path), [0], progress=False)
    folder = tmp_path / "seed0-step000003"
    names = [n for n, _ in load_model(read_checkpoint(folder)).named_parameters()]
    with safe_open(folder / FILE, framework="pt") as file:
        kinds = ("exp_avg", "exp_avg_sq")
        assert set(file.keys()) == {f"{kind}/{n}" for n in names for kind in kinds}
        said = json.loads(file.metadata()["curate.moments"])
    assert said == {"betas": [0.9, 0.999], "eps": 1e-8, "steps": dict.fromkeys(names, 3)}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
