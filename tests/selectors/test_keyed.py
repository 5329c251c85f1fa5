import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from curate.selectors.keyed import keyed64, mix64, row_keys, stream_key

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def plain_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_is_the_published_generator():
    # First outputs of splitmix64 from seed 1234567, as on rosettacode.org (Pseudo-random numbers).
    states = np.array([(1234567 + GOLDEN * i) & MASK for i in (1, 2, 3)], dtype=np.uint64)
    assert mix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(key=st.integers(0, MASK), ids=st.lists(st.integers(0, 1 << 62), min_size=1, max_size=9))
def test_agrees_with_whole_numbers_of_any_size(key, ids):
    found = keyed64(key, np.array(ids, dtype=np.int64)).tolist()
    assert found == [plain_mix((i * GOLDEN + key) & MASK) for i in ids]


def test_rows_of_all_shards_get_different_even_bits():
    shards, rows = np.divmod(np.arange(1 << 18), 512)
    keys = row_keys(1, shards, rows)
    # 2^18 draws of 32 bits: 8 pairs in common expected.
    assert len(keys) - len(np.unique(keys)) < 30
    share = np.bincount(keys >> 24, minlength=256)
    assert np.abs(share - 1024).max() < 6 * 32
    assert not np.array_equal(keys, row_keys(2, shards, rows))


def test_streams_depend_on_every_word_and_their_order():
    keys = {stream_key(*words) for words in [(), (0,), (0, 0), (1, 0), (0, 1), (1,), (2, 0)]}
    assert len(keys) == 7
