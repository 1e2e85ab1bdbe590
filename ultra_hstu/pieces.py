"""The pieces of the papers that a configuration has, in words: what a run says at first."""

from ultra_hstu.config import Config


def pieces(config: Config) -> list[str]:
    """Those that are on; a plain HSTU on one device has none."""
    data, model, parallel = config.data, config.model, config.parallel
    on = {
        f"stochastic length {data.stochastic_length}": data.stochastic_length is not None,
        "balanced load": data.load_balance,
        "merged input": bool(config.rank.tasks) and config.rank.input == "merged",
        f"window {_one(model.window)}": any(rows != -1 for rows in model.window),
        f"{_one(model.full_rows)} full rows": any(model.full_rows),
        f"prefix {_one(model.prefix)}": any(model.prefix),
        f"{model.truncate_length} events after {model.truncate_after} layers": (
            model.truncate_after is not None
        ),
        f"mixture of {len(model.channels)}": bool(model.channels),
        f"projections in {model.projection}": model.projection != "same",
        f"{model.remat} rematerialisation": model.remat != "none",
        f"mini-sequences of {model.chunk_rows} rows": model.chunk_rows is not None,
        f"{parallel.context} devices share rows": parallel.context > 1,
        "tables divided": parallel.data * parallel.context > 1,
        f"tables by {config.optim.tables}": config.optim.tables != "same",
        "matrices divided": parallel.fsdp and parallel.data > 1,
    }
    return [name for name, is_on in on.items() if is_on]


def _one(values: tuple[int, ...]) -> str:
    """The value of all layers, or those of each."""
    return "/".join(map(str, dict.fromkeys(values)))
