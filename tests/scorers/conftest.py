"""What the engine's tests share: loss functions, a brute force, and a zoo of small models.

The brute force is autograd on one row at a time; it shares no code with the engine.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from curate.kernels.cross_entropy import IGNORE, token_cross_entropy
from curate.scorers.protocol import Batch, Outputs

VOCAB, CLASSES, TOKENS, ROWS = 23, 3, 7, 6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on such small matrices spend their time waiting for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    out = model(**batch.inputs)
    return out if isinstance(out, Tensor) else out.logits


def classify(model: nn.Module, batch: Batch) -> Outputs:
    logits = _logits(model, batch)
    loss = token_cross_entropy(logits, batch.targets)
    return Outputs(loss, batch.targets, logits)


def language(model: nn.Module, batch: Batch) -> Outputs:
    """Mean over the target tokens of a row, whose windows may be several sequences."""
    logits = _logits(model, batch)
    token = token_cross_entropy(logits, batch.targets)
    count = (batch.targets != IGNORE).sum(1)
    total = token.sum(1)
    if batch.row_ids is not None:
        total = total.new_zeros(batch.rows).index_add_(0, batch.row_ids, total)
        count = count.new_zeros(batch.rows).index_add_(0, batch.row_ids, count)
    return Outputs(total / count, batch.targets, logits, row_ids=batch.row_ids)


def brute_force(
    model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Batch], Outputs]
) -> dict[str, Tensor]:
    """Return every trainable parameter's gradient per row [B, *shape], one row at a time."""
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = []
    for i in range(batch.rows):
        value = loss(model, batch.select_rows([i])).loss
        grads = torch.autograd.grad(value.sum(), list(params.values()), allow_unused=True)
        pairs = zip(grads, params.values(), strict=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in pairs])
    for module, mode in training:
        module.training = mode
    return dict(zip(params, map(torch.stack, zip(*rows, strict=True)), strict=True))


def images(channels: int = 2, size: int = 9, rows: int = ROWS, name: str = "x") -> Batch:
    x = torch.randn(rows, channels, size, size, dtype=torch.float64)
    return Batch({name: x}, torch.randint(0, CLASSES, (rows,)), rows)


def vectors(width: int = 5, rows: int = ROWS) -> Batch:
    x = torch.randn(rows, width, dtype=torch.float64)
    return Batch({"x": x}, torch.randint(0, CLASSES, (rows,)), rows)


def tokens(rows: int = ROWS, length: int = TOKENS) -> Batch:
    ids = torch.randint(1, VOCAB, (rows, length))
    return Batch({"x": ids}, torch.randint(0, CLASSES, (rows,)), rows)


def text(rows: int = ROWS, length: int = TOKENS, labels: bool = False) -> Batch:
    """Token ids with padding on the right; targets are the next tokens, or a label per row."""
    ids = torch.randint(1, VOCAB, (rows, length))
    lengths = length - torch.arange(rows) % 4
    mask = (torch.arange(length) < lengths[:, None]).long()
    following = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    real = torch.cat([mask[:, 1:], torch.zeros(rows, 1, dtype=torch.long)], 1)
    targets = (
        torch.randint(0, CLASSES, (rows,)) if labels else following.masked_fill(real == 0, -100)
    )
    return Batch({"input_ids": ids, "attention_mask": mask}, targets, rows)


class _Named(nn.Module):
    """A model whose one argument is called x."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class _LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6, padding_idx=1)
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0].mean(1))


class _Encoder(nn.Module):
    """nn.TransformerEncoder, rows first or tokens first, with a bare position parameter."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.embed, self.position = nn.Embedding(VOCAB, 8), nn.Parameter(torch.randn(TOKENS, 8))
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.batch_first = nn.Linear(8, CLASSES), batch_first

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.position
        h = torch.cat([self.cls.expand(len(x), -1, -1), h], 1)
        h = self.encoder(h) if self.batch_first else self.encoder(h.transpose(0, 1)).transpose(0, 1)
        return self.head(h[:, 0])


class _RoutedExperts(nn.Module):
    """Top-1 routing that gathers each expert's tokens, as mixtures of experts do."""

    def __init__(self, width: int = 6, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, h: Tensor) -> Tensor:
        flat = h.reshape(-1, h.shape[-1])
        gate, choice = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            at = (choice == i).nonzero().flatten()
            if len(at):
                out[at] = expert(flat[at]) * gate[at, None]
        return h + out.view_as(h)


class _Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCAB, 6), _RoutedExperts()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(x)).mean(1))


class _Bare(nn.Module):
    """Bare parameters, used in every way short of a layer, and activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Parameter(torch.randn(5, 8) * 0.3)
        self.shift, self.scale = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(1, 8))
        self.rate, self.gain = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(()))
        self.twice, self.stack = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(2, 8, 8))
        self.prelu, self.head = nn.PReLU(), nn.Linear(8, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.inward
        h += self.shift
        h = h.relu_() * self.scale
        h *= self.gain
        h = nn.functional.softplus(self.rate) * h
        h = h @ self.twice.T + torch.addmm(self.shift, h, self.twice)
        h = h @ self.stack[0] - h @ self.stack[1]
        return self.head(self.prelu(h.tanh_())) - self.gain


def _mlp() -> nn.Module:
    layers = nn.Linear(5, 7), nn.ReLU(inplace=True), nn.LayerNorm(7), nn.RMSNorm(7)
    return _Named(*layers, nn.Linear(7, CLASSES))


def _cnn() -> nn.Module:
    model = _Named(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 3, groups=4, stride=2, bias=False), nn.GroupNorm(2, 8),
        nn.Conv2d(8, 8, (3, 1), groups=8, padding="same"), nn.GELU(),
        nn.Conv2d(8, 6, 2, groups=2, dilation=2, padding=1, padding_mode="reflect"),
        nn.Flatten(2), nn.Conv1d(6, 4, 3, stride=2), nn.InstanceNorm1d(4, affine=True),
        nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 2, 9, 9) * 2 + 1)  # running statistics that are not 0 and 1
    return model


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(_gpt2_config(GPT2Config))


def _gpt2_config(config: Callable[..., object]) -> object:
    return config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=16,
                  bos_token_id=0, eos_token_id=0)  # fmt: skip


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=32, max_position_embeddings=16, num_labels=CLASSES)
    )  # fmt: skip


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, intermediate_size=32, tie_word_embeddings=False)
    )  # fmt: skip


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
                      num_key_value_heads=2, intermediate_size=12, num_local_experts=4,
                      num_experts_per_tok=2, experts_implementation="eager")
    )  # fmt: skip


def _lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = ["c_attn", "c_proj"]
    config = LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.1, fan_in_fan_out=True
    )
    return get_peft_model(_gpt2(), config)


def _lm_text() -> Batch:
    return text()


def _label_text() -> Batch:
    return text(labels=True)


_ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch], Callable[..., Outputs]]] = {
    "mlp": (_mlp, vectors, classify),
    "cnn": (_cnn, images, classify),
    "bert": (_bert, _label_text, classify),
    "gpt2 tied": (_gpt2, _lm_text, language),
    "llama": (_llama, _lm_text, language),
    "lora": (_lora, _lm_text, language),
    "lstm": (_LSTMClassifier, tokens, classify),
    "mixtral": (_mixtral, _lm_text, language),
    "routed experts": (_Mixture, tokens, classify),
    "bare parameters": (_Bare, vectors, classify),
    "encoder": (lambda: _Encoder(True), tokens, classify),
    "encoder, tokens first": (lambda: _Encoder(False), tokens, classify),
}


@pytest.fixture
def kit() -> SimpleNamespace:
    """Loss functions, batch makers and the brute force."""
    return SimpleNamespace(
        classify=classify, language=language, brute_force=brute_force, images=images, text=text,
        vectors=vectors, tokens=tokens, Named=_Named, zoo=_ZOO, make=make,
    )  # fmt: skip


@pytest.fixture(params=list(_ZOO))
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """Each model of the zoo in float64, with a batch and its loss function."""
    return make(request.param)


_QUICK = {"mlp", "gpt2 tied", "lstm", "routed experts", "bare parameters", "encoder, tokens first"}


@pytest.fixture(
    params=[n if n in _QUICK else pytest.param(n, marks=pytest.mark.slow) for n in _ZOO]
)
def sampled(request: pytest.FixtureRequest) -> SimpleNamespace:
    """The same, those that add no path of their own among the slow tests; with the truth."""
    found = make(request.param)
    found.truth = brute_force(found.model, found.batch, found.loss)
    return found


def make(name: str) -> SimpleNamespace:
    torch.manual_seed(0)
    model, batch, loss = _ZOO[name]
    return SimpleNamespace(name=name, model=model().double(), batch=batch(), loss=loss)
