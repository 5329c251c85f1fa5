"""Fixtures that several test files of this room share."""

import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.pipeline.manifests.manifest import Manifest, write_manifest, write_parts
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.storing.storage import Folder


@pytest.fixture(scope="session")
def store_endpoint() -> Iterator[str]:
    """An S3 emulator on a free port of this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0)
    pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def kept_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let finished scoring runs keep their attempts ledger."""
    monkeypatch.setattr("curate.pipeline.scoring.score.forget_attempts", lambda folder: None)


@pytest.fixture
def object_store(store_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, with the environment that finds it."""
    for key, value in {
        "AWS_ENDPOINT_URL": store_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def make_bert() -> Callable[[Path, list[str], int], str]:
    """Write a BERT without a head, as sentence encoders ship, and a WordPiece tokenizer trained on
    some sentences: `make_bert(folder, sentences, vocab_size)` -> folder."""

    def make(folder: Path, sentences: list[str], vocab_size: int) -> str:
        import torch
        from tokenizers import BertWordPieceTokenizer
        from transformers import BertConfig, BertModel, BertTokenizerFast

        trained = BertWordPieceTokenizer()
        trained.train_from_iterator(sentences, vocab_size=vocab_size, show_progress=False)
        trained.save_model(str(folder))
        BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=24,
        )
        BertModel(config).save_pretrained(folder)
        return str(folder)

    return make


MakeSelection = Callable[..., Manifest]


@pytest.fixture
def make_selection(tmp_path: Path) -> MakeSelection:
    """A factory of manifests: `make_selection(kind="loss", kept=300)` over shards of 130, 1, 269.

    Row r of shard s holds x = 1000 s + r, and f, words, text, lang, picture, array made of it. The
    same `data` name gives the same corpus; a callable `weights` takes the number of rows.
    """

    def corpus(name: str, shards: Sequence[int], offset: int) -> str:
        folder = tmp_path / name
        if folder.exists():
            return str(folder)
        folder.mkdir()
        for i, n in enumerate(shards):
            x = np.arange(n) + 1000 * i + offset
            flat = pa.array(np.repeat(x, 4), pa.float32())
            table = pa.table(
                {
                    "x": x,
                    "f": (x / 7).astype(np.float32),
                    "words": [[int(v)] * (int(v) % 3) for v in x],
                    "text": [f"row {v}" for v in x],
                    "lang": [("de", "en", "fr")[int(v) % 7 % 3] for v in x],
                    "picture": [b"\x89PNG%d" % v for v in x],
                    "array": pa.FixedSizeListArray.from_arrays(flat, 4),
                }
            )
            pq.write_table(table, folder / f"s{i}.parquet", row_group_size=50)
        return str(folder)

    def make(
        kind: str = "none",
        kept: int = 300,
        *,
        weights: Sequence[float] | None = None,
        ranks: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        name: str | None = None,
        data: str = "data",
        shards: Sequence[int] = (130, 1, 269),
        offset: int = 0,
        seed: int = 1,
        has_id: bool = False,
        selection: Mapping[str, Any] | None = None,
        scores: Sequence[Any] = (),
    ) -> Manifest:
        opened = open_corpus(corpus(data, shards, offset))
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.permutation(opened.rows)[:kept] if rows is None else np.array(rows))
        kept = len(chosen)
        if weights is None:
            drawn = rng.random(kept) + 0.1
            counts = rng.integers(0, 4, kept)
            weights = {"none": np.ones(kept), "repeat": counts}.get(kind, drawn / drawn.mean())
        starts = np.cumsum([0, *shards])
        shard = np.searchsorted(starts, chosen, side="right") - 1
        columns = {
            "shard": pa.array(shard, pa.int32()),
            "row": pa.array(chosen - starts[shard], pa.int64()),
            "weight": pa.array(np.asarray(weights), pa.float32()),
            "rank": pa.nulls(kept, pa.int32()) if ranks is None else pa.array(ranks, pa.int32()),
        }
        if has_id:
            columns["id"] = pa.array([f"id{c}" for c in chosen])
        folder = Folder(tmp_path / (name or f"manifest-{kind}"))
        files, _ = write_parts(folder, pa.table(columns).to_batches(max_chunksize=37))
        said = {"method": "top", "by": "x", "direction": "high", "seed": 0, "params": {}}
        said |= {"selected": kept, "budget": {"kind": "rows", "value": kept}, **(selection or {})}
        content = {
            "corpus": opened.describe(),
            "selection": said,
            "weight_kind": kind,
            "schedule": None,
            "groups": {},
            "scores": list(scores),
            "files": files,
        }
        write_manifest(folder, content)
        return Manifest.open(folder.uri)

    return make
