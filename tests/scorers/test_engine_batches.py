"""What the probe's rows do not show: models that treat other batches otherwise."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curate.scorers.engine import Engine, EngineError
from curate.scorers.protocol import Batch, Signal
from curate.scorers.signals import signals

ALL = Signal("grad_sq_norm")


class _Pooled(nn.Module):
    """Embeds tokens (0 is padding), and leaves it to `rows` what to do with the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(23, 5), nn.Linear(5, 6), nn.Linear(6, 3)

    def lengths(self, x: Tensor) -> list[int]:
        return (x > 0).sum(1).tolist()

    def order(self, x: Tensor) -> list[int]:
        lengths = self.lengths(x)
        return sorted(range(len(x)), key=lambda row: -lengths[row])


class _SortedByIndex(_Pooled):
    def forward(self, x: Tensor) -> Tensor:
        order = self.order(x)
        back = [order.index(row) for row in range(len(x))]
        return self.head(self.inner(self.embed(x[order])).tanh().mean(1))[back]


class _SortedByStack(_Pooled):
    def forward(self, x: Tensor) -> Tensor:
        order = self.order(x)
        h = self.inner(self.embed(torch.stack([x[row] for row in order]))).tanh().mean(1)
        return torch.stack([self.head(h)[order.index(row)] for row in range(len(x))])


class _Unpadded(_Pooled):
    def forward(self, x: Tensor) -> Tensor:
        lengths = self.lengths(x)
        flat = torch.cat([x[row, :n] for row, n in enumerate(lengths)])
        pieces = self.inner(self.embed(flat)).tanh().split(lengths)
        return self.head(torch.stack([piece.mean(0) for piece in pieces]))


def _full_then_padded(kit: SimpleNamespace) -> list[Batch]:
    full, padded = kit.tokens(length=8), kit.tokens(rows=4, length=8)
    for row, length in enumerate((5, 7, 4, 8)):  # 24 tokens: a multiple of the rows
        padded.inputs["x"][row, length:] = 0
    return [full, padded]


def _squares(kit: SimpleNamespace, model: nn.Module, batch: Batch) -> Tensor:
    truth = kit.brute_force(model, batch, kit.classify)
    return sum(g.reshape(len(g), -1).square().sum(1) for g in truth.values())


def _check(kit: SimpleNamespace, model: nn.Module, batches: list[Batch]) -> Engine:
    engine = Engine(model, kit.classify, [ALL])
    for batch in batches:
        torch.testing.assert_close(engine(batch)[ALL], _squares(kit, model, batch))
    return engine


@pytest.mark.parametrize("kind", [_SortedByIndex, _SortedByStack, _Unpadded])
def test_rows_moved_by_python_only_where_lengths_differ(kit, kind) -> None:
    """The probe meets rows of one length, in order; nothing but the calls themselves tells."""
    _check(kit, kind().double(), _full_then_padded(kit))


def test_picking_one_token_of_every_row_keeps_the_rows(kit) -> None:
    class Last(_Pooled):
        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(self.embed(x))
            return self.head(h[torch.arange(len(x)), (x > 0).sum(1) - 1])

    engine = _check(kit, Last().double(), _full_then_padded(kit))
    assert engine.paths["head.weight"] == "analytic: linear"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class _SometimesHidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.w
        return self.head(_Product.apply(h.tanh(), self.w) if bool((x > 6).any()) else h)


def test_a_weight_seen_in_the_probe_and_hidden_as_well_later(kit) -> None:
    later = kit.vectors(rows=1)
    later.inputs["x"][0, 0] = 7
    engine = _check(kit, _SometimesHidden().double(), [kit.vectors(), later])
    assert engine.paths["w"].startswith("row by row")


def test_a_first_batch_of_one_row_proves_nothing_about_others(kit) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b((h - h.mean(0) / 2).tanh())

    engine = Engine(Centred().double(), kit.classify, [ALL])
    engine(kit.vectors(rows=1))
    with pytest.raises(EngineError, match="depends on the other rows"):
        engine(kit.vectors())


def test_without_the_probe_what_is_not_certain_is_still_checked(kit) -> None:
    """A table [T, T] that joins every row's scores, and one that goes tokens first."""

    class Relative(_Pooled):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.place = nn.Embedding(16, 2), nn.Embedding(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            at = torch.arange(x.shape[1])
            h = self.embed(x.T) + self.place(at)[:, None]
            bias = self.table(at[:, None] - at + 7).permute(2, 0, 1).softmax(-1).sum(0)
            return self.head(self.inner(torch.einsum("ts,sbd->tbd", bias, h)).tanh().mean(0))

    model, batch = Relative().double(), kit.tokens()
    got = signals(model, batch, kit.classify, ["grad_sq_norm"], probe=False)["grad_sq_norm"]
    torch.testing.assert_close(got, _squares(kit, model, batch))


class _Table(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.head = table, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        return self.head(h.mean(1) if h.dim() == 3 else h)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_tables_are_scored_like_others(kit, kind) -> None:
    model, batch = _Table(kind(23, 6, sparse=True)).double(), kit.tokens()
    got = Engine(model, kit.classify, [ALL])(batch)[ALL]
    model.table.sparse = False
    torch.testing.assert_close(got, _squares(kit, model, batch))


def test_weights_used_inside_the_models_own_vmap(kit) -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.vmap(lambda row: F.linear(row, self.a.weight, self.a.bias).tanh())(x)
            return self.b(rows)

    _check(kit, Mapped().double(), [kit.vectors()])


def test_compiled_functions_inside_a_model_are_not_compiled(kit) -> None:
    def never(*_: object) -> None:
        raise AssertionError("compiled")

    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)
            self.act = torch.compile(lambda h: self.a(h).tanh(), backend=never)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(x))

    model, batch = Compiled().double(), kit.vectors()
    got = Engine(model, kit.classify, [ALL])(batch)[ALL]
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(got, _squares(kit, model, batch))


def test_complex_parameters_are_refused_by_name(kit) -> None:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, dtype=torch.complex128))
            self.head = nn.Linear(5, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.fft.ifft(torch.fft.fft(x) * self.w).real)

    with pytest.raises(ValueError, match="w is complex"):
        Engine(Fourier(), kit.classify, [ALL])(kit.vectors())
    Engine(Fourier(), kit.classify, [Signal("grad_sq_norm", "head\\.")])(kit.vectors())
