"""The page to try a service with, static/page.html, and what its routes read."""

import json
import math
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Int, Shaped
from pydantic import JsonValue

from ultra_hstu.data.catalog import first
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.titles import TitleSearch
from ultra_hstu.serving import schema
from ultra_hstu.serving.schema import FoundItem, FoundItems, ItemSearch, KnownUser, UserSearch
from ultra_hstu.serving.service import ScoreService, Service

RECOMMEND, SCORE = "/recommend", "/score"  # the paths of the two kinds of runs


class Page:
    """What the page shows of a service: its items by title, and its users' histories."""

    def __init__(self, service: Service):
        self._service = service
        self._data = None if service.data is None else service.data.interactions
        slots = service.catalog.num_items + 1
        self._count_I = (
            None if self._data is None else np.bincount(self._data.items, minlength=slots)
        )
        self._titles = TitleSearch(service.catalog, self._count_I)
        html = Path(__file__).with_name("static").joinpath("page.html").read_text("utf-8")
        self.html = html.replace("{{run}}", json.dumps(self._run()).replace("<", "\\u003c"))

    def _run(self) -> dict[str, JsonValue]:
        """What the page says of the run."""
        service, data, config = self._service, self._data, self._service.model.config
        run: dict[str, JsonValue] = {
            "path": RECOMMEND,
            "name": config.name,
            "source": config.data.source,
            "items": service.catalog.num_items,
            "users": None if data is None else data.num_users,
            "events": None if data is None else data.num_events,
            "examples": [] if data is None else data.users[:: -(-data.num_users // 3)].tolist(),
            "actions": {
                name: None if data is None else _span(data.actions[name]) for name in service.reads
            },
            "max_history": config.data.max_history,
            "max_k": min(schema.MAX_K, service.catalog.num_items),
            "max_found": schema.MAX_FOUND,
        }
        if isinstance(service, ScoreService):
            words = service.model.vocabulary.contexts
            run |= {"path": SCORE, "tasks": dict(service.model.kinds)}
            run |= {"features": list(service.features)}
            run |= {"context": {name: list(texts[1:]) for name, texts in words.items()}}
        return run

    def items(self, search: ItemSearch) -> FoundItems:
        """The items of a search."""
        found = self._titles.find(search.search, search.limit)
        count_I = self._count_I
        items = [
            FoundItem(
                item=raw,
                title=title,
                events=None if count_I is None else int(count_I[item]),
                features=self._service.catalog.features_of(int(item)),
            )
            for item, raw, title in zip(found.items, *self._named(found.items), strict=True)
        ]
        return FoundItems(items=items, found=found.count, complete=found.complete)

    def user(self, search: UserSearch) -> KnownUser:
        """A user of the data. Raises ValueError for an unknown one."""
        items, times, actions, codes = self._service.user(search.user)
        data = cast(Interactions, self._data)
        newest = slice(max(0, len(items) - schema.MAX_EVENTS), None)
        raw_ids, titles = self._named(items[newest])
        return KnownUser(
            user=first(data.users[data.row(search.user) :]),
            events=len(items),
            history=raw_ids,
            titles=titles,
            times=None if times is None else times[newest].tolist(),
            actions={
                name: [value if math.isfinite(value) else None for value in values[newest].tolist()]
                for name, values in actions.items()
            },
            context={name: data.context_values[name][code] for name, code in codes.items() if code},
        )

    def _named(self, items: Int[np.ndarray, " n"]) -> tuple[list[int | str], list[str | None]]:
        """Raw ids and titles of dense ids."""
        raw_ids, titles = self._service.catalog.decode(items), self._service.catalog.titles
        return raw_ids.tolist(), [None if titles is None else titles[item] for item in items]


def _span(values: Shaped[np.ndarray, " n"]) -> list[JsonValue] | None:
    """The least and the largest of the values, if there are any."""
    finite = values[np.isfinite(values)]
    return [finite.min().item(), finite.max().item()] if finite.size else None
