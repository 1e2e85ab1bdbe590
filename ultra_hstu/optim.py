"""AdamW as the published runs use it, with an optional warm-up and clipping."""

import optax

from ultra_hstu.config import OptimConfig


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, then constant or a cosine to `decay_steps`."""
    if config.decay_steps is None:
        constant = optax.constant_schedule(config.learning_rate)
        return (
            constant
            if config.warmup_steps == 0
            else optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
        )
    if config.warmup_steps == 0:
        return optax.cosine_decay_schedule(config.learning_rate, config.decay_steps)
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.decay_steps
    )


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    adamw = optax.adamw(
        learning_rate(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay
    )
    return (
        adamw
        if config.clip_norm is None
        else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    )
