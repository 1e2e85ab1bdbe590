"""Protocol `new_users`: who is learned from, who chooses the best epoch, who is tested."""

import dataclasses

import numpy as np
from jaxtyping import Bool

from ultra_hstu.data.interactions import Interactions


@dataclasses.dataclass(frozen=True, eq=False)
class NewUsers:
    """The newest users of the data are tested, on what they did last; the others are learned from.

    Of as many users, the newest of those that are learned from, training leaves out what they did
    last, on which the best epoch is chosen.
    """

    validation_U: Bool[np.ndarray, " users"]
    test_U: Bool[np.ndarray, " users"]

    @classmethod
    def of(cls, interactions: Interactions, fraction: float) -> "NewUsers":
        """Users are in order of their first events; without times, in the order of the source.

        Args:
            fraction: share of the users that are tested, rounded down.

        Raises:
            ValueError: too few users for all three.
        """
        users = interactions.num_users
        tested = int(np.floor(np.round(users * fraction, 6)))
        if not 0 < tested <= users // 2:
            raise ValueError(
                f"protocol 'new_users' tests {tested} of {users} users and validates on as many "
                f"others (data.new_users_fraction={fraction}): give another fraction, or more users"
            )
        order_U = np.arange(users)
        if interactions.timestamps is not None:
            order_U = np.argsort(interactions.timestamps[interactions.offsets[:-1]], kind="stable")
        validation_U, test_U = np.zeros((2, users), bool)
        test_U[order_U[users - tested :]] = True
        validation_U[order_U[users - 2 * tested : users - tested]] = True
        return cls(validation_U, test_U)
