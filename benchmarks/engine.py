"""What scoring a batch costs, as ratios to a plain forward or forward and backward pass of it.

    python benchmarks/engine.py                                every shape, one thread
    python benchmarks/engine.py --shape gpt2 --threads 2       one shape, two threads
    python benchmarks/engine.py --seconds 60 --output FILE     longer, and the table kept

All variants take turns, round after round, in one process; a ratio is the median over the rounds
of its own time over its neighbour's in the same round, so that a machine that slows down for a
while slows both. `cpu` counts the seconds of all threads, `wall` the clock's; on a shared machine
trust `cpu` with one thread. Before timing, a variant's norms are compared with autograd's on two
rows. Targets are those of the design: sketch <= 1.0, GraNd <= 1.25, EL2N-only <= 1.1.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curate.kernels.cross_entropy import token_cross_entropy
from curate.scorers.parts import TwoSidedSketch, sq_norm
from curate.scorers.passes import Needs, Passes
from curate.scorers.protocol import Batch, Outputs
from curate.scorers.watched_model import WatchedModel

VOCAB, WIDTH, LAYERS, TOKENS, ROWS = 8192, 256, 4, 128, 16


def main() -> None:
    """Print the table of every shape asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: every one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=25, help="of timing, for each shape")
    parser.add_argument("--output", type=Path, help="write the table there as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [_header(args.threads)]
    for name in args.shape or SHAPES:
        lines += ["", *_table(name, args.seconds)]
        print("\n".join(lines[-9:] if name != (args.shape or list(SHAPES))[0] else lines))
        sys.stdout.flush()
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


# -- shapes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A model, a batch, and how they are described in the table."""

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.b = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_a, self.norm_b = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
        return F.relu(y + (x if self.short is None else self.short(x)))


class _ResNet(nn.Module):
    def __init__(self, width: int = 32, classes: int = 100) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        sizes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        self.blocks = nn.Sequential(*(_Block(*size) for size in sizes))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=4,
                        n_positions=TOKENS, bos_token_id=0, eos_token_id=0)  # fmt: skip
    return GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS,
                         num_attention_heads=4, num_key_value_heads=2, intermediate_size=688,
                         max_position_embeddings=TOKENS)  # fmt: skip
    return LlamaForCausalLM(config)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS,
                        num_attention_heads=4, intermediate_size=4 * WIDTH, num_labels=4,
                        max_position_embeddings=TOKENS)  # fmt: skip
    return BertForSequenceClassification(config)


def _documents() -> Batch:
    ids = torch.randint(VOCAB, (ROWS, TOKENS))
    targets = torch.cat([ids[:, 1:], torch.full((ROWS, 1), -100)], 1)
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets, ROWS)


def _labelled() -> Batch:
    ids = torch.randint(VOCAB, (ROWS, TOKENS))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, torch.randint(4, (ROWS,)), ROWS)


def _images() -> Batch:
    return Batch({"x": torch.randn(64, 3, 32, 32)}, torch.randint(100, (64,)), 64)


_TEXT = f"{LAYERS} layers, width {WIDTH}, {ROWS} rows of {TOKENS} tokens"
SHAPES = {
    "gpt2": Shape(f"GPT-2-like: {_TEXT}, vocabulary {VOCAB}, tied", _gpt2, _documents),
    "bert": Shape(f"BERT-like: {_TEXT}, 4 classes", _bert, _labelled),
    "llama": Shape(f"Llama-like: {_TEXT}, vocabulary {VOCAB}", _llama, _documents),
    "resnet": Shape("ResNet: 3 blocks, width 32 to 128, 64 images 32 x 32", _ResNet, _images),
}


# -- variants ------------------------------------------------------------------------------------


def _variants(model: nn.Module, batch: Batch) -> dict[str, Callable[[], object]]:
    watched = WatchedModel(model, _outputs, probe=True)
    watched.want([""], head=False)
    watched.verify(batch)
    _compare_with_autograd(watched.passes, batch)
    names = watched.names("")
    norms = {"sq_norm": (names, sq_norm)}
    sketch = {"sketch": (names, TwoSidedSketch(0, (32, 32)))}
    passes = watched.passes

    def forward() -> None:
        with torch.no_grad():
            _plain_loss(model, batch)

    def backward() -> None:
        _plain_loss(model, batch).backward()
        model.zero_grad(set_to_none=True)

    return {
        "plain forward": forward,
        "plain forward + backward": backward,
        "floor: forward + activation backward": lambda: passes.run(batch, Needs(input_grad=True)),
        "loss + EL2N": lambda: passes.run(batch, Needs(statistics=True)),
        "sketch 32x32 + EL2N + loss": lambda: passes.run(batch, Needs(sketch, statistics=True)),
        "GraNd + EL2N + loss": lambda: passes.run(batch, Needs(norms, statistics=True)),
        "GraNd + sketch + EL2N + loss": lambda: passes.run(
            batch, Needs(norms | sketch, statistics=True)
        ),
    }


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    out = model(**batch.inputs)
    return out if isinstance(out, Tensor) else out.logits


def _plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = _logits(model, batch)
    return F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten())


def _outputs(model: nn.Module, batch: Batch) -> Outputs:
    logits = _logits(model, batch)
    loss = token_cross_entropy(logits, batch.targets)
    if loss.dim() == 2:
        loss = loss.sum(1) / (batch.targets != -100).sum(1)
    return Outputs(loss, batch.targets, logits)


def _compare_with_autograd(passes: Passes, batch: Batch) -> None:
    params = dict(passes.model.named_parameters())
    found = passes.run(batch, Needs({"n": (frozenset(params), sq_norm)})).readouts["n"]
    for row in (0, batch.rows - 1):
        loss = _outputs(passes.model, batch.select_rows([row])).loss
        grads = torch.autograd.grad(loss.sum(), list(params.values()))
        want = sum(float(g.double().square().sum()) for g in grads)
        got = sum(float(values[row]) for values in found.values())
        assert abs(got - want) <= 2e-4 * want, f"row {row}: {got} is not {want}"


# -- timing --------------------------------------------------------------------------------------

RATIOS = {
    "loss + EL2N": "plain forward",
    "floor: forward + activation backward": "plain forward + backward",
    "sketch 32x32 + EL2N + loss": "plain forward + backward",
    "GraNd + EL2N + loss": "plain forward + backward",
    "GraNd + sketch + EL2N + loss": "plain forward + backward",
}


def _table(name: str, seconds: float) -> list[str]:
    torch.manual_seed(0)
    model, batch = SHAPES[name].model().eval(), SHAPES[name].batch()
    times = _timed(_variants(model, batch), seconds)
    rounds = len(next(iter(times.values())))
    head = f"{'':38}{'cpu ms':>8}{'wall ms':>9}{'cpu ratio':>11}{'wall ratio':>12}"
    lines = [f"{SHAPES[name].title} ({rounds} rounds)", head]
    for variant, pairs in times.items():
        cpu, wall = (median(pair[i] for pair in pairs) * 1e3 for i in (0, 1))
        line = f"{variant:38}{cpu:8.1f}{wall:9.1f}"
        if base := RATIOS.get(variant):
            ratios = [
                median(a[i] / b[i] for a, b in zip(pairs, times[base], strict=True)) for i in (0, 1)
            ]
            line += f"{ratios[0]:11.2f}{ratios[1]:12.2f}   of {base}"
        lines.append(line)
    return lines


def _timed(
    variants: dict[str, Callable[[], object]], seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """Return (cpu, wall) seconds of every variant in every round."""
    for run in variants.values():
        run()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    end, order = time.monotonic() + seconds, list(variants)
    while time.monotonic() < end or len(times[order[0]]) < 5:
        for name in order:
            cpu, wall = time.process_time(), time.perf_counter()
            variants[name]()
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        order = order[1:] + order[:1]
    return times


def _header(threads: int) -> str:
    import transformers

    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.split(": ")[1] for line in text.splitlines() if line.startswith("model name")]
    machine = f"{len(names)} x {names[0]}" if names else platform.processor()
    return (
        f"{machine}, {threads} thread(s); torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}; "
        f"{datetime.now(UTC):%Y-%m-%d}"
    )


if __name__ == "__main__":
    main()
