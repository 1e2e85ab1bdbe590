"""Features of the users themselves (age, activity, ...): codes, and what they stand for."""

import dataclasses

import numpy as np
from jaxtyping import Int32, Shaped

from ultra_hstu.data import npz
from ultra_hstu.data.strings import STRINGS

UserIds = Shaped[np.ndarray, " users"]  # raw, int64 or str


@dataclasses.dataclass(frozen=True, eq=False)
class Contexts:
    """Categorical features of users.

    Attributes:
        users: raw user ids, ascending.
        codes: by feature, one code a user: 1..n, or 0 where it is unknown.
        values: by feature, the source's text for every code; slot 0 is "".
    """

    users: UserIds = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    codes: dict[str, Int32[np.ndarray, " users"]] = dataclasses.field(default_factory=dict)
    values: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def of(self, users: Shaped[np.ndarray, " n"]) -> dict[str, Int32[np.ndarray, " n"]]:
        """The codes of these raw users, 0 for those that the source does not describe."""
        if not len(self.users):
            return {name: np.zeros(len(users), np.int32) for name in self.codes}
        row = np.minimum(np.searchsorted(self.users, users), len(self.users) - 1)
        return {
            name: np.where(self.users[row] == users, codes[row], 0).astype(np.int32)
            for name, codes in self.codes.items()
        }

    def save(self, path: npz.Path) -> None:
        """Writes an npz file."""
        arrays = {f"codes/{name}": codes for name, codes in self.codes.items()}
        arrays |= {
            f"values/{name}": np.array(values, STRINGS) for name, values in self.values.items()
        }
        npz.save(path, arrays | {"users": self.users})

    @classmethod
    def load(cls, path: npz.Path) -> "Contexts":
        """What `save` wrote. Raises ValueError naming the file if it is missing or damaged."""
        remedy = "delete its folder, and the data is prepared again"
        with npz.reading(path, "readable", remedy) as file:
            names = [key.removeprefix("codes/") for key in file if key.startswith("codes/")]
            values = {name: tuple(file[f"values/{name}"].tolist()) for name in names}
            return cls(file["users"], {name: file[f"codes/{name}"] for name in names}, values)


def in_order(values: set[str]) -> tuple[str, ...]:
    """Numbers by size, other text by its letters."""
    by_letters = sorted(values)
    try:
        return tuple(sorted(by_letters, key=float))
    except ValueError:
        return tuple(by_letters)
