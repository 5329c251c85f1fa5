"""Scores that are read from the text of a row: how much likelier its n-grams are in the target.

Shapes: N rows of a window, G n-grams of a row, M buckets.

The n-grams of the whole corpus and of the target are counted before the first unit, once a run: by
this process portion by portion, or by Ray's workers (`ngram_tasks.py`). The counts are kept in
`ngrams/`; the first commit stays, and all workers read that.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int64
from safetensors import SafetensorError
from safetensors.numpy import load, save

from curate.pipeline.reading.corpus import Corpus, open_corpus
from curate.pipeline.scoring.target import Given, Target
from curate.pipeline.scoring.work import Work, text_signals
from curate.pipeline.storing.storage import Folder
from curate.pipeline.tasks.arrays import is_string, storage_type
from curate.pipeline.tasks.guess import guess_aloud
from curate.pipeline.tasks.registry import make_task, task_from_description
from curate.pipeline.tasks.task import Task
from curate.pipeline.tasks.tokenizers import BYTES
from curate.scorers.ngrams import gram_buckets, words
from curate.scorers.protocol import ADAM_KINDS, TARGET_KINDS, TEXT_KINDS, Scorer, Signal

log = logging.getLogger("curate.score")

FOLDER = "ngrams"
READ_ROWS = 4096
PORTION_ROWS = 1 << 18
"""Rows that one worker counts at a time."""
SAMPLE_ROWS = 1000
"""Rows that are counted where nothing is to be kept: for timing."""
SMALL = 1e-8
"""Added to shares before the logarithm, as in the source's package."""
NO_WORDS = "the {} has no words in its texts, so rows have no weights"

Of = Literal["corpus", "target"]
CORPORA: tuple[Of, ...] = ("corpus", "target")
Totals = dict[tuple[Signal, Of], Int64[np.ndarray, " m"]]
"""How many n-grams of either fall into each bucket, of some rows or all."""


def text_task(name: str | None, corpus: Corpus, options: dict[str, Any]) -> Task:
    """Return the task for a corpus that no model reads: what matters are its columns.

    Raises:
        ValueError: no task is evident, or the corpus does not suit the one named.
    """
    name = name or guess_aloud(corpus.schema)
    if name == "text_classification":
        options = {"tokenizer": BYTES, **options}  # it asks for one, and nothing is tokenised
    return make_task(name, corpus, **options)


def text_columns(task: Task, schema: pa.Schema, what: str) -> list[str]:
    """Return the columns of text that the task reads, of the corpus or the target (`what`).

    Raises:
        ValueError: one is missing, or holds something else.
    """
    names = list(task_inputs(task, schema))
    for name in names:
        if name not in schema.names:
            raise ValueError(
                f"{what} has no column {name!r} of text; it has: {', '.join(schema.names)}"
            )
        if not is_string(storage_type(schema.field(name).type)):
            raise ValueError(
                f"column {name!r} of {what} holds {schema.field(name).type}, not text: name the "
                f"text by --task-option inputs=COLUMN"
            )
    return names


def task_inputs(task: Task, schema: pa.Schema) -> Sequence[str]:
    """Return the task's input columns; a target may lack the label, which is not read."""
    said = task.describe().get("columns", {}).get("inputs")
    return task.columns(schema).inputs if said is None else list(said)


def find_text_target(
    given: Given | None, column: str | None, task: Task, scorers: Mapping[str, Scorer]
) -> Target:
    """Return a target that only texts are compared with: one group, and no label asked for.

    Raises:
        ValueError: there is none, groups are asked for, or it lacks the texts.
    """
    alias = next(a for a, s in scorers.items() if any(n.kind in TEXT_KINDS for n in s.needs))
    if given is None:
        raise ValueError(f"{alias} compares rows with a target: name it by --target CORPUS")
    if column is not None:
        raise ValueError(f"{alias} takes the target as a whole: leave --target-group out")
    corpus = given if isinstance(given, Corpus) else open_corpus(given)
    text_columns(task, corpus.schema, f"the target {corpus.uri}")
    return Target(corpus, None, ("all",), (corpus.rows,))


def compares_texts_only(scorers: Mapping[str, Scorer]) -> bool:
    """Tell whether a target is for its texts, not for its gradients."""
    kinds = {n.kind for scorer in scorers.values() for n in scorer.needs}
    return bool(kinds & TEXT_KINDS) and not kinds & (TARGET_KINDS | ADAM_KINDS)


@dataclass(frozen=True)
class Counts:
    """How many n-grams of the corpus and of the target fall into each bucket."""

    corpus: Int64[np.ndarray, " m"]
    target: Int64[np.ndarray, " m"]

    def log_ratio(self) -> Float64[np.ndarray, " m"]:
        """Return log(p_t + 1e-8) − log(p_r + 1e-8) for each bucket.

        Raises:
            ValueError: the corpus or the target has no words at all.
        """
        for of in CORPORA:
            if not getattr(self, of).any():
                raise ValueError(NO_WORDS.format(of))
        ratio: np.ndarray = np.log(self.target / self.target.sum() + SMALL) - np.log(
            self.corpus / self.corpus.sum() + SMALL
        )
        return ratio


@dataclass(frozen=True)
class Portion:
    """Rows of a shard `of` the corpus or the target."""

    of: Of
    shard: int
    start: int
    rows: int


def zero_counts(signals: Iterable[Signal]) -> Totals:
    """Return what counts are added to."""
    every = list(signals)
    return {(s, of): np.zeros(_settings(s)[1], np.int64) for s in every for of in CORPORA}


def add_counts(totals: Totals, more: Totals) -> None:
    """Add counts to the totals, in place."""
    for key, counts in more.items():
        totals[key] += counts


class TextWeights:
    """Gives the log importance weights of rows. `keeps`: counts made here are committed."""

    def __init__(self, work: Work, keeps: bool) -> None:
        assert work.target is not None, "checked when the run was set up"
        self.work, self.target, self.keeps = work, work.target, keeps
        self.folder = Folder(work.out)
        self.signals = sorted(text_signals(work.made))
        task = task_from_description(dict(work.task), work.corpus)
        self.columns = text_columns(task, work.corpus.schema, "the corpus")
        self._ratios: dict[Signal, Float64[np.ndarray, " m"]] = {}
        self._sample: Totals = {}

    @property
    def missing(self) -> list[Signal]:
        """The signals whose counts are not kept yet."""
        return [s for s in self.signals if not self.folder.exists(_name(s))]

    def check(self) -> None:
        """Read counts that are there; else see that there is something to count.

        Raises:
            ValueError: a file of counts is damaged, or texts have no words.
        """
        if not self.missing:
            self.ready()
            return
        for of in CORPORA:
            portions = (p for p in self.portions() if p.of == of)
            if not any(words(text) for portion in portions for text in self._read_texts(portion)):
                raise ValueError(NO_WORDS.format(of))

    def ready(self) -> None:
        """Make or read the counts.

        Raises:
            ValueError: a file of counts is damaged, or there is nothing to count.
        """
        if self.missing and self.keeps:
            totals = zero_counts(self.signals)
            for portion in self.portions():
                add_counts(totals, self.counted(portion))
            self.keep(totals)
        for signal in self.signals:
            if signal not in self._ratios:
                kept = self.folder.exists(_name(signal))
                counts = self._read(_name(signal)) if kept else self._sampled(signal)
                self._ratios[signal] = counts.log_ratio()

    def portions(self) -> list[Portion]:
        """Return what is to be counted, in parts that several workers can take."""
        return [
            Portion(of, shard, start, min(PORTION_ROWS, entry.rows - start))
            for of in CORPORA
            for shard, entry in enumerate(self._corpus(of).shards)
            for start in range(0, entry.rows, PORTION_ROWS)
        ]

    def counted(self, portion: Portion) -> Totals:
        """Return the counts of some rows."""
        totals = zero_counts(self.signals)
        log.info("counting n-grams of %s", self._corpus(portion.of).url(portion.shard))
        for text in self._read_texts(portion):
            for signal in self.signals:
                n, buckets = _settings(signal)
                found = gram_buckets(text, n, buckets)
                totals[signal, portion.of] += np.bincount(found, minlength=buckets)
        return totals

    def keep(self, totals: Totals) -> None:
        """Commit the counts of all portions; what is there already stays."""
        for signal in self.missing:
            made = Counts(totals[signal, "corpus"], totals[signal, "target"])
            self.folder.create(_name(signal), self._bytes(made))

    def of(self, rows: pa.Table) -> tuple[dict[Signal, Float64[np.ndarray, " n"]], dict[int, str]]:
        """Return each signal's weights, and why rows have none; a text without words has 0."""
        self.ready()
        texts = list(_texts(rows, self.columns))
        errors = {i: "the text is null" for i, text in enumerate(texts) if text is None}
        found = {
            signal: np.array([self._weight(signal, text) for text in texts])
            for signal in self.signals
        }
        return found, errors

    def _weight(self, signal: Signal, text: str | None) -> float:
        if text is None:
            return math.nan
        ratio = self._ratios[signal]
        # Rounded once, so that it does not matter in what order the n-grams stand.
        return math.fsum(ratio[gram_buckets(text, *_settings(signal))])

    def _sampled(self, signal: Signal) -> Counts:
        """Return the counts of the first rows alone."""
        if not self._sample:
            self._sample = zero_counts(self.signals)
            for of in CORPORA:
                left = SAMPLE_ROWS
                for portion in (p for p in self.portions() if p.of == of):
                    if left > 0:
                        first = replace(portion, rows=min(left, portion.rows))
                        add_counts(self._sample, self.counted(first))
                        left -= first.rows
        return Counts(self._sample[signal, "corpus"], self._sample[signal, "target"])

    def _corpus(self, of: Of) -> Corpus:
        return self.work.corpus if of == "corpus" else self.target.corpus

    def _read_texts(self, portion: Portion) -> Iterator[str]:
        """Yield the texts of some rows, those that are null left out."""
        some = portion.shard, portion.start, portion.rows
        for batch in self._corpus(portion.of).read(*some, self.columns, READ_ROWS):
            for text in _texts(pa.Table.from_batches([batch]), self.columns):
                if text is not None:
                    yield text

    def _bytes(self, made: Counts) -> bytes:
        said = {"run": self.work.run, "digest": _digest(made)}
        return save(vars(made), {"curate.ngrams": json.dumps(said, sort_keys=True)})

    def _read(self, name: str) -> Counts:
        data = self.folder.read(name)
        try:
            found = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            said = json.loads(header["__metadata__"]["curate.ngrams"])
            counts = Counts(found["corpus"], found["target"])
            is_whole = said == {"run": self.work.run, "digest": _digest(counts)}
        except (SafetensorError, ValueError, KeyError):
            is_whole = False
        if not is_whole:
            raise ValueError(
                f"{self.folder.full_name(name)} is damaged: delete it and run the same command"
            )
        return counts


def _settings(signal: Signal) -> tuple[int, int]:
    """Return n and the number of buckets, as `DSIR` writes them."""
    asked = dict(item.split("=") for item in signal.params.split())
    return int(asked["ngrams"]), int(asked["buckets"])


def _texts(rows: pa.Table, columns: Sequence[str]) -> Iterator[str | None]:
    """Yield each row's text, of several columns one under the other; None where one is null."""
    for parts in zip(*(rows.column(name).to_pylist() for name in columns), strict=True):
        yield None if None in parts else "\n".join(parts)


def _name(signal: Signal) -> str:
    n, buckets = _settings(signal)
    return f"{FOLDER}/{n}-grams-{buckets}.safetensors"


def _digest(counts: Counts) -> str:
    digest = hashlib.sha256()
    for values in (counts.corpus, counts.target):
        digest.update(values.astype("<i8").tobytes())
    return digest.hexdigest()
