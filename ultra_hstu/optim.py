"""AdamW as the published runs use it, with an optional warm-up and clipping."""

import optax

from ultra_hstu.config import OptimConfig


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Step -> learning rate: linear from 0 over `warmup_steps`, then constant."""
    if config.warmup_steps == 0:
        return optax.constant_schedule(config.learning_rate)
    return optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    adamw = optax.adamw(learning_rate(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay)
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
