"""The catalogue: the dense ids of a model, and the raw ids and titles of its source."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer, Shaped

from ultra_hstu.data import item_features, npz
from ultra_hstu.data.item_features import FeatureOfItems, ItemColumn
from ultra_hstu.data.strings import STRINGS, is_strings
from ultra_hstu.data.text import INTEGER, MAX_ID


@dataclasses.dataclass(frozen=True, eq=False)
class Catalog:
    """Maps raw item ids to dense ids 1..I and back. Dense id 0 is padding and has no raw id.

    Attributes:
        raw_ids: the raw id of every dense id, int64 or strings of variable width, ascending from
            slot 1 on; slot 0 holds -1 or "".
        titles: one title a slot ("" for slot 0), or None where the source has none.
        features: what else the source says of items, by the name of the column.
    """

    raw_ids: Shaped[np.ndarray, " slots"]
    titles: tuple[str, ...] | None = None
    features: Mapping[str, ItemColumn] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.raw_ids.dtype.kind == "U":
            object.__setattr__(self, "raw_ids", self.raw_ids.astype(STRINGS))

    @classmethod
    def from_ids(
        cls,
        ids: Shaped[np.ndarray, " items"],
        titles: Sequence[str] | None = None,
        features: Mapping[str, ItemColumn] | None = None,
    ) -> "Catalog":
        """The catalogue of these raw ids (int64 or str, distinct, any order), of their titles and
        their features in the same order.

        Raises:
            ValueError: an id that occurs twice, no ids at all, or ids that are neither integers nor
                strings.
        """
        if not is_strings(ids) and ids.dtype.kind not in "iu":
            raise ValueError(f"item ids must be integers or strings, not {ids.dtype}")
        if not len(ids):
            raise ValueError("a catalogue needs at least one item")
        ids = ids.astype(STRINGS if is_strings(ids) else np.int64)
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        twice = np.flatnonzero(ids[1:] == ids[:-1])
        if len(twice):
            raise ValueError(f"item id {first(ids[twice])!r} occurs twice in the catalogue")
        padding = np.array(["" if is_strings(ids) else -1], ids.dtype)
        return cls(
            np.concatenate([padding, ids]),
            None if titles is None else ("", *(titles[i] for i in order)),
            {name: column.reordered(order) for name, column in (features or {}).items()},
        )

    @property
    def num_items(self) -> int:
        return len(self.raw_ids) - 1

    def with_features(self, features: Mapping[str, FeatureOfItems]) -> "Catalog":
        """The catalogue with these features, by name, of raw ids; what has no entry is unknown.

        Raises ValueError for a column of numbers and texts together.
        """
        raw_ids = self.raw_ids[1:].tolist()
        more = {name: item_features.column_of(name, one, raw_ids) for name, one in features.items()}
        return dataclasses.replace(self, features=dict(self.features) | more)

    def features_of(self, item: int) -> dict[str, list[str]]:
        """What is known of a dense id, by the names of columns, as texts."""
        return {name: column.words(item) for name, column in self.features.items()}

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
            example = f"{first(known)!r} to {first(known[::-1])!r}"
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
        if ids.dtype.kind == "O":  # integers of any size
            ids = np.array([str(one) for one in ids.tolist()], STRINGS)
        if not is_strings(known) and (is_strings(ids) or ids.dtype.kind == "u"):
            ids = _numbers(ids)
        if is_strings(ids) != is_strings(known) or ids.dtype.kind not in "iTU":
            kinds = "strings" if is_strings(known) else "whole numbers"
            raise ValueError(f"item ids of this catalogue are {kinds}, not {ids.dtype}: {few(ids)}")
        ids = ids.astype(known.dtype, copy=False)
        index = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        return np.where(known[index] == ids, index + 1, 0).astype(np.int32)

    def by_title(self, title: str) -> int | str:
        """The raw id of the item with this title, or else of the only one whose title holds it.

        Capitals and blanks around count for nothing.

        Raises ValueError where there is none, or several: with some of them.
        """
        if self.titles is None:
            raise ValueError(f"title {title!r}: the items here have no titles, give ids")
        wanted, known = title.casefold().strip(), [one.casefold() for one in self.titles]
        found = [dense for dense, one in enumerate(known) if dense and one.strip() == wanted]
        found = found or [dense for dense, one in enumerate(known) if dense and wanted in one]
        ids = self.raw_ids[found].tolist()
        if len(found) == 1:
            return ids[0]
        if not found:
            raise ValueError(f"no item has the title {title!r}, or one that holds it")
        some = "; ".join(f"{ids[n]} {self.titles[found[n]]!r}" for n in range(min(10, len(ids))))
        more = f"; and {len(ids) - 10} more" if len(ids) > 10 else ""
        raise ValueError(
            f"{len(ids)} items have a title that holds {title!r}: give a whole title, or an id "
            f"instead: {some}{more}"
        )

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

    def of_items(self, items: Integer[np.ndarray, " n"]) -> "Catalog":
        """The catalogue of some of the items: dense ids, ascending."""
        slots = np.append(0, items)
        titles = None if self.titles is None else tuple(self.titles[slot] for slot in slots)
        features = {name: column.reordered(items - 1) for name, column in self.features.items()}
        return Catalog(self.raw_ids[slots], titles, features)

    def save(self, path: npz.Path) -> None:
        """Writes the catalogue to `path`, whole or not at all."""
        npz.save(path, self.arrays())

    @classmethod
    def load(cls, path: npz.Path) -> "Catalog":
        """The catalogue that `save` wrote.

        Raises ValueError naming the file if it is missing or damaged.
        """
        with npz.reading(path, "a readable catalogue", "train in a new folder") as arrays:
            return cls.from_arrays(arrays)

    def arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` makes a catalogue from."""
        titles = {} if self.titles is None else {"titles": np.array(self.titles, STRINGS)}
        return {"raw_ids": self.raw_ids} | titles | item_features.arrays_of(self.features)

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Catalog":
        """Raises KeyError or ValueError for arrays that are no catalogue's."""
        ids = arrays["raw_ids"]
        titles = tuple(arrays["titles"].tolist()) if "titles" in arrays else None
        if ids.ndim != 1 or len(ids) < 2 or not (is_strings(ids) or ids.dtype == np.int64):
            raise ValueError(f"its ids are {ids.dtype} of shape {ids.shape}")
        if not (ids[2:] > ids[1:-1]).all():
            raise ValueError("its ids are not ascending")
        if titles is not None and len(titles) != len(ids):
            raise ValueError(f"it has {len(titles)} titles for {len(ids)} ids")
        return cls(ids, titles, item_features.from_arrays(arrays, len(ids)))


def first(values: np.ndarray) -> int | str:
    """The first of many ids."""
    return values[:1].tolist()[0]


def few(values: np.ndarray) -> str:
    """The first few of many values, for messages."""
    shown = ", ".join(repr(value) for value in values.ravel()[:5].tolist())
    return f"{shown}, ... ({values.size} in all)" if values.size > 5 else shown


def _numbers(ids: np.ndarray) -> np.ndarray:
    """Ids as int64; those that are wider become one that no item has."""
    texts = [str(one).strip() for one in ids.tolist()]
    if not all(INTEGER.fullmatch(text) for text in texts):
        raise ValueError(f"item ids of this catalogue are whole numbers, not {few(ids)}")
    numbers = [int(text) for text in texts]
    return np.array([one if abs(one) <= MAX_ID else -MAX_ID - 1 for one in numbers], np.int64)
