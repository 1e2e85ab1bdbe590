"""Synthetic streaming data: a Dirichlet process over categories with a drifting vocabulary.

HSTU, arXiv 2402.17152, appendix C. tfds writes and reads array_record, an example a user;
TensorFlow is never imported.
"""

import contextlib
import hashlib
import io
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from ultra_hstu import paths
from ultra_hstu.config import DataConfig, SyntheticConfig
from ultra_hstu.data import sums
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import MIN_EVENTS, Interactions
from ultra_hstu.data.raw import locked, say_left_behind

_log = logging.getLogger(__name__)
CATALOG = "catalog.npz"
LIKED = 0.8
_BATCH = 4096  # users read at once: one by one, every user decompresses its neighbours too


class Synthetic(tfds.core.GeneratorBasedBuilder):
    """The stream of `draw_stream`: user u is record u; one event a second, record after record."""

    VERSION = tfds.core.Version("1.3.0")  # what an older version prepared is not read
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="synthetic")]
    # where tfds would look for its own kind of checksums, with a package that it does not install
    code_path = None

    def __init__(self, *, settings: SyntheticConfig, **kwargs: Any):
        self.settings = settings
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        items = tfds.features.Tensor(shape=(None,), dtype=np.int32)  # dense ids
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
        self, stream: Int[np.ndarray, "users length"]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for user, items in enumerate(stream):
            yield user, {"items": (items + 1).astype(np.int32)}


def load(config: DataConfig) -> Interactions:
    """The stream, prepared under `config.data_dir` where it is not yet.

    Raises:
        ValueError: settings that cannot work, a raw_dir, a data_dir that cannot be written.
    """
    settings = config.synthetic
    if config.raw_dir is not None:
        raise ValueError(
            f"{config.source} is generated: it reads no raw_dir, so {config.raw_dir!r} must be None"
        )
    if settings.length < MIN_EVENTS:
        raise ValueError(
            f"data.synthetic.length={settings.length}: nothing to learn from, a user must have "
            f"{MIN_EVENTS} events"
        )
    key = hashlib.sha256(repr((str(Synthetic.VERSION), settings)).encode()).hexdigest()
    home = paths.data_folder(config.data_dir) / f"{config.source}-{key[:16]}"
    if (damage := sums.damage(home)) is not None:
        say_left_behind(config)
        lock = paths.data_folder(config.data_dir) / f"{config.source}.lock"
        with locked(lock, f"the data must be prepared ({damage})"):
            if (damage := sums.damage(home)) is not None:  # not prepared by another run meanwhile
                _build(home, config, damage)
    builder = Synthetic(settings=settings, data_dir=home, config=config.source)
    source = builder.as_data_source("users")
    rows = range(len(source))
    parts = [
        example["items"]
        for first in rows[::_BATCH]
        for example in source.__getitems__(rows[first : first + _BATCH])
    ]
    items = np.concatenate(parts)
    return Interactions(
        users=np.arange(1, len(parts) + 1),
        items=items,
        offsets=np.arange(len(parts) + 1) * settings.length,
        timestamps=np.arange(len(items)),
        actions={"is_like": draw_likes(settings, items)},
        catalog=Catalog.load(Path(builder.data_path) / CATALOG),
    )


def draw_likes(
    settings: SyntheticConfig, items: Int[np.ndarray, " events"]
) -> Int[np.ndarray, " events"]:
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


def _build(home: Path, config: DataConfig, damage: str) -> None:
    if (home / sums.SUMS).exists():
        _log.warning("%s: the data is prepared again", damage)
    if home.exists():
        shutil.rmtree(home)
    _log.info("preparing %s in %s", config.source, home)
    with _quiet():
        made = Synthetic(settings=config.synthetic, data_dir=home, config=config.source)
        made.download_and_prepare()
    written = [str(path.relative_to(home)) for path in sorted(home.rglob("*")) if path.is_file()]
    sums.write(home, sums.checksums(home, written))  # last: now it is complete


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """tfds prints several lines and draws several bars for a build of seconds."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def draw_stream(settings: SyntheticConfig) -> Int[np.ndarray, "users length"]:
    """Items 0..I-1 of every record of the stream, as int64.

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
    rng = np.random.default_rng(settings.seed)
    concentration = rng.uniform(1, settings.max_concentration, users)
    most = min(settings.prior_categories, num_categories)
    prior = rng.permuted(
        np.broadcast_to(np.arange(num_categories), (users, num_categories)), axis=1
    )[:, :most]
    weight = rng.exponential(size=(users, most)) * (
        np.arange(most)[None] < rng.integers(1, most + 1, users)[:, None]
    )
    # Normalised exponentials: Dirichlet(1, ..., 1).
    cumulative = np.cumsum(weight / weight.sum(1, keepdims=True), axis=1)
    categories = np.empty((users, length), np.int64)
    rows = np.arange(users)
    for n in range(length):
        drawn = (rng.random(users)[:, None] >= cumulative[:, :-1]).sum(1)
        fresh = rng.random(users) * (concentration + n) < concentration
        earlier = categories[rows, rng.integers(0, max(n, 1), users)] if n else 0
        categories[:, n] = np.where(fresh, prior[rows, drawn], earlier)
    available = (released[:, None] - categories + num_categories - 1) // num_categories
    return categories + num_categories * np.floor(rng.random((users, length)) * available).astype(
        np.int64
    )
