"""Tiny real corpora and tiny real Hugging Face folders, made from nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from curate.pipeline.reading.corpus import Corpus, open_corpus

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "how vexingly quick daft zebras jump",
    "the five boxing wizards jump quickly",
    "a dog",
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """Write a table (or columns) as one Parquet file, or several, and open it."""

    def write(table: pa.Table | dict[str, Any], shards: int = 1) -> Corpus:
        table = table if isinstance(table, pa.Table) else pa.table(table)
        folder = tmp_path / f"corpus{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        bounds = np.linspace(0, table.num_rows, shards + 1).astype(int)
        for i in range(shards):
            part = table.slice(bounds[i], bounds[i + 1] - bounds[i])
            pq.write_table(part, folder / f"part-{i}.parquet")
        return open_corpus(str(folder))

    return write


def rows_of(corpus: Corpus) -> pa.Table:
    """Return all rows of a small corpus."""
    batches = [b for s in range(len(corpus.shards)) for b in corpus.read(s)]
    return pa.Table.from_batches(batches)


@pytest.fixture
def read_all() -> Callable[[Corpus], pa.Table]:
    return rows_of


@pytest.fixture(scope="session")
def bert_folder(
    tmp_path_factory: pytest.TempPathFactory, make_bert: Callable[[Path, list[str], int], str]
) -> str:
    """A BERT without a head whose tokenizer knows the words of the sentences."""
    return make_bert(tmp_path_factory.mktemp("bert"), SENTENCES, 120)


def _bpe(folder: Path) -> int:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        SENTENCES, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False
    )
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return int(trained.get_vocab_size())


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2 with tied embeddings, a context of 8 and a byte-level BPE tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    size = _bpe(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=size, n_positions=8, n_embd=16, n_layer=2, n_head=2, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama in bfloat16 with grouped-query attention and weights in two shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    size = _bpe(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="10KB")
    return str(folder)


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return SENTENCES
