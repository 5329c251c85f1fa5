"""Bergson: gradients of the block matrices as they are, sketched two-sided, and one-sided.

Its hooks are driven from Python with the weights frozen, as its own command freezes them; only the
embeddings' output is asked for a gradient, so that the hooks are reached.
"""

import logging
import tempfile
from collections.abc import Callable

import torch
from bergson.collector.collector import HookCollectorBase
from bergson.collector.gradient_collectors import GradientCollector
from bergson.config import IndexConfig
from bergson.gradients import GradientProcessor
from datasets import Dataset
from session import BLOCK, ONE_SIDED, TWO_SIDED, Call, serve, subject
from subject import row_losses
from torch import Tensor

SUBJECT, FOLDER = subject()
IDS = SUBJECT.ids(FOLDER)
logging.disable(logging.INFO)


class Norms(GradientCollector):
    """Squares the gradients of a layer when they are there, and keeps nothing else."""

    squares: dict[str, Tensor]

    @HookCollectorBase.split_attention_heads
    def backward_hook(self, module, g):  # type: ignore[no-untyped-def]
        self.squares[module._name] = self._compute_gradient(module, g).square().sum(1)


def norms() -> Call:
    collector, run = _collector(Norms)

    def call() -> Tensor:
        collector.squares = {}
        run()
        return sum(collector.squares.values())

    return call


def two_sided() -> Call:
    k = SUBJECT.k
    collector, run = _collector(GradientCollector, projection_dim=k, projection_type="rademacher")

    def call() -> Tensor:
        run()
        found = torch.cat(list(collector.mod_grads.values()), 1)
        collector.mod_grads.clear()
        return found

    return call


def one_sided() -> Call:
    collector, run = _collector(
        GradientCollector,
        projection_dim=SUBJECT.wide_k,
        projection_type="rademacher",
        projection_target="global",
    )

    def call() -> Tensor:
        run()
        collector.finalize_global_projection()
        return collector.mod_grads.pop("gradients")

    return call


def _collector(
    kind: type[GradientCollector], **projection: object
) -> tuple[GradientCollector, Callable[[], None]]:
    model = SUBJECT.model(FOLDER).requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    lengths = [SUBJECT.tokens] * SUBJECT.rows
    collector = kind(
        model=model.base_model,
        data=Dataset.from_dict({"input_ids": IDS.tolist(), "length": lengths}),
        cfg=IndexConfig(run_path=tempfile.mkdtemp(), model="none", loss_reduction="sum"),
        processor=GradientProcessor(**{"projection_dim": None, **projection}),
        target_modules={name.removeprefix("transformer.") for name in SUBJECT.block_layers},
        skip_index=True,
    )
    targets = torch.ones_like(IDS, dtype=torch.bool)
    targets[:, -1] = False

    def run() -> None:
        with collector.with_batch(targets):
            row_losses(model, IDS).sum().backward()
        model.zero_grad(set_to_none=True)

    return collector, run


if __name__ == "__main__":
    runs = {
        (BLOCK, "Bergson"): norms,
        (TWO_SIDED, "Bergson"): two_sided,
        (ONE_SIDED, "Bergson, dense"): one_sided,
    }
    serve(runs, SUBJECT.device, FOLDER)
