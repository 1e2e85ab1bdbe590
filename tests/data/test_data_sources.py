"""Every source, read from small files in its official format."""

import logging
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.data_files import KUAIRAND_HEADER, ML1M_RATINGS, kuairand_line, load, ml1m, write
from ultra_hstu.config import SyntheticConfig
from ultra_hstu.data.synthetic import draw_likes, draw_stream
from ultra_hstu.data.table import prepared

ROOT = Path(__file__).parents[2]


def test_movielens_1m(tmp_path):
    data = load(tmp_path, "ml-1m", ml1m(tmp_path / "raw"))
    assert data.users.tolist() == [1, 2] and data.offsets.tolist() == [0, 3, 6]
    assert data.catalog.raw_ids.tolist() == [-1, 10, 20, 30, 40]  # 40 was never rated
    assert data.catalog.titles == ("", "Heat (1995)", "Misérables, Les (1995)", "M::A::S::H", "Ran")
    assert data.catalog.decode(data.items).tolist() == [
        30,
        10,
        20,
        10,
        30,
        20,
    ]  # ties in the order of the file
    assert data.timestamps.tolist() == [90, 100, 100, 60, 70, 80]
    assert data.actions["rating"].tolist() == [3, 5, 4, 2, 1, 3]
    assert (data.items.dtype, data.timestamps.dtype, data.actions["rating"].dtype) == (
        np.int32,
        np.int64,
        np.float32,
    )
    assert data.history(2) == slice(3, 6) and data.history("1") == slice(0, 3)
    for unknown in (3, -1, 10**20, "3", "Ann"):
        with pytest.raises(
            ValueError, match=f"unknown user '?{unknown}'?: there are 2 users .* 1 to 2"
        ):
            data.history(unknown)


def test_movielens_100k(tmp_path):
    write(
        tmp_path / "raw/u.data", ["7\t2\t3\t881250949", "7\t1\t5\t881250948", "7\t3\t1\t881250950"]
    )
    rest = "|01-Jan-1995||http://example" + "|0" * 19
    write(
        tmp_path / "raw/u.item", [f"1|Toys{rest}", f"2|Três{rest}", f"3|unknown{rest}"], "latin-1"
    )
    data = load(tmp_path, "ml-100k", tmp_path / "raw")
    assert data.catalog.titles == ("", "Toys", "Três", "unknown")
    assert data.items.tolist() == [1, 2, 3] and data.actions["rating"].tolist() == [5, 3, 1]


def test_movielens_20m(tmp_path):
    write(
        tmp_path / "raw/ratings.csv",
        ["userId,movieId,rating,timestamp", "3,5,0.5,9", "3,6,4.5,8", "3,5,3.0,10"],
    )
    write(
        tmp_path / "raw/movies.csv",
        ["movieId,title,genres", '5,"American ""President"", The (1995)",Comedy', "6,Amélie,Drama"],
    )
    data = load(tmp_path, "ml-20m", tmp_path / "raw")
    assert data.catalog.titles == ("", 'American "President", The (1995)', "Amélie")
    assert data.items.tolist() == [2, 1, 1] and data.actions["rating"].tolist() == [4.5, 0.5, 3.0]


def test_ids_survive_exactly(tmp_path):
    big = [2**24, 2**24 + 1, 2**53, 2**53 + 1, 2**63 - 1]
    ratings = [
        f"{user}::{movie}::4::{time}"
        for user in (2**53, 2**53 + 1)
        for time, movie in enumerate(big)
    ]
    data = load(
        tmp_path, "ml-1m", ml1m(tmp_path / "raw", ratings, [f"{movie}::T::G" for movie in big])
    )
    assert data.users.tolist() == [2**53, 2**53 + 1]
    assert data.catalog.raw_ids[1:].tolist() == big
    assert data.catalog.decode(data.items).tolist() == big * 2
    assert data.catalog.encode(big).tolist() == [1, 2, 3, 4, 5]


def test_amazon_books_is_filtered_as_in_hstu(tmp_path):
    # u1..u5 rate b1..b5 (all kept). u6 rates 4 kept books and a rare one: first 5, then 4.
    # b6 gets its 5 ratings from u1 and from four users with too few, so it stays for u1 alone.
    rows = [(f"u{u}", f"b{b}", 5.0, 10 * u + b) for u in range(1, 6) for b in range(1, 6)]
    rows += [("u6", f"b{b}", 4.0, b) for b in range(1, 5)] + [("u6", "rare", 4.0, 9)]
    rows += [("u1", "b6", 1.0, 99)] + [(f"few{k}", "b6", 2.0, k) for k in range(4)]
    write(tmp_path / "raw/ratings_Books.csv", [f"{u},{b},{r},{t}" for u, b, r, t in rows])
    data = load(tmp_path, "amazon-books", tmp_path / "raw")
    assert data.users.tolist() == ["u1", "u2", "u3", "u4", "u5"]
    assert data.catalog.raw_ids.tolist() == ["", "b1", "b2", "b3", "b4", "b5", "b6"]
    assert np.diff(data.offsets).tolist() == [6, 5, 5, 5, 5]
    last = data.history("u1").stop - 1
    assert (
        data.catalog.decode(data.items[last : last + 1]).tolist() == ["b6"]
        and data.actions["rating"][last] == 1
    )
    for unknown in ("u6", 6):
        with pytest.raises(ValueError, match=f"unknown user '?{unknown}'?: .* 'u1' to 'u5'"):
            data.history(unknown)
    write(tmp_path / "raw/ratings_Books.csv", ["u1,b1,5.0,1"] * 4)
    with pytest.raises(ValueError, match="no user is left .*: 3 events that repeat"):
        load(tmp_path, "amazon-books", tmp_path / "raw")


def test_amazon_beauty(tmp_path, caplog):
    write(tmp_path / "raw/Beauty.txt", ["1 1 2 3 2", "2 4 1 5", "3 1 2"])
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path, "amazon-beauty", tmp_path / "raw")
    assert "dropped 2 events of users with fewer than 3 events" in caplog.text
    assert data.timestamps is None and data.actions == {} and data.num_items == 5
    assert data.items.tolist() == [
        1,
        2,
        3,
        2,
        4,
        1,
        5,
    ]  # repeats are kept, the order is that of the file


def test_assistments(tmp_path):
    for k in range(1, 6):
        lines = [f"{k},{900 + k}", "7,7,3000000000", "2,2,5", "0,1,1"]
        write(tmp_path / f"raw/fold{k}.csv", lines)
    data = load(tmp_path, "assistments-2017", tmp_path / "raw")
    assert data.users.tolist() == [1, 2, 3, 4, 5]
    assert data.catalog.raw_ids.tolist() == [-1, 7, 3000000000]
    assert data.items.tolist() == [1, 1, 2] * 5
    assert (
        data.actions["correct"].tolist() == [0, 1, 1] * 5
        and data.actions["skill"].tolist() == [2, 2, 5] * 5
    )


def test_kuairand_joins_its_logs_and_keeps_every_signal(tmp_path, caplog):
    first = [
        kuairand_line(0, 5, 1_649_000_000_900, is_click=1, play_time_ms=70_000),
        kuairand_line(0, 0, 1_649_000_000_100),
    ]
    first += first[:1]  # an exact repetition
    second = [
        kuairand_line(0, 5, 1_650_000_000_000, is_like=1, tab=14),
        kuairand_line(1, 0, 1_650_000_000_000),
    ]
    write(tmp_path / "raw/log_standard_4_08_to_4_21_pure.csv", [KUAIRAND_HEADER, *first])
    write(tmp_path / "raw/log_standard_4_22_to_5_08_pure.csv", [KUAIRAND_HEADER, *second])
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path, "kuairand-pure", tmp_path / "raw")
    assert "dropped 1 events that repeat" in caplog.text
    assert data.users.tolist() == [0] and data.catalog.raw_ids.tolist() == [-1, 0, 5]
    assert data.items.tolist() == [1, 2, 2]  # ordered by the millisecond within one second
    assert data.timestamps.tolist() == [1_649_000_000, 1_649_000_000, 1_650_000_000]
    assert len(data.actions) == 14 and {values.dtype for values in data.actions.values()} == {
        np.dtype(np.int32)
    }
    assert data.actions["is_click"].tolist() == [0, 1, 0] and data.actions[
        "play_time_ms"
    ].tolist() == [0, 70_000, 0]
    assert data.actions["is_like"].tolist() == [0, 0, 1] and data.actions["tab"].tolist() == [
        0,
        0,
        14,
    ]


@pytest.mark.parametrize("source", ["kuairand-1k", "kuairand-27k"])
def test_kuairand_variants_have_their_own_files(tmp_path, source):
    with pytest.raises(ValueError, match=f"lacks log_standard_.*_{source.split('-')[1]}"):
        load(tmp_path, source, tmp_path)


def test_synthetic_stream():
    settings = SyntheticConfig(
        users=4000, length=32, items=1000, categories=50, prior_categories=3, seed=1
    )
    items = draw_stream(settings)
    assert items.shape == (4000, 32) and items.min() == 0
    released = (0.4 + 0.6 * np.arange(4000) / 4000) * 1000
    assert (items < released[:, None]).all()
    assert (
        items[-400:].max() > 950 and items[:400].max() > 350
    )  # the whole of what is released is used
    kinds = [len(set(row)) for row in (items % 50).tolist()]
    assert max(kinds) == 3 and min(kinds) == 1
    np.testing.assert_array_equal(items, draw_stream(settings))
    assert (items != draw_stream(SyntheticConfig(4000, 32, 1000, 50, 3, seed=2))).any()


def test_synthetic_follows_the_dirichlet_process():
    """With a = 1, position 2 repeats the category of position 1 with probability 1/2 or more."""
    settings = SyntheticConfig(20_000, 2, 200, 20, 20, released_at_start=1.0, max_concentration=1.0)
    kinds = draw_stream(settings) % 20
    same = (kinds[:, 0] == kinds[:, 1]).mean()
    # 1/2 + 1/2 * E[sum of H_c^2]; a flat Dirichlet over k categories has 2 / (k + 1), k ~ U{1..20}
    expected = 0.5 + 0.5 * np.mean([2 / (k + 1) for k in range(1, 21)])
    assert abs(same - expected) < 4 * np.sqrt(0.25 / 20_000)


def test_synthetic_likes_follow_tastes():
    """A record's likes of a category agree with one another, and with nothing else."""
    settings = SyntheticConfig(users=400, length=60, items=100, categories=2, seed=1)
    items = draw_stream(settings).reshape(-1) + 1
    liked_UN = draw_likes(settings, items).reshape(400, 60)
    of_first_UN = (items.reshape(400, 60) - 1) % 2 == 0
    assert liked_UN.dtype == np.int32 and abs(liked_UN.mean() - 0.5) < 0.05
    rate_U = (liked_UN * of_first_UN).sum(1) / np.maximum(of_first_UN.sum(1), 1)
    known_U = of_first_UN.sum(1) > 20
    assert known_U.sum() > 100 and abs(np.abs(rate_U[known_U] - 0.5).mean() - 0.3) < 0.05
    assert 0.3 < (rate_U[known_U] > 0.5).mean() < 0.7
    np.testing.assert_array_equal(liked_UN.reshape(-1), draw_likes(settings, items))


def test_synthetic_loads_and_depends_on_its_settings(tmp_path):
    small = SyntheticConfig(users=20, length=8, items=60, categories=5)
    data = load(tmp_path, "synthetic", synthetic=small)
    np.testing.assert_array_equal(data.items.reshape(20, 8), draw_stream(small) + 1)
    assert data.num_items == 60 and data.catalog.titles[6] == "item 6 of category 1"
    assert data.timestamps.tolist() == list(range(160))
    assert set(data.actions) == {"is_like"} and len(data.actions["is_like"]) == 160
    other = load(
        tmp_path,
        "synthetic",
        synthetic=SyntheticConfig(users=20, length=8, items=60, categories=5, seed=1),
    )
    assert (other.items != data.items).any()
    with pytest.raises(ValueError, match="only 24 of 60 items are released at the start"):
        load(tmp_path, "synthetic", synthetic=SyntheticConfig(items=60, categories=25))
    with pytest.raises(ValueError, match="reads no raw_dir"):
        load(tmp_path, "synthetic", tmp_path, synthetic=small)


def test_a_prepared_set_is_read_again_and_a_changed_file_is_prepared_afresh(tmp_path, monkeypatch):
    raw = ml1m(tmp_path / "raw")
    first = load(tmp_path, "ml-1m", raw)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "from_sources", lambda *_: pytest.fail("prepared a second time"))
        np.testing.assert_array_equal(load(tmp_path, "ml-1m", raw).items, first.items)
    ml1m(raw, [*ML1M_RATINGS[:-1], "2::40::3::80"])
    assert load(tmp_path, "ml-1m", raw).items.tolist() == [*first.items[:-1].tolist(), 4]


def test_a_killed_build_leaves_nothing_that_is_read(tmp_path):
    raw = ml1m(tmp_path / "raw")
    program = f"""
import os, signal
from ultra_hstu.config import DataConfig
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.data.table import prepared
prepared.sums.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
data_dir = {str(tmp_path / "prepared")!r}
load_interactions(DataConfig(source="ml-1m", raw_dir={str(raw)!r}, data_dir=data_dir))
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -signal.SIGKILL
    assert list((tmp_path / "prepared").glob("*.incomplete"))
    assert load(tmp_path, "ml-1m", raw).num_events == 6
    assert not list((tmp_path / "prepared").glob("*.incomplete"))


def test_tensorflow_is_never_imported(tmp_path):
    program = f"""
import sys
from ultra_hstu.config import DataConfig, SyntheticConfig
from ultra_hstu.data.interactions import load_interactions
stream = SyntheticConfig(users=4, length=4, items=20, categories=4)
config = DataConfig(data_dir={str(tmp_path)!r}, synthetic=stream)
print(*(load_interactions(config).num_events for _ in range(2)), "tensorflow" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "16 16 False\n"
