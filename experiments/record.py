"""What a command measured, as a JSON file that says where its numbers come from."""

import os
from typing import Any

from ultra_hstu import json_files, paths, provenance

Json = dict[str, Any]  # a JSON object


class Record:
    """Measured values beside their provenance, written anew whenever some are added.

    Args:
      path: the file; None: nothing is written.
      grows: keep what the file holds already, beside the provenance of what is added.
      conditions: what else the numbers depend on.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, *, grows: bool = False, **conditions: Any
    ):
        self.path = paths.local(path) if path else None
        self.values = (read(path) if grows else {}) | provenance.provenance() | conditions
        if self.path:  # a folder that cannot be made fails before any work
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **parts: Any) -> None:
        """Puts these parts in place of those of the same names, and writes the file."""
        self.values |= parts
        if self.path:
            json_files.write_json(self.path, self.values)


def read(path: str | os.PathLike[str] | None) -> Json:
    """What the file holds; nothing where there is none. Raises ValueError for no JSON object."""
    if not path or not (file := paths.local(path)).exists():
        return {}
    return json_files.read_object(file, {}, "delete it, or put a whole one there")
