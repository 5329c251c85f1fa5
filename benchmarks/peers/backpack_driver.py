"""BackPACK: squared norms of the block matrices, with all other weights frozen."""

from backpack import backpack, extend
from backpack.extensions import BatchL2Grad
from session import BLOCK, Call, serve, subject
from subject import row_losses
from torch import Tensor

SUBJECT, FOLDER = subject()
IDS = SUBJECT.ids(FOLDER)


def norms() -> Call:
    model = SUBJECT.model(FOLDER).requires_grad_(False)
    layers = [extend(model.get_submodule(name)) for name in SUBJECT.block_layers]
    for layer in layers:
        layer.weight.requires_grad_(True)

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        with backpack(BatchL2Grad()):
            row_losses(model, IDS).sum().backward()
        return sum(layer.weight.batch_l2 for layer in layers)

    return call


if __name__ == "__main__":
    serve({(BLOCK, "BackPACK"): norms}, SUBJECT.device, FOLDER)
