"""Adapters of peft: loaded on their base model, scored by their own parameters alone."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch import nn

from curate.pipeline.models import adapters
from curate.pipeline.models.adapters import CONFIG, WEIGHTS
from curate.pipeline.models.checkpoint import (
    find_checkpoints,
    load_model,
    load_weights,
    read_checkpoint,
)
from curate.pipeline.scoring import signal_pass
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable

peft = pytest.importorskip("peft")

VOCABULARY, CONTEXT = 30, 12


@pytest.fixture(autouse=True)
def quiet() -> Any:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    yield
    logging.disable(logging.NOTSET)


def stirred(model: nn.Module, seed: int) -> nn.Module:
    """Return the model with its adapter away from zero, where LoRA starts."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    return model


def gpt2_base(folder: Path) -> str:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=8, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def adapted(base: str, folder: Path, seed: int, rank: int = 2) -> nn.Module:
    """Write an adapter and return the model that it was made on."""
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    config = peft.LoraConfig(r=rank, task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj"])
    made = stirred(peft.get_peft_model(model, config), seed)
    made.save_pretrained(folder)
    return made.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of one base model, and documents, some longer than the context."""
    root = tmp_path_factory.mktemp("lora")
    base = gpt2_base(root / "base")
    for step in (1, 2):
        adapted(base, root / "run" / f"checkpoint-{step}", seed=step)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, VOCABULARY, n).tolist() for n in rng.integers(2, 3 * CONTEXT, 9)]
    pq.write_table(pa.table({"tokens": pa.array(ids, pa.list_(pa.int32()))}), root / "a.parquet")
    return root


def columns(table: Any) -> dict[str, np.ndarray]:
    assert isinstance(table, ScoreTable)
    whole = pa.Table.from_batches(list(table.scan()), table.schema)
    return {n: whole[n].to_numpy() for n in whole.column_names}


def scored(root: Path, out: Path, **changes: Any) -> dict[str, np.ndarray]:
    given: dict[str, Any] = {
        "corpus": str(root / "a.parquet"), "checkpoints": str(root / "run"), "task": "causal_lm",
        "scorers": "grand,loss", "keep_checkpoints": True, "batch_rows": 4, "progress": False,
    }  # fmt: skip
    return columns(score(**{**given, **changes}, out=out))


def by_hand(model: nn.Module, ids: list[int]) -> tuple[float, float]:
    """Return a document's mean loss and the norm of its gradient over the adapter, in float64."""
    model = model.double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = torch.tensor(ids[start : start + CONTEXT])
        targets = torch.tensor(ids[start + 1 : start + 1 + CONTEXT])
        logits = model(window[None, : len(targets)]).logits[0]
        total = total + nn.functional.cross_entropy(logits, targets, reduction="sum")
        count += len(targets)
    own = [p for n, p in model.named_parameters() if "lora_" in n]
    grads = torch.autograd.grad(total / count, own)
    return (total / count).item(), (torch.stack([g.norm() for g in grads]).norm().item())


class TestLoading:
    def test_the_adapter_alone_is_trainable_and_gives_what_it_gave(self, run: Path) -> None:
        made = adapted(str(run / "base"), run / "made", seed=1)
        found = load_model(read_checkpoint(run / "made"))
        ids = torch.arange(10)[None]
        torch.testing.assert_close(found(ids).logits, made(ids).logits)
        trainable = [n for n, p in found.named_parameters() if p.requires_grad]
        assert trainable and all("lora_" in n for n in trainable)
        assert not found.training

    def test_weights_swap_in_place(self, run: Path) -> None:
        first, second = find_checkpoints(str(run / "run"))
        model, other = load_model(first), load_model(second)
        ids = torch.arange(10)[None]
        assert not torch.allclose(model(ids).logits, other(ids).logits, atol=1e-3)
        load_weights(model, second)
        torch.testing.assert_close(model(ids).logits, other(ids).logits)

    def test_an_adapter_of_another_form_is_refused(self, run: Path, tmp_path: Path) -> None:
        adapted(str(run / "base"), tmp_path / "wide", seed=1, rank=3)
        model = load_model(find_checkpoints(str(run / "run"))[0])
        with pytest.raises(ValueError, match="do not fit the adapted model: base_model"):
            load_weights(model, read_checkpoint(tmp_path / "wide"))

    def test_a_classifier_comes_with_its_adapter_on_a_base_without_one(
        self, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, max_position_embeddings=16, num_labels=5,
        )  # fmt: skip
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
        model = transformers.BertForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=5
        )
        lora = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"])
        made = stirred(peft.get_peft_model(model, lora), 3).eval()
        made.save_pretrained(tmp_path / "adapter")
        ids = torch.arange(6)[None]
        # the pooler, which masked language models lack, is in neither: its weights would be chance
        with pytest.raises(ValueError, match=r"has no weights for bert\.pooler"):
            load_model(read_checkpoint(tmp_path / "adapter"))
        made.base_model.model.save_pretrained(tmp_path / "whole")
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "whole")
        whole = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "whole")
        again = stirred(peft.get_peft_model(whole, lora), 4).eval()
        again.save_pretrained(tmp_path / "second")
        found = load_model(read_checkpoint(tmp_path / "second"))
        assert found(ids).logits.shape == (1, 5)
        torch.testing.assert_close(found(ids).logits, again(ids).logits)
        trainable = [n for n, p in found.named_parameters() if p.requires_grad]
        assert {n.split(".")[-1] for n in trainable if "classifier" in n} == {"weight", "bias"}


class TestScoring:
    def test_gradients_are_of_the_adapter_alone(self, run: Path, tmp_path: Path) -> None:
        found = scored(run, tmp_path / "s")
        documents = pq.read_table(run / "a.parquet")["tokens"].to_pylist()
        for k, checkpoint in enumerate(find_checkpoints(str(run / "run"))):
            model = load_model(checkpoint)
            for row, ids in enumerate(documents):
                loss, norm = by_hand(model, ids)
                # float32 passes of a two-layer model against float64
                assert found["loss_by_checkpoint"][row][k] == pytest.approx(loss, rel=1e-4)
                assert found["grand_by_checkpoint"][row][k] == pytest.approx(norm, rel=1e-4)

    @pytest.mark.slow
    def test_a_base_too_large_to_hold_twice_takes_the_adapters_in_turn(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = scored(run, tmp_path / "a")
        monkeypatch.setattr(signal_pass, "RESIDENT_BYTES", 0)
        swapped = scored(run, tmp_path / "b")
        for name in ("loss", "grand"):
            np.testing.assert_array_equal(plain[name], swapped[name])

    @pytest.mark.slow
    def test_the_base_counts_by_its_weights_not_by_its_place(
        self, run: Path, tmp_path: Path
    ) -> None:
        def identity(out: str, **changes: Any) -> str:
            scored(run, tmp_path / out, **changes)
            told: str = json.loads((tmp_path / out / "_meta.json").read_text())["run"]
            return told

        recorded = identity("a")
        shutil.copytree(run / "base", tmp_path / "moved")
        assert identity("b", model=str(tmp_path / "moved")) == recorded
        other = load_model(find_checkpoints(str(run / "run"))[0]).base_model.model
        stirred(other.requires_grad_(True), 9)
        plain = transformers.GPT2LMHeadModel.from_pretrained(run / "base")
        stirred(plain, 9).save_pretrained(tmp_path / "changed")
        assert identity("c", model=str(tmp_path / "changed")) != recorded


class TestRefusals:
    def set_base(self, folder: Path, base: str | None) -> None:
        said = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**said, "base_model_name_or_path": base}))

    @pytest.mark.parametrize("base", ["somebody/base-7b", "gone/base", None])
    def test_a_base_that_is_not_here_is_asked_for(
        self, base: str | None, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("curate.pipeline.tasks.tokenizers.is_reachable", lambda place: False)
        adapter = tmp_path / "adapter"
        shutil.copytree(run / "run" / "checkpoint-1", adapter)
        self.set_base(adapter, base)
        with pytest.raises(ValueError, match="not here: name it by --model BASE_FOLDER") as caught:
            scored(run, tmp_path / "s", checkpoints=str(adapter))
        assert "\n" not in str(caught.value)
        found = scored(
            run, tmp_path / "t", checkpoints=str(adapter), model=str(run / "base"), scorers="loss"
        )
        assert np.isfinite(found["loss"]).all()

    def test_adapters_of_different_bases_and_whole_models_are_kept_apart(
        self, run: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(run / "run", tmp_path / "run")
        shutil.copytree(run / "base", tmp_path / "other")
        self.set_base(tmp_path / "run" / "checkpoint-2", str(tmp_path / "other"))
        with pytest.raises(ValueError, match="score them apart, or name the base model of both"):
            scored(run, tmp_path / "s", checkpoints=str(tmp_path / "run"))
        shutil.copytree(run / "base", tmp_path / "run" / "checkpoint-3")
        with pytest.raises(ValueError, match=r"holds an adapter and .* a whole model"):
            scored(run, tmp_path / "s", checkpoints=str(tmp_path / "run"))

    def test_no_weights_no_peft_and_prompts(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "empty" / "checkpoint-5").mkdir(parents=True)
        (tmp_path / "empty" / "checkpoint-5" / CONFIG).write_text("{}")
        for path in (tmp_path / "empty", tmp_path / "empty" / "checkpoint-5"):
            with pytest.raises(ValueError, match=f"has no weights of it: save {WEIGHTS}"):
                find_checkpoints(str(path))
        model = transformers.GPT2LMHeadModel.from_pretrained(run / "base")
        prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        peft.get_peft_model(model, prompts).save_pretrained(tmp_path / "prompts")
        with pytest.raises(ValueError, match="holds prompts that are put before the input"):
            load_model(read_checkpoint(tmp_path / "prompts"))
        monkeypatch.setattr(adapters, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"pip install 'curate\[lora\]'"):
            load_model(find_checkpoints(str(run / "run"))[0])

    def test_damage_is_said(self, run: Path, tmp_path: Path) -> None:
        shutil.copytree(run / "run" / "checkpoint-1", tmp_path / "a")
        whole = (tmp_path / "a" / WEIGHTS).read_bytes()
        (tmp_path / "a" / WEIGHTS).write_bytes(whole[:-5])
        with pytest.raises(ValueError, match="is damaged"):
            load_model(read_checkpoint(tmp_path / "a"))


def test_the_digest_is_of_the_adapter(run: Path, tmp_path: Path) -> None:
    first, second = find_checkpoints(str(run / "run"))
    assert first.digest != second.digest and (first.step, second.step) == (1, 2)
    shutil.copytree(first.path, tmp_path / "copy")
    assert read_checkpoint(tmp_path / "copy").digest == first.digest
