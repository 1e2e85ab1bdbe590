"""Synthetic streaming data: a Dirichlet process over categories with a drifting vocabulary.

HSTU, arXiv 2402.17152, appendix C. tfds writes and reads array_record, an example
for some thousand records; TensorFlow is never imported.
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float64, Int32, Int64, Integer

from ultra_hstu.config import DataConfig, SyntheticConfig
from ultra_hstu.data import generated
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import MIN_EVENTS, Interactions

CATALOG = "catalog.npz"
LIKED = 0.8
_RECORDS = 4096  # of an example, and those whose items are drawn at one time


class Synthetic(tfds.core.GeneratorBasedBuilder):
    """The stream of `draw_stream`: user u is record u; one event a second, record after record."""

    VERSION = tfds.core.Version("1.4.0")  # what an older version prepared is not read
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="synthetic")]
    # where tfds would look for its own kind of checksums, with a package that it does not install
    code_path = None

    def __init__(self, *, settings: SyntheticConfig, **kwargs: Any):
        self.settings = settings
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (None, self.settings.length)
        items = tfds.features.Tensor(shape=shape, dtype=np.int32, encoding="bytes")  # dense ids
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"items": items}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        settings = self.settings
        titles = [
            f"item {i + 1} of category {i % settings.categories + 1}" for i in range(settings.items)
        ]
        stream = draw_stream(settings)
        catalog = Catalog.from_ids(np.arange(1, settings.items + 1), titles)
        catalog.save(Path(self.data_path) / CATALOG)
        return {"users": self._generate_examples(stream)}

    def _generate_examples(
        self, stream: Int32[np.ndarray, "users length"]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for first in range(0, len(stream), _RECORDS):
            yield first, {"items": stream[first : first + _RECORDS] + np.int32(1)}


def load(config: DataConfig) -> Interactions:
    """The stream, prepared under `config.data_dir` where it is not yet.

    Raises:
        ValueError: settings that cannot work, a raw_dir, a data_dir that cannot be written.
    """
    settings = config.synthetic
    if settings.length < MIN_EVENTS:
        raise ValueError(
            f"data.synthetic.length={settings.length}: nothing to learn from, a user must have "
            f"{MIN_EVENTS} events"
        )

    def make(home: Path) -> None:
        with _quiet():
            made = Synthetic(settings=settings, data_dir=home, config=config.source)
            made.download_and_prepare()

    home = generated.folder(config, str(Synthetic.VERSION), make)
    builder = Synthetic(settings=settings, data_dir=home, config=config.source)
    source = builder.as_data_source("users")
    items = np.concatenate([example["items"].reshape(-1) for example in source])
    return Interactions(
        users=np.arange(1, settings.users + 1),
        items=items,
        offsets=np.arange(settings.users + 1) * settings.length,
        timestamps=np.arange(len(items)),
        actions={"is_like": draw_likes(settings, items)},
        catalog=Catalog.load(Path(builder.data_path) / CATALOG),
    )


def draw_likes(
    settings: SyntheticConfig, items: Int32[np.ndarray, " events"]
) -> Int32[np.ndarray, " events"]:
    """Whether each event's item was liked, int32 0 or 1: a signal for ranking.

    A record likes each category with probability 1/2, and an item of a category that it likes with
    probability `LIKED`, another with 1 - `LIKED`. So only the record's own likes tell, and the best
    NE is that of `LIKED`, .72, where all tastes are known, and 1 where none is.

    Args:
      items: 1..I of all records, one after another.
    """
    rng = np.random.default_rng((settings.seed, 1))  # the stream draws from `seed`
    taste_UC = rng.random((settings.users, settings.categories)) < 0.5
    category_E = (items - 1) % settings.categories
    liked_E = taste_UC[np.arange(len(items)) // settings.length, category_E]
    return (rng.random(len(items)) < np.where(liked_E, LIKED, 1 - LIKED)).astype(np.int32)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """tfds prints several lines and draws several bars for a build of seconds."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """What is drawn of every record before its events.

    Attributes:
        released: items that are there for it, those with the smallest ids.
        concentration: a.
        category: those of its own prior, and others of no weight, to a fixed number.
        cumulative: of the weights of these, which sum to 1.
    """

    released: Int64[np.ndarray, " users"]
    concentration: Float64[np.ndarray, " users"]
    category: Int64[np.ndarray, "users most"]
    cumulative: Float64[np.ndarray, "users most"]

    def available(
        self, category: Integer[np.ndarray, "users n"], of: int, rows: slice = slice(None)
    ) -> Int64[np.ndarray, "users n"]:
        """How many released items each of these categories, `of` in all, has for its record."""
        return (self.released[rows, None] - category + of - 1) // of


def draw_records(settings: SyntheticConfig, rng: np.random.Generator) -> Records:
    """Raises ValueError where the first record lacks a released item in some category."""
    users, num_categories = settings.users, settings.categories
    progress = (
        settings.released_at_start + (1 - settings.released_at_start) * np.arange(users) / users
    )
    released = np.floor(progress * settings.items).astype(np.int64)
    if released[0] < num_categories:
        raise ValueError(
            f"only {released[0]} of {settings.items} items are released at the start, too few for "
            f"{num_categories} "
            "categories: raise synthetic.items or synthetic.released_at_start, or lower "
            "synthetic.categories"
        )
    concentration = rng.uniform(1, settings.max_concentration, users)
    most = min(settings.prior_categories, num_categories)
    prior = np.empty((users, most), np.int64)
    for first in range(0, users, _RECORDS):
        of_block = prior[first : first + _RECORDS]
        every = np.broadcast_to(np.arange(num_categories), (len(of_block), num_categories))
        of_block[:] = rng.permuted(every, axis=1)[:, :most]
    weight = rng.exponential(size=(users, most)) * (
        np.arange(most)[None] < rng.integers(1, most + 1, users)[:, None]
    )
    # Normalised exponentials: Dirichlet(1, ..., 1).
    cumulative = np.cumsum(weight / weight.sum(1, keepdims=True), axis=1)
    return Records(released, concentration, prior, cumulative)


def draw_stream(settings: SyntheticConfig) -> Int32[np.ndarray, "users length"]:
    """Items 0..I-1 of every record of the stream.

    Record r draws a concentration a ~ U(1, max_concentration), up to `prior_categories` categories
    and a flat random distribution H over them. Position n takes, with probability a / (a + n - 1),
    a category from H, and otherwise the category of a uniformly chosen earlier position; then an
    item uniformly among those of the category that are released. Item i belongs to category i mod
    C. Items are released in order of id: `released_at_start` of them to the first record, linearly
    more later.

    Raises:
        ValueError: settings under which the first record lacks a released item in some category.
    """
    users, length, num_categories = settings.users, settings.length, settings.categories
    rng = np.random.default_rng(settings.seed)
    records = draw_records(settings, rng)
    category = np.empty((length, users), np.int32)  # a position after the other
    rows, drawn = np.arange(users), np.zeros(users, np.int8)
    for n in range(length):
        uniform = rng.random(users)
        drawn[:] = 0
        for edge in records.cumulative.T[:-1]:
            drawn += uniform >= edge
        fresh = rng.random(users) * (records.concentration + n) < records.concentration
        earlier = category[rng.integers(0, max(n, 1), users), rows] if n else 0
        category[n] = np.where(fresh, records.category[rows, drawn], earlier)
    items = np.empty((users, length), np.int32)
    for first in range(0, users, _RECORDS):
        some = slice(first, first + _RECORDS)
        of_record = category[:, some].T
        available = records.available(of_record, num_categories, some)
        place = np.floor(rng.random(of_record.shape) * available).astype(np.int32)
        items[some] = of_record + num_categories * place
    return items
