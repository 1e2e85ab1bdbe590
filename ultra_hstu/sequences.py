"""The frame of a flat buffer of sequences: whose each row is, what kind it is, and when it happened. Encoders read this and nothing else of a batch."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
    """B sequences in T rows, each: contextual tokens, history, targets. Rows from `offsets[B]` on are padding.

    Fields are `Any` because a pytree's leaves may also be shapes, shardings or stacks.
    """

    offsets: Any  # int32 [B + 1]
    real_T: (
        Any  # bool [T]: rows that hold something; a padded layout has others inside its sequences
    )
    time_T: Any  # int32 [T]: seconds
    next_time_T: Any  # int32 [T]: time of the event after the row
    num_targets: Any = None  # int32 [B], or None for no targets
    num_contextual: Any = None  # int32 [B], or None for no contextual tokens

    @property
    def num_rows(self) -> int:
        return self.time_T.shape[0]
