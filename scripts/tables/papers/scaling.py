"""What the grid of the scaling curve says of a claim: operations counted, fits over its runs."""

import statistics
from collections.abc import Callable

from experiments.record import Json
from scripts.scaling import grid
from scripts.scaling.fits import Curve, Fit, compare, estimate, exponent, slope
from scripts.tables.papers.row import Cell, Missing, Value
from scripts.tables.scaling import (
    COMPUTE,
    MODELS,
    curve,
    estimate_text,
    longest,
    ratio_text,
    runs_of,
    selections,
)

LONG = "synthetic_long"
TITLES = {LONG: "synthetic", "assistments": "ASSISTments"}
Chosen = Callable[[Json], bool]


def operations(model: str) -> Cell:
    """What a model computes for the longest histories, against HSTU."""
    text = "operations {:+.0%} in training, {:+.0%} at inference, "
    text += f"{grid.SETS[LONG].lengths[-1]:,} events"
    return Cell("scaling_counts", text, tuple(_against_hstu(model, one) for one in COMPUTE))


def ratios(model: str, *, which: int) -> tuple[Cell, ...]:
    """Scaling efficiency and ratio of exponents against HSTU, on each data set.

    Args:
      which: of `selections`, the runs that are fitted.
    """
    cells = []
    for data, title in TITLES.items():
        words, chosen = list(selections(data, model).items())[which]
        values = tuple(
            _ratio(data, model, chosen, fit, one) for fit in (slope, exponent) for one in COMPUTE
        )
        text = f"{title}, {words}: efficiency {{}} training, {{}} inference; exponents {{}}, {{}}"
        cells.append(Cell("scaling_h200", text, values))
    return tuple(cells)


def power_laws(model: str) -> tuple[Cell, ...]:
    """The exponent of a model over its training, and how many powers of ten that spans."""
    return tuple(
        Cell(
            "scaling_h200",
            f"{title}: exponent {{}} over {{:.1f}} decades",
            (_exponent(data, model), _decades(data, model)),
        )
        for data, title in TITLES.items()
    )


def over_depth(model: str) -> tuple[Cell, ...]:
    """NE of a model on the longest histories by its number of layers."""
    return tuple(
        Cell(
            "scaling_h200",
            f"{title}: NE "
            + ", ".join(f"{{:.4f}} with {layers} layers" for layers in grid.SETS[data].layers),
            tuple(_ne(data, model, layers) for layers in grid.SETS[data].layers),
        )
        for data, title in TITLES.items()
    )


def _against_hstu(model: str, compute: str) -> Value:
    def value(record: Json) -> float:
        ours, theirs = (longest(record, LONG, one) for one in (model, "hstu"))
        if not (ours and theirs):
            raise Missing(("runs", f"{LONG}, {MODELS[model]}"), 1)
        return float(ours[0][compute] / theirs[0][compute] - 1)

    return value


def _fitted(
    record: Json,
    data: str,
    model: str,
    compute: str = "training",
    chosen: Chosen = lambda run: True,
) -> Curve:
    """Raises Missing where too few runs are finished."""
    found = curve(list(filter(chosen, runs_of(record, data, model))), compute)
    if found is None:
        raise Missing(("runs", f"{data}, {MODELS[model]}"), 1)
    return found


def _ratio(data: str, model: str, chosen: Chosen, fit: Fit, compute: str) -> Value:
    def value(record: Json) -> str:
        ours, theirs = (_fitted(record, data, one, compute, chosen) for one in (model, "hstu"))
        return ratio_text(compare(ours, theirs, fit))

    return value


def _exponent(data: str, model: str) -> Value:
    return lambda record: estimate_text(estimate(_fitted(record, data, model), exponent))


def _decades(data: str, model: str) -> Value:
    return lambda record: _fitted(record, data, model).decades


def _ne(data: str, model: str, layers: int) -> Value:
    def value(record: Json) -> float:
        length = grid.SETS[data].lengths[-1]
        ne = [
            run["result"]["best"]["ne"]
            for run in runs_of(record, data, model)
            if (run["length"], run["layers"]) == (length, layers)
        ]
        if not ne:
            raise Missing(("runs", f"{data}, {MODELS[model]}, {layers} layers"), 1)
        return statistics.mean(ne)

    return value
