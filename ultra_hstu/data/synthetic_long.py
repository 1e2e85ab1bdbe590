"""Long histories of likes, whose best possible prediction is known at every length.

Category k of C is drawn, for every event by itself, with probability p_k in proportion to k^-skew,
and an item of it uniformly. User u likes an item of category k with probability
theta_uk ~ Beta(likes, others), drawn once. So all that a history says of an event is how many
events of its category it holds and how many of these were liked, wherever they lie: a rare category
shows in long histories alone. `data.best_prediction` has the posterior, and the floor of NE.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int32

from ultra_hstu.config import DataConfig, SyntheticLongConfig
from ultra_hstu.data import generated
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import MIN_EVENTS, Interactions

LIKED, CATEGORY = "liked", "category"
ACTIONS, FEATURES = (LIKED, CATEGORY), (CATEGORY,)
VERSION = "1"  # of what is drawn
_FILE = "events.npz"
_USERS = 64  # drawn at one time


def load(config: DataConfig) -> Interactions:
    """The events, prepared under `config.data_dir` where they are not yet. They have no times.

    Raises:
        ValueError: settings that cannot work, a raw_dir, a data_dir that cannot be written.
    """
    if config.synthetic_long.length < MIN_EVENTS:
        raise ValueError(
            f"data.synthetic_long.length={config.synthetic_long.length}: nothing to learn from, a "
            f"user must have {MIN_EVENTS} events"
        )

    def make(home: Path) -> None:
        home.mkdir(parents=True)
        draw(config.synthetic_long).save(home / _FILE, compress=False)

    return Interactions.load(generated.folder(config, VERSION, make) / _FILE)


def category_probabilities(settings: SyntheticLongConfig) -> Float64[np.ndarray, " C"]:
    """p_k of an event's category, the most frequent one first."""
    weight_C = np.arange(1, settings.categories + 1, dtype=np.float64) ** -settings.skew
    return weight_C / weight_C.sum()


def draw(settings: SyntheticLongConfig) -> Interactions:
    """All users' events; item i = 1, 2, ... belongs to category (i - 1) mod C + 1."""
    rng = np.random.default_rng(settings.seed)
    users, length, num_categories = settings.users, settings.length, settings.categories
    edges = np.cumsum(category_probabilities(settings))[:-1]
    category = np.empty((users, length), np.int32)  # 0..C-1
    items: Int32[np.ndarray, "users length"] = np.empty_like(category)
    liked = np.empty_like(category)
    for first in range(0, users, _USERS):
        some = slice(first, min(first + _USERS, users))
        shape = category[some].shape
        theta = rng.beta(settings.likes, settings.others, (shape[0], num_categories))
        category[some] = np.searchsorted(edges, rng.random(shape), side="right")
        place = rng.integers(0, settings.items_per_category, shape)
        items[some] = category[some] + num_categories * place + 1
        liked[some] = rng.random(shape) < np.take_along_axis(theta, category[some], axis=1)
    ids = np.arange(1, num_categories * settings.items_per_category + 1)
    titles = [f"item {i} of category {(i - 1) % num_categories + 1}" for i in ids.tolist()]
    return Interactions(
        users=np.arange(1, users + 1),
        items=items.reshape(-1),
        offsets=np.arange(users + 1) * length,
        timestamps=None,
        actions={LIKED: liked.reshape(-1), CATEGORY: category.reshape(-1) + np.int32(1)},
        catalog=Catalog.from_ids(ids, titles),
        features=FEATURES,
    )
