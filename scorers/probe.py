"""The probe: how a model's parameters are to be differentiated, found out and checked on few rows.

Every parameter's squared norm on every path is compared with autograd on the row alone, and the
batch with its reverse. What disagrees falls to its next path.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curate.kernels.grad_norm import accumulable
from curate.scorers.casting import Coarsest
from curate.scorers.discover import make_plan
from curate.scorers.fallback import whole_model_rows
from curate.scorers.memory import is_out_of_memory
from curate.scorers.needs import Harvest, Needs
from curate.scorers.passes import Passes
from curate.scorers.plan import WHOLE
from curate.scorers.prepared import named_parameters, prepared
from curate.scorers.readouts import sq_norm
from curate.scorers.recording import Recording, record
from curate.scorers.rows import count_rows, select_rows, sequences_of

log = logging.getLogger("curate.engine")


PROBE_ROWS = 3


class EngineError(RuntimeError):
    """No path gives a parameter's per-row gradient, or the rows depend on one another."""


def discover(passes: Passes, names: list[str], batch: Any) -> None:
    """Give the passes a plan for these parameters, from two and three rows of the batch."""
    rows = probe_rows(batch)
    runs = [rows[:2], rows, rows[::-1]]
    with prepared(passes.model):
        # A loss function may look a new model over before it decides how to call it (split_head).
        with torch.no_grad():
            passes.evaluate(select_rows(batch, rows[:2]))
        recordings = [_record(passes, select_rows(batch, r)) for r in runs]
    passes.plan = make_plan(names, passes.model, *recordings)


def _record(passes: Passes, batch: Any) -> Recording:
    params = named_parameters(passes.model)
    device = next((p.device for p in params.values()), torch.device("cpu"))
    sequences, _ = sequences_of(batch)
    return record(passes.model, params, lambda: passes.evaluate(batch), sequences, device)


def probe_rows(batch: Any) -> list[int]:
    """Return three rows from the whole of the batch; a short batch repeats some."""
    rows = count_rows(batch)
    return [0, rows // 2, rows - 1] if rows >= PROBE_ROWS else [0, rows - 1, 0]


@dataclass
class Reference:
    """What autograd says on each row alone."""

    loss: Tensor
    norms: dict[str, Tensor]

    @property
    def scale(self) -> Tensor:
        """The norm of each row's whole gradient."""
        zero = torch.zeros_like(self.loss)
        return torch.stack([zero, *self.norms.values()]).square().sum(0).sqrt()


def verify(passes: Passes, names: list[str], batch: Any) -> None:
    """Check every parameter's path on three rows, and demote it until it is right.

    Raises:
        EngineError: rows depend on one another, or no path gets a parameter right.
    """
    rows = probe_rows(batch)
    sub, back = select_rows(batch, rows), select_rows(batch, rows[::-1])
    params = {n: p for n, p in named_parameters(passes.model).items() if n in names}
    _refuse_batch_statistics(passes.model)
    with prepared(passes.model):
        reference = _reference(passes, sub, params)
        again = _reference(passes, select_rows(sub, [0]), params)
        with Coarsest() as coarsest:
            together = _losses(passes, sub)
        repeated = partial(_losses, passes, sub)
        _check_independent(together, repeated, reference, again, _tolerance(coarsest.eps) * 10)
    tolerance = _tolerance(coarsest.eps)
    needs = Needs({"probe": (frozenset(names), sq_norm)})
    while names:
        try:
            forward, backward = passes.run(sub, needs), passes.run(back, needs)
            # The same rows among all others, where more of them can be out of order.
            among = passes.run(batch, needs) if count_rows(batch) > PROBE_ROWS else None
        except RuntimeError as error:
            if isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
                raise
            # A table spread over the rows did not fit where it went; or the model will not be
            # watched at all (checkpointing around its first layer), though it runs unwatched.
            if not _withdraw_shared(passes, names) and not _withdraw_all(passes, names, error):
                raise
            continue
        if not _near(forward.loss, reference.loss, tolerance):
            if not _withdraw_shared(passes, names):
                raise EngineError("the model gives another loss when its parameters are watched")
            continue
        found = [_norms(forward), {n: x.flip(0) for n, x in _norms(backward).items()}]
        if among is not None:
            found.append({n: x[rows] for n, x in _norms(among).items()})
        wrong = {
            name for name in names
            if not all(_equal(norms.get(name), name, reference, tolerance) for norms in found)
        }  # fmt: skip
        stuck = sorted(n for n in wrong if passes.plan.path(n) == WHOLE)
        if stuck:
            raise EngineError(
                f"no way was found to get the per-row gradient of {', '.join(stuck[:5])} right: "
                "the same row gives another gradient each time"
            )
        if not wrong:
            break
        passes.plan.demote(wrong, "disagrees with autograd on the row alone")
    paths = {name: passes.plan.path(name) for name in names}
    passes.plan.trusted = {p.module for p in paths.values() if p.module is not None}


def _reference(passes: Passes, batch: Any, params: Mapping[str, Tensor]) -> Reference:
    losses, norms = [], dict[str, list[Tensor]]((n, []) for n in params)
    for loss, grads in whole_model_rows(batch, lambda b: passes.evaluate(b).loss, params):
        losses.append(accumulable(loss).squeeze(0))
        for name, grad in zip(params, grads, strict=True):
            # In float64: over millions of elements torch's own float32 norm is off by 2e-4.
            norms[name].append(torch.linalg.vector_norm(grad, dtype=torch.float64))
    return Reference(torch.stack(losses), {n: torch.stack(v) for n, v in norms.items()})


def _losses(passes: Passes, batch: Any) -> Tensor:
    with torch.no_grad():
        return accumulable(passes.evaluate(batch).loss)


def _norms(harvest: Harvest) -> dict[str, Tensor]:
    return {name: x.sqrt() for name, x in harvest.readouts["probe"].items()}


def _equal(got: Tensor | None, name: str, reference: Reference, tolerance: float) -> bool:
    truth = reference.norms[name]
    got = torch.zeros_like(truth) if got is None else got
    # 1e-4 relative is float32 through a deep model. The absolute part is for parameters whose
    # gradient is exactly 0 (the key biases of attention): what autograd gives there is the
    # rounding of terms as large as the row's other gradients.
    slack = tolerance * truth + tolerance * 1e-2 * reference.scale
    return not bool(((got - truth).abs() > slack).any())


def _tolerance(eps: float) -> float:
    """1e-4; in half precision, of the weights or by automatic casting, what its roundings allow."""
    return max(1e-4, 8 * eps)


def _near(x: Tensor, y: Tensor, tolerance: float) -> bool:
    # Not-a-number rows are for the caller to report; the others must agree.
    finite = y.isfinite()
    return bool(((x - y).abs() <= tolerance * (1 + y.abs()))[finite].all())


def _check_independent(
    together: Tensor,
    repeated: Callable[[], Tensor],
    reference: Reference,
    again: Reference,
    tolerance: float,
) -> None:
    steady = _near(again.loss, reference.loss[:1], tolerance)
    if steady and _near(together, reference.loss, tolerance):
        return
    # A single row may escape what is random; all of them together seldom do.
    if not steady or not _near(repeated(), together, tolerance):
        raise EngineError(
            "the same row gives another loss each time; turn off what is random in evaluation "
            "mode (F.dropout without training=self.training, sampling)"
        )
    raise EngineError(
        "a row's loss depends on the other rows of its batch, so per-row gradients are not "
        "defined; make the rows independent in evaluation mode"
    )


def _refuse_batch_statistics(model: nn.Module) -> None:
    suspects = [
        name for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None
    ]  # fmt: skip
    if suspects:
        raise EngineError(
            f"{', '.join(suspects[:5])} takes its statistics from the batch, so a row's loss "
            "depends on the other rows; give it running statistics (track_running_stats=True)"
        )


def _withdraw_shared(passes: Passes, names: list[str]) -> bool:
    """Demote what was spread over the rows: the model took it otherwise than we thought.

    Returns whether there was anything to demote.
    """
    shared = {k for k, layout in passes.plan.layouts.items() if layout.kind.startswith("shared")}
    affected = {n for k in shared for n in k[1] if n in names}
    affected = passes.plan.names("analytic", affected)
    for key in shared:
        del passes.plan.layouts[key]
    passes.plan.demote(affected, "not used as one table shared by all rows")
    return bool(affected)


def _withdraw_all(passes: Passes, names: list[str], error: RuntimeError) -> bool:
    """Send every parameter through the whole model row by row, if any went another way."""
    if all(passes.plan.path(name) == WHOLE for name in names):
        return False
    reason = str(error).strip().split("\n")[0]
    log.warning("the model cannot be watched (%s); its rows are taken one by one", reason)
    passes.plan.choices |= {name: [WHOLE] for name in names}
    return True
