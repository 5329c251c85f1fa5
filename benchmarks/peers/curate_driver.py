"""Ours, in its own environment: the same cases, and all of them in one pass.

The engine's loss is the mean over a row's targets, the peers' the sum: what is compared is brought
to the sum's scale after the call. The probe (three rows against autograd) comes before it.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))

import checkout  # noqa: F401  (makes curate importable)
import torch
from session import ALL, BIASED, BLOCK, EKFAC, ONE_SIDED, TOGETHER, TWO_SIDED, Call, serve, subject
from shapes import outputs
from subject import curvatures
from torch import Tensor

from curate.kernels.grad_tiles import rotated_sq_norm
from curate.kernels.rademacher import stream_key
from curate.kernels.sparse_projection import sparse_project
from curate.scorers.needs import Needs
from curate.scorers.parts import Gradient
from curate.scorers.protocol import IGNORE, Batch
from curate.scorers.readouts import Projection, Readout, TwoSidedSketch, sq_norm
from curate.scorers.watched_model import WatchedModel

SUBJECT, FOLDER = subject()
IDS = SUBJECT.ids(FOLDER)
TARGETS = torch.cat([IDS[:, 1:], torch.full_like(IDS[:, :1], IGNORE)], 1)
BATCH = Batch({"input_ids": IDS}, TARGETS, SUBJECT.rows)
TO_SUM = SUBJECT.tokens - 1


def signal(case: str, readout: Readout) -> Call:
    """Return one signal of a set of parameters."""
    run = _passes(_names(case), {"": (_names(case), readout)})
    order = sorted(_names(case))

    def call() -> Tensor:
        found = run()[""]
        parts = [found[name] for name in order]
        if case == TWO_SIDED:
            return torch.cat(parts, 1) * TO_SUM
        return torch.stack(parts).sum(0) * (TO_SUM if case == ONE_SIDED else TO_SUM**2)

    return call


def together() -> Call:
    """Return the norms over all parameters, from a pass that makes every sketch and EL2N too."""
    everything, matrices = _names(ALL), _names(BLOCK)
    run = _passes(
        everything,
        {
            "norm": (everything, sq_norm),
            "two": (matrices, TwoSidedSketch(0, (SUBJECT.k, SUBJECT.k))),
            "one": (matrices, _one_sided()),
        },
        statistics=True,
    )
    return lambda: torch.stack(list(run()["norm"].values())).sum(0) * TO_SUM**2


def _passes(
    names: frozenset[str],
    readouts: dict[str, tuple[frozenset[str], Readout]],
    statistics: bool = False,
) -> Callable[[], dict[str, dict[str, Tensor]]]:
    watched = WatchedModel(SUBJECT.model(FOLDER), outputs, probe=True)
    watched.want([f"^({'|'.join(map(str, names))})$"], head=False)
    watched.verify(BATCH)
    needs = Needs(readouts, statistics=statistics)
    return lambda: watched.passes.run(BATCH, needs).readouts


def _names(case: str) -> frozenset[str]:
    if case == ALL:
        return frozenset(name for name, _ in SUBJECT.model(FOLDER).named_parameters())
    kinds = ("weight", "bias") if case == BIASED else ("weight",)
    return frozenset(f"{layer}.{kind}" for layer in SUBJECT.block_layers for kind in kinds)


def _one_sided() -> Readout:
    def readout(gradient: Gradient) -> Tensor:
        assert gradient.pair is not None, "the block matrices are linear layers'"
        key = stream_key(0, gradient.name, "whole")
        found: Tensor = sparse_project(gradient.pair.left, gradient.pair.right, key, SUBJECT.wide_k)
        return found

    return readout


def ekfac() -> Call:
    """Return self-influences by the curvature that kronfluence has fitted."""
    bases = {
        f"{layer}.weight": [x.float().to(IDS.device) for x in (c.outputs, c.inputs, c.weight)]
        for layer, c in curvatures(FOLDER, SUBJECT.block_layers).items()
    }

    def readout(gradient: Gradient) -> Tensor:
        assert gradient.pair is not None, "the block layers are linear"
        left, right = gradient.pair.left, gradient.pair.right
        ones = right.new_ones(*right.shape[:-1], 1)
        return rotated_sq_norm(left, torch.cat([right, ones], -1), *bases[gradient.name])

    run = _passes(_names(BLOCK), {"": (_names(BLOCK), readout)})
    return lambda: torch.stack(list(run()[""].values())).sum(0) * TO_SUM**2


if __name__ == "__main__":
    runs = {
        (case, "curate"): lambda case=case: signal(case, sq_norm) for case in (BLOCK, BIASED, ALL)
    }
    two = TwoSidedSketch(0, (SUBJECT.k, SUBJECT.k))
    runs |= {
        (TWO_SIDED, "curate"): lambda: signal(TWO_SIDED, two),
        (ONE_SIDED, "curate, sparse"): lambda: signal(ONE_SIDED, _one_sided()),
        (ONE_SIDED, "curate, dense"): lambda: signal(ONE_SIDED, Projection(0, SUBJECT.wide_k)),
        (TOGETHER, "curate"): together,
        (EKFAC, "curate"): ekfac,
    }
    serve(runs, SUBJECT.device, FOLDER)
