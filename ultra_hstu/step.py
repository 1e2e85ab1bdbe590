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
from ultra_hstu.parallel import parameters
from ultra_hstu.parallel.embedding_sharding import padded_tables
from ultra_hstu.parallel.mesh import make_mesh
from ultra_hstu.parallel.shards import Shards

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
    def optimizer(self) -> optax.GradientTransformation:
        return optim.optimizer(self.config.optim)

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
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32))

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

        def loss_and_grads(
            params: Params, feed: Feed, number: StepNumber, key: Array
        ) -> tuple[Array, Params]:
            loss, grads = jax.value_and_grad(self.loss)(params, feed.batch(number), key)
            if specs is not None:
                grads = parameters.summed(grads, specs)
            return self.shards.total(loss), grads

        everywhere = PartitionSpec()
        run = self.over_devices(
            loss_and_grads, (specs, feed_specs(feed), everywhere, everywhere), (everywhere, specs)
        )
        loss, grads = run(state.params, feed, number, key)
        with jax.enable_x64(False):  # Optax computes its corrections in the widest floats there are
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        if self.mesh is not None:
            new = jax.lax.with_sharding_constraint(new, self.shardings)
        return new, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

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
