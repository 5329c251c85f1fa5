"""TRAK: per-row gradients of the block matrices by vmap, their norms, and its dense projector."""

import torch
from session import BLOCK, ONE_SIDED, Call, serve, subject
from subject import DTYPES, row_losses
from torch import Tensor, nn
from torch.func import functional_call
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, ProjectionType

SUBJECT, FOLDER = subject()
IDS = SUBJECT.ids(FOLDER)


class RowLoss(AbstractModelOutput):
    """The row's loss as the output whose gradient is taken."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(model, weights, buffers, row, _):  # type: ignore[no-untyped-def]
        class Bound(nn.Module):
            def forward(self, **inputs: Tensor) -> object:
                return functional_call(model, (weights, buffers), (), inputs)

        return row_losses(Bound(), row[None]).sum()

    def get_out_to_loss_grad(self, model, weights, buffers, batch):  # type: ignore[no-untyped-def]
        return torch.ones(len(batch[0]), 1, device=IDS.device)


def norms() -> Call:
    computer, _ = _computer()

    def call() -> Tensor:
        grads = computer.compute_per_sample_grad(batch=(IDS, IDS))
        return sum(g.flatten(1).square().sum(1) for g in grads.values())

    return call


def one_sided(kind: ProjectionType) -> Call:
    computer, size = _computer()
    projector = BasicProjector(
        grad_dim=size,
        proj_dim=SUBJECT.wide_k,
        seed=0,
        proj_type=kind,
        device=IDS.device,
        dtype=DTYPES[SUBJECT.dtype],
    )

    def call() -> Tensor:
        grads = computer.compute_per_sample_grad(batch=(IDS, IDS))
        return projector.project({n: g.detach() for n, g in grads.items()}, model_id=0)

    return call


def _computer() -> tuple[FunctionalGradientComputer, int]:
    model = SUBJECT.model(FOLDER)
    names = [f"{layer}.weight" for layer in SUBJECT.block_layers]
    size = sum(model.get_parameter(name).numel() for name in names)
    computer = FunctionalGradientComputer(
        model=model,
        task=RowLoss(),
        grad_dim=size,
        dtype=DTYPES[SUBJECT.dtype],
        device=IDS.device,
        grad_wrt=names,
    )
    return computer, size


if __name__ == "__main__":
    runs = {
        (BLOCK, "TRAK vmap"): norms,
        (ONE_SIDED, "TRAK, normal"): lambda: one_sided(ProjectionType.normal),
        (ONE_SIDED, "TRAK, Rademacher"): lambda: one_sided(ProjectionType.rademacher),
    }
    serve(runs, SUBJECT.device, FOLDER)
