"""Bergson's gradients of the held-out rows against those of the rows, for lds.py: FOLDER OUT.npz.

The block matrices' gradients as its collector gives them, whole, at the end of each seed: inner
products and cosines, means over seeds.
"""

import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from bergson.collector.gradient_collectors import GradientCollector
from bergson.config import IndexConfig
from bergson.gradients import GradientProcessor
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lds_model import BLOCK_LAYERS, TOKENS, gpt2

logging.disable(logging.INFO)


def gradients(state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Return the rows' gradients of the block matrices, [rows, P]."""
    model = gpt2().eval()
    model.load_state_dict(state)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    found = []
    for at in range(0, len(ids), 20):
        part = ids[at : at + 20]
        collector = GradientCollector(
            model=model.base_model,
            data=Dataset.from_dict({"input_ids": part.tolist(), "length": [TOKENS] * len(part)}),
            cfg=IndexConfig(run_path=tempfile.mkdtemp(), model="none", loss_reduction="sum"),
            processor=GradientProcessor(projection_dim=None),
            target_modules={name.removeprefix("transformer.") for name in BLOCK_LAYERS},
            skip_index=True,
        )
        targets = torch.ones_like(part, dtype=torch.bool)
        targets[:, -1] = False
        with collector.with_batch(targets):
            logits = model(input_ids=part).logits[:, :-1]
            tokens = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            tokens.view(len(part), -1).mean(1).sum().backward()
        found.append(torch.cat([g.flatten(1).float() for g in collector.mod_grads.values()], 1))
    return torch.cat(found)


def main() -> None:
    folder, out = Path(sys.argv[1]), sys.argv[2]
    train, queries = (
        torch.tensor(pq.read_table(folder / f"{name}.parquet")["input_ids"].to_pylist())
        for name in ("train", "queries")
    )
    paths = sorted((folder / "all").glob("seed*-epoch*"))
    last = max(path.name.rpartition("epoch")[2] for path in paths)
    ways: dict[str, list[Tensor]] = {"dot": [], "cosine": []}
    for path in paths:
        if not path.name.endswith(last):
            continue
        state = load_file(path / "model.safetensors")
        g, q = gradients(state, train), gradients(state, queries)
        ways["dot"].append(g @ q.T)
        ways["cosine"].append(F.normalize(g) @ F.normalize(q).T)
    np.savez(out, **{way: torch.stack(found).mean(0).numpy() for way, found in ways.items()})


if __name__ == "__main__":
    main()
