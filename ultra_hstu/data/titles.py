"""Finds items by words of their titles."""

import contextlib
import dataclasses
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int, Int32

from ultra_hstu.data.catalog import Catalog

SEARCH_S = 0.2  # after which a search ends with what it has
_BLOCK = 1 << 16  # titles between two looks at the clock


@dataclasses.dataclass(frozen=True, eq=False)
class FoundTitles:
    """What a search has found.

    Attributes:
        items: dense ids of the best.
        count: how many items fit in all.
        complete: whether all titles were looked at.
    """

    items: Int32[np.ndarray, " n"]
    count: int
    complete: bool


class TitleSearch:
    """The titles of a catalogue, the items with the most events first.

    Case, accents and punctuation make no difference. An item without a title has its id as one.
    """

    def __init__(self, catalog: Catalog, count_I: Int[np.ndarray, " I1"] | None = None):
        """
        Args:
            count_I: how many events each item has; None: all have the same, as far as is known.
        """
        self._catalog = catalog
        self.count_I = count_I
        counts = np.zeros(catalog.num_items) if count_I is None else count_I[1:]
        self._items = np.argsort(-counts, kind="stable").astype(np.int32) + 1
        ids = [str(raw) for raw in catalog.raw_ids.tolist()]
        titles = ids if catalog.titles is None else catalog.titles
        texts = _folded([titles[item] or ids[item] for item in self._items.tolist()])
        self._blocks = [texts.slice(at, _BLOCK) for at in range(0, len(texts), _BLOCK)]

    def find(self, search: str, limit: int) -> FoundTitles:
        """The items whose titles hold every word of `search`, and the one with this raw id.

        The raw id comes first, then titles where each word begins a word, then the others; within
        these, items with more events come first. A search for nothing finds all items.
        """
        words = _folded([search])[0].as_py().split()
        found, complete = self._by_id(search), True
        if words or not search.strip():
            matches, complete = self._match(words)
            found = np.concatenate([found, matches[~np.isin(matches, found)]])
        return FoundTitles(found[:limit], len(found), complete)

    def _match(self, words: list[str]) -> tuple[Int32[np.ndarray, " n"], bool]:
        """Dense ids of titles that hold all words, and whether there was time for all titles."""
        deadline = time.monotonic() + SEARCH_S
        begins, others, looked = [], [], 0
        for block in self._blocks:
            item_n = self._items[looked : looked + len(block)]
            looked += len(block)
            for word in words:
                match_n = _matches(block, word)
                item_n, block = item_n[match_n], block.filter(pa.array(match_n))
            begin_n = np.ones(len(block), bool)
            for word in words:
                begin_n &= _matches(block, f" {word}")
            begins.append(item_n[begin_n])
            others.append(item_n[~begin_n])
            if time.monotonic() > deadline:
                break
        return np.concatenate(begins + others), looked == len(self._items)

    def _by_id(self, search: str) -> Int32[np.ndarray, " n"]:
        """The item with this raw id, if there is one."""
        with contextlib.suppress(ValueError):  # no id of this catalogue's kind
            dense = self._catalog.find([search.strip()])
            return dense[dense > 0]
        return np.zeros(0, np.int32)


def _matches(texts: pa.LargeStringArray, part: str) -> Bool[np.ndarray, " n"]:
    return pc.match_substring(texts, part).to_numpy(zero_copy_only=False)


def _folded(texts: list[str]) -> pa.LargeStringArray:
    """Lower case without accents; a space, and nothing else, in front of every word."""
    spaced = pa.array([f" {text}" for text in texts], pa.large_string())
    plain = pc.replace_substring_regex(pc.utf8_normalize(spaced, "NFKD"), r"\p{M}+", "")
    return pc.replace_substring_regex(pc.utf8_lower(plain), r"[^\p{L}\p{N}]+", " ")
