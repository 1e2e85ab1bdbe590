"""What every encoder offers: all rows, some rows, or the rows that reach its last layer."""

import abc

from flax import nnx
from jaxtyping import Array, Float, Int

from ultra_hstu.nn.dropout import KeyOrNone
from ultra_hstu.nn.truncation import Kept
from ultra_hstu.sequences import Activations, Sequences


class Encoder(nnx.Module):
    """A stack of layers over flat jagged sequences.

    In a mesh, `x_TD` of the methods is this device's rows of the T, and so is what comes out.
    """

    @abc.abstractmethod
    def encode_kept(self, x_TD: Activations, sequences: Sequences, key: KeyOrNone = None) -> Kept:
        """The rows that reach the last layer, in a buffer of their own."""

    def __call__(
        self, x_TD: Activations, sequences: Sequences, key: KeyOrNone = None
    ) -> Activations:
        """The sequences after all layers; what comes out on padding means nothing.

        Rows that a truncation dropped come out 0: leave them out of losses.

        Raises:
          NotImplementedError: a truncation of rows that lie on several devices: `rows` gives those
            that are needed.
        """
        x_SD, cut = self.encode_kept(x_TD, sequences, key)
        if cut is None:
            return x_SD
        if sequences.shards.context > 1:
            raise NotImplementedError(
                f"all {sequences.num_rows} rows behind a truncation, over several devices: ask for "
                "some with `rows`"
            )
        return cut.restore(x_SD)

    def rows(
        self,
        x_TD: Activations,
        sequences: Sequences,
        rows_P: Int[Array, " P"],
        key: KeyOrNone = None,
    ) -> Float[Array, "p D"]:
        """The rows `rows_P` of `__call__`, without a buffer of T rows above a truncation.

        Numbers of T and more give zeros. In a mesh the P rows are divided among the devices, as
        `Shards.part` divides what belongs to them.
        """
        x_SD, cut = self.encode_kept(x_TD, sequences, key)
        num_rows = sequences.num_rows
        if cut is not None:
            num_rows = cut.sequences.num_rows
            rows_P = cut.row_T.at[rows_P].get(mode="fill", fill_value=num_rows)
        return sequences.shards.take(x_SD, rows_P, num_rows)
