"""Opacus: squared norms by ghost clipping, by hooks and by functorch.

It must be in training mode to record, and be given positions per row: looked up once for all rows
they have no row axis.
"""

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from session import ALL, BLOCK, Call, serve, subject
from subject import row_losses
from torch import Tensor, nn

SUBJECT, FOLDER = subject()
IDS = SUBJECT.ids(FOLDER)
POSITIONS = torch.arange(SUBJECT.tokens, device=IDS.device).repeat(SUBJECT.rows, 1)


def ghost(case: str) -> Call:
    model = GradSampleModuleFastGradientClipping(
        _trainable(case), loss_reduction="sum", strict=False, max_grad_norm=1.0
    )

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        row_losses(model, IDS, position_ids=POSITIONS).sum().backward()
        return model.get_norm_sample().square()

    return call


def materialised(case: str, functorch: bool) -> Call:
    model = GradSampleModule(
        _trainable(case), loss_reduction="sum", strict=False, force_functorch=functorch
    )
    params = [p for p in model.parameters() if p.requires_grad]

    def call() -> Tensor:
        for p in params:
            p.grad = p.grad_sample = None
        row_losses(model, IDS, position_ids=POSITIONS).sum().backward()
        return sum(p.grad_sample.flatten(1).square().sum(1) for p in params)

    return call


def _trainable(case: str) -> nn.Module:
    model = SUBJECT.model(FOLDER).train()  # without dropout
    if case == BLOCK:
        names = {f"{layer}.weight" for layer in SUBJECT.block_layers}
        for name, p in model.named_parameters():
            p.requires_grad_(name in names)
    return model


if __name__ == "__main__":
    runs = {(case, "Opacus ghost"): lambda case=case: ghost(case) for case in (BLOCK, ALL)}
    for case in (BLOCK, ALL):
        runs[case, "Opacus hooks"] = lambda case=case: materialised(case, False)
    runs[BLOCK, "Opacus functorch"] = lambda: materialised(BLOCK, True)
    serve(runs, SUBJECT.device, FOLDER)
