"""Hand-offs to other trainers: map-style loaders, Hugging Face Trainer, Ray; small trainings."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from curate.pipeline.manifests.loader import load_manifest
from curate.pipeline.manifests.weighted_trainer import WeightedTrainer
from curate.pipeline.training.batch_loss import batch_loss
from curate.scorers.protocol import Batch, Outputs


def listed(manifest) -> dict[int, float]:
    rows = manifest.rows(["x"])
    return {row["x"]: row["weight"] for row in rows}


class TestMapRows:
    @pytest.mark.parametrize("kind", ["none", "loss"])
    def test_every_row_once_with_its_weight(self, make_selection, kind):
        manifest = make_selection(kind)
        rows = manifest.as_map(["x", "text"])
        loader = DataLoader(rows, batch_size=16, sampler=rows.sampler(seed=3), num_workers=2)
        seen = [
            (int(x), float(w)) for b in loader for x, w in zip(b["x"], b["weight"], strict=True)
        ]
        assert len(seen) == 300 and dict(seen) == listed(manifest)
        assert [x for x, _ in seen] == [int(r["x"]) for r in manifest.as_torch(seed=3)]

    def test_positions_say_which_row_it_is(self, make_selection):
        rows = make_selection().as_map()
        assert [int(rows[i]["__position"]) for i in (0, 7, -1)] == [0, 7, 299]
        assert [int(r["x"]) for r in rows.__getitems__([5, 5, 2])] == [
            int(rows[i]["x"]) for i in (5, 5, 2)
        ]
        with pytest.raises(IndexError, match="outside the 300 rows"):
            rows[300]

    @pytest.mark.parametrize("kind", ["sampling", "repeat"])
    def test_the_sampler_shows_rows_as_the_weights_say(self, make_selection, kind):
        manifest = make_selection(kind)
        rows = manifest.as_map(["x"])
        sampler = rows.sampler(seed=1, epoch=2)
        shown = [int(rows[i]["x"]) for i in sampler]
        assert shown == [int(r["x"]) for r in manifest.as_torch(seed=1, epoch=2)]
        assert len(sampler) == len(shown)
        if kind == "repeat":
            assert Counter(shown) == {x: int(w) for x, w in listed(manifest).items() if w}
        assert {float(rows[i]["weight"]) for i in range(20)} == {1.0}

    @settings(deadline=None, max_examples=40)
    @given(data=st.data())
    def test_it_resumes_with_other_ranks_and_loses_nothing(self, data):
        manifest = load_manifest(self.path)
        rows = manifest.as_map(["x"])
        before, after = (data.draw(st.integers(1, 5)) for _ in range(2))
        steps = data.draw(st.integers(0, 300 // before - 1))
        seen = []
        for rank in range(before):
            sampler = rows.sampler(rank, before, seed=2)
            seen += [i for _, i in zip(range(steps), sampler, strict=False)]
            state = sampler.state_dict(steps)
        for rank in range(after):
            sampler = rows.sampler(rank, after)
            sampler.load_state_dict(state)
            mine = list(sampler)
            assert len(mine) == len(sampler)
            seen += mine
        assert len(seen) == len(set(seen)) and len(seen) > 300 - after

    @pytest.fixture(autouse=True)
    def _path(self, make_selection):
        type(self).path = make_selection().path

    def test_a_state_of_another_selection_is_refused(self, make_selection):
        state = make_selection(kept=20, name="other").as_map().sampler().state_dict()
        with pytest.raises(ValueError, match="a selection of 20 rows, this one has 300"):
            make_selection().as_map().sampler().load_state_dict(state)


class Linear(nn.Module):
    """Logits of x for three classes, as Trainer wants a model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, array, labels=None):
        return {"logits": self.layer(array / 1500)}


def arguments(tmp_path, **options) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(tmp_path / "out"),
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "logging_strategy": "no",
            **options,
        }
    )


@pytest.fixture
def classes(make_selection):
    """A data set for `Linear` with loss weights."""

    def make(kind: str = "loss", **options):
        manifest = make_selection(kind, **options)
        rows = manifest.as_datasets(["array", "x"])
        return manifest, rows.map(lambda row: {"labels": row["x"] % 3}).with_format("torch")

    return make


class TestWeightedTrainer:
    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_a_step_is_the_weighted_step_computed_by_hand(self, classes, tmp_path, accumulate):
        _, rows = classes(kept=24)
        options = dict(per_device_train_batch_size=24 // accumulate, max_steps=1)
        model = Linear()
        trainer = WeightedTrainer(
            model,
            arguments(tmp_path, gradient_accumulation_steps=accumulate, **options),
            train_dataset=rows,
        )
        trainer.train()
        expected = Linear()
        table = rows[:]
        logits = expected(table["array"])["logits"]
        losses = nn.functional.cross_entropy(logits, table["labels"], reduction="none")
        assert float(table["weight"].std()) > 0.1
        loss = (table["weight"] * losses).sum() / 24
        loss.backward()
        with torch.no_grad():
            for mine, other in zip(expected.parameters(), model.parameters(), strict=True):
                # Both in float32, summed in another order.
                torch.testing.assert_close(mine - 0.1 * mine.grad, other, rtol=1e-5, atol=1e-7)

    def test_weights_of_one_change_nothing(self, classes, tmp_path):
        _, rows = classes("none", kept=60)

        class Plain(Linear):
            def forward(self, array, labels=None):
                out = super().forward(array)
                return {"loss": nn.functional.cross_entropy(out["logits"], labels), **out}

        trained = []
        for cls, model in ((WeightedTrainer, Linear()), (Trainer, Plain())):
            trainer = cls(
                model,
                arguments(tmp_path, per_device_train_batch_size=12, num_train_epochs=2),
                train_dataset=rows,
            )
            trainer.train()
            trained.append(model.layer.weight.detach())
        torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-7)

    def test_an_epoch_shows_every_row_once_or_as_the_sampler_says(self, classes, tmp_path):
        for kind in ("loss", "repeat"):
            manifest, rows = classes(kind, kept=50, name=f"m-{kind}")
            seen: Counter[int] = Counter()

            class Watched(WeightedTrainer):
                def compute_loss(self, model, inputs, *args, seen=seen, kind=kind, **kwargs):
                    seen.update(inputs["array"][:, 0].int().tolist())
                    # Trainer did not drop it; where the sampler weighs, it is not applied again.
                    assert ("weight" in inputs) == (kind == "loss")
                    return super().compute_loss(model, inputs, *args, **kwargs)

            sampler = manifest.as_map().sampler() if kind == "repeat" else None
            Watched(
                Linear(),
                arguments(tmp_path, per_device_train_batch_size=8, num_train_epochs=2),
                train_dataset=rows,
                train_sampler=sampler,
            ).train()
            times = {x: 1 if kind == "loss" else int(w) for x, w in listed(manifest).items()}
            assert seen == {x: 2 * n for x, n in times.items() if n}

    @pytest.mark.parametrize("kind", ["repeat", "sampling"])
    def test_weights_that_the_sampler_follows_are_not_applied_twice(self, classes, tmp_path, kind):
        manifest, rows = classes(kind, kept=50)
        trained = []
        for data in (rows, rows.remove_columns("weight")):
            torch.manual_seed(0)
            model = Linear()
            made = arguments(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2)
            sampler = manifest.as_map().sampler(seed=3)
            WeightedTrainer(model, made, train_dataset=data, train_sampler=sampler).train()
            trained.append(model.layer.weight.detach())
        torch.testing.assert_close(*trained, rtol=0, atol=0)

    @pytest.mark.parametrize("packed", [False, True])
    def test_language_is_the_mean_over_weighted_target_tokens(self, tmp_path, packed):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0,
                       embd_pdrop=0, attn_pdrop=0)
        )  # fmt: skip
        tokens = torch.randint(0, 20, (6, 8))
        labels = tokens.masked_fill(
            torch.arange(8) > torch.tensor([[7], [3], [5], [2], [6], [7]]), -100
        )
        weight = torch.tensor([0.2, 2.0, 1.0, 0.5, 1.3, 1.0])
        each = weight[:, None].expand(6, 8).contiguous() if packed else weight
        items = [{"input_ids": tokens[i], "labels": labels[i], "weight": each[i]} for i in range(6)]
        options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=1)
        trainer = WeightedTrainer(model, arguments(tmp_path, **options), train_dataset=items)
        # The number that our own training descends, on the same model.
        logits = model(tokens).logits[:, :-1].detach()
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
        )
        counts = (labels[:, 1:] != -100).sum(1)
        outputs = Outputs(losses.sum(1) / counts, labels[:, 1:], logits)
        expected = batch_loss(outputs, Batch({}, labels[:, 1:], 6, weights=weight), "mean")
        assert trainer.train().training_loss == pytest.approx(float(expected), rel=1e-5)

    def test_evaluation_and_labels_of_other_kinds(self, classes, tmp_path):
        _, rows = classes(kept=24)
        trainer = WeightedTrainer(Linear(), arguments(tmp_path), eval_dataset=rows)
        assert trainer.evaluate()["eval_loss"] > 0
        logits = torch.randn(5, 1)
        values, counted = trainer._losses(logits, torch.arange(5.0))
        assert torch.allclose(values, (logits[:, 0] - torch.arange(5.0)) ** 2)
        assert counted.sum() == 5
        targets = torch.randint(0, 2, (5, 3)).float()
        values, _ = trainer._losses(torch.randn(5, 3), targets)
        assert values.shape == (5,)

    def test_what_does_not_combine_is_refused(self, classes, tmp_path):
        _, rows = classes(kept=24)
        with pytest.raises(ValueError, match="do not combine with label_smoothing_factor"):
            WeightedTrainer(
                Linear(), arguments(tmp_path), train_dataset=rows, compute_loss_func=print
            )
        trainer = WeightedTrainer(Linear(), arguments(tmp_path), train_dataset=rows)
        with pytest.raises(ValueError, match="needs 'labels' among the inputs; here are: array"):
            trainer.compute_loss(trainer.model, {"array": torch.zeros(1, 4)})

    @pytest.mark.slow
    def test_it_resumes_from_a_checkpoint_in_mid_epoch(self, classes, tmp_path):
        manifest, rows = classes("repeat", kept=40)
        options = dict(per_device_train_batch_size=4, num_train_epochs=3, seed=1)

        def train(steps: int, folder: str, resume: bool = False, shown: list | None = None):
            class Watched(WeightedTrainer):
                def compute_loss(self, model, inputs, *args, **kwargs):
                    if shown is not None:
                        shown.append(inputs["array"][:, 0].int().tolist())
                    return super().compute_loss(model, inputs, *args, **kwargs)

            model = Linear()
            made = arguments(
                tmp_path, **options, max_steps=steps, save_strategy="steps", save_steps=5,
                output_dir=str(tmp_path / folder),
            )  # fmt: skip
            Watched(
                model, made, train_dataset=rows, train_sampler=manifest.as_map().sampler(seed=4)
            ).train(resume_from_checkpoint=resume)
            return model.layer.weight.detach()

        whole_shown: list = []
        whole = train(25, "whole", shown=whole_shown)
        train(20, "cut")
        resumed_shown: list = []
        resumed = train(25, "cut", resume=True, shown=resumed_shown)
        assert resumed_shown == whole_shown[20:]
        torch.testing.assert_close(resumed, whole)


class TestRay:
    @pytest.mark.slow
    def test_streaming_splits_show_every_row_once_an_epoch(self, make_selection, ray_session):
        import ray

        manifest = make_selection("loss")
        splits = manifest.as_ray(["x"], batch_rows=32).streaming_split(2, equal=False)

        @ray.remote(num_cpus=0)
        def consume(split):
            epochs = []
            for _ in range(2):
                batches = list(split.iter_batches(batch_size=16))
                pairs = [zip(b["x"].tolist(), b["weight"].tolist(), strict=True) for b in batches]
                epochs.append([pair for batch in pairs for pair in batch])
            return epochs

        for part in zip(*ray.get([consume.remote(s) for s in splits]), strict=True):
            seen = [row for rank in part for row in rank]
            assert len(seen) == 300 and dict(seen) == listed(manifest)
