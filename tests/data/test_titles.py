"""Items are found by words of their titles, in bounded time."""

import numpy as np
import pytest

from ultra_hstu.data import titles
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.titles import TitleSearch

TITLES = {
    30: "Amélie (Fabuleux destin d'Amélie Poulain, Le) (2001)",
    10: "Star Wars (1977)",
    50: "Starship Troopers (1997)",
    20: "Wars of the Stars (1977)",
    40: "Rockstar Wars",
    60: "千と千尋の神隠し",
    70: "",
    1977: "???",
}
EVENTS = {10: 1, 20: 9, 40: 30}


def search_of(titles=True):
    ids = np.array(list(TITLES))
    catalog = Catalog.from_ids(ids, list(TITLES.values()) if titles else None)
    counts = np.array([EVENTS.get(raw, 0) for raw in catalog.raw_ids.tolist()])
    return TitleSearch(catalog, counts)


def found(search, text, limit=9):
    return search._catalog.decode(search.find(text, limit).items).tolist()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("star wars", [20, 10, 40]),  # words that begin words, then the others; most events first
        ("WARS,  star!", [20, 10, 40]),
        ("wars 1977", [20, 10]),
        ("amelie", [30]),
        ("AMÉLIE", [30]),
        ("d'amelie", [30]),
        ("千尋", [60]),
        ("70", [70]),  # the id of an item without a title
        ("1977", [1977, 20, 10]),  # the item of this id comes first
        (" 10 ", [10]),
        ("star trek", []),
        ("-!", []),
        ("???", []),
        ("9" * 256, []),
        ("\x00", []),
        ("  ", [40, 20, 10, 30, 50, 60, 70, 1977]),
    ],
)
def test_titles_are_found(text, ids):
    assert found(search_of(), text) == ids


def test_ids_stand_in_for_titles_that_are_not_there():
    assert found(search_of(titles=False), "0") == [40, 20, 10, 30, 50, 60, 70]
    strings = TitleSearch(Catalog.from_ids(np.array(["blue_mug", "mug", "red mug"])))
    assert found(strings, "Mug") == ["blue_mug", "mug", "red mug"]
    assert found(strings, "mug")[0] == "mug"  # the id itself


def test_a_search_is_bounded(monkeypatch):
    search = search_of()
    few = search.find("wars", 2)
    assert (len(few.items), few.count, few.complete) == (2, 3, True)
    monkeypatch.setattr(titles, "_BLOCK", 2)
    monkeypatch.setattr(titles, "SEARCH_S", -1)  # time for one block: the items with most events
    late = search_of().find("wars", 9)
    assert (len(late.items), late.count, late.complete) == (2, 2, False)
