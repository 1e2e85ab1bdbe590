"""The catalogue: the dense ids of a model, and the raw ids and titles of its source."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer, Shaped

from ultra_hstu.data import npz


@dataclasses.dataclass(frozen=True, eq=False)
class Catalog:
    """Maps raw item ids to dense ids 1..I and back. Dense id 0 is padding and has no raw id.

    Attributes:
        raw_ids: the raw id of every dense id, int64 or str, ascending from slot 1 on; slot 0 holds
            -1 or "".
        titles: one title a slot ("" for slot 0), or None where the source has none.
    """

    raw_ids: Shaped[np.ndarray, " slots"]
    titles: tuple[str, ...] | None = None

    @classmethod
    def from_ids(
        cls, ids: Shaped[np.ndarray, " items"], titles: Sequence[str] | None = None
    ) -> "Catalog":
        """The catalogue of these raw ids (int64 or str, distinct, any order) and their titles.

        Raises:
            ValueError: an id that occurs twice, no ids at all, or ids that are neither integers nor
                strings.
        """
        if ids.dtype.kind not in "iuU":
            raise ValueError(f"item ids must be integers or strings, not {ids.dtype}")
        if not len(ids):
            raise ValueError("a catalogue needs at least one item")
        order = np.argsort(ids, kind="stable")
        ids = ids[order].astype(np.int64) if ids.dtype.kind in "iu" else ids[order]
        twice = np.flatnonzero(ids[1:] == ids[:-1])
        if len(twice):
            raise ValueError(f"item id {ids[twice[0]].item()!r} occurs twice in the catalogue")
        padding = np.array([-1 if ids.dtype.kind == "i" else ""], ids.dtype)
        return cls(
            np.concatenate([padding, ids]),
            None if titles is None else ("", *(titles[i] for i in order)),
        )

    @property
    def num_items(self) -> int:
        return len(self.raw_ids) - 1

    def encode(self, ids: Any) -> Int32[np.ndarray, " n"]:
        """Dense ids of raw ids; digits in a string stand for a numeric id, as on a command line.

        Raises:
            ValueError: ids that the catalogue does not have, or of another kind (a float is never
                rounded to an id).
        """
        ids = np.atleast_1d(np.asarray(ids))
        dense = self.find(ids)
        if not dense.all():
            known = self.raw_ids[1:]
            example = f"{known[0].item()!r} to {known[-1].item()!r}"
            raise ValueError(
                f"unknown item ids {few(ids[dense == 0])}: the catalogue has {len(known)} items, "
                f"{example}"
            )
        return dense

    def find(self, ids: Any) -> Int32[np.ndarray, " n"]:
        """As `encode`, with 0 for ids that the catalogue does not have.

        Raises ValueError for ids of another kind.
        """
        ids = np.atleast_1d(np.asarray(ids))
        known = self.raw_ids[1:]
        if not ids.size:
            return np.zeros(0, np.int32)
        kind = known.dtype.kind
        if kind == "i" and ids.dtype.kind == "U":
            if not all(re.fullmatch(r"-?[0-9]{1,18}", text.strip()) for text in ids):
                raise ValueError(f"item ids of this catalogue are whole numbers, not {few(ids)}")
            ids = np.array([int(text) for text in ids], np.int64)
        if ids.dtype.kind == "u":
            ids = ids.astype(np.int64)
        if ids.dtype.kind != kind:
            kinds = "whole numbers" if kind == "i" else "strings"
            raise ValueError(f"item ids of this catalogue are {kinds}, not {ids.dtype}: {few(ids)}")
        index = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        return np.where(known[index] == ids, index + 1, 0).astype(np.int32)

    def decode(self, dense: Integer[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
        """Raw ids of dense ids.

        Raises:
            ValueError: a dense id outside 1..I.
        """
        outside = (dense < 1) | (dense > self.num_items)
        if outside.any():
            raise ValueError(
                f"dense item ids must lie in 1..{self.num_items}, not {few(dense[outside])}"
            )
        return self.raw_ids[dense]

    def save(self, path: npz.Path) -> None:
        """Writes the catalogue to `path`, whole or not at all."""
        titles = {} if self.titles is None else {"titles": np.array(self.titles)}
        npz.save(path, {"raw_ids": self.raw_ids} | titles)

    @classmethod
    def load(cls, path: npz.Path) -> "Catalog":
        """The catalogue that `save` wrote.

        Raises ValueError naming the file if it is missing or damaged.
        """
        with npz.reading(path, "a readable catalogue", "train in a new folder") as file:
            titles = tuple(file["titles"].tolist()) if "titles" in file else None
            return cls(file["raw_ids"], titles)


def few(values: np.ndarray) -> str:
    """The first few of many values, for messages."""
    shown = ", ".join(repr(value) for value in values.ravel()[:5].tolist())
    return f"{shown}, ... ({values.size} in all)" if values.size > 5 else shown
