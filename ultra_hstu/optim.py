"""AdamW as the published runs use it, with an optional warm-up and clipping."""

import optax

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
    return optax.adamw(
        learning_rate(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay
    )


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Of all parameters."""
    if config.clip_norm is None:
        return adamw(config)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw(config))
