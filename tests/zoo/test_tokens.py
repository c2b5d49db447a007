"""The tokenizer: merges as published, texts restored exactly."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_paths._utils.files import shipped_folder
from resnet_paths.reproduce.texts import read_merges
from resnet_paths.zoo.tokens import BytePairTokenizer, learn_merges

SHIPPED = BytePairTokenizer(read_merges(shipped_folder("data") / "python-docs" / "merges.txt"))


def learned_by_hand(words, num_merges):
    """Algorithm 1 of Sennrich et al. 2016, which counts all pairs of symbols again after each merge."""
    vocabulary = Counter(tuple(word) for word in words)
    age = {chr(value): value for value in range(256)}
    merges = []
    for _ in range(num_merges):
        pairs = Counter()
        for symbols, number in vocabulary.items():
            for pair in pairwise(symbols):
                pairs[pair] += number
        if not pairs:
            break
        # Of ties, about which the algorithm says nothing, the pair whose symbols were there first.
        best = min(pairs, key=lambda pair: (-pairs[pair], *(age[symbol] for symbol in pair)))
        merges.append("".join(best))
        age[merges[-1]] = 256 + len(merges)
        merged = Counter()
        for symbols, number in vocabulary.items():
            text = "|".join(("", *symbols, "")).replace("|" + "|".join(best) + "|", "|" + merges[-1] + "|")
            merged[tuple(text.strip("|").split("|"))] += number
        vocabulary = merged
    return merges


def test_merges_are_those_of_the_published_algorithm():
    generator = random.Random(0)
    words = [" low"] * 50 + [" lower"] * 21 + [" newest"] * 67 + [" widest"] * 33 + [" lowest"] * 5
    generator.shuffle(words)
    merges = learn_merges(["".join(words[:90]).encode(), "".join(words[90:]).encode()], 9)
    found = [BytePairTokenizer(merges).token_bytes[256 + i].decode() for i in range(9)]
    assert found == learned_by_hand(words, 9)


def test_merges_end_where_no_pair_is_left():
    assert len(learn_merges([b" ab ab"], 10)) == 2
    assert learn_merges([], 3) == []


@given(st.text(max_size=200))
def test_decoding_restores_every_text(text):
    assert SHIPPED.decode(SHIPPED.encode(text)) == text


def test_words_are_encoded_by_the_earliest_merges():
    tokenizer = BytePairTokenizer([(98, 99), (97, 98), (97, 256)])  # bc, ab, abc
    assert tokenizer.encode("abc").tolist() == [258]
    assert tokenizer.encode("ab abb").tolist() == [257, 32, 257, 98]
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.decode(torch.tensor([258, 257])) == "abcab"
    assert len(tokenizer) == 259


def test_merges_stay_within_words():
    assert all(b" " not in content[1:] or not content.strip() for content in SHIPPED.token_bytes)
    assert len(SHIPPED) == 1024


@pytest.mark.parametrize("content", [bytes(range(256)), b"\xff\xfe", "naïve — 数".encode()])
def test_every_byte_has_a_token(content):
    tokens = SHIPPED.encode(content)
    assert b"".join(SHIPPED.token_bytes[token] for token in tokens) == content
