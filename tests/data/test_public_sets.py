"""Public sets, read from small files in their publishers' formats."""

import dataclasses
import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests import commands
from tests.data.data_files import KUAIRAND_HEADER, kuairand_line, load, write
from tests.data.official_files import OFFICIAL
from ultra_hstu.config import Config, DataConfig
from ultra_hstu.data import raw, sources
from ultra_hstu.data.amazon import CATEGORIES
from ultra_hstu.table_config import TableConfig

A, B = "A0000000000001", "A0000000000002"
ITEMS = ("B000000001", "B000000002", "0000000003")
EVENTS = [
    (user, item, 1 + place, 1_400_000_000 + 100 * place)
    for user in (A, B)
    for place, item in enumerate(ITEMS)
]
REVIEWS = [
    {"reviewerID": u, "asin": i, "reviewerName": "N", "reviewText": "t", "overall": float(stars),
     "summary": "s", "unixReviewTime": seconds, "reviewTime": "05 13, 2014"}
    for u, i, stars, seconds in EVENTS
]  # fmt: skip
PRODUCTS = {
    "2014": [
        {"asin": ITEMS[0], "title": "Soap, 'fine'", "price": 3.5, "imUrl": "http://x",
         "brand": "Sud", "related": {"also_viewed": [ITEMS[1]]}, "categories": [["Beauty", "Bath"],
         ["Beauty"]]},
        {"asin": ITEMS[2], "imUrl": "http://y", "categories": [["Books"]]},
    ],
    "2018": [
        {"category": ["Beauty", "Bath"], "tech1": "", "description": [], "title": "Soap",
         "also_buy": [], "brand": "Sud", "main_cat": "All Beauty", "price": "$1,012.99",
         "asin": ITEMS[0], "imageURL": []},
        {"category": [], "title": "Oil", "brand": "", "price": ".a-box{}", "asin": ITEMS[2],
         "main_cat": "All Beauty"},
    ],
    "2023": [
        {"main_category": "All Beauty", "title": "Soap", "average_rating": 4.8,
         "rating_number": 10, "features": [], "price": 7.5, "images": [], "store": "Sud",
         "categories": ["Beauty", "Bath"], "details": {}, "parent_asin": ITEMS[0]},
        {"main_category": None, "title": "Oil", "price": "from 14.99", "store": None,
         "categories": [], "parent_asin": ITEMS[2], "rating_number": 1},
    ],
}  # fmt: skip


def packed(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))
    return path.parent


def ratings(release):
    if release == "2014":
        return [f"{u},{i},{r}.0,{t}" for u, i, r, t in EVENTS]
    if release == "2018":
        return [f"{i},{u},{r}.0,{t}" for u, i, r, t in EVENTS]
    rows = [f"{u},{i},{r}.0,{t}123" for u, i, r, t in EVENTS]
    return ["user_id,parent_asin,rating,timestamp", *rows]


def reviews(release):
    more = {"2014": {"helpful": [0, 1]}, "2018": {"verified": True, "style": {"Size:": " 3"}}}
    return [json.dumps(review | more[release]) for review in REVIEWS]


def products(release):
    return [repr(one) if release == "2014" else json.dumps(one) for one in PRODUCTS[release]]


CATEGORY = {"2014": "Beauty", "2018": "All_Beauty", "2023": "All_Beauty"}
RATINGS = {"2014": "ratings_Beauty.csv", "2018": "All_Beauty.csv", "2023": "All_Beauty.csv.gz"}
CORES = {
    "2014": "reviews_Beauty_5.json.gz",
    "2018": "All_Beauty_5.json.gz",
    "2023": "All_Beauty.csv.gz",
}
METADATA = {
    "2014": "meta_Beauty.json.gz",
    "2018": "meta_All_Beauty.json.gz",
    "2023": "meta_All_Beauty.jsonl.gz",
}


def put(folder, name, lines):
    return (
        packed(folder / name, lines) if name.endswith(".gz") else write(folder / name, lines).parent
    )


def rows_of(source):
    types = source.types
    return [row for batch in source.batches(types) for row in batch.to_pylist()]


def opened(source, folder):
    return sources.PUBLIC[source].open(DataConfig(source=source, raw_dir=str(folder)))


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("release", CATEGORIES)
def test_amazon(tmp_path, release, core):
    lines = reviews(release) if core and release != "2023" else ratings(release)
    folder = put(tmp_path / "raw", (CORES if core else RATINGS)[release], lines)
    packed(folder / METADATA[release], products(release))
    source = f"amazon-{release}/{CATEGORY[release]}{'/5core' if core else ''}"
    data = load(tmp_path, source, folder)
    assert data.users.tolist() == [A, B]
    assert data.catalog.raw_ids.tolist() == ["", *sorted(ITEMS)]
    title = "Soap, 'fine'" if release == "2014" else "Soap"
    assert data.catalog.titles == ("", "" if release == "2014" else "Oil", title, "")
    assert data.catalog.decode(data.items).tolist() == [*ITEMS, *ITEMS]
    assert data.timestamps.tolist() == 2 * [time for *_, time in EVENTS[:3]]
    assert data.actions["rating"].tolist() == [1, 2, 3, 1, 2, 3]
    first, second = rows_of(opened(source, folder).items)
    prices = {"2014": (3.5, None), "2018": (1012.99, None), "2023": (7.5, None)}[release]
    assert (first["price"], second["price"]) == prices
    names = {"2014": ("brand", "categories"), "2018": ("brand", "category")}
    brand, kinds = names.get(release, ("store", "categories"))
    assert first[brand] == "Sud" and not second[brand]
    assert first[kinds] == ["Beauty", "Bath"]


@pytest.mark.parametrize("release", CATEGORIES)
def test_amazon_without_metadata_and_packed_otherwise(tmp_path, release):
    name = RATINGS[release]
    other = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    folder = put(tmp_path / "raw", other, ratings(release))
    data = load(tmp_path, f"amazon-{release}/{CATEGORY[release]}", folder)
    assert data.num_events == 6 and data.catalog.titles is None
    assert data.missing_files == (METADATA[release],)


@pytest.mark.parametrize("given", CATEGORIES)
@pytest.mark.parametrize("release", CATEGORIES)
def test_releases_of_amazon_are_told_apart(tmp_path, release, given):
    """By their content: names of files say nothing."""
    if release == given:
        return
    source = f"amazon-{release}/{CATEGORY[release]}"
    folder = put(tmp_path / "raw", RATINGS[release], ratings(given))
    with pytest.raises(
        ValueError, match=f"line 1: .*This is the release of {given}: .*amazon-{given}/"
    ):
        load(tmp_path, source, folder)
    folder = put(tmp_path / "raw", RATINGS[release], ratings(release))
    packed(folder / METADATA[release], products(given))
    problem = f"unlike metadata of .*release of {release}, .* seems to be of the release of {given}"
    with pytest.raises(ValueError, match=f"{METADATA[release]} has .*{problem}"):
        load(tmp_path, source, folder)
    if "2023" not in (release, given):
        packed(folder / CORES[release], reviews(given))
        with pytest.raises(ValueError, match=f"unlike reviews of .*{release}.*seems .*{given}"):
            load(tmp_path, f"{source}/5core", folder)


@pytest.mark.parametrize(
    ("release", "line", "problem"),
    [
        ("2014", '{"asin": 3', "expected one dict a line, written as Python does"),
        ("2014", "__import__('os').system('true')", "expected one dict a line"),
        ("2018", "{'asin': '0000000003'}", "expected one JSON object a line"),
        ("2018", '{"title": "x"}', "the item has no asin"),
        ("2023", "[]", "expected one JSON object a line"),
        ("2023", "\udcff", "is not UTF-8"),
    ],
)
def test_bad_metadata(tmp_path, release, line, problem):
    folder = put(tmp_path / "raw", RATINGS[release], ratings(release))
    text = "".join(f"{one}\n" for one in [*products(release), line])
    path = folder / METADATA[release].removesuffix(".gz")
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"{path.name}, line 3: .*{problem}"):
        load(tmp_path, f"amazon-{release}/{CATEGORY[release]}", folder)


def test_an_empty_or_foreign_file_of_reviews(tmp_path):
    folder = packed(tmp_path / "raw" / CORES["2018"], ['{"verified": true, "stars": 3}'])
    with pytest.raises(ValueError, match="its reviews lack asin, overall, reviewerID, unixReview"):
        load(tmp_path, "amazon-2018/All_Beauty/5core", folder)
    packed(folder / CORES["2018"], ['{"stars": 3}'])
    with pytest.raises(
        ValueError, match="has stars, unlike reviews of .*2018, which have verified"
    ):
        load(tmp_path, "amazon-2018/All_Beauty/5core", folder)


@pytest.mark.parametrize("name", ["ml-10m", "ml-25m", "ml-32m", "ml-latest", "ml-latest-small"])
def test_movielens(tmp_path, name):
    events = [
        (user, movie, (user + movie) / 2, 1_112_486_027 - movie)
        for user in (1, 2)
        for movie in (1, 2, 3)
    ]
    movies = [
        (1, "Heat, The (1995)", "Crime|Drama"),
        (2, "Amélie (2001) ", "(no genres listed)"),
        (3, "Ran", "War"),
        (4, "M (1931)", "Crime"),
    ]
    folder = tmp_path / "raw"
    if name == "ml-10m":
        write(folder / "ratings.dat", ["::".join(map(str, event)) for event in events])
        write(folder / "movies.dat", ["::".join(map(str, movie)) for movie in movies])
    else:
        rows = [",".join(map(str, event)) for event in events]
        write(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *rows])
        rows = [f'{movie},"{title}",{genres}' for movie, title, genres in movies]
        write(folder / "movies.csv", ["movieId,title,genres", *rows])
    data = load(tmp_path, name, folder)
    assert data.num_items == 4 and data.catalog.titles[1] == "Heat, The (1995)"
    assert data.items.tolist() == [3, 2, 1] * 2
    assert data.actions["rating"].tolist() == [2, 1.5, 1, 2.5, 2, 1.5]
    items = rows_of(opened(name, folder).items)
    assert [one["genres"] for one in items] == [["Crime", "Drama"], [], ["War"], ["Crime"]]
    assert [one["year"] for one in items] == [1995, 2001, None, 1931]


def test_users_and_genres_of_movielens_100k(tmp_path):
    write(tmp_path / "raw/u.data", [f"7\t{movie}\t3\t88125094{movie}" for movie in (1, 2, 3)])
    flags = ["0"] * 19
    flags[1] = flags[8] = "1"
    movies = [f"{k}|T (1995)|01-Jan-1995||http://x|{'|'.join(flags)}" for k in (1, 2, 3)]
    write(tmp_path / "raw/u.item", movies)
    write(tmp_path / "raw/u.user", ["7|24|M|technician|85711", "8|9|F|other|T8H1N"])
    data = load(tmp_path, "ml-100k", tmp_path / "raw")
    assert data.contexts["gender"].tolist() == [2]
    assert data.context_values["occupation"] == ("", "other", "technician")
    assert rows_of(opened("ml-100k", tmp_path / "raw").items)[0]["genres"] == ["Action", "Drama"]
    write(tmp_path / "raw/u.item", [movies[0].replace("|1|", "|2|", 1), *movies[1:]])
    with pytest.raises(ValueError, match="u.item, line 1: each genre must be 0 or 1"):
        load(tmp_path, "ml-100k", tmp_path / "raw")


def yambda(folder, **changes):
    kinds = pa.array(["listen", "like", "listen", "dislike"] * 2).dictionary_encode()
    columns = {
        "uid": pa.array([100] * 4 + [200] * 4, pa.uint32()),
        "timestamp": pa.array([0, 5, 5, 40] * 2, pa.uint32()),
        "item_id": pa.array([7, 7, 8, 8] * 2, pa.uint32()),
        "is_organic": pa.array([1, 1, 0, 0] * 2, pa.uint8()),
        "played_ratio_pct": pa.array([110, None, 30, None] * 2, pa.uint16()),
        "track_length_seconds": pa.array([180, None, 200, None] * 2, pa.uint32()),
        "event_type": kinds,
    }
    folder.mkdir(exist_ok=True)
    pa.parquet.write_table(pa.table(columns | changes), folder / "multi_event.parquet")
    pairs = {
        "artist_id": pa.array([5, 6, 5], pa.uint32()),
        "item_id": pa.array([7, 7, 9], pa.uint32()),
    }
    pa.parquet.write_table(pa.table(pairs), folder / "artist_item_mapping.parquet")
    return folder


@pytest.mark.parametrize("size", ["50m", "500m", "5b"])
def test_yambda(tmp_path, size):
    folder = yambda(tmp_path / "raw")
    data = load(tmp_path, f"yambda-{size}", folder)
    assert data.users.tolist() == [100, 200] and data.catalog.raw_ids.tolist() == [-1, 7, 8]
    assert data.timestamps.tolist() == [0, 5, 5, 40] * 2  # from the first event of the set on
    assert data.actions["event_type"].tolist() == [3, 2, 3, 1] * 2  # dislike, like, listen
    assert data.actions["played_ratio_pct"][:3].tolist()[::2] == [110, 30]
    assert (
        data.features == ("is_organic",) and data.actions["is_organic"].tolist() == [1, 1, 0, 0] * 2
    )
    assert rows_of(opened(f"yambda-{size}", folder).items) == [
        {"item_id": 7, "artist_id": ["5", "6"]},
        {"item_id": 9, "artist_id": ["5"]},
    ]
    tasks = TableConfig(tasks={"like": "event_type==like", "heard": "played_ratio_pct>=50"})
    ranked = load(tmp_path, f"yambda-{size}", folder, table=tasks)
    assert ranked.actions["like"].tolist() == [0, 1, 0, 0] * 2
    assert ranked.actions["heard"][[0, 2]].tolist() == [1, 0]
    pa.parquet.write_table(pa.table({"uid": [1], "item_id": [[2]]}), folder / "multi_event.parquet")
    with pytest.raises(
        ValueError, match="lacks timestamp, .* give multi_event.parquet of the flat"
    ):
        load(tmp_path, f"yambda-{size}", folder)


USER_HEADER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,"
    "follow_user_num,follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,"
    "friend_user_num_range,register_days,register_days_range,"
    + ",".join(f"onehot_feat{k}" for k in range(18))
)


@pytest.mark.parametrize(("name", "matrix"), [("kuairec", "big"), ("kuairec-small", "small")])
def test_kuairec(tmp_path, caplog, name, matrix):
    header = "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio"
    rows = [
        f"{user},{video},{1000 * video},8000,2020-07-05 00:08:23.4,20200705,"
        f"159387890{video}.438,{video / 8}"
        for user in (0, 14)
        for video in (3, 1, 2)
    ]
    lost = ["14,9,1,1,,,,0.5"] if matrix == "small" else []
    write(tmp_path / f"raw/{matrix}_matrix.csv", [header, *rows, *lost])
    write(
        tmp_path / "raw/item_categories.csv",
        ["video_id,feat", '1,"[27, 9]"', "2,[8]", "3,[]", "9,[1]"],
    )
    user = '14,full_active,0,0,0,5,"(0,10]",4,"[1,10)",0,0,107,61-90,' + ",".join("1" * 18)
    write(tmp_path / "raw/user_features.csv", [USER_HEADER, user])
    with caplog.at_level("INFO"):
        data = load(tmp_path, name, tmp_path / "raw")
    assert data.catalog.decode(data.items).tolist() == [1, 2, 3] * 2
    assert data.timestamps.tolist()[:3] == [1_593_878_901, 1_593_878_902, 1_593_878_903]
    assert data.actions["watch_ratio"].tolist() == [0.125, 0.25, 0.375] * 2
    assert data.features == ("video_duration",)
    assert data.contexts["follow_user_num_range"].tolist() == [0, 1]
    assert ("dropped: 1 of 7 events that miss a value" in caplog.text) == bool(lost)
    first = rows_of(opened(name, tmp_path / "raw").items)[0]
    assert first == {"video_id": 1, "feat": ["27", "9"]}
    write(tmp_path / "raw/item_categories.csv", ["video_id,feat", "1,exit()"])
    with pytest.raises(ValueError, match="line 2: expected a video and a list of its categories"):
        load(tmp_path, name, tmp_path / "raw")


def test_videos_of_kuairand(tmp_path):
    log = [
        KUAIRAND_HEADER,
        *(kuairand_line(0, video, 1_649_000_000_000 + video, tab=2) for video in range(3)),
    ]
    write(tmp_path / "raw/log_standard_4_08_to_4_21_pure.csv", log)
    write(tmp_path / "raw/log_standard_4_22_to_5_08_pure.csv", log[:2])
    header = (
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,"
        "server_width,server_height,music_id,music_type,tag"
    )
    write(
        tmp_path / "raw/video_features_basic_pure.csv",
        [header, '0,12,NORMAL,2022-04-10,Web,1.0,9,720,1280,7.0,9.0,"12,65"', "2,3,AD,,,,,,,,,"],
    )
    data = load(tmp_path, "kuairand-pure", tmp_path / "raw")
    assert data.num_items == 3 and data.features == ("tab",)
    first, second = rows_of(opened("kuairand-pure", tmp_path / "raw").items)
    assert first["tag"] == ["12", "65"] and first["author_id"] == "12" and first["music_id"] == "7"
    assert second["tag"] == [] and second["music_id"] is None


def test_steam(tmp_path):
    days = ("2017-12-17", "2018-01-04", "2016-03-01")
    lines = [
        f"{{u'username': u'{user}', u'hours': 3.5, u'products': 5, u'product_id': u'{game}', "
        f"u'page_order': 0, u'date': u'{day}', u'text': u'it\\'s \"fun\"', "
        f"u'early_access': {game == 30}, u'page': 1}}"
        for user in ("Chaos Syren", "é")
        for game, day in zip((10, 20, 30), days, strict=True)
    ]
    folder = packed(tmp_path / "raw/steam_reviews.json.gz", lines)
    game = {"publisher": "P", "genres": ["Action", "Indie"], "app_name": "Lost", "title": "Lost",
            "tags": ["Casual"], "price": "Free to Play", "id": "10", "developer": "K"}  # fmt: skip
    packed(folder / "steam_games.json.gz", [repr(game), repr({"app_name": "no id"})])
    data = load(tmp_path, "steam", folder)
    assert data.users.tolist() == ["Chaos Syren", "é"]
    assert data.catalog.decode(data.items[:3]).tolist() == ["30", "10", "20"]
    assert data.timestamps[0] == 1_456_790_400 and data.actions["hours"][0] == 3.5
    assert data.features == ("early_access",) and data.catalog.titles == ("", "Lost", "", "")
    assert rows_of(opened("steam", folder).items) == [
        {"product_id": "10", "title": "Lost", "genres": ["Action", "Indie"], "tags": ["Casual"],
         "developer": "K", "publisher": "P", "price": None}
    ]  # fmt: skip
    for bad, problem in (("2017-13-01", "date must be a day"), ("", "the review has no date")):
        packed(folder / "steam_reviews.json.gz", [lines[0], lines[1].replace("2018-01-04", bad)])
        with pytest.raises(ValueError, match=f"steam_reviews.json.gz, line 2: {problem}"):
            load(tmp_path, "steam", folder)


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_gowalla(tmp_path, suffix):
    times = ("2010-10-19T23:55:27Z", "2010-10-18T22:17:43Z", "2010-10-17T23:42:03Z")
    lines = [
        f"{user}\t{time}\t30.2359091167\t-97.7951395833\t{place}"
        for user in (0, 1)
        for time, place in zip(times, (22847, 420315, 316637), strict=True)
    ]
    folder = put(tmp_path / "raw", f"loc-gowalla_totalCheckins.txt{suffix}", lines)
    data = load(tmp_path, "gowalla", folder)
    assert data.catalog.decode(data.items[:3]).tolist() == [316637, 420315, 22847]
    assert data.timestamps[0] == 1_287_358_923
    put(
        tmp_path / "raw",
        f"loc-gowalla_totalCheckins.txt{suffix}",
        [lines[0], lines[1].replace("T", " at ")],
    )
    with pytest.raises(ValueError, match="totalCheckins.txt.*, line 2: column 'time' holds"):
        load(tmp_path, "gowalla", folder)


def test_what_is_kept_of_a_public_set_can_be_chosen(tmp_path):
    events = [(u, i, 5, 1_400_000_000 + i) for u in range(1, 6) for i in range(1, 6)]
    events += [(u, 9, 5, 1_400_000_009) for u in (1, 2)]
    lines = [f"A00000000000{u:02},B00000000{i},{r},{t}" for u, i, r, t in events]
    folder = write(tmp_path / "raw/ratings_Beauty.csv", lines).parent
    assert load(tmp_path, "amazon-2014/Beauty", folder).num_items == 6
    core = TableConfig(k_core=5)
    assert load(tmp_path, "amazon-2014/Beauty", folder, table=core).num_items == 5
    for field in ({"user": "x"}, {"items_file": "x"}, {"time_unit": "s"}):
        data = DataConfig(source="amazon-2014/Beauty", table=TableConfig(**field))
        with pytest.raises(
            ValueError, match=f"data.table.{next(iter(field))}=.* does nothing under"
        ):
            Config(data=data).validate()


def test_inspect_shows_the_lengths_of_a_public_sets_histories(tmp_path):
    record = tmp_path / "histories.json"
    record.write_text('{"sets": {"other": {"mean": 1}}}')
    raw = write(tmp_path / "raw/u.item", OFFICIAL["ml-100k"]["u.item"]).parent
    events = [f"{user}\t{1 + k % 3}\t5\t88125094{k}" for user in (1, 2) for k in range(4 + user)]
    write(raw / "u.data", events)
    arguments = [
        "--config.data.source=ml-100k",
        f"--data={raw}",
        f"--record={record}",
        "--picture=",
    ]
    done = commands.run(
        "experiments.inspect", *arguments, f"--config.data.data_dir={tmp_path}/made"
    )
    assert done.returncode == 0, done.stderr
    assert "events 11, mean 5.5, median 5.5, 99 % 6.0, longest 6" in done.stdout
    sets = json.loads(record.read_text())["sets"]
    assert sets["other"] == {"mean": 1} and sets["ml-100k"]["events"] == 11


def test_sets_of_a_publisher_are_downloaded_apart(tmp_path, monkeypatch):
    """Two sets whose files have the same names, each from where its publisher has it."""
    for core in (False, True):
        source = "amazon-2023/All_Beauty" + ("/5core" if core else "")
        lines = ratings("2023")[: 7 if not core else 4]
        site = put(tmp_path / f"site{core}", "All_Beauty.csv.gz", lines)
        packed(site / METADATA["2023"], products("2023"))
        public = sources.PUBLIC[source]
        local = tuple(
            dataclasses.replace(one, url=(site / one.filename).as_uri()) for one in public.downloads
        )
        monkeypatch.setitem(sources.PUBLIC, source, dataclasses.replace(public, downloads=local))
        assert load(tmp_path, source).num_events == len(lines) - 1
    assert load(tmp_path, "amazon-2023/All_Beauty").num_events == 6
    folders = {
        raw.downloads_of(sources.PUBLIC[f"amazon-2023/All_Beauty{c}"], DataConfig()).parent
        for c in ("", "/5core")
    }
    assert len(folders) == 2


@pytest.mark.parametrize("public", sources.SETS, ids=lambda one: one.name)
def test_declarations_hold_together(public):
    """Files come from the downloads, and roles are columns of the files."""
    assert public.downloads and public.events
    archive = any(one.filename.endswith((".zip", ".tar.gz")) for one in public.downloads)
    if not archive:
        names = {one.filename for one in public.downloads}
        assert {*public.files, *public.context_files} == names
    assert all(one.url.startswith(("https://", "http://snap.")) for one in public.downloads)
    assert public.table.time is not None or public.table.time_unit == "none"
    assert public.table.items_file is None and public.table.users_file is None
