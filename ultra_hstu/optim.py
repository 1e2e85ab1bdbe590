"""AdamW as the published runs use it, with an optional warm-up and clipping."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ultra_hstu.config import OptimConfig


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, then constant or a cosine to `decay_steps`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.decay_steps is None:
        then = optax.constant_schedule(peak)
    else:
        then = optax.cosine_decay_schedule(peak, config.decay_steps - warmup)
    if warmup == 0:
        return then
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), then], [warmup])


def tables_learning_rate(config: OptimConfig) -> optax.Schedule:
    """`learning_rate` in proportion to `tables_learning_rate`: that of `optim.tables`."""
    schedule, peak = learning_rate(config), config.tables_learning_rate
    factor = 1.0 if peak is None else peak / config.learning_rate
    return lambda step: factor * schedule(step)


def adamw(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW, whose means lie in `state_dtype` between steps."""
    made = optax.adamw(
        learning_rate(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay
    )
    if config.state_dtype == "float32":
        return made

    def init(params: optax.Params) -> optax.OptState:
        return _floats_as(config.state_dtype, made.init(params))

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = made.update(grads, _floats_as(jnp.float32, state), params)
        return updates, _floats_as(config.state_dtype, state)

    return optax.GradientTransformation(init, update)


def _floats_as(dtype: DTypeLike, tree: PyTree) -> PyTree:
    """A pytree whose floating-point arrays have this dtype."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Of all parameters."""
    if config.clip_norm is None:
        return adamw(config)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw(config))
