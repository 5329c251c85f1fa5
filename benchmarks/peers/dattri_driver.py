"""dattri: self-influence by vmap, LoGra's two-sided sketch, and TracIn behind a dense projection.

Its block attributor multiplies gradients by the batch size, so the loss given to it is the mean
over rows; it reads batches as dictionaries alone.
"""

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from dattri.algorithm.logra import LoGraAttributor
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from session import ALL, BLOCK, TWO_SIDED, Call, serve, subject
from subject import row_losses
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

SUBJECT, FOLDER = subject()
IDS = SUBJECT.ids(FOLDER)


def self_influence(case: str) -> Call:
    model = SUBJECT.model(FOLDER)
    layers = [f"{layer}.weight" for layer in SUBJECT.block_layers] if case == BLOCK else None

    def loss(params: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        class Bound(nn.Module):
            def forward(self, **inputs: Tensor) -> Any:
                return functional_call(model, params, (), inputs)

        return row_losses(Bound(), batch[0][None]).sum()

    attributor = TracInAttributor(
        task=AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict()),
        weight_list=torch.ones(1),
        normalized_grad=False,
        device=SUBJECT.device,
        layer_name=layers,
    )
    attributor.projector_kwargs = None  # or it projects to 512
    loader = DataLoader([(row, row) for row in IDS], batch_size=len(IDS))
    return _quiet(lambda: attributor.self_attribute(loader))


def two_sided() -> Call:
    model = SUBJECT.model(FOLDER)

    def loss(model: nn.Module, batch: Mapping[str, Tensor], device: str) -> Tensor:
        return row_losses(model, batch["input_ids"]).mean()

    attributor = LoGraAttributor(
        task=AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict()),
        layer_names=SUBJECT.block_layers,
        hessian="Identity",
        device=SUBJECT.device,
        proj_dim=SUBJECT.k**2,
        offload="cpu",
    )
    loader = DataLoader([{"input_ids": row} for row in IDS], batch_size=len(IDS))

    def call() -> Tensor:
        attributor.cache(loader)
        return torch.cat(list(attributor.offload_manager.cached_gradients.values()))

    return _quiet(call)


def _quiet(call: Callable[[], Tensor]) -> Call:
    def quiet() -> Tensor:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            return call()

    return quiet


if __name__ == "__main__":
    runs = {(case, "dattri vmap"): lambda case=case: self_influence(case) for case in (BLOCK, ALL)}
    runs[TWO_SIDED, "dattri LoGra"] = two_sided
    serve(runs, SUBJECT.device, FOLDER)
