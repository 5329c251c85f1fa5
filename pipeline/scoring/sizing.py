"""How long scoring takes, estimated from the model's operations: for units and for the engine.

The estimate is a function of the configuration and the device kind, so that two runs of one
command plan the same units. It is no measurement; `--dry-run` makes one.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode

from curate.pipeline.models.weights import weight_files
from curate.pipeline.scoring.signal_pass import SignalPass
from curate.pipeline.scoring.work import Work
from curate.scorers.protocol import GRADIENT_SPREAD_KINDS, LOGIT_SPREAD_KINDS, Batch, SignalKind

OPERATIONS_PER_S = {"cpu": 2e10, "cuda": 2e13}
"""What a CPU, or a GPU, does of a small to middling model in practice."""
SECONDS_PER_ROW = 2e-5
SECONDS_PER_ROW_AND_CHECKPOINT = 1e-5
"""Reading, encoding and Python, whatever the model."""
GRADIENTS: frozenset[SignalKind] = GRADIENT_SPREAD_KINDS | frozenset[SignalKind](
    {"grad_sq_norm", "target_dot", "adam_target_dot", "sketch"}
)


@dataclass(frozen=True)
class Sizing:
    """Operations of one row's forward pass, seconds per row over all checkpoints, and the bytes of
    its stored vectors."""

    operations: float
    seconds_per_row: float
    stored_bytes: int = 0


def parameter_count(work: Work) -> int:
    """Return about how many parameters the model has: its weight files hold four bytes each."""
    if not work.checkpoints:
        return 0
    files = weight_files(Path(work.checkpoints[0].path))
    return sum(file.stat().st_size for file in files) // 4


def size_up(work: Work, signals: SignalPass, batch: Batch | None, device: str) -> Sizing:
    """Return the estimate for workers with this kind of device, from one forward pass.

    `batch` are a few rows; None where no model runs.
    """
    checkpoints = len(work.checkpoints)
    overhead = SECONDS_PER_ROW + SECONDS_PER_ROW_AND_CHECKPOINT * checkpoints
    if batch is None:
        return Sizing(0.0, SECONDS_PER_ROW)
    with FlopCounterMode(display=False) as counter:
        signals.loss(batch)
    operations = counter.get_total_flops() / batch.rows
    passes = 3 if any(s.kind in GRADIENTS for s in signals.wanted) else 1
    passes += any(s.kind in LOGIT_SPREAD_KINDS for s in signals.wanted)  # of activations alone
    rate = OPERATIONS_PER_S[device]
    all_passes = checkpoints * passes * operations + signals.references.operations(batch)
    return Sizing(operations, overhead + all_passes / rate)


def first_checkpoint_only(work: Work) -> Work:
    """Return the work at its first checkpoint: enough to check the model against the corpus."""
    return replace(work, checkpoints=work.checkpoints[:1])
