"""Angles between tokens: closed forms, small transformers by brute force, the code's triangle."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curate.kernels.cross_entropy import IGNORE, token_cross_entropy
from curate.scorers.engine import Engine
from curate.scorers.protocol import Batch, Outputs
from curate.scorers.registry import make_scorers
from curate.scorers.token_angles import up_projection

VARIANTS = "paper", "pairs", "code"
DIM = 5


class States(nn.Module):
    """Hands hidden states, as they are given, to a layer of a known name."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(DIM, 3)})
        self.double()

    def forward(self, h: Tensor) -> Tensor:
        return self.mlp["up_proj"](h)


def loss(model: nn.Module, batch: Batch) -> Outputs:
    logits = model(**batch.inputs)
    logits = getattr(logits, "logits", logits)
    tokens = token_cross_entropy(logits, batch.targets).sum(1)
    by_row = tokens
    if batch.row_ids is not None:
        by_row = tokens.new_zeros(batch.rows).index_add(0, batch.row_ids, tokens)
    return Outputs(by_row, batch.targets, logits, row_ids=batch.row_ids)


def scores(request: str, model: nn.Module, batch: Batch) -> Tensor:
    (scorer,) = make_scorers(request).values()
    engine = Engine(model, loss, scorer.needs)
    found = engine(batch)
    one = torch.ones(1, dtype=torch.float64)
    return scorer.reduce({s: x.double()[None] for s, x in found.items()}, one)


def of_states(rows: list[Tensor], variant: str, prompts: list[int] | None = None) -> Tensor:
    """Return the scores of rows of hidden states [T, D], padded on the right with rubbish."""
    width = max(map(len, rows))
    h = torch.full((len(rows), width, DIM), 7.0, dtype=torch.float64)
    targets = torch.full((len(rows), width), IGNORE)
    for i, row in enumerate(rows):
        h[i, : len(row)], targets[i, : len(row)] = row, 0
    given = None if prompts is None else torch.tensor(prompts)
    batch = Batch({"h": h}, targets, len(rows), prompt=given)
    return scores(f"angle_concentration(variant={variant})", States(), batch)


def brute(h: Tensor, variant: str, prompt: int = 0) -> float:
    """Return the score of one row from its matrix of cosines, entry by entry."""
    cosines = torch.nn.functional.cosine_similarity(h[:, None], h[None], dim=2)
    own = cosines[prompt:, prompt:]
    n = len(own)
    if variant == "paper":
        inside = own.mean()
    elif variant == "pairs":
        inside = own[~torch.eye(n, dtype=torch.bool)].mean() if n > 1 else torch.tensor(0.0)
    else:
        inside = (cosines * torch.tril(torch.ones_like(cosines), 1))[prompt:, prompt:].mean()
    across = cosines[prompt:, :prompt].mean() if prompt else torch.tensor(0.0)
    return float(inside + (8 if variant == "code" else 1) * across)


@pytest.mark.parametrize("variant", VARIANTS)
class TestKnownStates:
    def test_tokens_that_are_alike_have_one(self, variant: str) -> None:
        alike = torch.randn(1, DIM, dtype=torch.float64).expand(6, DIM)
        # Of the code's 36 places 21 on and below the diagonal and 5 above it are not zeroed.
        want = 26 / 36 if variant == "code" else 1.0
        assert of_states([alike], variant).item() == pytest.approx(want, rel=1e-12)

    def test_orthogonal_tokens_have_nothing_off_the_diagonal(self, variant: str) -> None:
        want = 0.0 if variant == "pairs" else 1 / DIM
        orthogonal = 3 * torch.eye(DIM, dtype=torch.float64)
        assert of_states([orthogonal], variant).item() == pytest.approx(want, abs=1e-12)

    def test_turning_scaling_and_padding_change_nothing(self, variant: str) -> None:
        h = torch.randn(6, DIM, dtype=torch.float64)
        turn = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64)).Q
        lengths = torch.rand(6, 1, dtype=torch.float64) + 0.1
        found = of_states([h, h @ turn, lengths * h, torch.randn(9, DIM).double()], variant)
        torch.testing.assert_close(found[1:3], found[0].expand(2))
        torch.testing.assert_close(of_states([h], variant)[0], found[0])

    def test_brute_force_with_and_without_a_prompt(self, variant: str) -> None:
        rows = [torch.randn(n, DIM, dtype=torch.float64) for n in (2, 7, 5, 3)]
        prompts = [1, 3, 0, 2]
        want = [brute(h, variant, p) for h, p in zip(rows, prompts, strict=True)]
        found = of_states(rows, variant, prompts)
        torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64))
        alone = [brute(h, variant) for h in rows]
        torch.testing.assert_close(of_states(rows, variant), torch.tensor(alone).double())


def test_the_code_slices_its_matrix_as_ours_does() -> None:
    """What the authors mean: rows of the question against columns of question and prompt."""
    h, p = torch.randn(20, DIM, dtype=torch.float64), 7
    unit = h / h.norm(dim=1, keepdim=True)
    cos = unit @ unit.T
    cos = cos * torch.tril(torch.ones_like(cos), diagonal=1)
    want = cos[p:, p:].mean() + 8 * cos[p:, :p].mean()
    torch.testing.assert_close(of_states([h], "code", [p])[0], want)


def test_a_prompt_weight_weighs_the_prompt() -> None:
    scorer = make_scorers("angle_concentration(prompt_weight=3)")["angle_concentration"]
    intra, inter = sorted(scorer.needs)  # angle_paper, angle_prompt
    values = {intra: torch.tensor([[0.5], [0.7]]), inter: torch.tensor([[0.1], [0.3]])}
    found = scorer.reduce({s: v.double() for s, v in values.items()}, torch.ones(2).double() / 2)
    assert found.item() == pytest.approx(0.6 + 3 * 0.2)


# -- models


def hugging_face(name: str) -> tuple[nn.Module, str]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 23, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    wide = {**small, "intermediate_size": 16, "num_key_value_heads": 2}
    configs: dict[str, tuple[Any, dict[str, Any], str]] = {
        "llama": (transformers.LlamaConfig, wide, "model.layers.1.mlp.up_proj"),
        "qwen2": (transformers.Qwen2Config, wide, "model.layers.1.mlp.up_proj"),
        "gpt2": (
            transformers.GPT2Config,
            {"vocab_size": 23, "n_embd": 8, "n_layer": 2, "n_head": 2},
            "transformer.h.1.mlp.c_fc",
        ),
        "gpt_neox": (transformers.GPTNeoXConfig, wide, "gpt_neox.layers.1.mlp.dense_h_to_4h"),
        "opt": (
            transformers.OPTConfig,
            {**small, "ffn_dim": 16, "word_embed_proj_dim": 8, "max_position_embeddings": 32},
            "model.decoder.layers.1.fc1",
        ),
    }
    config, settings, layer = configs[name]
    model = transformers.AutoModelForCausalLM.from_config(config(**settings))
    return model.double().eval(), layer


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "opt"])
def test_models_are_looked_into_where_the_source_does(name: str) -> None:
    model, layer = hugging_face(name)
    assert up_projection(model, "") is model.get_submodule(layer)
    lengths = (9, 6, 2)
    ids = torch.randint(1, 23, (3, 9))
    targets = torch.full((3, 9), IGNORE)
    for i, n in enumerate(lengths):
        targets[i, :n] = torch.randint(1, 23, (n,))
    batch = Batch({"input_ids": ids}, targets, 3, prompt=torch.tensor([4, 0, 1]))
    found = {v: scores(f"angle_concentration(variant={v})", model, batch) for v in VARIANTS}
    for i, (n, p) in enumerate(zip(lengths, (4, 0, 1), strict=True)):
        seen: list[Tensor] = []
        hook = model.get_submodule(layer).register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            model(input_ids=ids[i : i + 1, :n])
        hook.remove()
        h = seen[0].reshape(n, -1)
        for variant in VARIANTS:
            # float64; attention over a padded batch adds in another order.
            assert found[variant][i].item() == pytest.approx(brute(h, variant, p), rel=1e-9)


def test_bert_counts_the_tokens_of_its_mask() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=23, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).double().eval()
    layer = "bert.encoder.layer.1.intermediate.dense"
    assert up_projection(model, "") is model.get_submodule(layer)
    ids, mask = torch.randint(1, 23, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0

    def outputs(model: nn.Module, batch: Batch) -> Outputs:
        logits = model(**batch.inputs).logits
        return Outputs(token_cross_entropy(logits, batch.targets), batch.targets, logits)

    batch = Batch({"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 2]), 2)
    (scorer,) = make_scorers("angle_concentration").values()
    found = Engine(model, outputs, scorer.needs)(batch)
    total = scorer.reduce({s: x[None] for s, x in found.items()}, torch.ones(1).double())
    seen: list[Tensor] = []
    model.get_submodule(layer).register_forward_hook(lambda m, a, o: seen.append(a[0][0]))
    with torch.no_grad():
        model(input_ids=ids[1:, :4])
    assert total[1].item() == pytest.approx(brute(seen[0], "paper"), rel=1e-9)


def test_windows_of_a_document_are_one_row() -> None:
    """The second row's five tokens come in windows of three and two, its prompt in the first."""
    h = torch.randn(8, DIM, dtype=torch.float64)
    states = torch.stack([h[:3], h[3:6], torch.cat([h[6:], torch.full((1, DIM), 9.0)])])
    targets = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, IGNORE]])
    batch = Batch(
        {"h": states}, targets, 2, torch.tensor([0, 1, 1]), prompt=torch.tensor([1, 2, 0])
    )
    for variant in VARIANTS:
        found = scores(f"angle_concentration(variant={variant})", States(), batch)
        want = [brute(h[:3], variant, 1), brute(h[3:], variant, 2)]
        torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64))


def test_no_backward_pass_runs_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, scorer = States(), make_scorers("angle_concentration")["angle_concentration"]
    engine = Engine(model, loss, scorer.needs)
    assert not engine.differentiates

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a gradient was taken")

    batch = Batch({"h": torch.randn(2, 4, DIM).double()}, torch.zeros(2, 4, dtype=torch.long), 2)
    engine(batch)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    engine(batch)


def test_beside_gradients_it_is_the_same() -> None:
    model, _ = hugging_face("llama")
    ids = torch.randint(1, 23, (3, 6))
    batch = Batch({"input_ids": ids}, torch.randint(1, 23, (3, 6)), 3)
    both = make_scorers("angle_concentration,grand")
    wanted = {s for scorer in both.values() for s in scorer.needs}
    alone = Engine(model, loss, both["angle_concentration"].needs)(batch)
    for recompute in (False, True):
        found = Engine(model, loss, wanted, recompute=recompute)(batch)
        for signal, value in alone.items():
            torch.testing.assert_close(found[signal], value, rtol=1e-9, atol=0.0)


class TestRefusals:
    def test_a_model_without_such_a_layer(self) -> None:
        with pytest.raises(ValueError, match="name it by layer=REGEX"):
            up_projection(nn.Sequential(nn.Linear(2, 2)), "")
        with pytest.raises(ValueError, match="matches no module"):
            up_projection(nn.Sequential(nn.Linear(2, 2)), "mlp")
        with pytest.raises(ValueError, match="no regular expression"):
            up_projection(nn.Sequential(nn.Linear(2, 2)), "(")
        chosen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        assert up_projection(chosen, "^[01]$") is chosen[1]

    def test_a_layer_that_sees_no_tokens(self) -> None:
        model = nn.Sequential(nn.Linear(4, 2)).double()

        def outputs(model: nn.Module, batch: Batch) -> Outputs:
            logits = model(batch.inputs["x"])
            return Outputs(token_cross_entropy(logits, batch.targets), batch.targets, logits)

        batch = Batch({"x": torch.randn(3, 4).double()}, torch.zeros(3, dtype=torch.long), 3)
        (scorer,) = make_scorers("angle_concentration(layer='0')").values()
        with pytest.raises(ValueError, match="between the tokens of a row"):
            Engine(model, outputs, scorer.needs)(batch)

    @pytest.mark.parametrize("setting", ["variant=mean", "prompt_weight=much"])
    def test_settings(self, setting: str) -> None:
        # A weight of the wrong type is refused by the annotation where types are checked.
        with pytest.raises((ValueError, TypeError), match="angle_concentration"):
            make_scorers(f"angle_concentration({setting})")


def test_a_row_without_a_token_of_its_own_has_no_score() -> None:
    found = of_states([torch.randn(3, DIM).double(), torch.randn(2, DIM).double()], "pairs", [3, 0])
    assert found.isnan().tolist() == [True, False]
