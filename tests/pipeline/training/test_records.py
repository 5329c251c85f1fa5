"""What training notes about rows: observations, their folding, and records.parquet."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.pipeline.storing.storage import Folder
from curate.pipeline.training import records
from curate.pipeline.training.observations import (
    FoldedRows,
    ObservationLog,
    Presentations,
    fold,
    token_margins,
)
from curate.pipeline.training.records import (
    RECORD_SCHEMA,
    merge_records,
    read_records,
    record_batch,
    recorded_seeds,
    write_records,
)
from curate.scorers.protocol import IGNORE, Outputs

CLASSES = 4


def log_of(trace: list[tuple[int, float, float, list[bool]]]) -> Presentations:
    """A log from (position, loss, margin, right per token)."""
    position, loss, margin, right = zip(*trace, strict=True)
    return Presentations(
        np.array(position),
        np.array(loss, dtype=np.float32),
        np.array(margin, dtype=np.float32),
        np.array([len(r) for r in right], dtype=np.int32),
        np.array([b for r in right for b in r], dtype=bool),
    )


def naive(trace):
    """Forgetting, never learned, AUM, last loss and count of each row, one token at a time."""
    result = {}
    for position in sorted({t[0] for t in trace}):
        mine = [t for t in trace if t[0] == position]
        tokens = len(mine[0][3])
        events, learned = [], []
        for k in range(tokens):
            bits = [t[3][k] for t in mine]
            forgot = sum(a and not b for a, b in pairwise(bits))
            events.append(forgot if any(bits) else len(bits))
            learned.append(any(bits))
        aum = np.mean([t[2] for t in mine]) if tokens else np.nan
        result[position] = (
            np.mean(events) if tokens else np.nan,
            bool(tokens) and not any(learned),
            aum,
            mine[-1][1],
            len(mine),
        )
    return result


def test_forgetting_by_hand():
    right, wrong = [True], [False]
    trace = [
        (7, 0.1, 1.0, right), (2, 9.0, -1.0, wrong), (5, 0.2, 2.0, right),
        (7, 0.9, -3.0, wrong), (2, 8.0, -2.0, wrong), (5, 0.1, 4.0, right),
        (7, 0.2, 2.0, right), (2, 7.0, -3.0, wrong), (5, 0.0, 6.0, right),
        (7, 0.8, -1.0, wrong),
    ]  # fmt: skip
    rows = fold(log_of(trace))
    assert rows.position.tolist() == [2, 5, 7]
    assert rows.forgetting.tolist() == [3, 0, 2]  # never learned: its three presentations
    assert rows.never_learned.tolist() == [True, False, False]
    assert rows.aum.tolist() == [-2.0, 4.0, -0.25]
    assert rows.last_loss == pytest.approx([7.0, 0.0, 0.8])
    assert rows.seen.tolist() == [3, 3, 4]


def test_a_document_counts_the_mean_over_its_tokens():
    trace = [(0, 1, 0, [True, False, True]), (0, 1, 0, [False, False, True])]
    rows = fold(log_of(trace))
    # events 1, never learned after two presentations 2, none 0
    assert rows.forgetting.tolist() == [1.0]
    assert not rows.never_learned[0]


def test_rows_without_targets_hold_nan():
    rows = fold(log_of([(0, 1.5, 0.0, []), (0, 0.5, 0.0, [])]))
    assert np.isnan(rows.forgetting[0]) and np.isnan(rows.aum[0])
    assert (rows.last_loss[0], rows.seen[0], rows.never_learned[0]) == (0.5, 2, False)


def test_changing_token_counts_are_refused():
    with pytest.raises(ValueError, match="1 target tokens, then 2"):
        fold(log_of([(4, 1, 0, [True]), (4, 1, 0, [True, True])]))


@st.composite
def traces(draw):
    tokens = draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))
    shown = draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=30))
    number = st.floats(-8, 8, width=16)
    return [
        (p, draw(number), draw(number), [draw(st.booleans()) for _ in range(tokens[p])])
        for p in shown
    ]


def assert_equal_to_naive(rows, trace):
    expected = naive(trace)
    assert rows.position.tolist() == list(expected)
    columns = (rows.forgetting, rows.never_learned, rows.aum, rows.last_loss, rows.seen)
    for values, column in zip(zip(*expected.values(), strict=True), columns, strict=True):
        np.testing.assert_allclose(
            column.astype(float), np.array(values, float), rtol=1e-6, atol=1e-6
        )


@given(traces())
def test_folding_agrees_with_one_token_at_a_time(trace):
    assert_equal_to_naive(fold(log_of(trace)), trace)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_a_log_cut_anywhere_folds_to_the_margins_of_its_logits(
    tmp_path_factory, sizes, bucket_rows, seed, is_text
):
    folder = Folder(tmp_path_factory.mktemp("log"))
    log = ObservationLog(folder, bucket_rows)
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 4, size=10)  # target tokens of each row
    trace = []
    for step, size in enumerate(sizes, start=1):
        positions = rng.integers(0, 10, size)
        outputs, seen = presented(rng, positions, lengths if is_text else None)
        trace += seen
        log.add(step, positions, outputs)
        if rng.random() < 0.4:
            log.flush(step)
        if rng.random() < 0.2:  # a step that a killed run took after its last state
            log.flush(step)
            log.add(step + 1, positions, outputs)
            log.flush(step + 1)
            log.rewind(step)
    log.flush(len(sizes))
    parts = list(log.fold())
    assert all((p.position // bucket_rows == p.position[0] // bucket_rows).all() for p in parts)
    names = FoldedRows.__dataclass_fields__
    whole = FoldedRows(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))
    assert_equal_to_naive(whole, trace)


def presented(rng, positions, lengths):
    """Random outputs for these rows, and the trace that one reads off their logits by hand."""
    rows = len(positions)
    loss = torch.from_numpy(rng.random(rows).astype(np.float32))
    if lengths is None:
        logits = rng.normal(size=(rows, CLASSES)).astype(np.float32)
        targets = rng.integers(0, CLASSES, rows)
        margins = [[margin(z, y)] for z, y in zip(logits, targets, strict=True)]
        outputs = Outputs(loss, torch.from_numpy(targets), torch.from_numpy(logits))
    else:  # one window per token, padded to two positions, in mixed order
        row_ids = rng.permutation(np.repeat(np.arange(rows), lengths[positions]))
        targets = np.full((len(row_ids), 2), IGNORE)
        targets[np.arange(len(row_ids)), rng.integers(0, 2, len(row_ids))] = 1
        logits = rng.normal(size=(*targets.shape, CLASSES)).astype(np.float32)
        by_row = [np.flatnonzero(row_ids == r) for r in range(rows)]
        margins = [
            [margin(logits[s, t], 1) for s in mine for t in (0, 1) if targets[s, t] == 1]
            for mine in by_row
        ]
        tensors = (torch.from_numpy(x) for x in (targets, logits))
        outputs = Outputs(loss, *tensors, row_ids=torch.from_numpy(row_ids))
    trace = [
        (int(p), float(x), float(np.float32(np.mean(m))), [v > 0 for v in m])
        for p, x, m in zip(positions, loss, margins, strict=True)
    ]
    return outputs, trace


def margin(logits, label):
    return float(logits[label] - max(z for k, z in enumerate(logits) if k != label))


def test_hidden_states_give_the_margins_of_their_logits(monkeypatch):
    monkeypatch.setattr("curate.pipeline.training.observations.TOKENS_AT_ONCE", 3)
    torch.manual_seed(0)
    head = torch.nn.Linear(5, CLASSES)
    hidden, targets = torch.randn(2, 4, 5), torch.randint(0, CLASSES, (2, 4))
    targets[1, 2:] = IGNORE
    loss = torch.zeros(2)
    shown = token_margins(Outputs(loss, targets, logits=head(hidden)))
    read = token_margins(Outputs(loss, targets, hidden=hidden, head=head))
    assert torch.allclose(shown[targets != IGNORE], read[targets != IGNORE], atol=1e-6)
    assert not read.requires_grad


def test_a_task_without_logits_leaves_loss_and_count(tmp_path):
    log = ObservationLog(Folder(tmp_path), 8)
    log.add(1, np.array([3, 1]), Outputs(torch.tensor([0.5, 2.0])))
    log.flush(1)
    (rows,) = log.fold()
    assert rows.last_loss.tolist() == [2.0, 0.5]
    assert np.isnan(rows.aum).all()


# records.parquet


def lines(seed, places):
    """A record batch whose numbers tell seed and row apart."""
    shard, row = (np.array(column) for column in zip(*places, strict=True))
    number = 1000.0 * seed + 100 * shard + row
    folded = FoldedRows(
        np.arange(len(row)), number, row % 2 == 0, number + 0.5, number + 0.25, row + 1
    )
    return record_batch(seed, (shard, row), folded)


PLACES = [(0, r) for r in range(0, 40, 2)] + [(1, r) for r in range(7)] + [(2, 0), (2, 9)]


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "GROUP_ROWS", 6)
    folder = Folder(tmp_path)
    write_records(folder, [lines(0, PLACES), lines(4, PLACES[5:])], [0, 4])
    return folder


@pytest.mark.parametrize(
    ("shard", "start", "rows"),
    [(0, 0, 40), (0, 3, 9), (1, 2, 3), (2, 0, 10), (0, 39, 5), (3, 0, 4)],
)
def test_records_are_read_back_row_by_row(recorded, shard, start, rows):
    found = read_records(recorded.full_name("records.parquet"), shard, start, rows)
    assert list(found) == [0, 4]
    for seed, places in ((0, PLACES), (4, PLACES[5:])):
        for i in range(rows):
            columns = {name: column[i] for name, column in found[seed].items()}
            if (shard, start + i) not in places:
                assert np.isnan(columns["aum"]) and columns["seen"] == 0
                assert np.isnan(columns["forgetting"]) and not columns["never_learned"]
                continue
            number = 1000 * seed + 100 * shard + start + i
            assert columns["forgetting"] == number
            assert columns["aum"] == number + 0.5
            assert columns["seen"] == start + i + 1
            assert columns["never_learned"] == ((start + i) % 2 == 0)


def test_only_row_groups_that_may_hold_the_rows_are_read(recorded, monkeypatch):
    read = []
    whole = pq.ParquetFile.read_row_group

    def counted(self, group, *args, **kwargs):
        read.append(group)
        return whole(self, group, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    read_records(recorded.full_name("records.parquet"), 0, 12, 4)
    groups = pq.ParquetFile(recorded.full_name("records.parquet")).num_row_groups
    # Of each seed: the group with row 12, and the one in which shard 0 ends and shard 1 starts.
    assert (len(read), groups) == (4, 9)


def test_row_groups_hold_one_seed(recorded):
    file = pq.ParquetFile(recorded.full_name("records.parquet"))
    assert file.schema_arrow.remove_metadata() == RECORD_SCHEMA
    for group in range(file.num_row_groups):
        assert len(set(file.read_row_group(group)["seed"].to_pylist())) == 1


def test_merging_gives_the_same_bytes_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "GROUP_ROWS", 6)
    parts = {seed: Folder(tmp_path / f"part{seed}") for seed in (0, 1, 2)}
    for seed, part in parts.items():
        cut = [lines(seed, PLACES[:11]), lines(seed, PLACES[11:])]
        write_records(part, cut, [seed])
    once, grown = Folder(tmp_path / "once"), Folder(tmp_path / "grown")
    merge_records(once, parts)
    for seed in (2, 0, 1):
        merge_records(grown, {seed: parts[seed]})
    assert once.read("records.parquet") == grown.read("records.parquet")
    assert recorded_seeds(grown) == [0, 1, 2]
    assert once.names() == ["records.parquet"]


def test_records_pass_through_an_object_store(object_store):
    folder = Folder(f"{object_store}/run")
    write_records(folder, [lines(1, PLACES)], [1])
    found = read_records(f"{object_store}/run/records.parquet", 1, 0, 3)
    assert found[1]["seen"].tolist() == [1, 2, 3]


def test_null_is_not_a_number_and_back(tmp_path):
    nothing = np.array([np.nan], dtype=np.float32)
    folded = FoldedRows(np.array([0]), nothing, np.array([False]), nothing, nothing, np.array([1]))
    write_records(Folder(tmp_path), [record_batch(0, (np.array([0]), np.array([0])), folded)], [0])
    assert pq.read_table(tmp_path / "records.parquet")["aum"].null_count == 1
    assert np.isnan(read_records(tmp_path / "records.parquet", 0, 0, 1)[0]["aum"]).all()


def test_what_is_no_records_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_records(tmp_path / "records.parquet", 0, 0, 1)
    (tmp_path / "records.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        read_records(tmp_path / "records.parquet", 0, 0, 1)
    pq.write_table(pa.table({"seed": [1]}), tmp_path / "records.parquet")
    with pytest.raises(ValueError, match="holds no training records"):
        read_records(tmp_path / "records.parquet", 0, 0, 1)
