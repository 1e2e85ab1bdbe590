"""The pure functions of a run that every task shares: initial state and update step."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Int32, PyTree

from kernels.typing import Leaf
from ultra_hstu import optim
from ultra_hstu.config import Config
from ultra_hstu.data.feed import Feed, Fixed, StepNumber, feed_specs
from ultra_hstu.entry_updates import (
    EntryUpdate,
    OptState,
    Path,
    TableOptimizer,
    joined,
    path_of,
    split,
    table_optimizer,
)
from ultra_hstu.parallel import parameters
from ultra_hstu.parallel.embedding_sharding import EmbeddingTable, Entries, padded_tables
from ultra_hstu.parallel.mesh import make_mesh
from ultra_hstu.parallel.shards import ONE, Shards

type TableArrays = dict[str, Array]  # of tables, by their names
type Params = PyTree  # nnx.State of nnx.Param; specs and gradients have the same structure


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    params: Leaf[Params]
    opt_state: Leaf[optax.OptState]
    step: Leaf[Int32[Array, ""]]  # steps taken, over all epochs


HISTORY = ("loss", "grad_norm")  # what a compiled call returns of each of its steps
Updated = tuple[TrainState, dict[str, Float[Array, ""]]]  # and `loss` and `grad_norm` of the step


def require_jit() -> None:
    """Raises ValueError where JAX_DISABLE_JIT is set."""
    if jax.config.jax_disable_jit:
        raise ValueError(
            "JAX_DISABLE_JIT is set, but compiled programs train, evaluate and serve: unset it. "
            "(jax.debug.print shows what is inside of them.)"
        )


def shapes(tree: PyTree) -> Hashable:
    """The structure of a pytree, with shape and dtype of its arrays: what is compiled for."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def largest_weight(params: Params) -> float:
    """The largest magnitude in the parameters that this process holds."""
    return max(
        float(np.abs(shard.data).max(initial=0))
        for weight in jax.tree.leaves(params)
        for shard in weight.addressable_shards
    )


@dataclasses.dataclass(frozen=True)
class Steps[Model: nnx.Module](abc.ABC):
    """What every recipe shares; a subclass says how its model is built and what is minimised.

    `config.parallel` names a mesh, in which the same functions run on every device
    (`over_devices`): parameters and rows are then this device's.
    """

    config: Config
    devices: Sequence[jax.Device] | None = dataclasses.field(
        default=None, kw_only=True
    )  # of the mesh; None: all of all processes

    def __post_init__(self) -> None:
        require_jit()

    @abc.abstractmethod
    def build(self, seed: int) -> Model:
        """The model with the initial parameters of a seed."""

    @abc.abstractmethod
    def loss(self, params: Params, batch: PyTree, key: Array) -> Float[Array, ""]:
        """What a step lowers, on one batch; `key` decides all that is random.

        In a mesh it is this device's share, and the shares add up.
        """

    @property
    def tables(self) -> tuple[Path, ...]:
        """The tables whose entries `optim.tables` may update; a subclass has them."""
        return ()

    def reads(self, model: Model, batch: PyTree, key: Array) -> dict[Path, Int[Array, " N"]]:
        """Numbers of all entries of `tables` that `loss` reads, in a mesh on any device.

        One may be there several times; negative numbers are none.
        """
        return {}

    def folded(self, params: Params) -> tuple["Steps[Model]", Params]:
        """The recipe and parameters of the model that answers, where it is another one."""
        return self, params

    @property
    def holds_data(self) -> bool:
        """Whether its programs hold constants of the data, so that other data needs others."""
        return False

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef:
        """The structure of the model, without its parameters."""
        return nnx.split(nnx.eval_shape(lambda: self.build(0)))[0]

    @functools.cached_property
    def table_optimizer(self) -> TableOptimizer | None:
        """Of `tables`, entry by entry; None: they are updated as all parameters are."""
        return table_optimizer(self.config.optim)

    @functools.cached_property
    def by_entries(self) -> tuple[Path, ...]:
        """The tables that have an optimizer of their own."""
        return () if self.table_optimizer is None else self.tables

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Of all other parameters; where there are `by_entries`, their step clips all gradients."""
        return (
            optim.adamw(self.config.optim)
            if self.by_entries
            else optim.optimizer(self.config.optim)
        )

    @functools.cached_property
    def shards(self) -> Shards:
        return Shards.of(self.config)

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """None on one device.

        Raises ValueError if `config.parallel` is not the number of devices.
        """
        parallel = self.config.parallel
        if self.shards.devices == 1:
            return None
        return make_mesh(parallel.data, parallel.context, devices=self.devices)

    @functools.cached_property
    def specs(self) -> TrainState:
        """Where every array of a state lives, as PartitionSpecs."""
        return parameters.specs(jax.eval_shape(lambda: self.init(0)), self.shards)

    @functools.cached_property
    def shardings(self) -> TrainState | None:
        """Where every array of a state lives, as shardings; None on one device."""
        if self.mesh is None:
            return None
        return jax.tree.map(
            functools.partial(NamedSharding, self.mesh),
            self.specs,
            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
        )

    def init(self, seed: int) -> TrainState:
        params = padded_tables(nnx.split(self.build(seed))[1], self.shards)
        rest, tables = split(params, self.by_entries)
        opt_state = self.optimizer.init(rest)
        if self.table_optimizer is not None:
            of_tables = {name: self.table_optimizer.init(table) for name, table in tables.items()}
            opt_state = OptState.joined(opt_state, of_tables)
        return TrainState(params, opt_state, jnp.zeros((), jnp.int32))

    def start(self, seed: int) -> TrainState:
        """`init`, compiled, every array where it lives."""
        return jax.jit(self.init, static_argnums=0, out_shardings=self.shardings)(seed)

    def model(self, params: Params) -> Model:
        return nnx.merge(self.graphdef, params)

    def step(self, state: TrainState, batch: PyTree) -> Updated:
        """One update on a batch; in a mesh, it holds the groups' batches one after another."""
        return self.feed_step(state, Fixed(batch), 0)

    def feed_step(self, state: TrainState, feed: Feed, number: StepNumber) -> Updated:
        """One update on a batch of a feed; its key is a function of (seed, step)."""
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), state.step)
        specs = self.specs.params if self.mesh is not None else None
        rest_specs, table_specs = (None, {}) if specs is None else split(specs, self.by_entries)

        def loss_and_grads(
            params: Params, feed: Feed, number: StepNumber, key: Array
        ) -> tuple[Array, tuple[Params, TableArrays], TableArrays]:
            batch = feed.batch(number)
            rest, tables = split(params, self.by_entries)
            read = self._read(params, tables, batch, key)

            def loss(given: tuple[Params, TableArrays]) -> Array:
                rest, row_uD = given
                placed = {
                    name: tables[name].replace(dataclasses.replace(one, row_uD=row_uD[name]))
                    for name, one in read.items()
                }
                return self.loss(joined(rest, placed), batch, key)

            given = (rest, {name: one.row_uD for name, one in read.items()})
            value, grads = jax.value_and_grad(loss)(given)
            if specs is not None:
                grads = parameters.summed(grads, (rest_specs, table_specs))
            numbers = {name: one.number_u for name, one in read.items()}
            return self.shards.total(value), grads, numbers

        everywhere = PartitionSpec()
        run = self.over_devices(
            loss_and_grads,
            (specs, feed_specs(feed), everywhere, everywhere),
            (everywhere, (rest_specs, table_specs), table_specs),
        )
        loss, grads, numbers = run(state.params, feed, number, key)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        new = self._updated(state, grads, numbers, table_specs)
        if self.mesh is not None:
            new = jax.lax.with_sharding_constraint(new, self.shardings)
        return new, metrics

    def _read(
        self, params: Params, tables: dict[str, nnx.Variable], batch: PyTree, key: Array
    ) -> dict[str, Entries]:
        """What of the tables `by_entries` a batch reads, by their names."""
        if not tables:
            return {}
        numbers = self.reads(self.model(params), batch, key)
        return {
            name: Entries.of(table[...], numbers[path_of(name)], self._shards_of(table))
            for name, table in tables.items()
        }

    def _shards_of(self, table: nnx.Variable) -> Shards:
        """What divides the table: all devices, or nothing where each has all of it."""
        return self.shards if isinstance(table, EmbeddingTable) else ONE

    def _updated(
        self,
        state: TrainState,
        grads: tuple[Params, TableArrays],
        numbers: TableArrays,
        table_specs: dict[str, PartitionSpec],
    ) -> TrainState:
        """The state after an update; grads of tables are those of the entries `numbers`."""
        rest, tables = split(state.params, self.by_entries)
        opt_state, clip_norm = state.opt_state, self.config.optim.clip_norm
        table_state: dict[str, tuple[nnx.Variable, ...]] = {}
        if self.table_optimizer is not None:
            table_state = {name: state.opt_state.of(name) for name in tables}
            opt_state = state.opt_state.rest
            if clip_norm is not None:
                clip = optax.clip_by_global_norm(clip_norm)
                grads, _ = clip.update(grads, clip.init(grads))
        rest_grads, row_grads = grads
        with jax.enable_x64(False):  # Optax computes its corrections in the widest floats there are
            updates, opt_state = self.optimizer.update(rest_grads, opt_state, rest)
        rest = optax.apply_updates(rest, updates)
        if self.table_optimizer is not None:
            optimizer, config = self.table_optimizer, self.config.optim

            def update(
                tables: dict[str, nnx.Variable],
                states: dict[str, tuple[nnx.Variable, ...]],
                numbers: TableArrays,
                grads: TableArrays,
                step: Array,
            ) -> dict[str, tuple[nnx.Variable, tuple[nnx.Variable, ...]]]:
                return {
                    name: EntryUpdate(config, optimizer, self._shards_of(table).devices)(
                        table, states[name], numbers[name], grads[name], step
                    )
                    for name, table in tables.items()
                }

            in_specs = (*(table_specs,) * 4, PartitionSpec())
            changed = self.over_devices(update, in_specs, table_specs)(
                tables, table_state, numbers, row_grads, state.step
            )
            rest = joined(rest, {name: table for name, (table, _) in changed.items()})
            found = {name: one for name, (_, one) in changed.items()}
            opt_state = OptState.joined(opt_state, found)
        return TrainState(rest, opt_state, state.step + 1)

    def over_devices[**P, R](
        self, function: Callable[P, R], in_specs: PyTree, out_specs: PyTree
    ) -> Callable[P, R]:
        """`function` as every device of the mesh runs it; as it is on one device."""
        if self.mesh is None:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


Carry = tuple[TrainState, dict[str, Float[Array, " S"]]]


def run_steps(recipe: Steps, state: TrainState, feed: Feed, steps: Int[Array, ""]) -> Carry:
    """The first `steps` batches of a feed, one update each.

    The trip count is traced: a shorter last call does not compile again.
    """

    def body(i: Array, carry: Carry) -> Carry:
        state, history = carry
        state, metrics = recipe.feed_step(state, feed, i)
        return state, {name: history[name].at[i].set(value) for name, value in metrics.items()}

    history = {name: jnp.zeros(recipe.config.train.steps_per_call, jnp.float32) for name in HISTORY}
    return jax.lax.fori_loop(0, steps, body, (state, history))
