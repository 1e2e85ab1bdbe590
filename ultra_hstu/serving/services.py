"""The service of a run, whichever kind of run it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultra_hstu.serving import exported
from ultra_hstu.serving.capacity import MAX_USERS
from ultra_hstu.serving.retrieval import RecommendationModel
from ultra_hstu.serving.score_service import ScoreService
from ultra_hstu.serving.scoring import ScoringModel
from ultra_hstu.serving.service import Service
from ultra_hstu.serving.trained import RunData
from ultra_hstu.workdir import Workdir


def is_ranking(workdir: str) -> bool:
    """Whether a run scores given items; else it recommends. A file is an exported ranker. Raises ValueError for a folder without a run."""
    return Path(workdir).is_file() or bool(Workdir(workdir).read_config().rank.tasks)


def check_options(
    workdir: str, *, tables: str = "float32", block: Sequence[Any] = (), kind: str = "same"
) -> None:
    """Raises ValueError for options that this kind of run does not have."""
    ranking = is_ranking(workdir)
    if ranking and tables != "float32":
        raise ValueError(
            f"tables={tables} is for retrieval runs, and {workdir} is a ranking run: leave it out"
        )
    if ranking and block:
        raise ValueError(
            f"block hides items from recommendations, and {workdir} is a ranking run, which scores what it is given: leave it out"
        )
    if not ranking and kind != "same":
        raise ValueError(
            f"cache_kind={kind} rounds the keys and values of ranking runs, and {workdir} is a retrieval run: leave it out"
        )


def open_service(
    workdir: str,
    raw_dir: str | None = None,
    *,
    tables: str = "float32",
    block: Sequence[int | str] = (),
    kind: Any = "same",
    cache_bytes: int = 2**26,
    max_users: int = MAX_USERS,
) -> Service | ScoreService:
    """Recommendations of a retrieval run, scores of a ranking run or of the file that `experiments.export` wrote of it.

    Args:
      raw_dir: where the raw data is now, if not where the run found it.
      tables, block: of a retrieval run: what the item table is served from; raw ids that are recommended to nobody.
      kind: of a ranking run: how keys and values of encoded users are kept.
      cache_bytes: memory for encoded users.
      max_users: requests in one device call.

    Raises:
      ValueError: no run, one that cannot be served, or options of the other kind.
    """
    check_options(workdir, tables=tables, block=block, kind=kind)
    if Path(workdir).is_file():
        return ScoreService(
            exported.scoring_model(workdir, kind=kind, max_users=max_users),
            None,
            cache_bytes=cache_bytes,
        )
    data = RunData(workdir, raw_dir)
    if is_ranking(workdir):
        return ScoreService(
            ScoringModel.of_run(data, kind=kind, max_users=max_users), data, cache_bytes=cache_bytes
        )
    model = RecommendationModel(workdir, tables=tables, max_users=max_users)
    blocked = model.catalog.find(block)  # lists outlive items: unknown ids have nothing to block
    if blocked.any():
        model.block(blocked[blocked > 0])
    return Service(model, data, cache_bytes=cache_bytes)
