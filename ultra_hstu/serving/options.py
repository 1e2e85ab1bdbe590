"""How a run is served, and whether it is one that scores or one that recommends."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ultra_hstu.nn.key_values import CacheDtype
from ultra_hstu.quantization import HostKind
from ultra_hstu.serving.inputs import MAX_USERS
from ultra_hstu.workdir import Workdir


def is_ranking(workdir: str) -> bool:
    """Whether a run scores given items; else it recommends. A file is an exported ranker. Raises
    ValueError for a folder without a run."""
    return Path(workdir).is_file() or bool(Workdir(workdir).read_config().rank.tasks)


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """How a run is served.

    Attributes:
      tables, block: of a retrieval run: what the item table is served from; raw ids that are
        recommended to nobody.
      kind: of a ranking run: dtype of the cache.
      host_kind: of a ranking run: dtype of the cache in host memory; None: `kind`.
      host_table: of a ranking run: keeps the item table in host memory, as one of
        `quantization.HOST_KINDS`.
      cache_bytes, device_bytes: memory for encoded users, of the host and (of a ranking run) the
        device.
      drop_blocks: of a ranking run: full histories drop their oldest events in blocks.
      max_users: requests in one device call.
      candidates: of a retrieval run with a mixture of logits: how many items are scored for a user;
        None: as many as it takes to know the best.
    """

    tables: str = "float32"
    block: Sequence[int | str] = ()
    kind: CacheDtype = "same"
    host_kind: CacheDtype | None = None
    host_table: HostKind | None = None
    cache_bytes: int = 2**26
    device_bytes: int = 0
    drop_blocks: bool = False
    max_users: int = MAX_USERS
    candidates: int | None = None

    def check(self, workdir: str) -> None:
        """Raises ValueError for options that this kind of run does not have."""
        ranking = is_ranking(workdir)
        given = {
            "tables": self.tables if self.tables != "float32" else None,
            "block": self.block,
            "candidates": self.candidates,
            "cache_kind": self.kind if self.kind != "same" else None,
            "host_cache_kind": self.host_kind,
            "host_table": self.host_table,
            "device_cache_mib": self.device_bytes // 2**20,
            "drop_blocks": self.drop_blocks,
        }
        reasons = {
            "tables": "it scores the items of a request: keep its table in host memory with "
            "host_table",
            "block": "it scores what it is given, and block hides items from recommendations",
            "candidates": "it scores what it is given",
            "host_table": "it reads its whole table for every request: use tables=int8 or "
            "tables=int4",
        }
        for name, value in given.items():
            if value and ranking == (name in ("tables", "block", "candidates")):
                other, this = ("retrieval", "ranking") if ranking else ("ranking", "retrieval")
                raise ValueError(
                    f"{name}={value} is for {other} runs, and {workdir} is a {this} run. "
                    f"Leave it out: {reasons.get(name, 'it keeps no keys and values')}"
                )
