"""What MosaicML Streaming reads and learns from MDS exports; run by an interpreter that has it.

    PYTHON streaming_driver.py REQUEST.pt ANSWER.pt

The request is {name: case}, a case `streams` (options of `Stream`, a dict for each) and, to train,
`columns` that are read, `seeds` of the shuffle, the first `weight` and `bias` of a linear model and
more `options` of the dataset. The answer has for each seed `epochs`, the samples in the order seen
through two DataLoader workers, the dataset's `length`, and the `weight` that two epochs of
full-batch descent on the weighted loss come to. Without seeds it has `samples`, those of the first
stream in order, and with `write` {file: bytes} in `files`, what the library's writer makes of them.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.utils.data import DataLoader

BATCH, EPOCHS = 16, 2


if find_spec("torchvision") is None:  # two names of it are imported, none is used here
    import transformers.feature_extraction_utils  # noqa: F401  (it looks for torchvision itself)

    for name, holds in {
        "torchvision": {},
        "torchvision.datasets": {"VisionDataset": object},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {"to_tensor": None},
    }.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(holds)

import streaming  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402


class Rows(streaming.StreamingDataset):
    """Only these columns of a sample, since texts and lists of any length make no tensor."""

    def __init__(self, columns, **options):
        super().__init__(**options)
        self.columns = columns

    def __getitem__(self, at):
        sample = super().__getitem__(at)
        return {name: sample[name] for name in self.columns}


def trained(case, seed):
    """Descend the weighted mean loss, a step per epoch; return what was seen, and the weights."""
    clean_stale_shared_memory()
    rows = Rows(
        case["columns"],
        streams=[streaming.Stream(**options) for options in case["streams"]],
        shuffle=True,
        shuffle_seed=seed,
        batch_size=BATCH,
        **case.get("options", {}),
    )
    loader = DataLoader(rows, batch_size=BATCH, num_workers=2)
    model = nn.Linear(4, 3)
    model.load_state_dict({"weight": case["weight"], "bias": case["bias"]})
    epochs = []
    for _ in range(EPOCHS):
        seen, total = [], 0.0
        for batch in loader:
            logits = model(batch["array"].float() / 1500)
            losses = nn.functional.cross_entropy(logits, batch["x"] % 3, reduction="none")
            total = total + (batch["weight"] * losses).sum()
            seen += zip(*(batch[name].tolist() for name in ("x", "array", "weight")), strict=True)
        model.zero_grad()
        (total / len(seen)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad
        epochs.append(seen)
    return {"epochs": epochs, "weight": model.weight.detach(), "length": len(rows)}


def read(case):
    """Return the samples in order and, if asked for, the files that the library makes of them."""
    clean_stale_shared_memory()
    rows = streaming.StreamingDataset(**case["streams"][0], shuffle=False, batch_size=1)
    samples = [rows[at] for at in range(len(rows))]
    plain = [{k: getattr(v, "tolist", lambda v=v: v)() for k, v in s.items()} for s in samples]
    return {"samples": plain, "files": written(rows.shards[0], samples) if case["write"] else {}}


def written(shard, samples):
    columns = dict(zip(shard.column_names, shard.column_encodings, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        with streaming.MDSWriter(columns=columns, out=str(out), size_limit=None) as writer:
            for sample in samples:
                writer.write(sample)
        return {path.name: path.read_bytes() for path in out.iterdir()}


def main():
    asked, answer = sys.argv[1:]
    found = {}
    for name, case in torch.load(asked, weights_only=False).items():
        seeds = case.get("seeds")
        found[name] = {seed: trained(case, seed) for seed in seeds} if seeds else read(case)
    torch.save(found, answer)


if __name__ == "__main__":
    main()
