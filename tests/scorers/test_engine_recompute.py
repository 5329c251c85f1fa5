"""Blocks run twice: the same numbers, to the bit, from a fraction of the memory."""

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curate.scorers.engine import Engine
from curate.scorers.passes import Passes
from curate.scorers.protocol import Batch, Outputs, Signal
from curate.scorers.recompute import repeated_blocks
from curate.scorers.signals import signals

ALL = Signal("grad_sq_norm")
WANTS = ("loss", "grad_norm", "sketch", "grad_dot", "el2n", "el2n_seq", "weight_alignment",
         "embedding", "input_grad")  # fmt: skip
WIDTH = 6


class _Mix(nn.Module):
    """A block: a norm, a mixing of tokens, two layers; three weights and some activations."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        x = (x @ x.mT).softmax(-1) @ x
        return h + self.down(F.gelu(self.up(x)))


class _Chain(nn.Module):
    """Embeds tokens, applies blocks, and predicts from the mean."""

    def __init__(self, *blocks: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(23, width), nn.ModuleList(blocks)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = self.through(block, h)
        return self.head(h.mean(1))

    def through(self, block: nn.Module, h: Tensor) -> Tensor:
        return block(h)


@contextmanager
def _calls(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count how often each block's code ran; the block's own hooks would see one call only."""
    found, own = dict.fromkeys(repeated_blocks(model), 0), []
    for name, module in repeated_blocks(model).items():

        def counted(*args: Any, _name: str = name, _own: Any = module.forward, **kw: Any) -> Any:
            found[_name] += 1
            return _own(*args, **kw)

        module.forward = counted
        own.append(module)
    yield found
    for module in own:
        del module.forward


def _squares(
    kit: SimpleNamespace, model: nn.Module, batch: Batch, loss: Callable[..., Any]
) -> Tensor:
    truth = kit.brute_force(model, batch, loss)
    total: Tensor = sum(g.reshape(len(g), -1).square().sum(1) for g in truth.values())
    return total


def _check(
    kit: SimpleNamespace,
    model: nn.Module,
    batch: Batch,
    loss: Callable[..., Any] | None = None,
    again: int | None = 1,
) -> Engine:
    """Compare plain and recomputed passes bit by bit, and the norm with the brute force.

    A pass with recomputation must run each block `again` times more often than one without.
    """
    loss = loss or kit.classify
    squares = _squares(kit, model, batch, loss)
    plain, engine = Engine(model, loss, [ALL]), Engine(model, loss, [ALL], recompute=True)
    want, got = plain(batch)[ALL], engine(batch)[ALL]
    assert torch.equal(got, want)
    torch.testing.assert_close(got, squares, rtol=1e-9, atol=1e-15)
    with _calls(model) as once:
        assert torch.equal(plain(batch)[ALL], want)
    with _calls(model) as twice:
        assert torch.equal(engine(batch)[ALL], want)
    if again is not None:
        assert once and {twice[name] - n for name, n in once.items()} == {again}
    assert engine.paths == plain.paths
    assert not any("forward" in vars(m) for m in model.modules())
    return engine


@pytest.mark.parametrize(
    "name",
    ["gpt2 tied", "encoder, tokens first", "bare parameters"]
    + [
        pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "llama", "lora", "mixtral", "cnn")
    ],
)
def test_every_signal_of_common_models_to_the_bit(kit, name) -> None:
    case = kit.make(name)
    wants = WANTS if name != "bare parameters" else WANTS[:4]
    if name == "mixtral":
        wants = [w for w in WANTS if w != "input_grad"]
    given = dict(
        sketch_dim=(3, 4),
        directions=[{n: torch.randn_like(p) for n, p in case.model.named_parameters()}],
    )
    with _calls(case.model) as once:
        want = signals(case.model, case.batch, case.loss, wants, **given)
    with _calls(case.model) as twice:
        got = signals(case.model, case.batch, case.loss, wants, recompute=True, **given)
    for kind, value in want.items():
        assert torch.equal(got[kind], value), kind
    assert bool(once) == (name not in ("bare parameters", "cnn"))
    assert all(twice[block] > n for block, n in once.items())


def test_one_sided_sketches_and_windows_of_a_row(kit) -> None:
    case = kit.make("gpt2 tied")
    batch = Batch(case.batch.inputs, case.batch.targets, 3, torch.tensor([0, 1, 0, 2, 0, 1]))
    for dim in (3, (2, 2), (8,)):
        want, got = (
            signals(case.model, batch, case.loss, ["sketch", "grad_norm"], sketch_dim=dim,
                    recompute=on)
            for on in (False, True)
        )  # fmt: skip
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_one_block_used_many_times(kit) -> None:
    """ALBERT: the parts of all uses meet in one sum; each run counts its uses from where it was."""
    block = _Mix()
    _check(kit, _Chain(*[block] * 4).double(), kit.tokens(), again=4)


def test_albert_of_hugging_face(kit) -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(
        vocab_size=23, hidden_size=8, embedding_size=4, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    model = AlbertForSequenceClassification(config).double()
    _check(kit, model, kit.text(labels=True), again=3)


@pytest.mark.slow
def test_encoder_and_decoder_of_hugging_face(kit) -> None:
    """Cross attention: the encoder's output goes into every block of the decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=23, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model, batch = T5ForConditionalGeneration(config).double(), kit.text()
    inputs = dict(batch.inputs, decoder_input_ids=batch.inputs["input_ids"])
    _check(kit, model, Batch(inputs, batch.targets, batch.rows), kit.language)


def test_weights_tied_between_blocks_and_with_the_head(kit) -> None:
    class Tied(_Chain):
        def forward(self, x: Tensor) -> Tensor:
            return (
                super().forward(x) @ self.blocks[0].norm.weight[:3].diag()
                + self.blocks[1].down(torch.ones(len(x), 2 * WIDTH, dtype=torch.float64))[:, :3]
            )

    blocks = [_Mix() for _ in range(3)]
    blocks[2].up.weight = blocks[0].up.weight
    blocks[1].down.weight = nn.Parameter(blocks[0].up.weight.detach().T.clone())
    _check(kit, Tied(*blocks).double(), kit.tokens())


class _Odd(_Mix):
    """Takes and returns what blocks of real models do."""

    def forward(
        self, h: tuple[Tensor, Tensor], mask: Tensor | None = None, *, positions: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        left, right = h
        cos, sin = positions
        left = left * cos + right * sin
        if mask is not None:
            left = left.masked_fill(mask[..., None], 0.0)
        return super().forward(left), {"right": right + left.tanh()}


class _OddChain(_Chain):
    def forward(self, x: Tensor) -> Tensor:
        h, rest = self.embed(x), {"right": self.embed(x.flip(1))}
        at = torch.arange(x.shape[1], dtype=h.dtype)[:, None]
        for i, block in enumerate(self.blocks):
            mask = (x == 3) if i else None
            h, rest = block((h, rest["right"]), mask, positions=(at.cos(), at.sin()))
        return self.head((h + rest["right"]).mean(1))


def test_tuples_keywords_masks_and_none(kit) -> None:
    _check(kit, _OddChain(_Odd(), _Odd(), _Odd()).double(), kit.tokens())


class _Remembering(_Mix):
    """Reads a tensor that it was not given, and whose gradient goes on to another weight."""

    def __init__(self, outside: list[Tensor]) -> None:
        super().__init__()
        self.outside = outside

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h * self.outside[0].tanh())


def test_tensors_that_blocks_have_by_closure(kit) -> None:
    outside: list[Tensor] = []

    class Model(_Chain):
        def __init__(self) -> None:
            super().__init__(_Remembering(outside), _Remembering(outside))
            self.gate = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            outside[:] = [self.gate(F.one_hot(x % WIDTH, WIDTH).double())]
            return super().forward(x)

    _check(kit, Model().double(), kit.tokens())


def test_blocks_that_get_no_gradient_at_their_input(kit) -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.Sequential(_Mix(), _Mix()), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(x).mean(1))

    x = torch.randn(6, 4, WIDTH, dtype=torch.float64)
    batch = Batch({"x": x}, torch.randint(0, 3, (6,)), 6)
    model = Raw().double()
    _check(kit, model, batch)
    late = Engine(model, kit.classify, [Signal("grad_sq_norm", r"1\.down|head")])
    want = late(batch)
    late.recompute = True
    assert all(torch.equal(value, want[s]) for s, value in late(batch).items())


class _Overwriting(_Mix):
    def forward(self, h: Tensor) -> Tensor:
        h += self.norm(h)
        return super().forward(h.mul_(0.5))


class _OverwritingChain(_Chain):
    def through(self, block: nn.Module, h: Tensor) -> Tensor:
        out = block(h)
        return out + h.mul_(0.5).tanh()


@pytest.mark.parametrize("where", ["inside", "after"])
def test_inputs_that_are_overwritten(kit, where, caplog) -> None:
    """By the block itself, or by the model when the block is done.

    Not to the bit: autograd refuses the plain pass, which the engine then takes row by row.
    """
    blocks = [_Overwriting() if where == "inside" else _Mix() for _ in range(2)]
    model = (_Chain if where == "inside" else _OverwritingChain)(*blocks).double()
    batch = kit.tokens()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        squares = _squares(kit, model, batch, kit.classify)
    engine = Engine(model, kit.classify, [ALL], recompute=True)
    with caplog.at_level(logging.INFO, "curate.engine"):
        for _ in range(2):
            torch.testing.assert_close(engine(batch)[ALL], squares)
    said = [r.getMessage() for r in caplog.records if "a copy is kept" in r.getMessage()]
    assert any(text.startswith("blocks.0: an input") for text in said)


def test_an_input_of_a_layer_overwritten_inside_a_block(kit) -> None:
    """Found in the second run, inside autograd; the pass is made again with a copy."""

    class Block(_Mix):
        def forward(self, h: Tensor) -> Tensor:
            x = self.norm(h)
            out = self.up(x)
            x.mul_(0.5)
            return h + self.down(out.relu()) + x

    model, batch = _Chain(Block(), Block()).double(), kit.tokens()
    want = Engine(model, kit.classify, [ALL], probe=False)(batch)[ALL]
    engine = Engine(model, kit.classify, [ALL], probe=False, recompute=True)
    assert torch.equal(engine(batch)[ALL], want)
    assert engine.paths["blocks.0.up.weight"] == "analytic: linear"
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        torch.testing.assert_close(want, _squares(kit, model, batch, kit.classify))


class _Fickle(_Mix):
    """Does something else every second time."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change, self.runs = change, 0

    def forward(self, h: Tensor) -> Tensor:
        self.runs += 1
        if self.runs % 2 == 0:
            if self.change == "raises":
                raise KeyError("gone")
            if self.change == "more":
                h = h.exp().log()
            elif self.change == "fewer":
                return h + self.down(F.gelu(self.up(h)))
            else:
                h = h[:, :-1].repeat(1, 2, 1)[:, : h.shape[1] - 1]
        return super().forward(h)


@pytest.mark.parametrize("change", ["raises", "more", "fewer", "shape"])
def test_a_block_that_is_not_the_same_twice_is_left_alone(kit, change, caplog) -> None:
    fickle = _Fickle(change)
    model, batch = _Chain(_Mix(), fickle).double(), kit.tokens()

    def loss(model: nn.Module, batch: Batch) -> Outputs:
        fickle.runs = 0  # every pass begins with an odd run
        return kit.classify(model, batch)

    want = Engine(model, loss, [ALL])(batch)[ALL]
    engine = Engine(model, loss, [ALL], recompute=True)
    assert torch.equal(engine(batch)[ALL], want)
    assert any("blocks.1 is not run twice" in r.getMessage() for r in caplog.records)
    assert engine.paths["blocks.1.up.weight"] == "analytic: linear"
    with _calls(model) as calls:
        assert torch.equal(engine(batch)[ALL], want)
    assert calls == {"blocks.0": 2, "blocks.1": 1}


def test_blocks_that_are_given_a_cache_run_once(kit) -> None:
    class KeyCache:
        seen = 0

    class Block(_Mix):
        def forward(self, h: Tensor, cache: Any = None) -> Tensor:
            if cache is not None:
                cache.seen += 1
            return super().forward(h)

    class Model(_Chain):
        def forward(self, x: Tensor) -> Tensor:
            self.cache = KeyCache()
            return super().forward(x)

        def through(self, block: nn.Module, h: Tensor) -> Tensor:
            return block(h, cache=self.cache)

    model = Model(Block(), Block()).double()
    _check(kit, model, kit.tokens(), again=0)


def test_caches_of_hugging_face_are_off_in_the_pass_and_on_after_it(kit) -> None:
    case = kit.make("llama")
    assert case.model.config.use_cache
    caches: list[object] = []
    case.model.model.register_forward_hook(lambda m, a, out: caches.append(out.past_key_values))
    engine = Engine(case.model, case.loss, [ALL], recompute=True)
    with _calls(case.model) as calls:
        engine(case.batch)
    assert set(caches) == {None} and min(calls.values()) > 1
    assert case.model.config.use_cache


def test_checkpointing_of_the_models_own_inside_a_block(kit) -> None:
    from torch.utils.checkpoint import checkpoint

    class Block(_Mix):
        def forward(self, h: Tensor) -> Tensor:
            return checkpoint(super().forward, h, use_reentrant=False)

    _check(kit, _Chain(Block(), Block()).double(), kit.tokens(), again=None)


def test_checkpointing_of_hugging_face_is_off(kit) -> None:
    case = kit.make("gpt2 tied")
    case.model.gradient_checkpointing_enable()
    case.model.train()
    _check(kit, case.model, case.batch, case.loss)


def test_slower_paths_inside_blocks(kit) -> None:
    """Caught once, in the first run; the second has the same outputs and catches nothing."""

    class Block(_Mix):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.act = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.PReLU(WIDTH)

        def forward(self, h: Tensor) -> Tensor:
            x = self.act(self.recurrent(h)[0].transpose(1, 2)).transpose(1, 2)
            return super().forward(h + x)

    for blocks in ([Block(), Block()], [Block(), _Mix(), _Mix()]):
        engine = _check(kit, _Chain(*blocks).double(), kit.tokens(), again=None)
        assert engine.paths["blocks.0.act.weight"] == "vmap: blocks.0.act"
        assert engine.paths["blocks.0.recurrent.weight_hh_l0"] == "row by row: blocks.0.recurrent"


def test_a_weight_first_used_after_the_probe_inside_a_block(kit) -> None:
    class Block(_Mix):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(WIDTH, WIDTH)

        def forward(self, h: Tensor) -> Tensor:
            return super().forward(self.extra(h) if h.shape[1] > 7 else h)

    model = _Chain(Block(), Block()).double()
    engine = _check(kit, model, kit.tokens())
    longer = kit.tokens(length=9)
    plain = Engine(model, kit.classify, [ALL])
    torch.testing.assert_close(engine(longer)[ALL], plain(longer)[ALL])


def test_gradients_taken_inside_a_block(kit) -> None:
    class Energy(_Mix):
        def forward(self, h: Tensor) -> Tensor:
            force = torch.func.grad(lambda x: x.sin().sum())(h.detach())
            return super().forward(h + force)

    _check(kit, _Chain(Energy(), Energy()).double(), kit.tokens(), again=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_automatic_casting_is_the_same_in_the_second_run(kit, dtype) -> None:
    model, batch = _Chain(_Mix(), _Mix()), kit.tokens()
    seen: set[torch.dtype] = set()
    model.blocks[0].up.register_forward_hook(lambda m, a, out: seen.add(out.dtype))

    def cast(model: nn.Module, batch: Batch) -> Outputs:
        with torch.autocast("cpu", dtype=dtype):
            return kit.classify(lambda **inputs: model(**inputs).float(), batch)

    engine = Engine(model, cast, [ALL])
    want = engine(batch)[ALL]
    engine.recompute = True
    seen.clear()
    assert torch.equal(engine(batch)[ALL], want)
    assert seen == {dtype}


def test_everything_is_put_back_when_a_block_raises(kit) -> None:
    model, batch = _Chain(_Mix(), _Mix()).double(), kit.tokens()
    engine = Engine(model, kit.classify, [ALL], recompute=True)
    want = engine(batch)[ALL]

    def fails(h: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("first or second run")

    own = model.blocks[1].forward
    model.blocks[1].forward = fails
    with pytest.raises(torch.OutOfMemoryError):
        engine(batch)
    assert model.blocks[1].forward is fails
    runs: list[int] = []

    def fails_later(h: Tensor) -> Tensor:
        runs.append(1)
        return own(h) if len(runs) == 1 else fails(h)

    model.blocks[1].forward = fails_later
    with pytest.raises(torch.OutOfMemoryError):
        engine(batch)
    assert len(runs) == 2
    del model.blocks[1].forward
    assert torch.equal(engine(batch)[ALL], want)


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors made within and still alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        for p in model.parameters():  # a view of a weight is nothing new
            self._note(p.untyped_storage())
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        at, size = id(storage), storage.nbytes()
        if at in self._known and self._known[at]() is storage:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed(_: object) -> None:
            self.now -= size

        self._known[at] = weakref.ref(storage, freed)


def _peak(kit: SimpleNamespace, blocks: int, recompute: bool, wants: list[Signal]) -> int:
    torch.manual_seed(0)
    model = _Chain(*(_Mix(32) for _ in range(blocks)), width=32)
    batch = kit.tokens(rows=2, length=64)
    engine = Engine(model, kit.classify, wants, recompute=recompute)
    engine.verify(batch)
    with _Live(model) as live:
        engine(batch)
    return live.peak


@pytest.mark.parametrize(
    "wants", [[ALL], [Signal("weight_alignment"), Signal("el2n_seq"), ALL]], ids=["norm", "all"]
)
def test_a_further_block_costs_its_input_instead_of_its_activations(kit, wants) -> None:
    """Twelve blocks more: the plain pass grows by all that they keep, the other by [2, 64, 32]."""
    plain, less = (
        (_peak(kit, 16, on, wants) - _peak(kit, 4, on, wants)) / 12 for on in (False, True)
    )
    one_input = 2 * 64 * 32 * 4
    assert less < 1.05 * one_input
    assert plain > 9 * one_input
    assert _peak(kit, 16, True, wants) < _peak(kit, 16, False, wants) / 5


def test_which_modules_are_blocks(kit) -> None:
    leaf = nn.Linear(4, 4)
    stages = nn.ModuleList(nn.Sequential(*(_Mix(width) for _ in range(2))) for width in (2, 4, 16))
    cases: list[tuple[nn.Module, list[str]]] = [
        (_Chain(_Mix(), _Mix()), ["blocks.0", "blocks.1"]),
        (nn.Sequential(_Chain(_Mix(), _Mix()), nn.Sequential(leaf, nn.ReLU())),
         ["0.blocks.0", "0.blocks.1"]),
        (nn.ModuleDict({"0": _Mix(), "1": _Mix()}), ["0", "1"]),
        (nn.ModuleDict({"h": nn.ModuleList([_Mix(), _Mix()]), "end": leaf}), ["h.0", "h.1"]),
        (nn.Sequential(leaf, nn.ReLU(), leaf), []),
        # The last stage is most of the model: the blocks are those inside the stages.
        (stages, [f"{i}.{j}" for i in range(3) for j in range(2)]),
        (_Chain(*[_Mix()] * 3), ["blocks.0"]),
    ]  # fmt: skip
    for model, names in cases:
        assert list(repeated_blocks(model)) == names


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
)
@pytest.mark.parametrize("where", ["probe", "second run", "replay"])
def test_no_slower_path_is_taken_because_memory_ran_out(kit, where, error, monkeypatch) -> None:
    """What a machine lacks for a moment says nothing of the model; the plan stays as it was."""

    class Block(_Mix):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.left = nn.PReLU(), -1

        def forward(self, h: Tensor) -> Tensor:
            self.left -= 1
            if self.left == 0:
                raise error
            return self.act(super().forward(h))

    model, batch = _Chain(Block(), Block()).double(), kit.tokens()
    engine = Engine(model, kit.classify, [ALL], recompute=True)
    want, paths = engine(batch)[ALL], engine.paths
    if where == "replay":

        def fails(*_: object) -> None:
            raise error

        handle = model.blocks[1].act.register_forward_pre_hook(
            lambda m, args: fails() if torch._C._functorch.peek_interpreter_stack() else None
        )
    elif where == "second run":
        model.blocks[1].left = 2
    else:
        run = Passes.run

        def armed(self: Passes, *given: Any) -> Any:
            model.blocks[1].left = 1
            return run(self, *given)

        monkeypatch.setattr(Passes, "run", armed)
    with pytest.raises(RuntimeError) as raised:
        engine.verify(batch) if where == "probe" else engine(batch)
    assert raised.value is error
    monkeypatch.undo()
    if where == "replay":
        handle.remove()
    assert torch.equal(engine(batch)[ALL], want)
    assert engine.paths == paths
