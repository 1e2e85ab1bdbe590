"""The pure functions of a run that every task shares: initial state and update step."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ultra_hstu import optim
from ultra_hstu.config import Config
from ultra_hstu.data.feed import Feed, Fixed, feed_specs
from ultra_hstu.parallel import parameters
from ultra_hstu.parallel.embedding_sharding import padded_tables
from ultra_hstu.parallel.mesh import make_mesh
from ultra_hstu.parallel.shards import Shards

Params = Any  # nnx.State of nnx.Param


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    params: Params
    opt_state: Any
    step: Any  # int32: steps taken, over all epochs


@dataclasses.dataclass(frozen=True)
class Steps:
    """What every recipe shares; a subclass says how its model is built and what is minimised.

    `config.parallel` names a mesh, in which the same functions run on every device (`over_devices`): parameters and rows are then this device's.
    """

    config: Config
    devices: Sequence[jax.Device] | None = dataclasses.field(
        default=None, kw_only=True
    )  # of the mesh; None: all of all processes

    def build(self, seed: int) -> Any:
        """The model with the initial parameters of a seed."""
        raise NotImplementedError(f"{type(self).__name__} does not build a model")

    def loss(self, params: Params, batch: Any, key: jax.Array) -> Float[Array, ""]:
        """What a step lowers, on one batch; `key` decides all that is random. In a mesh: this device's share, the shares add up."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

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
        """None on one device. Raises ValueError if `config.parallel` is not the number of devices."""
        parallel = self.config.parallel
        return (
            None
            if self.shards.devices == 1
            else make_mesh(parallel.data, parallel.context, devices=self.devices)
        )

    @functools.cached_property
    def specs(self) -> TrainState:
        """Where every array of a state lives, as PartitionSpecs."""
        return parameters.specs(jax.eval_shape(lambda: self.init(0)), self.shards)

    @functools.cached_property
    def shardings(self) -> Any:
        """The same as shardings; None on one device."""
        if self.mesh is None:
            return None
        is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
        return jax.tree.map(
            functools.partial(NamedSharding, self.mesh), self.specs, is_leaf=is_spec
        )

    def init(self, seed: int) -> TrainState:
        params = padded_tables(nnx.split(self.build(seed))[1], self.shards)
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32))

    def start(self, seed: int) -> TrainState:
        """`init`, compiled, every array where it lives."""
        return jax.jit(self.init, static_argnums=0, out_shardings=self.shardings)(seed)

    def model(self, params: Params) -> Any:
        return nnx.merge(self.graphdef, params)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One update on a batch; in a mesh, on one whose arrays hold the groups' batches one after another."""
        return self.feed_step(state, Fixed(batch), 0)

    def feed_step(
        self, state: TrainState, feed: Feed, number: Any
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One update on a batch of a feed; its key is a function of (seed, step)."""
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), state.step)
        specs = self.specs.params if self.mesh is not None else None

        def loss_and_grads(
            params: Params, feed: Feed, number: Any, key: jax.Array
        ) -> tuple[Array, Any]:
            loss, grads = jax.value_and_grad(self.loss)(params, feed.batch(number), key)
            return self.shards.total(loss), grads if specs is None else parameters.summed(
                grads, specs
            )

        everywhere = PartitionSpec()
        run = self.over_devices(
            loss_and_grads, (specs, feed_specs(feed), everywhere, everywhere), (everywhere, specs)
        )
        loss, grads = run(state.params, feed, number, key)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        if self.mesh is not None:
            new = jax.lax.with_sharding_constraint(new, self.shardings)
        return new, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    def over_devices(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """`function` as every device of the mesh runs it; as it is on one device."""
        if self.mesh is None:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
