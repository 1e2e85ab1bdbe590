"""Features of users: read from the publishers' files, and bad lines named."""

import logging

import numpy as np
import pytest

from tests.data.data_files import (
    KUAIRAND_HEADER,
    KUAIRAND_USER_HEADER,
    ML1M_RATINGS,
    ML1M_USERS,
    kuairand_line,
    kuairand_user,
    load,
    ml1m,
    ml1m_zip,
    write,
)
from ultra_hstu.data.download import Download, obtain
from ultra_hstu.data.table import prepared


def test_movielens_1m(tmp_path):
    data = load(
        tmp_path, "ml-1m", ml1m(tmp_path / "raw", users=[ML1M_USERS[2], *ML1M_USERS[:2]])
    )  # in any order
    assert {name: codes.tolist() for name, codes in data.contexts.items()} == {
        "gender": [1, 2],
        "age": [1, 7],
        "occupation": [11, 17],
    }
    assert {codes.dtype for codes in data.contexts.values()} == {np.dtype(np.int32)}
    assert data.context_values["gender"] == ("", "F", "M") and data.context_values["age"] == (
        "",
        "1",
        "18",
        "25",
        "35",
        "45",
        "50",
        "56",
    )
    assert data.context_values["occupation"][1:] == tuple(
        str(k) for k in range(21)
    )  # every documented value, also those that nobody has


def test_sources_without_such_a_file_have_none(tmp_path):
    bare = load(tmp_path, "ml-1m", ml1m(tmp_path / "bare"))
    assert bare.contexts == {} and bare.context_values == {}
    write(
        tmp_path / "raw/u.data", ["7\t2\t3\t881250949", "7\t1\t5\t881250948", "7\t1\t1\t881250950"]
    )
    write(
        tmp_path / "raw/u.item",
        [f"{k}|Toys|01-Jan-1995||http://example" + "|0" * 19 for k in (1, 2)],
        "latin-1",
    )
    write(tmp_path / "raw/users.dat", ["of another release"])
    assert load(tmp_path, "ml-100k", tmp_path / "raw").contexts == {}


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("4::X::25::3::1", "gender must be one of F, M: 'X'"),
        ("4::M::24::3::1", "age must be one of 1, 18, 25, 35, 45, 50, 56: '24'"),
        ("4::M::25::21::1", "occupation must be one of 0, 1, .*, 20: '21'"),
        ("4::M::::3::1", "age is empty"),
        ("four::M::25::3::1", "UserID must be a whole number: 'four'"),
        ("4::M::25::3", "expected 5 fields, UserID::gender::age::occupation::Zip-code, found 4"),
        ("1::M::25::3::1", "user 1 comes a second time"),
    ],
)
def test_a_bad_user(tmp_path, bad, problem):
    raw = ml1m(tmp_path / "raw", users=[*ML1M_USERS, bad, "5::M::25::3::1"])
    with pytest.raises(ValueError, match=f"users.dat, line 4: {problem}"):
        load(tmp_path, "ml-1m", raw)


def test_users_that_the_file_lacks_are_unknown_and_counted(tmp_path, caplog):
    raw = ml1m(
        tmp_path / "raw",
        [*ML1M_RATINGS, "9::10::5::1", "9::20::5::2", "9::30::5::3"],
        users=ML1M_USERS[:2],
    )
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path, "ml-1m", raw)
    assert data.users.tolist() == [1, 2, 9] and data.contexts["age"].tolist() == [1, 7, 0]
    assert (
        "1 of 3 users have no row in" in caplog.text
        and "users.dat, so that their features are unknown: 9" in caplog.text
    )


def kuairand(folder, *users, header=KUAIRAND_USER_HEADER):
    log = [
        KUAIRAND_HEADER,
        *(
            kuairand_line(user, video, 1_649_000_000_000 + video)
            for user in (0, 7)
            for video in range(3)
        ),
    ]
    write(folder / "log_standard_4_08_to_4_21_1k.csv", log)
    write(folder / "log_standard_4_22_to_5_08_1k.csv", log[:2])
    return write(folder / "user_features_1k.csv", [header, *users]).parent


def test_kuairand(tmp_path):
    users = [
        kuairand_user(
            7,
            user_active_degree="full_active",
            follow_user_num_range="(0,10]",
            onehot_feat3="10",
            onehot_feat4="1.0",
        ),
        kuairand_user(
            3,
            user_active_degree="UNKNOWN",
            follow_user_num_range="500+",
            onehot_feat3="9",
            onehot_feat4="",
        ),
        kuairand_user(
            0,
            user_active_degree="high_active",
            follow_user_num_range="0",
            onehot_feat3="1124",
            onehot_feat4="",
        ),
    ]
    data = load(tmp_path, "kuairand-1k", kuairand(tmp_path / "raw", *users))
    assert (
        data.users.tolist() == [0, 7]
        and len(data.contexts) == 26
        and "follow_user_num" not in data.contexts
    )
    assert data.context_values["follow_user_num_range"] == ("", "(0,10]", "0", "500+")
    assert data.contexts["follow_user_num_range"].tolist() == [2, 1]
    assert data.context_values["onehot_feat3"] == ("", "9", "10", "1124") and data.contexts[
        "onehot_feat3"
    ].tolist() == [3, 2]  # as numbers
    assert data.context_values["onehot_feat4"] == ("", "1.0") and data.contexts[
        "onehot_feat4"
    ].tolist() == [0, 1]
    assert data.context_values["user_active_degree"] == (
        "",
        "UNKNOWN",
        "full_active",
        "high_active",
    )


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (kuairand_user(-1), "user_id must lie in 0"),
        (kuairand_user(7), "user 7 comes a second time"),
        (kuairand_user(8)[:-2], "expected 31 fields, .*, found 30"),
        (kuairand_user(8).replace("0,", '"0,', 1), "unexpected end of data|found"),
        ("", "expected 31 fields, .*, found 0"),
    ],
)
def test_a_bad_kuairand_user(tmp_path, bad, problem):
    with pytest.raises(ValueError, match=f"user_features_1k.csv, line 3: .*({problem})"):
        load(
            tmp_path,
            "kuairand-1k",
            kuairand(tmp_path / "raw", kuairand_user(7), bad, kuairand_user(9)),
        )


def test_a_kuairand_file_with_other_columns(tmp_path):
    header = KUAIRAND_USER_HEADER.replace("register_days_range", "days").replace(
        "onehot_feat17", "onehot"
    )
    with pytest.raises(
        ValueError,
        match="user_features_1k.csv, line 1: the header lacks register_days_range, onehot_feat17",
    ):
        load(tmp_path, "kuairand-1k", kuairand(tmp_path / "raw", kuairand_user(7), header=header))


def test_the_fingerprint_covers_features_and_actions(tmp_path):
    def fingerprint(name, ratings=ML1M_RATINGS, users=ML1M_USERS):
        return load(tmp_path, "ml-1m", ml1m(tmp_path / name, ratings, users=users)).fingerprint()[
            "sha256"
        ]

    first = fingerprint("first")
    assert fingerprint("same") == first
    assert fingerprint("older", users=["1::F::18::10::48067", *ML1M_USERS[1:]]) != first
    assert fingerprint("none", users=()) != first
    assert fingerprint("rated", ratings=["1::10::4::100", *ML1M_RATINGS[1:]]) != first


def test_what_an_older_version_prepared_is_not_read(tmp_path, monkeypatch):
    raw = ml1m(tmp_path / "raw", users=ML1M_USERS)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_VERSION", 0)
        patch.setattr(prepared, "read_users", lambda *_: prepared.Contexts())
        assert load(tmp_path, "ml-1m", raw).contexts == {}
    assert load(tmp_path, "ml-1m", raw).contexts["age"].tolist() == [1, 7]


def test_a_download_from_before_is_completed(tmp_path):
    """A folder that holds only the files that an older version unpacked is downloaded again."""
    archive = ml1m_zip(tmp_path / "site" / "ml-1m.zip", tmp_path / "site")
    download = Download(archive.as_uri(), None)
    folder = tmp_path / "raw" / "ml-1m"
    before = obtain([download], ["ratings.dat", "movies.dat"], folder)
    assert not (folder / "users.dat").exists()
    after = obtain([download], ["ratings.dat", "movies.dat", "users.dat"], folder)
    assert (
        folder / "users.dat"
    ).read_text().splitlines() == ML1M_USERS and before.items() < after.items()
    archive.unlink()
    assert obtain([download], ["ratings.dat", "movies.dat", "users.dat"], folder) == after
