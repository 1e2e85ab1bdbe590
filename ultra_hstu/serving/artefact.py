"""Runs a scorer that `ultra_hstu.serving.export` wrote, with JAX and NumPy alone: a copy of this
file travels in the artefact, which is a zip file.

    PYTHONPATH=scorer.zip python
    >>> import artefact
    >>> scorer = artefact.Scorer("scorer.zip")
    >>> cache = scorer.encode(history)
    >>> scorer.score(cache, candidates)

Inputs are plain dicts of arrays, users one after another: see `Scorer.encode` and `Scorer.score`.
The checks of arrays and their padding are those of `ultra_hstu.serving` itself.
The copy of this file and the programs in the artefact are code: whoever runs them trusts whoever
wrote them. An online deployment runs neither.
"""

import contextlib
import io
import json
import math
import os
import zipfile
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.export
import numpy as np

FORMAT, VERSION = "ultra_hstu scorer", 1
# What `metadata.json` holds: a type, a list of one, or a dict of names; "*" is any name.
METADATA: dict[str, Any] = {
    "capacity": {"users": int, "candidates": int, "events": {"*": int}},
    "channels": {"*": int},
    "sizes": {"items": int, "signals": [int], "features": [int], "contextual": [int]},
    "config": {},
} | dict.fromkeys(("tasks", "signals", "features", "contextual"), [str])
Numbers = jax.Array | np.ndarray | Sequence[int] | Sequence[Sequence[int]]
Arrays = dict[str, Any]  # arrays by name, those of channels in dicts of their own
Program = jax.export.Exported


class Scorer:
    """A ranker's cached scoring for one bucket.

    Attributes:
      metadata: what the artefact says of itself: `config`, `tasks` (order of the logits),
        `signals`, `features`, `contextual` (names, in the order of their columns) with their
        `sizes`, `channels` (longest history of each), and `capacity`: users, events of each
        channel, candidates.
    """

    def __init__(self, path: str | os.PathLike):
        """Raises ValueError for a file with a part that is damaged, of another version, or made for
        other devices."""
        whole = f"{os.fspath(path)} is no scorer that can be read"
        with naming(whole), zipfile.ZipFile(path) as file:
            self.metadata, items, params = read(file)
            self.raw_ids = items["raw_ids"]
            encode, score = (_read_program(file, name) for name in ("encode.bin", "score.bin"))
            _require_one_export(encode, score, params, self.metadata["capacity"])
        platforms = {*encode.platforms, *score.platforms}
        if (here := _platform()) not in platforms:
            raise ValueError(
                f"{os.fspath(path)} was made for {', '.join(sorted(platforms))}, "
                f"and the device here is {here}: export it for {here}"
            )
        self._params = jax.device_put(params)
        self._encode, self._score = jax.jit(encode.call), jax.jit(score.call)

    def items(self, raw_ids: Any) -> np.ndarray:
        """Dense ids of raw ones. Raises ValueError for ids that the model does not know."""
        ids, known = np.atleast_1d(np.asarray(raw_ids)), self.raw_ids[1:]
        if ids.size and ids.dtype.kind != known.dtype.kind:
            raise ValueError(f"raw ids of this scorer are {known.dtype}, got {ids.dtype}")
        index = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        if (unknown := ids[known[index] != ids] if ids.size else ids).size:
            raise ValueError(
                f"unknown item {unknown[0].item()!r}, and {unknown.size - 1} more: "
                f"the model has {len(known)} items"
            )
        return index.astype(np.int32) + 1

    def encode(self, history: dict[str, Any]) -> list[jax.Array]:
        """Keys and values of histories, to be handed to `score`.

        Args:
          history: "channels": by name, "item_E" [E] dense ids, "time_E" [E] seconds, "signal_ES"
            [E, S] and "feature_EF" [E, F] codes, "offsets" [B + 1]; "context_BC" [B, C] codes;
            "now_B" [B] seconds. Of a long history the newest events count.

        Raises:
          ValueError: values, shapes or dtypes that do not fit, and more than the artefact takes.
        """
        longest, largest = self.metadata["channels"], self.metadata["capacity"]
        _fits("users", np.size(history["now_B"]), largest["users"])
        checked = check_history(history, longest, self.metadata["sizes"], "history")
        channels = {}
        for name, columns in checked["channels"].items():
            offsets, most = columns.pop("offsets"), largest["events"][name]
            keep_E, kept_B = newest_events(offsets, longest[name])
            _fits(f"events of {name}", int(kept_B.sum()), most)
            channels[name] = {key: padded(values[keep_E], most) for key, values in columns.items()}
            kept_offsets = np.append(0, np.cumsum(kept_B))
            channels[name]["offsets"] = padded_offsets(kept_offsets, largest["users"])
        now_B = checked["now_B"]
        request = {
            "channels": channels,
            "context_BC": padded(checked["context_BC"], largest["users"]),
            "now_B": padded(now_B, largest["users"]),
            "used_B": padded(np.ones_like(now_B), largest["users"]),
        }
        return self._encode(self._params, request)

    def score(self, cache: list[jax.Array], candidates: dict[str, Any]) -> np.ndarray:
        """Logits float32 [C, K] of candidates, in their order.

        Args:
          candidates: "item_C" [C] dense ids, "feature_CF" [C, F] codes, "time_C" [C] seconds,
            "offsets" over the users that were encoded; "slot_C" [C] if they are not 0, 1, 2, ...
            for each user.

        Raises:
          ValueError: as `encode`.
        """
        largest = self.metadata["capacity"]
        columns = check_candidates(candidates, None, self.metadata["sizes"])
        offsets, count = columns.pop("offsets"), len(columns["item_C"])
        _fits("users", len(offsets) - 1, largest["users"])
        _fits("candidates", count, largest["candidates"])
        request = {key: padded(values, largest["candidates"]) for key, values in columns.items()}
        request["offsets"] = padded_offsets(offsets, largest["users"])
        return np.asarray(self._score(self._params, cache, request))[:count]


@contextlib.contextmanager
def naming(part: str) -> Iterator[None]:
    """Whatever a damaged part makes its readers raise becomes a ValueError that names the part."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{part}: {str(error) or type(error).__name__}") from error


def read(file: zipfile.ZipFile) -> tuple[Arrays, Arrays, list[np.ndarray]]:
    """What a scorer says of itself, its items ("raw_ids", and "titles" if it has them), and its
    parameters. Raises ValueError for what is not as `export.save` writes it."""
    content = read_member(file, "metadata.json")
    with naming("metadata.json"):
        metadata = json.loads(content)
        require_form(metadata, {"format": str, "version": int}, "metadata")
        if (found := metadata["format"]) != FORMAT:
            raise ValueError(f"it holds a {found!r}, no {FORMAT!r}")
        if (version := metadata["version"]) != VERSION:
            raise ValueError(
                f"it has version {version}, and this reader takes {VERSION}: export the model again"
            )
        require_form(metadata, METADATA, "metadata")
    items, named = read_arrays(file, "items.npz"), read_arrays(file, "params.npz")
    with naming("items.npz"):
        slots, raw_ids = metadata["sizes"]["items"] + 1, items["raw_ids"]
        for name, array in items.items():
            if array.shape != (slots,) or array.dtype.kind not in "iU":
                raise ValueError(f"{slots} slots, but {name} of {array.dtype} {array.shape}")
        if (raw_ids[2:] <= raw_ids[1:-1]).any():
            raise ValueError("raw_ids do not ascend")
    with naming("params.npz"):
        params = [named[str(i)] for i in range(len(named))]
        for i, array in enumerate(params):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"array {i} holds NaN or infinity: train again, and export that")
    return metadata, items, params


def read_member(file: zipfile.ZipFile, name: str) -> bytes:
    """A part of the file, with the right checksum, in no more memory than it has bytes there."""
    with naming(name):
        if file.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed, which export does not do")
        return file.read(name)


def read_arrays(file: zipfile.ZipFile, name: str) -> dict[str, np.ndarray]:
    """The arrays of an npz file in the file."""
    content = io.BytesIO(read_member(file, name))
    with naming(name), zipfile.ZipFile(content) as arrays:
        return {
            member.removesuffix(".npy"): _array(read_member(arrays, member), member)
            for member in arrays.namelist()
        }


def _array(content: bytes, name: str) -> np.ndarray:
    """The array of an npy file. NumPy makes room for what its head says: so that is checked."""
    buffer = io.BytesIO(content)
    with naming(name):
        np.lib.format.read_magic(buffer)
        shape, _, dtype = np.lib.format.read_array_header_1_0(buffer)
        wanted, given = math.prod(shape) * dtype.itemsize, len(content) - buffer.tell()
        if min(shape, default=0) < 0 or wanted != given:
            raise ValueError(f"shape {shape} of {dtype} has {wanted} bytes, and {given} are there")
        buffer.seek(0)
        return np.lib.format.read_array(buffer, allow_pickle=False)


def _read_program(file: zipfile.ZipFile, name: str) -> Program:
    content = bytearray(read_member(file, name))
    with naming(name):
        program = jax.export.deserialize(content)
        program.mlir_module()  # raises where it cannot be read
        return program


def require_form(value: Any, form: Any, name: str) -> None:
    """Raises ValueError where JSON has not this form: see METADATA. Integers are counts."""
    kind: Any = form if isinstance(form, type) else type(form)
    if type(value) is not kind or (kind is int and value < 0):
        raise ValueError(f"{name} is {value!r:.40}, no {kind.__name__}")
    if isinstance(form, list):
        for number, one in enumerate(value):
            require_form(one, form[0], f"{name}[{number}]")
    if isinstance(form, dict):
        for key in value if "*" in form else form:
            require_form(value.get(key), form.get("*", form.get(key)), f"{name}.{key}")


def _require_one_export(
    encode: Program, score: Program, params: list[np.ndarray], capacity: Arrays
) -> None:
    def arrays(tree: Any) -> list[tuple]:
        return [(tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(tree)]

    with naming("encode.bin, score.bin, params.npz and metadata.json are not of one export"):
        (first, request), _ = jax.tree.unflatten(encode.in_tree, encode.in_avals)
        (second, cache, asked), _ = jax.tree.unflatten(score.in_tree, score.in_avals)
        sizes = {
            "users": request["now_B"].shape[0],
            "candidates": asked["item_C"].shape[0],
            "events": {name: one["item_E"].shape[0] for name, one in request["channels"].items()},
        }
        if (arrays(first), arrays(second)) != (arrays(params), arrays(params)):
            raise ValueError("other parameters")
        if arrays(cache) != arrays(encode.out_avals) or sizes != capacity:
            raise ValueError(f"sizes {sizes} and {capacity}")


def _platform() -> str:
    platform = jax.default_backend()
    if platform != "gpu":
        return platform
    return "rocm" if "rocm" in str(jax.devices()[0].client.platform_version).lower() else "cuda"


def _fits(what: str, count: int, most: int) -> None:
    if count > most:
        raise ValueError(
            f"{count} {what} are more than the {most} of this artefact: "
            "send fewer, or export for more"
        )


def check_history(history: Arrays, channels: Collection[str], sizes: Arrays, what: str) -> Arrays:
    """A history as int32 arrays: see `Scorer.encode`.

    Args:
      channels: names of the model's channels.
      sizes: "items", and the codes of each of "signals", "features" and "contextual".

    Raises:
      ValueError: wrong channels, shapes or dtypes, and ids or codes that the model does not know;
        with the value.
    """
    given = history["channels"]
    if sorted(given) != sorted(channels):
        raise ValueError(
            f"{what} has the channels {sorted(given)}, the model {sorted(channels)}: "
            "give each, an empty one too"
        )
    now_B = check_ints(f"{what}.now_B", history["now_B"], (None,))
    users, contextual = len(now_B), sizes["contextual"]
    if users == 0:
        raise ValueError(f"{what} holds no users: give at least one, who may have no events")
    context_BC = check_ints(
        f"{what}.context_BC",
        history["context_BC"],
        (users, len(contextual)),
        0,
        sum(size - 1 for size in contextual),
    )
    checked = {}
    for name in channels:
        here, events = f"{what}.channels[{name!r}]", given[name]
        offsets = check_offsets(f"{here}.offsets", events["offsets"], users)
        count = int(offsets[-1])
        checked[name] = {
            "item_E": check_ids(f"{here}.item_E", events["item_E"], count, sizes),
            "time_E": check_ints(f"{here}.time_E", events["time_E"], (count,)),
            "signal_ES": check_codes(
                f"{here}.signal_ES", events["signal_ES"], count, sizes["signals"]
            ),
            "feature_EF": check_codes(
                f"{here}.feature_EF", events["feature_EF"], count, sizes["features"]
            ),
            "offsets": offsets,
        }
    return {"channels": checked, "context_BC": context_BC, "now_B": now_B}


def check_candidates(candidates: Arrays, users: int | None, sizes: Arrays) -> Arrays:
    """Candidates as int32 arrays, with slots: see `Scorer.score`. Raises ValueError as
    `check_history`."""
    offsets = check_offsets("candidates.offsets", candidates["offsets"], users)
    count = int(offsets[-1])
    slot_C = candidates.get("slot_C")
    if slot_C is None:
        slot_C = np.arange(count) - np.repeat(offsets[:-1], np.diff(offsets))
    return {
        "item_C": check_ids("candidates.item_C", candidates["item_C"], count, sizes),
        "feature_CF": check_codes(
            "candidates.feature_CF", candidates["feature_CF"], count, sizes["features"]
        ),
        "time_C": check_ints("candidates.time_C", candidates["time_C"], (count,)),
        "offsets": offsets,
        "slot_C": check_ints("candidates.slot_C", slot_C, (count,), 0),
    }


def check_ids(name: str, values: Numbers, count: int, sizes: Arrays) -> np.ndarray:
    """int32 [count], dense ids of the model's items."""
    try:
        return check_ints(name, values, (count,), 1, sizes["items"])
    except ValueError as error:
        raise ValueError(
            f"{error}: items are dense ids of the model's {sizes['items']} items; "
            "leave unknown ones out"
        ) from None


def check_ints(
    name: str,
    values: Numbers,
    shape: tuple[int | None, ...],
    least: Numbers | int = -(2**31),
    most: Numbers | int = 2**31 - 1,
) -> np.ndarray:
    """int32 of a shape (None: any size) with values in [least, most], numbers or one a column."""
    array = np.asarray(values)
    if array.ndim != len(shape) or any(
        want not in (None, got) for want, got in zip(shape, array.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have the shape [{wanted}], got {list(array.shape)}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got {array.dtype}")
    least, most = np.broadcast_to(least, array.shape[1:]), np.broadcast_to(most, array.shape[1:])
    wrong = (array < least[None]) | (array > most[None])
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{name}[{', '.join(map(str, index))}] is {array[index]}, "
            f"not in {least[index[1:]]}..{most[index[1:]]}"
        )
    return array.astype(np.int32)


def check_codes(name: str, values: Numbers, count: int, sizes: Sequence[int]) -> np.ndarray:
    """int32 [count, codes] with values below the sizes, one a column."""
    return check_ints(name, values, (count, len(sizes)), 0, np.asarray(sizes, np.int64) - 1)


def check_offsets(name: str, values: Numbers, users: int | None) -> np.ndarray:
    """Offsets of `users` users (None: any number), int32 [B + 1]."""
    offsets = check_ints(name, values, (None if users is None else users + 1,), 0)
    if not len(offsets) or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"{name} must start at 0 and never fall, got {offsets.tolist()[:20]}: "
            "they are cumulative lengths"
        )
    return offsets


def padded(x: Numbers, rows: int) -> np.ndarray:
    """The array with rows of zeros behind it."""
    x = np.asarray(x)
    wide = np.zeros((rows, *x.shape[1:]), x.dtype)
    wide[: len(x)] = x
    return wide


def padded_offsets(offsets: Numbers, users: int) -> np.ndarray:
    """Offsets of `users` users: those behind the given ones have nothing."""
    offsets = np.asarray(offsets, np.int32)
    return np.append(offsets, offsets[-1:].repeat(users + 1 - len(offsets)))


def newest_events(offsets: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Which events are among the newest `longest` of their user, and how many each user has."""
    length_B = np.diff(offsets)
    kept_B = np.minimum(length_B, longest)
    keep_E = np.arange(offsets[-1]) >= np.repeat(offsets[1:] - kept_B, length_B)
    return keep_E, kept_B
