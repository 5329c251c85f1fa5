"""Every kind of signal of one model and batch, on any device: for gpu.py to compare.

Shapes: B rows, M groups of a target.
"""

import copy
from collections.abc import Sequence

import torch
from shapes import Shape, outputs
from torch import Tensor

from curate.scorers.curvature import CurvatureSettings
from curate.scorers.curvature_estimate import CurvatureEstimate, made_curvature
from curate.scorers.engine import Engine
from curate.scorers.protocol import Batch, Signal
from curate.scorers.readouts import TwoSidedSketch

PLAIN = ("loss", "el2n", "el2n_seq", "entropy", "margin", "correct", "grad_sq_norm", "embedding")


def all_signals(
    shape: Shape, places: Sequence[tuple[torch.device, torch.dtype]]
) -> list[dict[str, Tensor]]:
    """Return what each place (a device and a dtype) gives of the same weights and rows."""
    torch.manual_seed(0)
    # Attention as plain products: what is compared is what is made of the gradients.
    model = shape.model(torch.device("cpu"), torch.float32, "eager")
    batch = shape.batch(torch.device("cpu"), torch.float32)
    found = []
    for device, dtype in places:
        own = copy.deepcopy(model).to(device, dtype)
        inputs = {
            name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.inputs.items()
        }
        rows = Batch(inputs, batch.targets, batch.rows, batch.row_ids).to(device)
        found.append(_of_device(own, rows))
    return found


def _of_device(model: torch.nn.Module, rows: Batch) -> dict[str, Tensor]:
    kinds = [CurvatureSettings(kind, labels="data") for kind in ("diagonal", "kfac", "ekfac")]
    wanted = {name: Signal(name) for name in PLAIN}  # type: ignore[arg-type]
    wanted |= {"sketch": Signal("sketch"), "logit gradient": Signal("logit_grad")}
    wanted |= {"target": Signal("target_dot"), "target norm": Signal("target_norm")}
    for kind in kinds:
        wanted[f"{kind.kind} norm"] = Signal("grad_sq_norm", curvature=kind.text)
        wanted[f"{kind.kind} influence"] = Signal("target_dot", curvature=kind.text)
    engine = Engine(model, outputs, wanted.values())
    engine.row_sketch = TwoSidedSketch(0, (8, 8))
    _, summed = engine.summed_gradient(rows)
    engine.directions = {name: g[None] / rows.rows for name, g in summed.items()}
    made = {}
    for kind in kinds:
        estimate = CurvatureEstimate(engine, kind)
        for _ in range(estimate.stages):
            estimate.add(rows, range(rows.rows))
            estimate.end_stage()
        tensors, said = estimate.found()
        device = rows.targets.device
        tensors = {name: v.to(device) for name, v in tensors.items()}
        made["", kind.text] = made_curvature(kind, tensors, said)
    engine.curved.curvatures = made
    values = engine(rows)
    return {name: values[signal].double().cpu() for name, signal in wanted.items()}
