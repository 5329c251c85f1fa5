"""A small model trained through each export's own library learns what the full weights say.

The exported rows go into the library's loader, a linear model descends the weighted loss over one
epoch in full batches, and must arrive where the same step on the manifest's own rows does. MDS,
whose library cannot be installed beside ours, is in `test_trained_through_mds.py`.
"""

import json
from collections.abc import Callable, Iterator

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from curate.pipeline.exporting.export import export

Item = tuple[int, list[float], float]  # x, array, weight


def from_parquet(folder) -> Iterator[Item]:
    table = pq.read_table(folder)
    yield from zip(*(table[n].to_pylist() for n in ("x", "array", "weight")), strict=True)


def from_jsonl(folder) -> Iterator[Item]:
    for path in sorted(folder.glob("part-*")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            yield row["x"], row["array"], row["weight"]


def from_datasets(folder) -> Iterator[Item]:
    rows = datasets.load_from_disk(str(folder)).with_format("torch")
    for batch in DataLoader(rows, batch_size=32, shuffle=True):
        yield from zip(*(batch[n].tolist() for n in ("x", "array", "weight")), strict=True)


def from_webdataset(folder) -> Iterator[Item]:
    wds = pytest.importorskip("webdataset")
    urls = sorted(str(p) for p in folder.glob("part-*.tar"))
    rows = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(50).decode().to_tuple("json")
    for batch in wds.WebLoader(rows, batch_size=None, num_workers=2):
        yield batch[0]["x"], batch[0]["array"], batch[0]["weight"]


READERS: dict[str, Callable[..., Iterator[Item]]] = {
    "parquet": from_parquet,
    "jsonl": from_jsonl,
    "datasets": from_datasets,
    "webdataset": from_webdataset,
}


def step(items: list[Item]) -> torch.Tensor:
    """The weights of a linear classifier after an epoch of full-batch descent."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, array, weight = (torch.tensor(np.array(c)) for c in zip(*items, strict=True))
    losses = nn.functional.cross_entropy(model(array.float() / 1500), x % 3, reduction="none")
    ((weight.float() * losses).sum() / len(x)).backward()
    return (model.weight - model.weight.grad).detach()


@pytest.mark.slow
@pytest.mark.parametrize("to", READERS)
@pytest.mark.parametrize("kind", ["loss", "repeat"])
def test_training_through_it_is_training_on_the_manifest(make_selection, tmp_path, to, kind):
    manifest = make_selection(kind)
    export(manifest, to, tmp_path / "out", columns=["x", "array"], unit_rows=60)
    own = [(r["x"], r["array"], r["weight"]) for r in manifest.rows(["x", "array"])]
    if kind == "repeat":
        own = [(x, a, 1.0) for x, a, n in own for _ in range(int(n))]
    read = list(READERS[to](tmp_path / "out"))
    assert sorted((x, w) for x, _, w in read) == sorted((x, w) for x, _, w in own)
    # Float32 sums of some hundred terms in another order.
    torch.testing.assert_close(step(read), step(own), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_training_by_document_numbers_is_training_on_the_manifest(make_selection, tmp_path):
    manifest = make_selection("loss")
    export(manifest, "megatron", tmp_path / "out")
    ids = np.load(tmp_path / "out" / "documents-00000.npy", mmap_mode="r")
    weights = np.load(tmp_path / "out" / "weights-00000.npy", mmap_mode="r")
    corpus = manifest.corpus
    documents = [
        row
        for shard in range(len(corpus.shards))
        for batch in corpus.read(shard, columns=["x", "array"])
        for row in batch.to_pylist()
    ]
    chosen = [documents[i] for i in ids.tolist()]
    read = [(r["x"], r["array"], w) for r, w in zip(chosen, weights.tolist(), strict=True)]
    own = [(r["x"], r["array"], r["weight"]) for r in manifest.rows(["x", "array"])]
    assert read == own
    torch.testing.assert_close(step(read), step(own))


@pytest.mark.slow
def test_ray_train_workers_share_an_epoch(make_selection, tmp_path, ray_session):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def train(config):
        import ray.train
        from ray.train.torch import prepare_model

        model = prepare_model(nn.Linear(1, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = []
        for batch in ray.train.get_dataset_shard("train").iter_torch_batches(batch_size=32):
            x, weight = batch["x"], batch["weight"]
            logits = model(x.float()[:, None] / 3000)
            losses = nn.functional.cross_entropy(logits, x % 3, reduction="none")
            optimizer.zero_grad()
            (weight * losses).mean().backward()
            optimizer.step()
            seen += list(zip(x.tolist(), weight.tolist(), strict=True))
        rank = ray.train.get_context().get_world_rank()
        with open(f"{config['out']}/rank{rank}.json", "w") as file:
            json.dump(seen, file)

    manifest = make_selection("loss")
    TorchTrainer(
        train,
        train_loop_config={"out": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(storage_path=str(tmp_path / "ray")),
        datasets={"train": manifest.as_ray(["x"], batch_rows=32)},
    ).fit()
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    own = sorted((r["x"], r["weight"]) for r in manifest.rows(["x"]))
    assert sorted((x, w) for rank in ranks for x, w in rank) == own
    assert len(ranks[0]) == len(ranks[1])
