"""Every command that a page, a docstring or the Makefile shows exists and takes those flags."""

import collections
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path for folder in ("experiments", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))
]
# A command, and lines of it that begin with a flag.
COMMAND = re.compile(
    r"(?:python|\$\(PY\)) -m ([a-z_]+(?:\.[a-z_]+)+)([^`#\n]*(?:\n +\[?--[^`#\n]*)*)"
)
FLAG = re.compile(r"(--[\w.]+)(=\"[^\"]*\"|=[^\s\]\"]+)?")
PLACEHOLDERS = {"=...": "=ml1m_hstu", "=NAME": "=ml1m_hstu", "=N": "=2", "=I": "=0"}

# Runs each module up to its `command.run`, which parses the flags and does no more.
PARSE = """
import json, runpy, sys
from absl import flags
from experiments import command
known = set(flags.FLAGS)
def parse(*_, **__):
    flags.FLAGS(sys.argv)
command.run = parse
for module, arguments in json.load(sys.stdin):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    except Exception as error:
        print(module, *arguments, "->", error)
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
"""


def documented():
    """(module, flags) of every command."""
    found = collections.defaultdict(list)
    for path in [*PAGES, *SOURCES]:
        for module, rest in COMMAND.findall(path.read_text()):
            arguments = [
                name + PLACEHOLDERS.get(value, value).replace('"', "")
                for name, value in FLAG.findall(rest)
            ]
            if arguments not in found[module]:
                found[module].append(arguments)
    return {
        module: found[module]
        for module in found
        if module.split(".")[0] in ("experiments", "scripts")
    }


def test_documented_commands_parse():
    commands = documented()
    shown = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in SOURCES}
    assert commands.keys() <= shown
    runnable = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for path in SOURCES
        if "command.run(main" in path.read_text()
    }
    assert runnable == commands.keys(), "a command that nothing shows, or one that is none"
    several = [(module, arguments) for module in commands for arguments in commands[module]]
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(several),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    # A page may name a command without all that it needs.
    failed = [line for line in done.stdout.splitlines() if "must have a value" not in line]
    assert done.returncode == 0 and not failed, "\n".join(failed) + done.stderr


def test_modules_that_pages_name_exist():
    for path in [*PAGES, *SOURCES]:
        for name in re.findall(r"\b(?:scripts|experiments)(?:\.[a-z_]+)+", path.read_text()):
            folder, _, last = name.rpartition(".")
            modules = {ROOT / (name.replace(".", "/") + end) for end in (".py", "/__init__.py")}
            inside = ROOT / (folder.replace(".", "/") + ".py")
            assert (
                any(module.exists() for module in modules)
                or (inside.exists() and last in inside.read_text())
                or (ROOT / name).exists()
            ), f"{path}: {name}"
