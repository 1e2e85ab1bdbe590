"""Follows the README on MovieLens-100K in an empty folder, and records what each command prints.

python -m scripts.walkthrough [--raw_dir=PATH] [--record=experiments/results/walkthrough.json]
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import portpicker
from absl import flags

from experiments import command
from experiments.record import Json, Record
from scripts.load.loop import deployment

ROOT = Path(__file__).parents[1]
RUN = "--workdir=runs/ml100k"
COMMANDS = {
    "train": ["--config=ml100k_hstu", "--config.train.protocol=validated", RUN],
    "evaluate": [RUN, "--config.eval.hide=all"],
    "recommend": [RUN, "--user=42", "--k=3"],
}
SERVE = f"ultra-hstu serve {RUN}"
REQUEST = {"history": [50, 181, 172], "k": 2}
WIDTH = "110"  # of the screen, in characters

_RAW_DIR = flags.DEFINE_string("raw_dir", None, "the publisher's files, instead of a download")
_RECORD = command.define_record()


def main(_: list[str]) -> None:
    raw_dir = _RAW_DIR.value and Path(_RAW_DIR.value).absolute()
    target = _RECORD.value and Path(_RECORD.value).absolute()
    os.environ |= {"PYTHONPATH": str(ROOT), "COLUMNS": WIDTH}
    record = Record(target)
    steps: list[Json] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name, arguments in COMMANDS.items():
            local = [f"--config.data.raw_dir={raw_dir}"] if raw_dir and name == "train" else []
            done = subprocess.run(
                [sys.executable, "-m", "experiments", name, *arguments, *local],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            lines = [line.rstrip() for line in done.stdout.replace(f"{folder}/", "").splitlines()]
            steps.append({"command": " ".join(["ultra-hstu", name, *arguments]), "prints": lines})
            print(*lines, sep="\n")
        with deployment("runs/ml100k", port=portpicker.pick_unused_port()) as served:
            sent = urllib.request.Request(
                f"{served.url}/recommend",
                json.dumps(REQUEST).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(sent) as response:
                answer = json.load(response)
    record.add(steps=steps, serve=SERVE, request=REQUEST, response=answer)


if __name__ == "__main__":
    command.run(main)
