"""Optimizers of embedding tables that update the entries a step has read, and no other.

Neither time nor memory of a step grows with the table: what is read, differentiated and written is
each entry of the batch once.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, PyTree

from kernels.typing import Leaf
from ultra_hstu import optim
from ultra_hstu.config import OptimConfig
from ultra_hstu.parallel.embedding_sharding import Routes, in_chunks

EPS = 1e-8

Path = tuple[str, ...]  # of a table among the parameters
ITEM_TABLE: Path = ("embedding", "item_table")
CODES = ("signals", "features", "contextual")  # attributes of `embedding` that embed codes
Rows = Float[Array, "u D"]
State = tuple[Leaf[Float[Array, "X ..."]], ...]  # of a table: arrays with a row an entry


class OptState(NamedTuple):
    """Of optimizers of tables beside that of the other parameters.

    Attributes:
      rest: of Optax.
      tables: arrays of every table, by its name, that are divided among devices as the table is:
        as many such sets as the optimizer keeps.
    """

    rest: optax.OptState
    tables: tuple[dict[str, nnx.Variable], ...]

    def of(self, name: str) -> tuple[nnx.Variable, ...]:
        """The state of one table."""
        return tuple(one[name] for one in self.tables)

    @staticmethod
    def joined(rest: optax.OptState, tables: Mapping[str, tuple[nnx.Variable, ...]]) -> "OptState":
        """From the states of each table."""
        sets = zip(*tables.values(), strict=True)
        return OptState(rest, tuple(dict(zip(tables, one, strict=True)) for one in sets))


class TableOptimizer(abc.ABC):
    """How entries change by their gradients, which are sums over all that was read of each."""

    @abc.abstractmethod
    def init(self, table: nnx.Variable) -> tuple[nnx.Variable, ...]:
        """The state of a table."""

    @abc.abstractmethod
    def step(self, grad_uD: Rows, state: State, step: Int32[Array, ""]) -> tuple[Rows, State]:
        """What is subtracted from entries, over the learning rate, and their new state.

        Args:
          state: of these entries.
          step: number of the step, from 0.
        """


@dataclasses.dataclass(frozen=True)
class RowwiseAdagrad(TableOptimizer):
    """`G += mean(g^2)`, `w -= rate * g / (sqrt(G) + eps)`, with one G an entry.

    As the public HSTU benchmark and FBGEMM's EXACT_ROWWISE_ADAGRAD have it.
    """

    def init(self, table: nnx.Variable) -> tuple[nnx.Variable, ...]:
        return (table.replace(jnp.zeros((table.shape[0], 1), jnp.float32)),)

    def step(self, grad_uD: Rows, state: State, step: Int32[Array, ""]) -> tuple[Rows, State]:
        sum_u1 = state[0] + jnp.mean(jnp.square(grad_uD), axis=1, keepdims=True)
        return grad_uD / (jnp.sqrt(sum_u1) + EPS), (sum_u1,)


@dataclasses.dataclass(frozen=True)
class LazyAdam(TableOptimizer):
    """Adam (arXiv 1412.6980) whose means of an entry move in the steps alone that read it.

    The corrections of the means follow the number of the step, as if they had always moved. Between
    steps the means lie in `state_dtype`.
    """

    beta1: float
    beta2: float
    state_dtype: DTypeLike = jnp.float32

    def init(self, table: nnx.Variable) -> tuple[nnx.Variable, ...]:
        return tuple(table.replace(jnp.zeros(table.shape, self.state_dtype)) for _ in range(2))

    def step(self, grad_uD: Rows, state: State, step: Int32[Array, ""]) -> tuple[Rows, State]:
        mean_uD, square_uD = (one.astype(jnp.float32) for one in state)
        mean_uD = self.beta1 * mean_uD + (1 - self.beta1) * grad_uD
        square_uD = self.beta2 * square_uD + (1 - self.beta2) * jnp.square(grad_uD)
        steps = (step + 1).astype(jnp.float32)
        corrected_uD = square_uD / (1 - jnp.float32(self.beta2) ** steps)
        unit_uD = mean_uD / (1 - jnp.float32(self.beta1) ** steps)
        return unit_uD / (jnp.sqrt(corrected_uD) + EPS), (mean_uD, square_uD)


def table_optimizer(config: OptimConfig) -> TableOptimizer | None:
    """That of `optim.tables`; None where tables are like all parameters."""
    match config.tables:
        case "rowwise_adagrad":
            return RowwiseAdagrad()
        case "lazy_adam":
            return LazyAdam(config.beta1, config.beta2, config.state_dtype)
    return None


def path_of(name: str) -> Path:
    return tuple(name.split("."))


def split(params: PyTree, paths: Sequence[Path]) -> tuple[PyTree, dict[str, PyTree]]:
    """The parameters (or specs of them) without some tables, and these by their names."""
    if not paths:
        return params, {}
    flat = nnx.to_flat_state(params)
    rest = [(path, leaf) for path, leaf in flat if path not in paths]
    found = {".".join(map(str, path)): leaf for path, leaf in flat if path in paths}
    return nnx.from_flat_state(rest), found


def joined(rest: PyTree, tables: Mapping[str, nnx.Variable]) -> PyTree:
    """`split` undone."""
    if not tables:
        return rest
    some = [(path_of(name), leaf) for name, leaf in tables.items()]
    return nnx.from_flat_state([*nnx.to_flat_state(rest), *some])


@dataclasses.dataclass(frozen=True)
class EntryUpdate:
    """The update of one table by the gradients of entries. In a mesh, inside `shard_map`."""

    config: OptimConfig
    optimizer: TableOptimizer
    devices: int  # that divide the table

    def __call__(
        self,
        table: nnx.Variable,
        state: tuple[nnx.Variable, ...],
        number_u: Int[Array, " u"],
        grad_uD: Rows,
        step: Int32[Array, ""],
    ) -> tuple[nnx.Variable, tuple[nnx.Variable, ...]]:
        """The table and its state, changed in the entries `number_u`, which are all different.

        In a mesh, gradients go to the devices that hold the entries, in as many rounds as it takes.
        """
        arrays = (table[...], *(one[...] for one in state))
        entries = arrays[0].shape[0]
        if self.devices == 1:

            def chunk(
                first: Array, number_c: Array, arrays: tuple[Array, ...]
            ) -> tuple[Array, ...]:
                grad_cD = jax.lax.dynamic_slice_in_dim(grad_uD, first, len(number_c))
                return self._in_place(arrays, number_c, grad_cD, step, ascending=True)

            arrays = in_chunks(chunk, number_u, entries, arrays)
        else:
            used_u = number_u < self.devices * entries
            routes = Routes(self.devices, entries, jnp.where(used_u, number_u, -1))

            def in_turn(turn: Array, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
                here, grad = routes.wanted(turn), routes.sent(turn, grad_uD, 0)
                return self._in_place(arrays, here, grad, step, ascending=False)

            arrays = jax.lax.fori_loop(0, routes.rounds, in_turn, arrays)
        return table.replace(arrays[0]), tuple(
            one.replace(array) for one, array in zip(state, arrays[1:], strict=True)
        )

    def _in_place(
        self,
        arrays: tuple[Array, ...],
        number_u: Int[Array, " u"],
        grad_uD: Rows,
        step: Int32[Array, ""],
        *,
        ascending: bool,
    ) -> tuple[Array, ...]:
        """The table and its state after an update; numbers beyond the table are none."""
        row_uD, *state = (
            x.at[number_u].get(mode="fill", fill_value=0, indices_are_sorted=ascending)
            for x in arrays
        )
        change_uD, new_state = self.optimizer.step(grad_uD, tuple(state), step)
        rate = optim.tables_learning_rate(self.config)(step)
        new_uD = row_uD * (1 - rate * self.config.weight_decay) - rate * change_uD
        return tuple(
            x.at[number_u].set(
                new.astype(x.dtype),
                mode="drop",
                indices_are_sorted=ascending,
                unique_indices=ascending,
            )
            for x, new in zip(arrays, (new_uD, *new_state), strict=True)
        )
