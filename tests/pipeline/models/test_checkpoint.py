"""Checkpoint folders: what they hold, that they are whole or absent, and what is refused."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from curate.pipeline.models.checkpoint import (
    Checkpoint,
    checkpoint_name,
    find_checkpoints,
    load_model,
    load_weights,
    read_checkpoint,
    records_path,
    save_checkpoint,
)
from curate.pipeline.models.models import make_model

GOLDEN = Path(__file__).parents[2] / "golden" / "checkpoint-v1"
ARGS = {"input_shape": [3], "num_classes": 2, "hidden": [4]}
TASK = {
    "kind": "tabular_classification",
    "columns": {"inputs": ["x"], "label": "label", "id": None},
    "classes": [0, 1],
    "preprocess": {"labels": "value"},
    "row_loss": "mean",
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def save(folder: Path, model: nn.Module | None = None, **changes: Any) -> Checkpoint:
    kept = {"spec": "mlp", "model_args": ARGS, "task": TASK, "seed": 0, "step": 0}
    made = make_model("mlp", **ARGS) if model is None else model
    return save_checkpoint(folder, made, **{**kept, **changes})


def test_the_golden_checkpoint_reads_as_ever() -> None:
    (found,) = find_checkpoints(str(GOLDEN))
    assert found == Checkpoint(
        path=str(GOLDEN / "seed3-epoch002"),
        model="mlp",
        model_args=ARGS,
        task=TASK,
        seed=3,
        epoch=2,
        step=14,
        lr=0.003,
        rows_seen=448,
        corpus={"uri": "corpus", "digest": "00", "rows": 224},
        digest=found.digest,
    )
    parts = [Path(found.path) / name for name in ("model.safetensors", "curate.json")]
    sums = b"".join(hashlib.sha256(part.read_bytes()).digest() for part in parts)
    assert found.digest == hashlib.sha256(sums).hexdigest()
    # The weights are the index of each value, so the logits can be worked out by hand:
    # hidden = x @ W1.T + b1 with W1 = 0..11 and b1 = 0..3; logits = hidden @ W2.T + b2.
    x = torch.tensor([[1.0, 0.0, -1.0]])
    hidden = torch.tensor([-2.0 + i for i in range(4)]).clamp(min=0)  # [0, 0, 0, 1]
    expected = [hidden[3] * 3 + 0, hidden[3] * 7 + 1]
    assert load_model(found)(x)[0].tolist() == expected


def test_a_checkpoint_describes_itself(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = make_model("mlp", **ARGS)
    corpus = {"uri": "c", "digest": "d", "rows": 5}
    name = checkpoint_name(2, epoch=5)
    saved = save(
        tmp_path / name, model, seed=2, step=40, epoch=5, lr=1e-3, rows_seen=99, corpus=corpus
    )
    assert name == "seed2-epoch005" and checkpoint_name(0, step=500) == "seed0-step000500"
    assert sorted(os.listdir(saved.path)) == ["curate.json", "model.safetensors"]
    meta = json.loads((tmp_path / name / "curate.json").read_text())
    assert meta == {
        "format": "curate.checkpoint",
        "version": 1,
        "model": "mlp",
        "model_args": ARGS,
        "task": TASK,
        "seed": 2,
        "epoch": 5,
        "step": 40,
        "lr": 1e-3,
        "rows_seen": 99,
        "corpus": corpus,
    }
    assert read_checkpoint(saved.path) == saved
    loaded = load_model(saved)
    assert not loaded.training
    for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tied_weights_are_saved_once_and_come_back_tied(tmp_path: Path) -> None:
    args = {"vocab_size": 7, "context": 4, "layers": 1, "heads": 1, "dim": 4}
    model = make_model("gpt", **args)
    saved = save(tmp_path / "seed0-epoch001", model, spec="gpt", model_args=args)
    names = load_file(f"{saved.path}/model.safetensors").keys()
    assert "tokens.weight" in names and "head.weight" not in names
    loaded = load_model(saved)
    assert loaded.head.weight is loaded.tokens.weight
    assert torch.equal(loaded.head.weight, model.head.weight)
    # A file that names the tied weight otherwise is as good.
    state = load_file(f"{saved.path}/model.safetensors")
    state["head.weight"] = state.pop("tokens.weight") + 1
    save_file(state, f"{saved.path}/model.safetensors")
    load_weights(loaded, read_checkpoint(saved.path))
    assert torch.equal(loaded.tokens.weight, model.tokens.weight + 1)


def test_views_of_one_storage_are_saved_apart(tmp_path: Path) -> None:
    model = make_model("mlp", **ARGS)
    whole = torch.arange(24.0)
    model[1].weight = nn.Parameter(whole[:12].view(4, 3))
    model[3].weight = nn.Parameter(whole[12:20].view(2, 4))
    loaded = load_model(save(tmp_path / "seed0-epoch001", model))
    assert loaded[3].weight.flatten().tolist() == list(range(12, 20))


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    model = make_model("mlp", **ARGS)
    saved = save(tmp_path / "seed0-epoch001", torch.compile(model))  # compiles nothing until called
    assert set(load_file(f"{saved.path}/model.safetensors")) == set(model.state_dict())


def test_a_part_called_module_keeps_its_name(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.module = nn.Linear(2, 2)
    saved = save(tmp_path / "seed0-epoch001", model)
    assert set(load_file(f"{saved.path}/model.safetensors")) == {"module.weight", "module.bias"}


def test_batch_norm_statistics_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    args = {"input_shape": [1, 8, 8], "num_classes": 2, "width": 2}
    model = make_model("cnn", **args)
    model(torch.rand(16, 1, 8, 8))
    loaded = load_model(save(tmp_path / "seed0-epoch001", model, spec="cnn", model_args=args))
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded(images), model.eval()(images))


@pytest.mark.parametrize("form", ["safetensors index", "pickle", "old pickle", "pickle index"])
def test_weights_are_read_in_every_form_that_hugging_face_writes(tmp_path: Path, form: str) -> None:
    model = make_model("mlp", **ARGS)
    saved = save(tmp_path / "seed0-epoch001", model)
    folder = Path(saved.path)
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    if form in ("pickle", "old pickle"):
        is_new = form == "pickle"
        file = folder / "pytorch_model.bin"
        torch.save(state, file, _use_new_zipfile_serialization=is_new)
    else:
        kind = "model.safetensors" if "safe" in form else "pytorch_model.bin"
        stem, ending = kind.rsplit(".", 1)
        files = {name: f"{stem}-{i % 2}.{ending}" for i, name in enumerate(state)}
        for file in set(files.values()):
            part = {name: state[name] for name in state if files[name] == file}
            (save_file if "safe" in form else torch.save)(part, folder / file)
        (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": files}))
    again = read_checkpoint(folder)
    assert again.digest != saved.digest
    loaded = load_model(again)
    assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in state)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    folder = Path(save(tmp_path / "seed0-epoch001").path)
    (folder / "model.safetensors").unlink()
    torch.save({"0.weight": Path("/")}, folder / "pytorch_model.bin")  # any class will do
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read as plain weights"):
        load_model(read_checkpoint(folder))


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({**ARGS, "num_classes": 3}, r"3\.weight is \[2, 4\] in the file, \[3, 4\] in the model"),
        (
            {**ARGS, "hidden": [4, 4, 4]},
            r"the model's 5\.weight, 5\.bias, 7\.weight and 1 more are",
        ),
        ({**ARGS, "hidden": []}, r"the file's 3\.bias, 3\.weight are not in the model"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_none_is_copied(
    tmp_path: Path, args: dict[str, Any], complaint: str
) -> None:
    saved = save(tmp_path / "seed0-epoch001")
    model = make_model("mlp", **args)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=complaint):
        load_weights(model, saved)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_checkpoints_are_found_in_order_wherever_they_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    for seed, epoch, step in [(1, 2, 20), (0, 10, 100), (0, 2, 20), (0, 0, 0), (1, 0, 0)]:
        name = checkpoint_name(seed, epoch=epoch)
        save(folder / name, seed=seed, epoch=epoch, step=step)
    (folder / ".seed0-epoch011.77.new").mkdir()
    (folder / "notes").mkdir()
    ordered = [(0, 0), (0, 20), (0, 100), (1, 0), (1, 20)]
    for paths in (str(folder), str(tmp_path / "run"), [f"{folder}/seed*"], [folder, f"{folder}/"]):
        assert [(c.seed, c.step) for c in find_checkpoints(paths)] == ordered
    some = find_checkpoints([f"{folder}/seed1*", f"{folder}/seed0-epoch010"])
    assert [(c.seed, c.step) for c in some] == [(0, 100), (1, 0), (1, 20)]
    assert records_path(str(folder)) is None
    (folder / "records.parquet").touch()
    assert records_path([f"{folder}/seed1*"]) == str(folder / "records.parquet")


def test_two_checkpoints_of_one_step_are_refused(tmp_path: Path) -> None:
    for run in ("a", "b"):
        save(tmp_path / run / "seed0-epoch001", step=7)
    with pytest.raises(ValueError, match="are both seed 0 step 7; name one of them"):
        find_checkpoints([str(tmp_path / "a"), str(tmp_path / "b")])


def test_checkpoints_of_different_tasks_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "seed0-epoch001")
    save(tmp_path / "seed1-epoch001", seed=1, task={**TASK, "classes": ["a", "b"]})
    with pytest.raises(ValueError, match="different tasks, columns or classes; score them apart"):
        find_checkpoints(str(tmp_path))


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        ({}, "no checkpoint in .*; expected folders such as seed0-epoch005"),
        ({"curate.json": "{"}, "has no weights"),
        ({"curate.json": "{", "model.safetensors": ""}, r"curate\.json is no JSON"),
        ({"curate.json": "[]", "model.safetensors": ""}, "is no JSON object"),
        ({"curate.json": '{"format": "x"}', "model.safetensors": ""}, "does not describe a check"),
        (
            {
                "curate.json": '{"format": "curate.checkpoint", "version": 2}',
                "model.safetensors": "",
            },
            "has version 2; update curate",
        ),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_named(
    tmp_path: Path, write: dict[str, str], complaint: str
) -> None:
    for name, content in write.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        find_checkpoints(str(tmp_path))


def test_what_is_not_there_or_not_local_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is nothing"):
        find_checkpoints(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="there is nothing"):
        find_checkpoints([f"{tmp_path}/seed*"])
    with pytest.raises(ValueError, match="local folders only"):
        find_checkpoints("s3://bucket/run")
    saved = save(tmp_path / "seed0-epoch001")
    (Path(saved.path) / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(read_checkpoint(saved.path))


def test_saving_again_replaces_and_clears_what_a_kill_left(tmp_path: Path) -> None:
    target = tmp_path / "seed0-epoch001"
    first = save(target)
    (tmp_path / ".seed0-epoch001.12.new").mkdir()
    second = save(target, step=9)
    assert second.step == 9 and first.digest != second.digest
    assert [p.name for p in tmp_path.iterdir()] == ["seed0-epoch001"]


def test_a_users_model_is_remembered_by_file_and_digest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "net.py"
    file.write_text("from torch import nn\ndef make(num_classes): return nn.Linear(3, num_classes)")
    spec, args = f"{file}:make", {"num_classes": 2}
    saved = save(tmp_path / "c" / "s", make_model(spec, **args), spec=spec, model_args=args)
    meta = json.loads(Path(saved.path, "curate.json").read_text())
    assert meta["model_digest"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert isinstance(load_model(saved), nn.Linear)
    file.write_text(file.read_text() + "\n# changed")
    read_checkpoint(saved.path)
    assert "has changed since the checkpoint was saved" in caplog.text
    copied = load_model(saved, model=spec)
    assert isinstance(copied, nn.Linear)
    file.unlink()
    with pytest.raises(ValueError, match="no file"):
        load_model(read_checkpoint(saved.path))


def test_a_users_changes_to_a_transformer_are_not_lost(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n"
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "def make(num_classes):\n"
        "    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)\n"
        "    model = BertForSequenceClassification(BertConfig(**small, vocab_size=9))\n"
        "    model.classifier = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, num_classes))\n"
        "    return model\n"
    )
    spec, args = f"{file}:make", {"num_classes": 3}
    made = make_model(spec, **args)
    saved = save(tmp_path / "c" / "s", made, spec=spec, model_args=args)
    assert Path(saved.path, "config.json").is_file()
    found = load_model(saved).state_dict()
    assert all(torch.equal(found[name], value) for name, value in made.state_dict().items())


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "LlamaForTokenClassification"])
def test_a_folder_of_transformers_beside_a_trainers_checkpoint_changes_nothing(
    tmp_path: Path, head: str
) -> None:
    """The checkpoint's own configuration names its head; nothing else tells which it is."""
    transformers = pytest.importorskip("transformers")
    small = transformers.LlamaConfig(
        vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, num_labels=3,
    )  # fmt: skip
    base, tuned = tmp_path / "base", tmp_path / "run" / "checkpoint-5"
    transformers.LlamaForCausalLM(small).save_pretrained(base)
    made = getattr(transformers, head)(small)
    made.save_pretrained(tuned)
    found = load_model(read_checkpoint(tuned), str(base))
    assert type(found).__name__ == head
    own = made.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in found.state_dict().items())


KILLED = """
import sys, torch
from curate.pipeline.models.checkpoint import save_checkpoint
torch.set_num_threads(1)
model = torch.nn.Linear(1000, 1000)
task = {"kind": "x"}
print("ready", flush=True)
step = 0
while True:
    step += 1
    save_checkpoint(f"{sys.argv[1]}/seed0-step{step % 3:06d}", model, spec="mlp", model_args={},
                    task=task, seed=0, step=step)
"""


def test_a_kill_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    for wait in (0.05, 0.11, 0.23):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd="/"
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        while not any(tmp_path.glob("seed0-*")):
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        model = nn.Linear(1000, 1000)
        for found in find_checkpoints(str(tmp_path)):
            load_weights(model, found)
