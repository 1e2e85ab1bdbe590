"""What attention is divided by: a constant of the stack, or the length of each sequence."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels.jagged import split_lengths
from kernels.typing import Scale
from ultra_hstu.sequences import Sequences

DivideBy = Literal["constant", "kept", "length"]


@dataclasses.dataclass(frozen=True)
class Divisor:
    """Of all rows of a sequence alike.

    Attributes:
      whole: rows of the longest sequence, N.
      kept: the most rows that a truncation leaves of one.
      by: "constant": N everywhere (HSTU, arXiv 2402.17152). "kept": N, and above a truncation
        `kept`, as the published `L2STU` divides by the short length. "length": contextual tokens
        and history of the sequence itself, of which a truncation leaves fewer.
    """

    whole: int
    kept: int
    by: DivideBy = "constant"

    @property
    def of_sequence(self) -> bool:
        """Whether every row of a sequence changes when the sequence grows."""
        return self.by == "length"

    def scale(self, sequences: Sequences, segment_R: Int[Array, " R"], *, truncated: bool) -> Scale:
        """The factor on outputs: a constant, or one for each row of these sequences.

        Targets do not count: a score does not depend on how many others are asked for. Behind no
        history a target, which sees itself, is divided by 1.
        """
        if not self.of_sequence:
            return 1.0 / (self.kept if truncated and self.by == "kept" else self.whole)
        contextual_B, history_B, _ = split_lengths(sequences.lengths, *sequences.counts)
        return (1.0 / jnp.maximum(contextual_B + history_B, 1))[segment_R]
