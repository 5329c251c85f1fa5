"""What training sees of every row it presents, logged as it happens and folded at the end.

A presentation leaves its loss, its mean margin, and one bit per target token: predicted right or
not. The log holds them in memory, sorts them into buckets of rows and writes them beside the
training state; a run that is killed drops what is younger than the state it goes on from. Folding
takes one bucket at a time, so memory is bounded by a bucket and not by the corpus.

Shapes: B rows, S sequences, T tokens, C classes, P presentations, N rows of a bucket.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.pipeline.storing.storage import Folder
from curate.scorers.protocol import IGNORE, Outputs

TOKENS_AT_ONCE = 1 << 12
DRAIN_EVERY = 64
"""Steps between moves of observations from the device to the host."""
FLUSH_BYTES = 1 << 26


@dataclass(frozen=True)
class Presentations:
    """P presentations in the order they happened; `right` holds the bits of all their tokens."""

    position: np.ndarray
    loss: np.ndarray
    margin: np.ndarray
    tokens: np.ndarray
    right: np.ndarray

    @property
    def nbytes(self) -> int:
        return 20 * len(self.position) + len(self.right)

    def take(self, index: np.ndarray) -> "Presentations":
        """Return these presentations, in this order."""
        starts = np.cumsum(self.tokens) - self.tokens
        picks = _spans(starts[index], self.tokens[index])
        position, loss, margin = (c[index] for c in (self.position, self.loss, self.margin))
        return Presentations(position, loss, margin, self.tokens[index], self.right[picks])


@torch.no_grad()
def token_margins(outputs: Outputs) -> Float[Tensor, "*t"] | None:
    """Return z_y - max_{k != y} z_k at every position, None where the task shows no logits.

    Positions without a target hold a number without a meaning.
    """
    if outputs.targets is None or (outputs.logits is None and outputs.hidden is None):
        return None
    targets = outputs.targets.reshape(-1)
    scores = outputs.hidden if outputs.logits is None else outputs.logits
    assert scores is not None
    flat = scores.detach().reshape(len(targets), -1)
    parts = []
    for start in range(0, len(targets), TOKENS_AT_ONCE):
        logits = flat[start : start + TOKENS_AT_ONCE]
        if outputs.logits is None:
            assert outputs.head is not None, "hidden states come with the head that reads them"
            logits = outputs.head(logits)
        chosen = targets[start : start + TOKENS_AT_ONCE].clamp(min=0).unsqueeze(-1)
        rival = logits.float().scatter(-1, chosen, -torch.inf).amax(-1)
        parts.append(logits.float().gather(-1, chosen).squeeze(-1) - rival)
    return torch.cat(parts).reshape(outputs.targets.shape)


@dataclass(frozen=True)
class _Step:
    """One step's forward pass on the device; `row` says whose token each entry of `margin` is."""

    step: int
    position: np.ndarray
    loss: Tensor
    margin: Tensor
    row: Tensor


class ObservationLog:
    """Collects presentations during training and writes them in buckets of `bucket_rows` rows."""

    def __init__(self, folder: Folder, bucket_rows: int) -> None:
        self._folder = folder
        self._bucket_rows = bucket_rows
        self._recent: list[_Step] = []
        self._held: list[Presentations] = []

    def rewind(self, step: int) -> None:
        """Forget everything after `step`, on disk and in memory."""
        self._recent, self._held = [], []
        for name in self._folder.names():
            if _step_and_bucket(name)[0] > step:
                self._folder.delete(name)

    def add(self, step: int, positions: Int[np.ndarray, " b"], outputs: Outputs) -> None:
        """Note one step's forward pass."""
        self._recent.append(_observed(step, positions, outputs))
        if len(self._recent) >= DRAIN_EVERY:
            self._drain()
        if sum(p.nbytes for p in self._held) > FLUSH_BYTES:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Write what is in memory; it happened up to and with `step`."""
        self._drain()
        if not self._held:
            return
        held, self._held = _joined(self._held), []
        buckets = held.position // self._bucket_rows
        for bucket in np.unique(buckets):
            part = held.take(np.flatnonzero(buckets == bucket))
            self._folder.replace(f"{step:09d}-{bucket:06d}.npz", _packed(part))

    def fold(self) -> Iterator["FoldedRows"]:
        """Yield the records of all rows seen, bucket by bucket, in order of position."""
        files: dict[int, list[str]] = {}
        for name in sorted(self._folder.names()):
            files.setdefault(_step_and_bucket(name)[1], []).append(name)
        for bucket in sorted(files):
            parts = [_unpacked(self._folder.read(name)) for name in files[bucket]]
            yield fold(_joined(parts))

    def _drain(self) -> None:
        recent, self._recent = self._recent, []
        if recent:
            self._held.append(_on_host(recent))


@dataclass(frozen=True)
class FoldedRows:
    """What training saw of N rows, sorted by position."""

    position: np.ndarray
    forgetting: np.ndarray
    never_learned: np.ndarray
    aum: np.ndarray
    last_loss: np.ndarray
    seen: np.ndarray


def fold(log: Presentations) -> FoldedRows:
    """Return forgetting, area under the margin, last loss and count of every row in the log.

    Forgetting (Toneva et al. 2019, arXiv 1812.05159, section 3): the number of presentations at
    which a token is wrong and was right at the presentation before; a token that never was right
    counts as many events as it had presentations. A row's value is the mean over its target
    tokens. AUM (Pleiss et al. 2020, arXiv 2001.10528, section 3): the mean over presentations of
    the mean over target tokens of z_y - max_{k != y} z_k. Rows without targets hold NaN.
    """
    rows, row_of, seen = np.unique(log.position, return_inverse=True, return_counts=True)
    order = np.argsort(row_of, kind="stable")
    first = order[np.cumsum(seen) - seen]
    last = order[np.cumsum(seen) - 1]
    tokens = log.tokens[first].astype(np.int64)
    for bad in np.flatnonzero(log.tokens != tokens[row_of])[:1]:
        raise ValueError(
            f"the row at position {log.position[bad]} had {tokens[row_of[bad]]} target tokens, "
            f"then {log.tokens[bad]}: a task must encode a row the same way every time"
        )
    events, ever = _token_events(log, row_of, order, seen, tokens)
    per_token = np.where(ever, events, np.repeat(seen, tokens)).astype(np.float64)
    margin = np.zeros(len(rows))
    np.add.at(margin, row_of, log.margin.astype(np.float64))
    has_targets = tokens > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        forgetting = _row_sums(per_token, tokens) / tokens
        aum = np.where(has_targets, margin / seen, np.nan)
    return FoldedRows(
        position=rows,
        forgetting=forgetting.astype(np.float32),
        never_learned=has_targets & (_row_sums(ever, tokens) == 0),
        aum=aum.astype(np.float32),
        last_loss=log.loss[last].astype(np.float32),
        seen=seen.astype(np.int32),
    )


def _token_events(
    log: Presentations, row_of: np.ndarray, order: np.ndarray, seen: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return events and "was ever right" of all rows' tokens, by the n-th presentations in turn."""
    state = np.cumsum(tokens) - tokens
    bits = np.cumsum(log.tokens.astype(np.int64)) - log.tokens
    turn = np.empty(len(order), dtype=np.int64)
    turn[order] = np.arange(len(order)) - np.repeat(np.cumsum(seen) - seen, seen)
    by_turn = np.argsort(turn, kind="stable")
    ends = np.cumsum(np.bincount(turn)) if len(turn) else np.zeros(0, dtype=np.int64)
    was = np.zeros(int(tokens.sum()), dtype=bool)
    ever = np.zeros_like(was)
    events = np.zeros(len(was), dtype=np.int32)
    for start, end in zip((0, *ends[:-1]), ends, strict=True):
        shown = by_turn[start:end]
        where = _spans(state[row_of[shown]], tokens[row_of[shown]])
        right = log.right[_spans(bits[shown], log.tokens[shown])]
        events[where] += was[where] & ~right
        was[where] = right
        ever[where] |= right
    return events, ever


def _observed(step: int, positions: np.ndarray, outputs: Outputs) -> _Step:
    """Return what to keep of a forward pass, the tokens in sequence order."""
    loss = outputs.loss.detach().float()
    margins = token_margins(outputs)
    if margins is None or outputs.targets is None:
        nothing = loss.new_zeros(0)
        return _Step(step, positions, loss, nothing, nothing.long())
    row = outputs.row_ids
    if row is None:
        row = torch.arange(len(margins), device=margins.device)
    if margins.dim() == 1:
        return _Step(step, positions, loss, margins, row)
    is_target = outputs.targets != IGNORE
    row_of_token = row.reshape(-1, *[1] * (margins.dim() - 1)).expand_as(margins)
    return _Step(step, positions, loss, margins[is_target], row_of_token[is_target])


def _on_host(steps: list[_Step]) -> Presentations:
    """Return the presentations of these steps in order, the tokens of each one together."""
    loss = torch.cat([s.loss for s in steps]).cpu().numpy()
    position = np.concatenate([s.position for s in steps])
    sizes = np.array([len(s.position) for s in steps])
    before = np.cumsum(sizes) - sizes
    row = torch.cat([s.row for s in steps]).cpu().numpy()
    row = row + np.repeat(before, [len(s.row) for s in steps])
    margin = torch.cat([s.margin for s in steps]).cpu().numpy()
    tokens = np.bincount(row, minlength=len(position)).astype(np.int32)
    mean = np.bincount(row, weights=margin, minlength=len(position)) / np.maximum(tokens, 1)
    right = (margin > 0)[np.argsort(row, kind="stable")]
    return Presentations(position, loss, mean.astype(np.float32), tokens, right)


def _joined(parts: list[Presentations]) -> Presentations:
    names = ("position", "loss", "margin", "tokens", "right")
    return Presentations(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))


def _packed(part: Presentations) -> bytes:
    stream = io.BytesIO()
    np.savez(
        stream,
        position=part.position,
        loss=part.loss,
        margin=part.margin,
        tokens=part.tokens,
        right=np.packbits(part.right),
    )
    return stream.getvalue()


def _unpacked(content: bytes) -> Presentations:
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        tokens = stored["tokens"]
        right = np.unpackbits(stored["right"], count=int(tokens.sum())).astype(bool)
        return Presentations(stored["position"], stored["loss"], stored["margin"], tokens, right)


def _step_and_bucket(name: str) -> tuple[int, int]:
    step, bucket = name.removesuffix(".npz").split("-")
    return int(step), int(bucket)


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return `[s, s + 1, …, s + l - 1]` of every (start, length), one after the other."""
    lengths = lengths.astype(np.int64)
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _row_sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the sum of each run of `lengths` values."""
    sums = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    ends = np.cumsum(lengths)
    result: np.ndarray = sums[ends] - sums[ends - lengths]
    return result
