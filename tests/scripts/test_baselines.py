"""scripts.baselines, on small synthetic data."""

import json

from tests import commands


def test_both_values_of_what_is_hidden_are_recorded(tmp_path):
    fields = {"max_history": 4, "synthetic.users": 60, "synthetic.length": 12}
    record = tmp_path / "record.json"
    done = commands.run(
        "scripts.baselines",
        "--config=synthetic",
        f"--config.data.data_dir={tmp_path}",
        *(f"--config.data.{name}={value}" for name, value in fields.items()),
        f"--record={record}",
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(record.read_text())
    assert written["protocol"] == "published"
    assert [run["eval"]["hide"] for run in written["runs"]] == ["window", "all"]
    names = {"random", "popularity", "last item's neighbours", "item-item"}
    assert all(run["baselines"].keys() == names for run in written["runs"])
    window, every = (run["baselines"]["random"]["repeats"] for run in written["runs"])
    assert window < every, "more is met before where more of the history counts"
