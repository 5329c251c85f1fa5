"""Curvatures of a Llama over token ids, from `score`, against dense sums in float64.

Shapes: T tokens of a row. The brute force takes rows one at a time, by module hooks and autograd.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch import Tensor, nn

from curate.pipeline.scoring.score import score

VOCABULARY, CONTEXT = 23, 16


def documents(folder: Path, rows: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    found = [rng.integers(1, VOCABULARY, rng.integers(3, CONTEXT)).tolist() for _ in range(rows)]
    folder.mkdir()
    lines = [json.dumps({"ids": ids, "part": "pq"[i % 2]}) for i, ids in enumerate(found)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return found


def seen(model: Any, ids: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return of every linear layer its inputs, 1 appended where it has a bias, and its deltas."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        m.register_forward_hook(lambda _, x, y, n=n: kept.update({n: (x[0], y)}))
        for n, m in layers.items()
    ]
    tokens = torch.tensor([ids])
    loss = nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])
    for hook in hooks:
        hook.remove()
    deltas = torch.autograd.grad(loss, [kept[n][1] for n in layers])
    found = {}
    for (name, layer), delta in zip(layers.items(), deltas, strict=True):
        a = kept[name][0][0].detach()
        a = a if layer.bias is None else nn.functional.pad(a, (0, 1), value=1.0)
        found[name] = a, delta[0]
    return found


def expected(
    model: Any, rows: list[list[int]], target: list[list[int]], kind: str, damping: float | None
) -> tuple[Any, Any]:
    """Return self-influences [N] and influences [N, 2] on the target's even and odd rows."""
    own, cross = np.zeros(len(rows)), np.zeros((len(rows), 2))
    mine, theirs = ([seen(model, ids) for ids in some] for some in (rows, target))
    for name in mine[0]:
        g, f = (torch.stack([d[name][1].T @ d[name][0] for d in some]) for some in (mine, theirs))
        # No loss comes from a document's last token: it is no part of A.
        a = torch.cat([row[name][0][:-1] for row in mine])
        delta = torch.cat([row[name][1] for row in mine])
        on_a, right = torch.linalg.eigh(a.T @ a / len(a))
        on_s, left = torch.linalg.eigh(delta.T @ delta / len(rows))
        g, f = left.T @ g @ right, left.T @ f @ right
        scale = on_s[:, None] * on_a if kind == "kfac" else g.square().mean(0)
        scale = scale + (0.1 * scale.mean() if damping is None else damping)
        groups = torch.stack([f[::2].mean(0), f[1::2].mean(0)])
        own += (g**2 / scale).sum((1, 2)).numpy()
        cross += torch.einsum("nij,mij->nm", g / scale, groups).numpy()
    return own, cross


@pytest.mark.slow
def test_scores_equal_brute_force(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT,
        initializer_range=0.3, tie_word_embeddings=False, attention_bias=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "checkpoint-3")
    rows = documents(tmp_path / "corpus", 19, seed=0)
    target = documents(tmp_path / "target", 6, seed=1)
    asked = {
        "a": ("influence(labels=data,groups=max)", "ekfac", None),
        "b": ("influence(labels=data,curvature=kfac,damping=0.01)", "kfac", 0.01),
        "c": ("self_influence(labels=data,curvature=ekfac,damping=0.001)", "ekfac", 0.001),
        "d": ("self_influence(labels=data,curvature=kfac)", "kfac", None),
    }
    score(
        tmp_path / "corpus", checkpoints=str(tmp_path / "checkpoint-3"), task="causal_lm",
        task_options={"inputs": "ids"}, target=str(tmp_path / "target"), target_group="part",
        scorers=",".join(f"{name}={v[0]}" for name, v in asked.items()), batch_rows=4,
        progress=False, out=tmp_path / "s",
    )  # fmt: skip
    found = pq.read_table(tmp_path / "s" / "part-00000.parquet")
    exact: Any = model.double()
    exact.eval()
    for name, (request, kind, damping) in asked.items():
        own, cross = expected(exact, rows, target, kind, damping)
        of_groups = cross.max(1) if "max" in request else cross.mean(1)
        want = own if request.startswith("self") else of_groups
        # float32 passes against float64; values of a row are sums of some hundred terms.
        close = {"rtol": 1e-4, "atol": 1e-5 * np.abs(want).max()}
        np.testing.assert_allclose(found[name].to_numpy(), want, **close, err_msg=name)
