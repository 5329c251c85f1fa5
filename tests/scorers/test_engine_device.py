"""What the engine asks of a device: nothing that waits for it per layer, nothing left on another.

On a CPU only the calls can be counted that would wait for a GPU; the rest needs one.
"""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curate.scorers.engine import Engine
from curate.scorers.protocol import Signal

SIGNALS = [Signal(k) for k in ("loss", "el2n", "el2n_seq", "grad_sq_norm", "weight_alignment")]
_WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "_unique2", "unique_dim", "equal",
          "unique_consecutive", "masked_select", "bincount", "repeat_interleave"}  # fmt: skip
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class _Waits(TorchDispatchMode):
    """Counts operations whose result's size or value the CPU must know before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in _WAITS or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class _Stack(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(23, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(6),
                nn.Linear(6, 6),
                nn.GELU(),
                nn.Sequential(nn.Conv1d(7, 7, 3, padding=1)),
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h.mean(1))


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_waits_for_the_device_once_per_layer(kit, recompute) -> None:
    counts = []
    for blocks in (1, 4):
        engine = Engine(_Stack(blocks), kit.classify, SIGNALS, recompute=recompute)
        batch = kit.tokens()
        engine.verify(batch)
        with _Waits() as waits:
            engine(batch)
        counts.append(waits.found)
    assert counts[0] == counts[1]
    # The table's largest index and distinct rows, and two checks that all targets are classes.
    assert counts[0].total() <= 4


@needs_gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_every_model_of_the_zoo_on_a_gpu(case, recompute) -> None:
    want = Engine(case.model, case.loss, [Signal("grad_sq_norm")])(case.batch)
    engine = Engine(case.model.cuda(), case.loss, [Signal("grad_sq_norm")], recompute=recompute)
    got = engine(case.batch.to("cuda"))
    for signal, value in got.items():
        assert value.is_cuda
        torch.testing.assert_close(value.cpu(), want[signal])


@needs_gpu
def test_half_precision_on_a_gpu_takes_the_triton_kernels(kit) -> None:
    case = kit.make("gpt2 tied")
    truth = Engine(case.model, case.loss, SIGNALS)(case.batch)
    model, batch = case.model.bfloat16().cuda(), case.batch.to("cuda")
    engine = Engine(model, case.loss, SIGNALS)
    eps = torch.finfo(torch.bfloat16).eps
    for recompute in (False, True):
        engine.recompute = recompute
        for signal, value in engine(batch).items():
            torch.testing.assert_close(
                value.double().cpu(), truth[signal], rtol=16 * eps, atol=16 * eps
            )
