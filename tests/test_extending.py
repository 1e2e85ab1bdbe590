"""The blocks of docs/extending.md run, in order, in one namespace.

A block that begins with the path of a file has that file's names at hand. A diff is applied to the
text of its files, and the block behind it sees what the changed files define.
"""

import re
from importlib import import_module
from pathlib import Path

from ultra_hstu.data import sources

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "extending.md"
BLOCKS = re.findall(r"^```(python|diff)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def public(names):
    return {name: value for name, value in names.items() if not name.startswith("__")}


def patched(diff):
    """The namespaces of the files that a diff changes."""
    for part in diff.split("--- ")[1:]:
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
        yield names


def test_the_blocks_run(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", dict(sources.SOURCES))
    names, changed = {"__name__": "extending"}, {}
    for kind, block in BLOCKS:
        if kind == "diff":
            for found in patched(block):
                changed |= public(found)
            continue
        file = re.match(r"# (\S+)\.py\n", block)
        if file and (ROOT / f"{file[1]}.py").exists():
            names |= public(vars(import_module(file[1].replace("/", "."))))
        seen = names | changed if changed else names
        exec(compile(block, f"{PAGE.name}: {block[:60]!r}", "exec"), seen)
        changed = {}


def test_the_files_that_it_names_exist():
    text = re.sub(r"^```.*?^```$", "", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    for path in re.findall(r"`((?:kernels|ultra_hstu|tests)/[\w/]+(?:\.py|/))`", text):
        assert "NAME" in path or (ROOT / path).exists(), path
