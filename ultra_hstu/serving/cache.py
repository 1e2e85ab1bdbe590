"""The cache of encoded histories: what it holds, whose it is, and which of its rows stay as they are when events are added."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.key_values import Kind
from ultra_hstu.ranking.batch import Form
from ultra_hstu.serving.frozen import Channel, FrozenRanker
from ultra_hstu.serving.inputs import Events, History
from ultra_hstu.serving.tokens import row_counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """B users' encoded histories, flat and jagged: an explicit pytree, which nothing else holds.

    Attributes:
      channels: keys and values of every layer of every channel, on the device, at the sizes of a capacity class.
      history: the events that were encoded, the newest of each channel, in host memory: what `append` goes on from.
      mark: the parameters that it was made with, or rather a few of them.
      signature: of the model's structure.
      kind: how keys and values are kept.
    """

    channels: dict[str, Channel]
    history: History
    mark: Any
    signature: str = dataclasses.field(metadata={"static": True})
    kind: Kind = dataclasses.field(metadata={"static": True})

    @property
    def users(self) -> int:
        return self.history.users

    @property
    def places(self) -> int:
        """Users that there is room for."""
        return len(next(iter(self.channels.values())).events_B)

    @property
    def nbytes(self) -> int:
        """Bytes on the device, those of keys and values and the frames beside them; a class may be half as large again as its rows need."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.channels))


def check_cache(cache: Any, model: FrozenRanker) -> Cache:
    """The cache, if it is this model's. Raises ValueError if it is that of another configuration or of other parameters, or none."""
    if not isinstance(cache, Cache):
        raise ValueError(
            f"cache must be a serving.Cache, got {type(cache).__name__}: encode_history makes it"
        )
    if cache.signature != model.signature:
        raise ValueError(
            f"the cache was made by a model of another configuration ({cache.signature}, this one is {model.signature}): encode the history again"
        )
    if cache.mark is not model.mark and not np.array_equal(cache.mark, model.mark):
        raise ValueError(
            "the cache was made with other parameters of this model: encode the history again"
        )
    return cache


@dataclasses.dataclass(frozen=True)
class Growth:
    """Which rows of a channel stay when its histories grow: the first `keep_B` of each user, above a truncation the first `keep_kept_B` of its kept rows."""

    keep_B: Int[np.ndarray, " B"]
    keep_kept_B: Int[np.ndarray, " B"]
    new_rows: int  # computed anew
    kept_rows: int  # the same above a truncation

    @property
    def nothing_stays(self) -> bool:
        return not self.keep_B.any()

    @property
    def all_stays(self) -> bool:
        return self.new_rows == 0 and self.kept_rows == 0


def growth(encoder: HSTU, form: Form, before: Events, after: Events, added: Events) -> Growth:
    """What is left of a cache of `before` in one of `after`, which is `before` and `added`, the oldest events gone where there is no room.

    A row stays if neither its own input nor anything that it sees has changed; attention is causal, so that in a history without contextual tokens all rows
    before the first changed one stay, in every layer. Nothing of a growing history stays if positions count from the targets, if there are contextual
    tokens (they see the whole history, and all of it sees them), or if its oldest events fell off. Otherwise the first changed row is

    - the first new one;
    - with full rows under a window, the first of those that were the newest: they lose the far keys that they saw;
    - with a relative bias, the last old one: it asked at the time of the request, and now does at that of the event after it. This one changes without
      new events too.

    Above a truncation that drops rows, those that are kept lose keys and move: none of a growing history stays.
    """
    events_B, added_B = np.diff(before.offsets), np.diff(added.offsets)
    old_B, new_B = row_counts(form, events_B), row_counts(form, np.diff(after.offsets))
    grows_B = added_B > 0
    biased = int(encoder.layers[0].bias is not None)
    full = max(mask.wider_rows for mask in encoder.layer_masks)
    moves_B = np.full_like(grows_B, form.backwards) | (np.diff(after.offsets) < events_B + added_B)
    changed_B = np.where(grows_B, np.where(moves_B, old_B, max(full, biased)), biased)
    if form.contextual and (grows_B.any() or biased):
        changed_B = old_B
    stay_B = np.maximum(old_B - changed_B, 0)
    if encoder.truncation is None:
        left_B = kept_B = np.zeros_like(stay_B)
    else:
        longest = encoder.truncation.length + form.contextual
        left_B = np.minimum(new_B, longest)
        kept_B = np.where(grows_B & (new_B > longest), 0, np.maximum(left_B - (new_B - stay_B), 0))
    return Growth(
        stay_B.astype(np.int32),
        kept_B.astype(np.int32),
        int((new_B - stay_B).sum()),
        int((left_B - kept_B).sum()),
    )
