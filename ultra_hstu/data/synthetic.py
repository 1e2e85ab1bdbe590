"""Synthetic streaming data: a Dirichlet process over categories with a drifting vocabulary.

HSTU, arXiv 2402.17152, appendix C.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

from ultra_hstu.config import DataConfig, SyntheticConfig
from ultra_hstu.data.builder import InteractionsBuilder, SourceConfig
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.events import RawEvents


class Synthetic(InteractionsBuilder):
    """The stream of `draw_stream`: user u is record u; one event a second, record after record."""

    BUILDER_CONFIGS = [
        SourceConfig(name="synthetic", description="A Dirichlet process over categories")
    ]

    def __init__(self, *, settings: SyntheticConfig, **kwargs: Any):
        self.settings = settings
        super().__init__(**kwargs)

    @classmethod
    def settings_of(cls, config: DataConfig) -> dict[str, SyntheticConfig]:
        return {"settings": config.synthetic}

    def read(self) -> tuple[RawEvents, Catalog]:
        settings = self.settings
        items = draw_stream(settings) + 1
        users = np.repeat(np.arange(1, settings.users + 1), settings.length)
        events = RawEvents(users, items.ravel(), np.arange(items.size), {})
        titles = [
            f"item {i + 1} of category {i % settings.categories + 1}" for i in range(settings.items)
        ]
        return events, Catalog.from_ids(np.arange(1, settings.items + 1), titles)


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
