"""The pages of the documentation, as a reader would follow them: block after block, in a folder.

What is done with a block is what its fence says. `python` runs, all blocks of a page in one
namespace; one that begins with the path of a file has the names of that file. `diff` is applied to
the text of its files, and the block behind it has the names of the changed files. Each command of
`sh` runs, on a small file in the publisher's format in place of the download, if what it needs is
there: its data, or a run that the page has trained. Of all others (clusters, GPUs, hours) the flags
must exist. `console` shows commands behind `$ `, which run alike, and what they print. Other fences
(json, text, yaml) are shown.
"""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pyarrow
from pyarrow import parquet

from experiments import configs
from experiments.__main__ import COMMANDS
from tests import commands
from tests.data import data_files
from ultra_hstu.config import Config
from ultra_hstu.library import respond
from ultra_hstu.serving.schema import Request, ScoreRequest
from ultra_hstu.serving.service import open_service

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a page may say beside commands of this repository.
OTHERS = ("cd", "export", "git", "pip", "ray", "source", "tensorboard", "wait")
SMALL = ("--config.train.epochs=1", "--config.train.eval_users=16", "--config.data.batch_users=16")
SMALL += ("--config.model.layers=1",)
TRAINED = ("experiments.evaluate", "experiments.recommend", "experiments.export")


def publisher_files(source: str, folder: Path) -> Path | None:
    """Files of a source as its publisher has them: 48 users who walk through 64 items. None: there
    is no small copy of this source."""
    items = [1193, 914, 608, 2858, *range(1, 61)]
    events = [
        (user, items[(7 * user + step) % 64], 3 + (user + step) % 3, 10**9 + 60 * step)
        for user in range(1, 49)
        for step in range(12)
    ]
    if source == "ml-1m":
        ratings = ["::".join(map(str, event)) for event in events]
        movies = [f"{item}::Film {item} (1999)::Drama" for item in sorted(items)]
        users = [f"{user}::F::25::3::55117" for user in range(1, 49)]
        return data_files.ml1m(folder, ratings, movies, users)
    if source == "ml-100k":
        data_files.write(folder / "u.data", ["\t".join(map(str, event)) for event in events])
        flags = "|0" * 19
        lines = [f"{item}|Film {item} (1999)|01-Jan-1999||{flags}" for item in sorted(items)]
        data_files.write(folder / "u.item", lines, "latin-1")
        return folder
    return None


def own_files(folder: Path) -> None:
    """The file that the README trains on, in the place of a reader's own."""
    columns = {"user_id": [f"u_{699 + n // 12:05d}" for n in range(576)]}
    columns |= {"item_id": [f"p_{n * 7 % 64:02d}" for n in range(576)]}
    columns |= {"timestamp": [10**9 + 60 * n for n in range(576)]}
    parquet.write_table(pyarrow.table(columns), folder / "events.parquet")


def check_flags(module: str, arguments: list[str], line: str) -> None:
    """The module defines every flag, and configurations have every field that one names."""
    files = [ROOT / f"{module.replace('.', '/')}.py", ROOT / "experiments" / "command.py"]
    text = "".join(file.read_text() for file in files)
    defined = set(re.findall(r'(?:DEFINE_\w+|define_config)\(\s*"(\w+)"', text)) | {"config"}
    for argument in arguments:
        name, *fields = argument.removeprefix("--").partition("=")[0].split(".")
        assert argument.startswith("--") and name in defined, f"no flag {argument}: {line}"
        found: object = Config()
        for field in fields:
            found = getattr(found, field) if not isinstance(found, dict) else None  # any name


class Page:
    """A page that is followed in a folder. `ran` are the modules of the commands that ran."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.names: dict[str, object] = {"__name__": "page"}
        self.changed: dict[str, object] = {}
        self.variables: dict[str, str] = {}
        self.served = ""
        self.ran: list[str] = []
        own_files(folder)

    def follow(self) -> None:
        for kind, block in FENCE.findall(PAGES[self.name].read_text()):
            kinds = {"python": self.python, "diff": self.diff, "sh": self.shell}
            (kinds | {"console": self.console}).get(kind, str)(block)

    def python(self, block: str) -> None:
        file = re.match(r"# (\S+)\.py\n", block)
        if file and (ROOT / f"{file[1]}.py").exists():
            self.names |= _public(vars(import_module(file[1].replace("/", "."))))
        seen = self.names | self.changed if self.changed else self.names
        exec(compile(block, f"{self.name}: {block[:60]!r}", "exec"), seen)
        self.changed = {}

    def diff(self, block: str) -> None:
        for part in block.split("--- ")[1:]:
            path, *hunks = part.split("@@\n")
            text = (ROOT / path.strip()).read_text()
            for hunk in hunks:
                lines = hunk.splitlines(keepends=True)
                old = "".join(line[1:] for line in lines if line[0] in " -")
                new = "".join(line[1:] for line in lines if line[0] in " +")
                assert text.count(old) == 1, f"{path.strip()} has not one place like this:\n{old}"
                text = text.replace(old, new)
            module = import_module(path.strip().removesuffix(".py").replace("/", "."))
            names = {"__name__": module.__name__}
            exec(compile(text, path.strip(), "exec"), names)
            self.changed |= _public(names)

    def shell(self, block: str) -> None:
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in self.variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if len(words) == 1 and re.match(r"\w+=", words[0]):
                name, _, self.variables[name] = words[0].partition("=")
                continue
            for started in re.split(" '&&?'", " ".join(map(shlex.quote, words))):
                self.command(shlex.split(started), line)

    def console(self, block: str) -> None:
        """Commands behind `$ `, and what they print."""
        lines = [line[2:] for line in block.splitlines() if line.startswith("$ ")]
        self.shell("\n".join(lines))

    def command(self, words: list[str], line: str) -> None:
        while words and (words[0] == "srun" or re.match(r"\w+=|--", words[0])):
            words = words[1:]  # settings of the environment; srun and its flags
        if not words:
            return
        program, *arguments = words
        if program == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(arguments) <= set(targets), line
        elif program == "curl":
            path = next(word for word in arguments if word.startswith("localhost")).split("/")[1]
            self.request(path, json.loads(arguments[arguments.index("-d") + 1]))
        elif program == "ultra-hstu":
            assert arguments[0] in COMMANDS, line
            self.module(f"experiments.{arguments[0]}", arguments[1:], line)
        elif words[:2] == ["python", "-m"]:
            self.module(words[2], words[3:], line)
        else:
            assert program in OTHERS, f"{self.name}: what does this do? {line}"
            for path in re.findall(r"\S+\.txt", line):
                assert (ROOT / path).exists(), line

    def module(self, module: str, arguments: list[str], line: str) -> None:
        flags = dict(word.removeprefix("--").split("=", 1) for word in arguments if "=" in word)
        workdir = self.folder / flags.get("workdir", "none")
        there = module in TRAINED and (workdir / "result.json").exists()
        if module == "experiments.train" and not re.search("parallel|distributed", line):
            named = configs.named(flags["config"]).data.source
            source = flags.get("config.data.source", named)
            raw = publisher_files(source, self.folder / source)
            if raw is not None:
                there, arguments = True, [*arguments, f"--config.data.raw_dir={raw}", *SMALL]
                if "seeds" in flags:  # one will do
                    arguments.append("--seeds=" + flags["seeds"].split(",")[0])
        own = self.folder / flags.get("data", flags.get("config.data.raw_dir", "none"))
        if own.is_file():
            there, small = True, SMALL if module == "experiments.train" else ()
            arguments = [*arguments, *small]
        if module == "experiments.compare":
            there = all((self.folder / run / "config.json").exists() for run in arguments)
            if not there:
                return
        if module == "experiments.serve":
            self.served = str(workdir)
        if not there:
            check_flags(module, arguments, line)
            return
        self.ran.append(module)
        done = commands.run(module, *arguments, folder=self.folder)
        assert done.returncode == 0, f"{self.name}: {line}\n{done.stdout}{done.stderr}"

    def request(self, path: str, request: dict[str, object]) -> None:
        """Fits the schema, and is answered if the page has trained the run that it serves."""
        schema = {"recommend": Request, "score": ScoreRequest}[path]
        schema.model_validate(request)
        if (Path(self.served) / "result.json").exists():
            service = open_service(self.served)
            if service.request_type is schema:
                assert respond(service, request).model_dump_json()
                self.ran.append("curl")


def _public(names: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in names.items() if not name.startswith("__")}
