"""TRAK's attributions of the held-out rows, for lds.py: FOLDER OUT.npz.

Over the checkpoints at the end of each seed: f = the log odds of the row's mean token probability,
gradients of all parameters projected to k by normal numbers, TRAK's own scores (Park et al. 2023).
k has to stay below the number of rows, or its Gram matrix has no inverse; several are tried.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lds_model import gpt2

PROJECTED = (16, 32, 64, 128)


class LogOdds(AbstractModelOutput):
    """log p / (1 - p), p = exp(-mean token loss)."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(model, weights, buffers, ids, _):  # type: ignore[no-untyped-def]
        loss = _loss(model, weights, buffers, ids[None])[0]
        p = torch.exp(-loss)
        return torch.log(p) - torch.log1p(-p)

    def get_out_to_loss_grad(self, model, weights, buffers, batch):  # type: ignore[no-untyped-def]
        p = torch.exp(-_loss(model, weights, buffers, batch[0]))
        return (1 - p)[:, None].clone().detach()


def _loss(model: nn.Module, weights: object, buffers: object, ids: Tensor) -> Tensor:
    logits = functional_call(model, (weights, buffers), (), {"input_ids": ids}).logits[:, :-1]
    tokens = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return tokens.view(len(ids), -1).mean(1)


def _ids(path: Path) -> Tensor:
    return torch.tensor(pq.read_table(path)["input_ids"].to_pylist())


def main() -> None:
    folder, out = Path(sys.argv[1]), sys.argv[2]
    train, queries = (_ids(folder / f"{name}.parquet") for name in ("train", "queries"))
    paths = sorted((folder / "all").glob("seed*-epoch*"))
    last = max(path.name.rpartition("epoch")[2] for path in paths)
    states = [load_file(path / "model.safetensors") for path in paths if path.name.endswith(last)]
    found = {f"k = {k}": _scores(train, queries, states, k, Path(out)) for k in PROJECTED}
    np.savez(out, **found)


def _scores(
    train: Tensor, queries: Tensor, states: list[dict[str, Tensor]], k: int, out: Path
) -> np.ndarray:
    traker = TRAKer(
        model=gpt2().eval(),
        task=LogOdds(),
        train_set_size=len(train),
        proj_dim=k,
        device="cpu",
        use_half_precision=False,
        save_dir=f"{out.with_suffix('')}-{k}",
    )
    for number, state in enumerate(states):
        traker.load_checkpoint(state, model_id=number)
        for at in range(0, len(train), 20):
            part = train[at : at + 20]
            traker.featurize(batch=(part, part), num_samples=len(part))
    traker.finalize_features()
    for number, state in enumerate(states):
        traker.start_scoring_checkpoint("queries", state, number, num_targets=len(queries))
        for at in range(0, len(queries), 20):
            part = queries[at : at + 20]
            traker.score(batch=(part, part), num_samples=len(part))
    return np.asarray(traker.finalize_scores("queries"))


if __name__ == "__main__":
    main()
