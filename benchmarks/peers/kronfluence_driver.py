"""kronfluence: self-influence with no curvature, which is the squared norm, and with EK-FAC.

Factors are fitted before the timed call, on the same rows. It counts biases with their layers. The
EK-FAC factors are left in the folder for whoever else scores with them.
"""

import logging
import tempfile

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from session import BIASED, EKFAC, Call, serve, subject
from subject import row_losses
from torch import Tensor, nn

SUBJECT, FOLDER = subject()
IDS = SUBJECT.ids(FOLDER)
DAMPING = 1e-3


class RowLoss(Task):
    """The sum of the rows' losses, over the block layers."""

    def compute_train_loss(self, batch: Tensor, model: nn.Module, sample: bool = False) -> Tensor:
        return row_losses(model, batch.to(IDS.device)).sum()

    def compute_measurement(self, batch: Tensor, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return SUBJECT.block_layers


def self_influence(strategy: str) -> Call:
    task, rows = RowLoss(), list(IDS.cpu())
    analyzer = Analyzer(
        analysis_name="rows",
        model=prepare_model(SUBJECT.model(FOLDER), task),
        task=task,
        cpu=SUBJECT.device == "cpu",
        output_dir=tempfile.mkdtemp(),
        disable_tqdm=True,
        log_level=logging.ERROR,
    )
    factors = FactorArguments(strategy=strategy, use_empirical_fisher=True)
    analyzer.fit_all_factors("factors", rows, per_device_batch_size=len(rows), factor_args=factors)
    if strategy == "ekfac":
        kept = analyzer.load_eigendecomposition("factors")
        kept |= analyzer.load_lambda_matrices("factors")
        torch.save({"damping": DAMPING, "factors": kept}, FOLDER / "ekfac.pt")
    damping = DAMPING if strategy == "ekfac" else 0.0

    def call() -> Tensor:
        analyzer.compute_self_scores(
            "scores",
            "factors",
            rows,
            per_device_train_batch_size=len(rows),
            score_args=ScoreArguments(damping_factor=damping),
            overwrite_output_dir=True,
        )
        return analyzer.load_self_scores("scores")["all_modules"]

    return call


if __name__ == "__main__":
    runs = {
        (BIASED, "kronfluence"): lambda: self_influence("identity"),
        (EKFAC, "kronfluence"): lambda: self_influence("ekfac"),
    }
    serve(runs, SUBJECT.device, FOLDER)
