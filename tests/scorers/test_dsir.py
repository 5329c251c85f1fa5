"""DSIR's n-grams: the published hashing rule, worked by hand."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.scorers.ngrams import bucket, gram_buckets, words
from curate.scorers.registry import make_scorers


def test_words_and_runs_of_punctuation_are_apart_and_in_lower_case() -> None:
    # What nltk's wordpunct_tokenize documents for this sentence, in lower case.
    text = "Good muffins cost $3.88\nin New York."
    want = ["good", "muffins", "cost", "$", "3", ".", "88", "in", "new", "york", "."]
    assert words(text) == want
    assert words("don't... stop_here Straße") == ["don", "'", "t", "...", "stop_here", "straße"]
    assert words(" \n\t") == []


def test_buckets_are_sha256_modulo_their_number() -> None:
    # printf %s "the cat" | sha256sum, to base 10, modulo 10000.
    hexadecimal = hashlib.sha256(b"the cat").hexdigest()
    assert bucket("the cat", 10_000) == int(hexadecimal, 16) % 10_000
    # sha256 of the empty string ends in ...7852b855.
    assert bucket("", 16) == 0x5 and bucket("", 256) == 0x55 and bucket("", 1) == 0


def test_unigrams_and_bigrams_joined_by_a_space() -> None:
    grams = ["a", "b", "c", "a b", "b c"]
    assert gram_buckets("A b C", 2, 97).tolist() == [bucket(g, 97) for g in grams]
    assert gram_buckets("A b C", 1, 97).tolist() == [bucket(g, 97) for g in grams[:3]]
    assert gram_buckets("a", 3, 97).tolist() == [bucket("a", 97)]
    assert gram_buckets("", 2, 97).tolist() == []


@given(st.text(), st.integers(1, 4), st.integers(1, 50))
def test_any_text_has_as_many_grams_as_its_words_make(text: str, n: int, buckets: int) -> None:
    found, count = gram_buckets(text, n, buckets), len(words(text))
    assert len(found) == sum(max(0, count - size + 1) for size in range(1, n + 1))
    assert ((found >= 0) & (found < buckets)).all()


def test_a_text_that_has_no_utf8_form_is_counted() -> None:
    assert len(gram_buckets("a \ud800", 2, 10)) == 3


@pytest.mark.parametrize("setting", ["ngrams=0", "buckets=0", "buckets=1e4", "ngrams=True"])
def test_settings_are_positive_numbers(setting: str) -> None:
    # A number of the wrong type is refused by the annotation where types are checked.
    with pytest.raises((ValueError, TypeError), match=r"must be at least 1|Type-check error"):
        make_scorers(f"dsir({setting})")
