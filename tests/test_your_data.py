"""The blocks of docs/your_data.md run, in order, in one namespace; its commands run on a small shop
whose structure is known."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests import commands
from ultra_hstu.data.catalog import Catalog

PAGE = Path(__file__).parent.parent / "docs" / "your_data.md"
SMALL = [
    f"--config.{field}"
    for field in (
        "model.width=16",
        "model.qk_width=16",
        "model.v_width=16",
        "data.max_history=20",
        "loss.negatives=16",
        "train.epochs=8",
        "optim.learning_rate=0.01",
        "data.batch_users=16",
    )
]


def test_the_blocks_run():
    names = {"__name__": "your_data"}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        exec(compile(block, f"{PAGE.name}: {block[:60]!r}", "exec"), names)


def shop(folder: Path, users=200, items=40, length=12):
    """Every user buys around a ring of items, so that the next one is known; all are as popular."""
    rng = np.random.default_rng(0)
    events = []
    for user in range(users):
        item, time = int(rng.integers(items)), 1_600_000_000
        for _ in range(length):
            time += int(rng.integers(1, 10**5))
            events.append((f"u_{user:05d}", f"p_{item:04d}", time, 1 + 4 * (item % 2)))
            item = (item + 1) % items
    rng.shuffle(events)
    lines = ["user_id,item_id,timestamp,rating", *(",".join(map(str, one)) for one in events)]
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    titles = ["item_id,title", *(f'p_{item:04d},"mug, no. {item}"' for item in range(items))]
    (folder / "items.csv").write_text("\n".join(titles) + "\n")


def run(module, *arguments):
    done = commands.run(f"experiments.{module}", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_from_a_file_to_recommendations_by_title(tmp_path):
    shop(tmp_path)
    data = [
        f"--config.data.data_dir={tmp_path}/data",
        f"--config.data.table.items_file={tmp_path}/items.csv",
    ]
    events, folder = tmp_path / "events.csv", tmp_path / "run"
    picture = tmp_path / "inspect.png"
    said, read = run("inspect", f"--data={events}", f"--picture={picture}", *data)
    assert "2,400" in said and "steps an epoch" in said and picture.stat().st_size > 10_000
    assert read.index("preparing") < read.index("columns: user = user_id, item = item_id")
    arguments = ["--config=table", f"--config.data.raw_dir={events}", f"--workdir={folder}"]
    said, read = run("train", *arguments, *data, *SMALL)
    assert "preparing" not in read  # inspect has done so
    result = json.loads((folder / "result.json").read_text())
    assert result["best"]["hr@10"] > 0.9  # of 40 items, 29 unseen: popularity has about a third
    said, _ = run("recommend", f"--workdir={folder}", "--title=mug, no. 7", "--k=1")
    assert "p_0008" in said and "mug, no. 8" in said
    said, _ = run("recommend", f"--workdir={folder}", "--user=u_00042", "--k=2")
    assert "user u_00042" in said and "mug, no. " in said


def test_titles_mean_items():
    ids = np.array(["a", "b", "c", "d"])
    catalog = Catalog.from_ids(ids, ["Blue mug", "Blue mug, large", "", "Pan"])
    for title, raw in {"blue MUG": "a", "large": "b", "pan ": "d"}.items():
        assert catalog.by_title(title) == raw
    with pytest.raises(ValueError, match="2 items .* holds 'mug': .* instead: a 'Blue mug'; b "):
        catalog.by_title("mug")
    many = Catalog.from_ids(np.arange(12), [f"Pan {n}" for n in range(12)])
    with pytest.raises(ValueError, match="9 'Pan 9'; and 2 more$"):
        many.by_title("pan")
    with pytest.raises(ValueError, match="no item has the title 'pot'"):
        catalog.by_title("pot")
    with pytest.raises(ValueError, match="have no titles, give ids"):
        Catalog.from_ids(ids).by_title("pot")


def test_from_a_rule_to_scores(tmp_path):
    shop(tmp_path, users=60)
    folder = tmp_path / "run"
    run(
        "train",
        "--config=table_rank",
        f"--config.data.raw_dir={tmp_path}/events.csv",
        f"--config.data.data_dir={tmp_path}/data",
        "--config.data.table.tasks.like=rating>=4",
        "--config.model.layers=1",
        "--config.model.heads=1",
        f"--workdir={folder}",
        *(one for one in SMALL if "loss" not in one),
    )
    said, _ = run(
        "recommend", f"--workdir={folder}", "--user=u_00003", "--candidates=p_0001,p_0002"
    )
    first, second = (one["scores"]["like"] for one in json.loads(said)["candidates"])
    assert first > 0.5 > second  # odd items are liked
