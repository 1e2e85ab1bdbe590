"""What a source knows of its items beside titles, and the codes of it that a model reads."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int32, Int64, Integer, Shaped

from ultra_hstu.data.strings import STRINGS, pack
from ultra_hstu.feature_config import TITLE, FeatureConfig, Spelled
from ultra_hstu.nn.item_features import ItemCodes

WORD = re.compile(r"\w+")
MAX_DISTINCT = 1000  # distinct fractions of a column that has neither buckets nor a hash
Order = Integer[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, eq=False)
class ItemTexts:
    """A column of texts, any number of them an item.

    Attributes:
      values: the distinct texts, in the order in which items first have them.
      codes: places in `values`, those of one item after those of another.
      offsets: slot i of a catalogue has `codes[offsets[i]:offsets[i + 1]]`; slot 0, padding, none.
    """

    values: Shaped[np.ndarray, " values"]
    codes: Int32[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " ends"]

    @classmethod
    def of(cls, texts: Iterable[Sequence[str]]) -> "ItemTexts":
        """Of items in the order of `Catalog.from_ids`; an empty text is none."""
        return cls.from_arrow(pa.array([list(one) for one in texts], pa.list_(pa.string())))

    @classmethod
    def from_arrow(cls, column: pa.Array) -> "ItemTexts":
        """Of texts, one an item, or of lists of texts. Null and empty texts are none.

        A text that an item has twice counts once.
        """
        if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
            column = pa.LargeListArray.from_arrays(np.arange(len(column) + 1), column)
        item_n = pc.list_parent_indices(column).to_numpy(zero_copy_only=False).astype(np.int64)
        coded = pc.dictionary_encode(pc.cast(pc.list_flatten(column), pa.large_string()))
        texts = np.array(coded.dictionary.to_pylist(), STRINGS)
        code_n = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        filled = np.append(texts == "", True)
        kept = ~filled[code_n]
        item_n, code_n = item_n[kept], code_n[kept]
        first_n = np.sort(np.unique(item_n * (len(texts) + 1) + code_n, return_index=True)[1])
        return cls._of(texts, item_n[first_n], code_n[first_n], len(column))

    @classmethod
    def _of(
        cls, texts: Shaped[np.ndarray, " t"], item_n: Order, code_n: Order, items: int
    ) -> "ItemTexts":
        """With the texts that some item has, in the order in which items first have them."""
        used, first = np.unique(code_n, return_index=True)
        used = used[np.argsort(first)]
        place = np.zeros(len(texts) + 1, np.int32)
        place[used] = np.arange(len(used))
        counts = np.bincount(item_n, minlength=items)
        offsets = np.concatenate([[0, 0], np.cumsum(counts)]).astype(np.int64)
        return cls(texts[used], place[code_n], offsets)

    def reordered(self, order: Order) -> "ItemTexts":
        """Of the items order[0], order[1], ... of those that are here, counted without padding.

        -1 stands for an item of which nothing is known.
        """
        start, count = self.offsets[1:-1][order], np.diff(self.offsets[1:])[order]
        count = np.where(order >= 0, count, 0)
        item_n = np.repeat(np.arange(len(order)), count)
        within = np.arange(len(item_n)) - np.repeat(np.cumsum(count) - count, count)
        code_n = self.codes[np.repeat(start, count) + within].astype(np.int64)
        return self._of(self.values, item_n, code_n, len(order))

    def words(self, item: int) -> list[str]:
        """The texts of a dense id."""
        return self.values[self.codes[self.offsets[item] : self.offsets[item + 1]]].tolist()

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "item_values": self.values,
            "item_codes": self.codes,
            "item_offsets": self.offsets,
        }

    def digest(self) -> str:
        """A hash of the column."""
        return _digest(self.arrays().values())


@dataclasses.dataclass(frozen=True, eq=False)
class ItemNumbers:
    """A column of numbers, one an item: NaN where it is unknown, as in slot 0."""

    numbers: Float64[np.ndarray, " slots"]

    @classmethod
    def of(cls, numbers: Shaped[np.ndarray, " items"]) -> "ItemNumbers":
        """Of items in the order of `Catalog.from_ids`. Infinity is unknown."""
        wide = np.append(np.nan, np.asarray(numbers, np.float64))
        return cls(np.where(np.isfinite(wide), wide, np.nan))

    def reordered(self, order: Order) -> "ItemNumbers":
        return ItemNumbers.of(np.where(order >= 0, self.numbers[1:][order], np.nan))

    def words(self, item: int) -> list[str]:
        number = float(self.numbers[item])
        return [] if np.isnan(number) else [text_of(number)]

    def arrays(self) -> dict[str, np.ndarray]:
        return {"item_numbers": self.numbers}

    def digest(self) -> str:
        """A hash of the column."""
        return _digest(self.arrays().values())


ItemColumn = ItemTexts | ItemNumbers


# Of one item, by its raw id: a number, a text, or several texts.
FeatureOfItems = Mapping[Any, float | str | Sequence[str]]


def column_of(name: str, of_item: FeatureOfItems, raw_ids: Sequence[int | str]) -> ItemColumn:
    """The column of these items. Raises ValueError for numbers and texts in one column."""
    found: list[Any] = [of_item.get(raw) for raw in raw_ids]
    numbers = [isinstance(one, int | float) for one in found if one is not None]
    if all(numbers) and numbers:
        return ItemNumbers.of(np.array([np.nan if one is None else one for one in found]))
    if any(numbers):
        odd = next(one for one in found if isinstance(one, int | float))
        raise ValueError(
            f"feature of items {name!r}: an item has the number {odd!r}, others have texts: give "
            "numbers alone, or texts alone"
        )
    return ItemTexts.of(
        [one] if isinstance(one, str) else [] if one is None else list(one) for one in found
    )


def _digest(arrays: Iterable[np.ndarray]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        for part in pack(array) if array.dtype == STRINGS else (array,):
            found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()[:16]


def arrays_of(columns: Mapping[str, ItemColumn]) -> dict[str, np.ndarray]:
    """What `from_arrays` makes the columns from: PART/NAME for each part of a column."""
    return {
        f"{part}/{name}": array
        for name, column in columns.items()
        for part, array in column.arrays().items()
    }


def from_arrays(arrays: Mapping[str, np.ndarray], slots: int) -> dict[str, ItemColumn]:
    """The columns of a catalogue. Raises KeyError or ValueError for arrays that are no columns."""
    found: dict[str, ItemColumn] = {}
    for key, array in arrays.items():
        part, _, name = key.partition("/")
        if part == "item_numbers":
            found[name] = ItemNumbers(array)
            right = array.shape == (slots,) and array.dtype == np.float64
        elif part == "item_offsets":
            values, codes = arrays[f"item_values/{name}"], arrays[f"item_codes/{name}"]
            found[name] = ItemTexts(values, codes, array)
            right = len(array) == slots + 1 and not array[:2].any() and array[-1] == len(codes)
            right &= bool((np.diff(array) >= 0).all())
            right &= not len(codes) or 0 <= codes.min() <= codes.max() < len(values)
        else:
            continue
        if not right:
            raise ValueError(f"its feature {name!r} is not that of {slots} slots")
    return found


# --- codes ---


def hashed(text: str, buckets: int) -> int:
    """A bucket from 0, the same in every process and on every machine."""
    found = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(found, "little") % buckets


def user_code(raw: int | str, entries: int) -> int:
    """The code of a user's id, 1 to `entries`: a whole number's remainder, or a text's hash."""
    text = str(raw).strip()
    number = int(text) % entries if re.fullmatch(r"-?[0-9]+", text) else hashed(text, entries)
    return 1 + number


def text_of(number: float) -> str:
    """A number as the text that is hashed: whole ones have no point."""
    return str(int(number)) if number.is_integer() else repr(number)


def check_names(config: FeatureConfig, known: Iterable[str]) -> None:
    """Raises ValueError for a column that a source does not have, naming those that it has."""
    columns = sorted(known)
    for name in config.items:
        if Spelled.of(name).column not in columns:
            here = ", ".join(columns) or "none"
            raise ValueError(
                f"features.items: unknown feature of items {name!r}: this source has {here}"
            )


def item_codes(
    config: FeatureConfig,
    columns: Mapping[str, ItemColumn],
    titles: Sequence[str] | None = None,
    items: int | None = None,
) -> ItemCodes | None:
    """The codes of the columns that a model reads; None where it reads none.

    Args:
      titles: of all slots; they are the column "title", if no other is.
      items: how many the model has room for; None: as many as there are.

    Raises:
      ValueError: an unknown column, buckets or a net of texts, a number with too many values.
    """
    if not config.items:
        return None
    columns = _with_titles(config, columns, titles)
    parts, numbers = [], []
    sizes: list[int] = []
    slots = 0
    for name in config.items:
        spelled, column = Spelled.of(name), columns[Spelled.of(name).column]
        if isinstance(column, ItemTexts):
            code_IV, size = _of_texts(name, spelled, column, config.max_values)
        else:
            code_IV, size = _of_numbers(name, spelled, column)
        slots = len(code_IV)
        if spelled.mlp:
            assert isinstance(column, ItemNumbers)
            known_I = ~np.isnan(column.numbers)
            plain_I = np.where(known_I, column.numbers, 0.0)
            # The same for every data set: statistics of the column would know later items.
            numbers.append(np.stack([np.sign(plain_I) * np.log1p(np.abs(plain_I)), known_I], 1))
        parts.append(np.where(code_IV > 0, code_IV + sum(sizes), 0))
        sizes.append(size)
    number_IN = np.concatenate([np.zeros((slots, 0)), *numbers], axis=1).astype(np.float32)
    widths = tuple(part.shape[1] for part in parts)
    code_IV = np.concatenate(parts, axis=1).astype(np.int32)
    more = ((0, 0 if items is None else items + 1 - slots), (0, 0))
    return ItemCodes(np.pad(code_IV, more), widths, tuple(sizes), np.pad(number_IN, more))


def entries(
    config: FeatureConfig,
    columns: Mapping[str, ItemColumn],
    titles: Sequence[str] | None = None,
) -> dict[str, tuple[str, ...]]:
    """What the entries of `item_codes` stand for, by name, in the order of their codes."""
    columns, found = _with_titles(config, columns, titles), {}
    for name in config.items:
        spelled, column = Spelled.of(name), columns[Spelled.of(name).column]
        if spelled.size:
            found[name] = tuple(map(str, range(spelled.size)))
        elif isinstance(column, ItemTexts):
            found[name] = tuple(column.values.tolist()) or ("",)
        elif not spelled.mlp:
            numbers = column.numbers[~np.isnan(column.numbers)].tolist()
            found[name] = tuple(map(text_of, dict.fromkeys(numbers))) or ("",)
    return found


def _with_titles(
    config: FeatureConfig, columns: Mapping[str, ItemColumn], titles: Sequence[str] | None
) -> Mapping[str, ItemColumn]:
    """The columns, and that of titles where it is read. Raises ValueError for unknown ones."""
    if titles is not None and any(Spelled.of(name).column == TITLE for name in config.items):
        columns = {TITLE: ItemTexts.of([[title] for title in titles[1:]])} | dict(columns)
    check_names(config, columns)
    return columns


def _of_texts(
    name: str, spelled: Spelled, column: ItemTexts, most: int
) -> tuple[Int64[np.ndarray, "I1 V"], int]:
    """Codes from 1 of each item's texts, and how many codes there are."""
    if spelled.edges or spelled.mlp:
        raise ValueError(
            f"features.items: {name!r}: the column holds texts, such as "
            f"{column.values[:1].tolist()}, and buckets and nets read numbers: name "
            f"{spelled.column!r} alone, or with [hash N]"
        )
    if spelled.words:
        column = _words_of(column)
    code_of, size = np.arange(len(column.values)), len(column.values)
    if spelled.hashed:
        size = spelled.hashed
        code_of = np.array([hashed(text, size) for text in column.values.tolist()], np.int64)
    count_I = np.minimum(np.diff(column.offsets), most)
    code_IV = np.zeros((len(count_I), max(1, int(count_I.max(initial=0)))), np.int64)
    for place in range(code_IV.shape[1]):
        has_I = count_I > place
        code_IV[has_I, place] = 1 + code_of[column.codes[column.offsets[:-1][has_I] + place]]
    return code_IV, max(1, size)


def _words_of(column: ItemTexts) -> ItemTexts:
    """Each word of the texts as a text of its own, without case."""
    words = [WORD.findall(text.casefold()) for text in column.values.tolist()]
    items = range(1, len(column.offsets) - 1)
    codes = (column.codes[column.offsets[i] : column.offsets[i + 1]].tolist() for i in items)
    return ItemTexts.of([word for code in of_item for word in words[code]] for of_item in codes)


def _of_numbers(
    name: str, spelled: Spelled, column: ItemNumbers
) -> tuple[Int64[np.ndarray, "I1 V"], int]:
    number_I = column.numbers
    known_I = ~np.isnan(number_I)
    if spelled.mlp:
        return np.zeros((len(number_I), 0), np.int64), 0
    if spelled.size:
        return number_codes(spelled, number_I)[:, None], spelled.size
    distinct, first, code_I = np.unique(number_I, return_index=True, return_inverse=True)
    size = len(distinct) - int(not known_I.all())
    whole = bool((distinct[:size] % 1 == 0).all())  # which may be ids
    if size > MAX_DISTINCT and not whole:
        raise ValueError(
            f"features.items: {name!r} has {size} different numbers: give the ends of buckets, "
            f"as in {name}[10,100], or use {name}[mlp] or {name}[hash 1000]"
        )
    place = np.argsort(np.argsort(first[:size]))  # in the order in which items first have them
    code_I = np.append(place, -1)[np.minimum(code_I, size)] + 1
    return code_I.astype(np.int64)[:, None], max(1, size)


def number_codes(spelled: Spelled, number_n: Shaped[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Codes from 1 of numbers in buckets, of values or of a hash; 0 where there is none (NaN)."""
    known_n = ~np.isnan(number_n)
    if spelled.edges:
        code_n = np.searchsorted(spelled.edges, number_n, side="right")
    else:
        distinct, code_n = np.unique(np.where(known_n, number_n, 0), return_inverse=True)
        of = [hashed(text_of(float(one)), spelled.hashed) for one in distinct.tolist()]
        code_n = np.array(of, np.int64)[code_n]
    return np.where(known_n, code_n + 1, 0).astype(np.int64)
