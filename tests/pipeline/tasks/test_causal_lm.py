"""Windows against brute force, packing against a token-by-token sum, and what is refused."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curate.pipeline.models.models import make_model, model_args
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.causal_lm import CausalLM
from curate.pipeline.tasks.registry import make_task, task_from_description
from curate.scorers.protocol import IGNORE

Write = Callable[..., Corpus]
VOCABULARY, CONTEXT = 11, 4


def token_task(**changes: object) -> CausalLM:
    """A task over a column of token ids with a small vocabulary and context."""
    kept = {"input": "ids", "id": None, "tokenizer": None, "tokenizer_digest": None}
    return CausalLM(**{**kept, "vocab_size": VOCABULARY, "context": CONTEXT, **changes})


@pytest.fixture(scope="module")
def gpt() -> nn.Module:
    torch.manual_seed(0)
    model = make_model("gpt", vocab_size=VOCABULARY, context=CONTEXT, layers=1, heads=2, dim=8)
    with torch.no_grad():  # far from uniform, so that tokens differ in their loss
        model.tokens.weight.mul_(30)
    return model.eval()


def brute_force(model: nn.Module, document: list[int]) -> list[float]:
    """Return every target token's loss, each window run on its own."""
    losses = []
    for start in range(0, len(document) - 1, CONTEXT):
        window = document[start : start + CONTEXT + 1]
        logits = model(torch.tensor([window[:-1]]))[0].double()
        losses += [
            -torch.log_softmax(row, -1)[y].item() for row, y in zip(logits, window[1:], strict=True)
        ]
    return losses


documents = st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=3 * CONTEXT + 2),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(documents)
def test_a_documents_loss_is_over_all_its_target_tokens(gpt: nn.Module, rows: list) -> None:
    table = pa.table({"ids": pa.array(rows, pa.list_(pa.int64()))})
    for row_loss, reduce in (("mean", np.mean), ("sum", np.sum)):
        task = token_task(row_loss=row_loss)
        outputs = task.outputs(gpt, task.collate(task.encode(table)))
        expected = [reduce(brute_force(gpt, row)) for row in rows]
        np.testing.assert_allclose(outputs.loss.detach(), expected, rtol=2e-5)


@settings(max_examples=40, deadline=None)
@given(documents)
def test_every_token_after_the_first_is_a_target_once_and_in_its_place(rows: list) -> None:
    task = token_task()
    encoded = task.encode(pa.table({"ids": rows}))
    assert task.cost(encoded).tolist() == [len(row) for row in rows]
    batch = task.collate(encoded)
    assert batch.targets.shape[1] <= CONTEXT
    ids = torch.arange(batch.rows) if batch.row_ids is None else batch.row_ids
    for i, row in enumerate(rows):
        mine = ids == i
        wanted = batch.targets[mine] != IGNORE
        assert batch.targets[mine][wanted].tolist() == row[1:]
        assert batch.inputs["input_ids"][mine][wanted].tolist() == row[:-1]
    assert (batch.row_ids is None) == all(len(row) <= CONTEXT + 1 for row in rows)


@settings(max_examples=30, deadline=None)
@given(documents, st.randoms())
def test_selecting_rows_of_a_batch_is_collating_those_rows(
    gpt: nn.Module, rows: list, random: object
) -> None:
    task = token_task()
    encoded = task.encode(pa.table({"ids": rows}))
    picks = random.choices(range(len(rows)), k=3)  # type: ignore[attr-defined]
    whole = task.outputs(gpt, task.collate(encoded)).loss
    some = task.outputs(gpt, task.collate(encoded.take(picks))).loss
    sub = task.outputs(gpt, task.collate(encoded).select_rows(picks)).loss
    torch.testing.assert_close(some, whole[picks])
    torch.testing.assert_close(sub, whole[picks])


@settings(max_examples=30, deadline=None)
@given(documents, st.data())
def test_packed_loss_weighs_each_target_token_by_its_document(
    gpt: nn.Module, rows: list, data: st.DataObject
) -> None:
    weight = st.floats(0.25, 4, width=32)
    weights = data.draw(st.lists(weight, min_size=len(rows), max_size=len(rows)))
    task = token_task()
    packed = task.pack_batch(task.encode(pa.table({"ids": rows})), torch.tensor(weights))
    stream = [token for row in rows for token in row]
    owners = [i for i, row in enumerate(rows) for _ in row]
    losses = brute_force(gpt, stream)
    each = np.array([weights[i] for i in owners[1:]])
    expected = float((each * losses).sum() / each.sum())
    assert task.packed_loss(gpt, packed).item() == pytest.approx(expected, rel=2e-5)
    is_target = packed.targets != IGNORE
    assert packed.targets[is_target].tolist() == stream[1:]
    assert packed.row_ids[is_target].tolist() == owners[1:]
    assert is_target[:-1].all(), "only the last window is not full"


def test_packed_documents_are_parted_by_the_end_token(corpus: Write, gpt2_folder: str) -> None:
    opened = corpus({"text": ["a dog", "the fox", "jumps"]})
    task = make_task("causal_lm", opened, model=gpt2_folder)
    encoded = task.encode(_table(opened))
    packed = task.pack_batch(encoded)
    stream = [packed.input_ids[0, 0].item(), *packed.targets[packed.targets != IGNORE].tolist()]
    documents = encoded.column("tokens").to_pylist()
    assert stream == [token for document in documents for token in [*document, 0]]


def test_the_byte_vocabulary_parts_packed_documents_by_itself(corpus: Write) -> None:
    opened = corpus({"text": ["ab", "c"]})
    task = make_task("causal_lm", opened, model="gpt")
    packed = task.pack_batch(task.encode(_table(opened)))
    assert packed.input_ids[0, :4].tolist() == [256, ord("a"), ord("b"), 256]
    assert packed.targets[packed.targets != IGNORE].tolist() == [97, 98, 256, 99]


def test_bytes_of_any_text_are_targets_from_the_first_on(corpus: Write) -> None:
    opened = corpus({"text": ["é", "a"]})
    task = make_task("causal_lm", opened, model="gpt", context=16)
    assert model_args(task) == {"vocab_size": 257, "context": 16}
    batch = task.collate(task.encode(_table(opened)))
    assert batch.inputs["input_ids"].tolist() == [[256, 0xC3], [256, 0]]
    assert batch.targets.tolist() == [[0xC3, 0xA9], [97, IGNORE]]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [(None, "is null"), ("", r"no target token \(1 token\)")],
)
def test_a_document_without_targets_is_an_error_of_its_own(
    corpus: Write, text: str | None, complaint: str
) -> None:
    opened = corpus({"text": ["fine", text, "too"]})
    task = make_task("causal_lm", opened, model="gpt")
    table = _table(opened)
    for row in (0, 2):
        task.encode(table.slice(row, 1))
    with pytest.raises(ValueError, match=complaint):
        task.encode(table.slice(1, 1))
    with pytest.raises(ValueError, match=complaint):
        task.encode(table)


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([3], "no target token"),
        ([], r"no target token \(0 tokens\)"),
        ([1, 11], "token id 11 is outside the vocabulary of 11"),
        ([1, -1], "token id -1 is outside"),
        ([1, None], "null"),
        (None, "null"),
    ],
)
def test_token_ids_are_checked_before_a_model_sees_them(ids: object, complaint: str) -> None:
    table = pa.table({"ids": pa.array([[1, 2], ids], pa.list_(pa.int32()))})
    with pytest.raises(ValueError, match=complaint):
        token_task().encode(table)


def test_token_columns_say_how_large_their_vocabulary_is(corpus: Write) -> None:
    opened = corpus({"input_ids": [[5, 1, 2], [40, 3]]}, shards=2)
    assert make_task("causal_lm", opened, model="gpt").vocab_size == 41
    assert make_task("causal_lm", opened, model="gpt", vocab_size="64").vocab_size == 64


def test_an_end_token_is_appended_on_request(corpus: Write, gpt2_folder: str) -> None:
    opened = corpus({"text": ["a dog", "fox"]})
    plain = make_task("causal_lm", opened, model=gpt2_folder)
    ended = make_task("causal_lm", opened, model=gpt2_folder, append_eos="true")
    for a, b in zip(
        plain.encode(_table(opened)).column("tokens").to_pylist(),
        ended.encode(_table(opened)).column("tokens").to_pylist(),
        strict=True,
    ):
        assert b == [*a, 0]


def test_a_description_makes_the_same_task_again(corpus: Write, gpt2_folder: str) -> None:
    opened = corpus({"text": ["a dog"], "id": ["x"]})
    task = make_task("causal_lm", opened, model=gpt2_folder, row_loss="sum")
    again = task_from_description(task.describe())
    assert again == task
    assert again.columns(opened.schema).all == ("text", "id")
    assert task.describe()["row_loss"] == "sum"


def test_a_corpus_of_another_kind_is_refused(corpus: Write) -> None:
    text = make_task("causal_lm", corpus({"text": ["a dog"]}), model="gpt")
    with pytest.raises(ValueError, match="reads column 'text', but the corpus has words"):
        text.columns(pa.schema([("words", pa.string())]))
    with pytest.raises(ValueError, match=r"holds list<.*>, not text"):
        text.columns(pa.schema([("text", pa.list_(pa.int32()))]))
    with pytest.raises(ValueError, match="row_loss is 'mean' or 'sum'"):
        make_task("causal_lm", corpus({"text": ["a dog"]}), row_loss="median")


def _table(opened: Corpus) -> pa.Table:
    return pa.Table.from_batches(b for s in range(len(opened.shards)) for b in opened.read(s))
