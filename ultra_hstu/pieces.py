"""The pieces of the papers that a configuration has, in words: what a run says at first."""

from collections.abc import Callable

from ultra_hstu.config import Config
from ultra_hstu.model_config import ModelConfig

DIVISORS = {"kept": "the rows that truncation leaves", "length": "each sequence's length"}


def pieces(config: Config) -> list[str]:
    """Those that are on; a plain HSTU on one device has none."""
    data, model, parallel, ranking = config.data, config.model, config.parallel, config.rank
    gradients = "" if model.projection_gradient == "same" else " and their gradients"
    input_side = {
        f"stochastic length {data.stochastic_length}": data.stochastic_length is not None,
        "balanced load": data.load_balance,
        "merged input": bool(ranking.tasks) and ranking.input == "merged",
        "generative training": bool(ranking.tasks) and ranking.supervise == "all",
    }
    others = {
        f"mixture of {len(model.channels)} transducers": bool(model.channels),
        f"feed-forward blocks of width {model.feed_forward}": model.feed_forward is not None,
        f"attention divided by {DIVISORS.get(model.divide_by)}": model.divide_by in DIVISORS,
        "mixture of logits": config.loss.similarity == "mol",
        f"activations in {model.dtype}": model.dtype != "float32",
        f"projections{gradients} in {model.projection}": model.projection != "same",
        f"{model.remat} rematerialisation": model.remat != "none",
        f"mini-sequences of {model.chunk_rows} rows": model.chunk_rows is not None,
        f"a loss in chunks of {config.loss.chunk_rows} rows": config.loss.chunk_rows is not None,
        f"optimizer's state in {config.optim.state_dtype}": config.optim.state_dtype != "float32",
        f"{parallel.context} devices share rows": parallel.context > 1,
        f"{parallel.batches} batches": parallel.context > 1 and parallel.batches != "replicated",
        "tables divided": parallel.data * parallel.context > 1,
        f"tables by {config.optim.tables}": config.optim.tables != "same",
        "matrices divided": parallel.fsdp and parallel.data > 1,
    }
    encoders = [_of_encoders(model, say) for say in (_window, _full_rows, _prefix, _truncation)]
    return [*_on(input_side), *(name for names in encoders for name in names), *_on(others)]


def _on(pieces: dict[str, bool]) -> list[str]:
    return [name for name, is_on in pieces.items() if is_on]


def _of_encoders(model: ModelConfig, say: Callable[[ModelConfig], str]) -> list[str]:
    """What encoders have, "" for nothing: with the names of channels where these differ."""
    said = {channel: say(encoder) for channel, encoder in model.encoders.items()}
    if len(set(said.values())) > 1:
        said = {channel: text and f"{text} ({channel})" for channel, text in said.items()}
    return [text for text in dict.fromkeys(said.values()) if text]


def _window(encoder: ModelConfig) -> str:
    is_on = any(rows != -1 for rows in encoder.window)
    return f"window {_one(encoder.window)}" if is_on else ""


def _full_rows(encoder: ModelConfig) -> str:
    return f"{_one(encoder.full_rows)} full rows" if any(encoder.full_rows) else ""


def _prefix(encoder: ModelConfig) -> str:
    return f"prefix {_one(encoder.prefix)}" if any(encoder.prefix) else ""


def _truncation(encoder: ModelConfig) -> str:
    if encoder.truncate_after is None:
        return ""
    return f"{encoder.truncate_length} events after {encoder.truncate_after} layers"


def _one(values: tuple[int, ...]) -> str:
    """The value of all layers, or those of each."""
    return "/".join(map(str, dict.fromkeys(values)))
