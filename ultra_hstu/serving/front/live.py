"""The model that answers now, and the newer one that takes its place while requests go on.

A newer model is loaded and compiled beside the other; then one assignment puts it in its place.
Requests that were taken before are answered by the model that took them, so that none waits, none
is lost, and no answer is made by two models.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ultra_hstu.serving.front.page import Page
from ultra_hstu.serving.inputs import Query
from ultra_hstu.serving.schema import AboutUser, Response, ScoreResponse
from ultra_hstu.serving.service import (
    RecommendService,
    ScoreService,
    Service,
    ServingOptions,
    open_service,
)
from ultra_hstu.workdir import Workdir

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Model[R: AboutUser, A: Response | ScoreResponse]:
    """A service that is ready, its page, and its version, which answers name."""

    service: Service[R, A]
    page: Page | None
    version: str


@dataclasses.dataclass(frozen=True, eq=False)
class Asked[R: AboutUser, A: Response | ScoreResponse]:
    """A query, and the model that has looked up its ids and answers it."""

    model: Model[R, A]
    query: Query


def place_of(workdir: str) -> Path:
    """Where the model lies that a path means now: a link is followed, and of a run over windows it
    is the newest finished one. Raises ValueError for a run over windows that has none."""
    path = Path(workdir).resolve()
    if path.is_file():
        return path
    folder = Workdir(path)
    newest = folder.newest()
    if newest is folder and folder.windows:
        raise ValueError(f"{path} has no finished window yet: train it first")
    return newest.path


class Live[R: AboutUser, A: Response | ScoreResponse]:
    """Answers with the newest model of a path.

    Attributes:
      model: the one that takes requests now.
      problem: why a newer one could not take its place; None: nothing is amiss.
    """

    def __init__(self, workdir: str, raw_dir: str | None, options: ServingOptions, *, page: bool):
        """
        Args:
          page: whether there is a page to try the model with.
        """
        self._workdir, self._raw_dir, self._options, self._page = workdir, raw_dir, options, page
        self._place = place_of(workdir)
        self.model: Model[R, A] = self._load(self._place)
        self.problem: str | None = None

    def _load(self, place: Path) -> Model[R, A]:
        service = open_service(str(place), self._raw_dir, self._options)
        service.warm_up()
        page = Page(service) if self._page else None
        return Model(service, page, version(service, place))  # type: ignore[arg-type]

    def renew(self) -> bool:
        """Takes a newer model, if the path means another one now. Returns whether it did.

        One that cannot be served is named in `problem` and the log; the other goes on.
        """
        try:
            place = place_of(self._workdir)
            if place == self._place:
                return False
            model: Model[R, A] = self._load(place)
        except (ValueError, OSError) as error:
            if self.problem != str(error):
                log.error("%s goes on, its newer model cannot be served: %s", self.version, error)
            self.problem = str(error)
            return False
        log.warning("%s takes the place of %s", model.version, self.version)
        self.model, self._place, self.problem = model, place, None
        return True

    def follow(self, seconds: float) -> None:
        """Renews in a thread of its own, looking every so many seconds."""

        def look() -> None:
            while True:
                time.sleep(seconds)
                self.renew()

        threading.Thread(target=look, daemon=True, name="follow").start()

    @property
    def version(self) -> str:
        return self.model.version

    def prepare(self, request: R) -> Asked[R, A]:
        """As of a `Service`, which is the one that answers."""
        model = self.model
        return Asked(model, model.service.prepare(request))

    @staticmethod
    def answer(asked: Sequence[Asked[R, A]]) -> list[A]:
        """The answers, in order: one call for each model that has been asked."""
        models = {id(one.model.service): one.model.service for one in asked}
        answers = {
            key: iter(service.answer([one.query for one in asked if one.model.service is service]))
            for key, service in models.items()
        }
        return [next(answers[id(one.model.service)]) for one in asked]


def version(service: RecommendService | ScoreService, place: Path) -> str:
    """The name of a model's folder (or file), and the step that it was trained to."""
    if service.data is None:
        return place.name
    return f"{place.name}:{service.data.step}"
