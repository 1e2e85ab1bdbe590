"""Own files, changed at random: what a slow definition reads, or an error that says where."""

import csv
import io
import re
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_table import NAMES, ROWS, csv_text, load
from ultra_hstu.data.table.values import MISSING

TEXT = csv_text([(*row[:3], int(row[3]), row[4]) for row in ROWS])
PIECES = [
    *"u1,\n\"; .-é\t'",
    "",
    "\n\n",
    "nan",
    "1e9",
    "1600000003",
    "user_id",
    " u1 ",
    '"a\nb"',
    "0",
]
CHANGES = st.lists(
    st.tuples(st.integers(0, len(TEXT)), st.integers(0, 12), st.sampled_from(PIECES)), max_size=3
)


def slowly(text: str):
    """The histories by user, of items; None where the file should be refused."""
    rows = [row for row in csv.reader(io.StringIO(text), strict=True) if row]
    header = [name.strip() for name in rows[0]]
    if header != list(NAMES) or any(len(row) != len(header) for row in rows):
        return None
    events = []
    for user, item, time, rating, _ in rows[1:]:
        if {user, item, time} & set(MISSING) or not user.strip() or not item.strip():
            return None
        if not re.fullmatch(r" *-?[0-9]{1,18} *", time) or rating in MISSING:
            return None
        events.append((user.strip(), item.strip(), int(time), float(np.float32(rating))))
    if len({len(str(abs(event[2]))) for event in events}) != 1 or events[0][2] < 1e9:
        return None  # units are tested elsewhere
    for place in (0, 1):
        ids = [event[place] for event in events]
        if any(re.fullmatch(r"-?[0-9.]+", one) for one in ids):
            return None  # ids that may be numbers, too
    histories = {}
    for user, item, time, rating in sorted(dict.fromkeys(events), key=lambda event: event[2]):
        if (item, time) not in [event[:2] for event in histories.setdefault(user, [])]:
            histories[user].append((item, time, rating))
    return {user: events for user, events in histories.items() if len(events) >= 3}


@settings(max_examples=60)
@given(CHANGES)
def test_changed_files(changes):
    text = TEXT
    for start, size, piece in changes:
        text = text[:start] + piece + text[start + size :]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "events.csv"
        raw.write_text(text, newline="")
        try:
            data = load(Path(folder), raw)
        except ValueError as error:
            assert re.search(r"events\.csv|data\.table|no user is left", str(error)), error
            return
    try:
        want = slowly(text)
    except (ValueError, csv.Error):
        want = None
    if want is not None:
        ids = data.catalog.decode(data.items).tolist()
        got = list(zip(ids, data.timestamps.tolist(), data.actions["rating"].tolist(), strict=True))
        found = {user: got[data.history(user)] for user in data.users.tolist()}
        assert found == want
