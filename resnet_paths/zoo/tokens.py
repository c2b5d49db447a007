"""Byte-pair encoding: text to tokens and back (Sennrich et al. 2016; on bytes as in Radford et al. 2019)."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

__all__ = ["BytePairTokenizer", "learn_merges"]

# A merge never crosses the end of a word; the space before a word belongs to it, as in GPT-2.
_WORD = re.compile(rb" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
_Pair = tuple[int, int]


class BytePairTokenizer:
    """Tokens 0 to 255 are bytes, and each merge of two tokens is one token more; decoding restores every text.

    Args:
        merges: Pairs of tokens in the order in which they are merged; pair `i` becomes token ``256 + i``.
    """

    def __init__(self, merges: Sequence[_Pair]) -> None:
        self._ranks = {pair: 256 + i for i, pair in enumerate(merges)}
        self.token_bytes = [bytes([value]) for value in range(256)]
        for left, right in merges:
            self.token_bytes.append(self.token_bytes[left] + self.token_bytes[right])
        self._words: dict[bytes, list[int]] = {}

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.token_bytes)

    def encode(self, text: str | bytes) -> torch.Tensor:
        """Tokens of a text, int64 [position]."""
        content = text.encode() if isinstance(text, str) else text
        tokens: list[int] = []
        for word in _WORD.findall(content):
            if word not in self._words:
                self._words[word] = self._encode_word(word)
            tokens += self._words[word]
        return torch.tensor(tokens, dtype=torch.int64)

    def decode(self, tokens: torch.Tensor | Iterable[int]) -> str:
        """Text of tokens [position]; bytes that are not UTF-8 become replacement characters."""
        return b"".join(self.token_bytes[int(token)] for token in tokens).decode(errors="replace")

    def _encode_word(self, word: bytes) -> list[int]:
        tokens = list(word)
        while len(tokens) > 1:
            pair = min(itertools.pairwise(tokens), key=lambda pair: self._ranks.get(pair, len(self)))
            if pair not in self._ranks:
                break
            tokens = _merged(tokens, pair, self._ranks[pair])
        return tokens


def learn_merges(texts: Iterable[bytes], num_merges: int) -> list[_Pair]:
    """The most frequent pairs of neighbouring tokens, merged one after the other (Sennrich et al. 2016, algorithm 1).

    Args:
        texts: Texts as bytes.
        num_merges: Number of merges.

    Returns:
        Pairs of tokens in the order of merges, for `BytePairTokenizer`. Of equally frequent pairs the smaller one is
        merged first.
    """
    counts: Counter[bytes] = Counter()
    for text in texts:
        counts.update(_WORD.findall(text))
    words = [(list(word), number) for word, number in counts.items()]
    pairs: Counter[_Pair] = Counter()
    places: dict[_Pair, set[int]] = {}
    for i, (tokens, number) in enumerate(words):
        for pair in itertools.pairwise(tokens):
            pairs[pair] += number
            places.setdefault(pair, set()).add(i)
    merges: list[_Pair] = []
    for new in range(256, 256 + num_merges):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] <= 0:
            break
        merges.append(best)
        for i in places.pop(best):
            tokens, number = words[i]
            merged = _merged(tokens, best, new)
            for pair in itertools.pairwise(tokens):
                pairs[pair] -= number
            for pair in itertools.pairwise(merged):
                pairs[pair] += number
                places.setdefault(pair, set()).add(i)
            words[i] = (merged, number)
        del pairs[best]
    return merges


def _merged(tokens: list[int], pair: _Pair, new: int) -> list[int]:
    """Tokens with every occurrence of a pair replaced, from the left."""
    merged: list[int] = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged
