"""What the entries of a model's tables stand for, and parameters carried to another vocabulary.

Entries belong to raw ids and values, not to numbers: where a vocabulary grows, an entry moves with
what it stands for, and the entries of what is new start from the mean of those that are known. New
items of retrieval are drawn instead: there a score is a product with an item's vector, and the mean
of all items lies near every user. The moments of an optimizer move along, and are zero for what is
new.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, PyTree, Shaped

from ultra_hstu.config import Config
from ultra_hstu.data import item_features, signals
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.codebook import Codebook
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.feature_config import Spelled
from ultra_hstu.json_files import read_object, write_json
from ultra_hstu.nn.initializers import truncated_normal
from ultra_hstu.workdir import Workdir

NEW, EMPTY = -1, -2  # in the place of a known entry: one that is new, one that stands for nothing
Index = Int32[np.ndarray, " entries"]  # of the old entry, of each new one


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Items, and the values of what is known of them, of events and of users, as text, by name."""

    catalog: Catalog
    features: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    contextual: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    item_features: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, data: Interactions) -> "Vocabulary":
        """The values that a run reads, in the order of their codes, which count from 1."""
        return cls(
            data.catalog,
            {name: _texts(name, signals.values(data, name)) for name in config.rank.features},
            {name: tuple(data.context_values[name][1:]) for name in config.rank.contextual},
            item_features.entries(config.features, data.catalog.features, data.catalog.titles),
        )

    def save(self, folder: Workdir) -> None:
        """Writes what the folder's catalogue does not hold, if there is any."""
        if self.features or self.contextual:
            write_json(
                folder.vocabulary, {"features": self.features, "contextual": self.contextual}
            )

    @classmethod
    def load(cls, folder: Workdir) -> "Vocabulary":
        """What a run was trained with. Raises ValueError naming a file that is damaged."""
        config, catalog = folder.read_config(), folder.read_catalog()
        of_items = item_features.entries(config.features, catalog.features, catalog.titles)
        if not (config.rank.features or config.rank.contextual):
            return cls(catalog, item_features=of_items)
        remedy = "the same training command writes it again from the data"
        found = read_object(folder.vocabulary, {"features": dict, "contextual": dict}, remedy)
        features, contextual = (
            {name: tuple(of) for name, of in found[part].items()}
            for part in ("features", "contextual")
        )
        return cls(catalog, features, contextual, of_items)

    def codes(self) -> Codebook:
        """The codes of values that a request has."""
        sized = {name: Spelled.of(name).size for name in self.features}
        values = {
            name: np.array([] if sized[name] else list(map(float, texts)))
            for name, texts in self.features.items()
        }
        contexts = {name: ("", *words) for name, words in self.contextual.items()}
        return Codebook(self.catalog, values, contexts)

    def tables(self, old: "Vocabulary") -> dict[str, Index]:
        """By the end of a parameter's name: which entry of `old` each entry comes from, or NEW.

        Raises ValueError for catalogues whose ids are of two kinds.
        """
        dense_I = old.catalog.find(self.catalog.raw_ids[1:])
        known_I = np.where(dense_I > 0, dense_I, NEW).astype(np.int32)
        found = {"embedding.item_table": np.append(np.int32(0), known_I)}
        for name in ("features", "contextual", "item_features"):
            keys, before = _keys(getattr(self, name)), _keys(getattr(old, name))
            place = {key: i for i, key in enumerate(before)}
            if keys:
                index = [place.get(key, NEW) for key in keys]
                found[f"embedding.{name}.table"] = np.array(index, np.int32)
        return found

    def lost(self, old: "Vocabulary") -> list[int | str]:
        """The raw ids of `old` that are not here any more."""
        gone = self.catalog.find(old.catalog.raw_ids[1:]) == 0
        return old.catalog.raw_ids[1:][gone].tolist()


def _texts(name: str, values: Shaped[np.ndarray, " n"]) -> tuple[str, ...]:
    """What the codes of a feature of events stand for."""
    return tuple(map(str, range(size) if (size := Spelled.of(name).size) else values.tolist()))


def _keys(values: Mapping[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """The entries of a table of codes, column after column."""
    return [(name, text) for name, texts in values.items() for text in texts]


def names(tree: PyTree) -> list[str]:
    """The names of the arrays of a pytree, in its order."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    texts = [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]
    return [text.removesuffix(".value") for text in texts]


def carried[State](
    state: State, like: State, tables: Mapping[str, Index], *, item_std: float | None
) -> State:
    """A state, or parameters, with the entries that another vocabulary has.

    Args:
      like: shapes, dtypes and shardings of the result.
      tables: of `Vocabulary.tables`. Entries behind them stand for nothing, and are zero. So are
        new items whose features say what they are.
      item_std: new items are drawn with this deviation, as at the start of a run; None: they are
        the mean of the known ones.
    """
    described = "embedding.item_features.table" in tables
    indices = {
        name: np.pad(
            tables[found], (0, wanted.shape[0] - len(tables[found])), constant_values=EMPTY
        )
        for name, wanted in zip(names(like), jax.tree.leaves(like), strict=True)
        for found in tables
        if name.endswith(found)
    }

    moved = []
    for name, leaf, wanted in zip(
        names(state), jax.tree.leaves(state), jax.tree.leaves(like), strict=True
    ):
        if name in indices:
            move = jax.jit(_moved, static_argnums=(2, 3, 4), out_shardings=wanted.sharding)
            of_moments, of_items = name.startswith("opt_state"), name.endswith("item_table")
            starts = not of_moments and not (of_items and described)
            leaf = move(leaf, indices[name], starts, of_items, item_std if of_items else None)
        moved.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(like), moved)


def _moved(
    table_XD: Float[Array, "X D"],
    index_Y: Int32[Array, " Y"],
    starts: bool,
    padding: bool,
    std: float | None,
) -> Float[Array, "Y D"]:
    """The entries of a table by their old numbers, and what new ones start from.

    `starts`: not from zero, but from the mean of the known ones, or drawn with the deviation `std`.
    `padding`: entry 0 stands for nothing.
    """
    known_Y1 = (index_Y >= 0)[:, None]
    kept_YD = jnp.where(known_Y1, table_XD[jnp.maximum(index_Y, 0)], 0.0)
    if not starts:
        return kept_YD
    counts_Y1 = known_Y1.at[0].set(False) if padding else known_Y1
    count = jnp.sum(counts_Y1)
    if std is None:
        total_D = jnp.sum(jnp.where(counts_Y1, kept_YD, 0.0), axis=0)
        first_YD = (total_D / jnp.maximum(count, 1))[None]
    else:  # others in every vocabulary
        first_YD = truncated_normal(std)(jax.random.key(count), kept_YD.shape)
    return jnp.where((index_Y == NEW)[:, None], first_YD, kept_YD)
