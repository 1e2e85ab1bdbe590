"""Ctrl-C and SIGTERM: said at once, also inside C code; the second one leaves; the exit codes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import screen
from tests import commands

ROOT = Path(__file__).parents[1]
# Like XLA when it compiles: C code that lets other threads run, and no handler of Python.
IN_C = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
START = "import hashlib, signal, threading, time\nfrom ultra_hstu import signals\nsignals.watch()\n"
READY = "threading.Timer(0.2, lambda: print('ready', flush=True)).start()\n"  # by then it is inside


def start(code):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", START + code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_c_code_is_acknowledged_and_the_second_leaves(number):
    process = start(READY + IN_C)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said = process.stderr.readline()  # comes while the main thread is inside
    assert said.startswith(f"{number.name}: stopping; nothing has to be saved, and it takes 5 s")
    process.send_signal(number)
    _, more = process.communicate(timeout=20)
    assert (process.returncode, more) == (128 + number, "")


def test_without_a_second_one_it_leaves_after_the_time_that_it_said():
    process = start("signals.GRACE_S = 0.1\n" + READY + IN_C)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


PROMISED = """
with signals.stopping(lambda: "stopping: it is saved, in about 3 s") as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(float("SECONDS"))
print("saved")
"""


@pytest.mark.parametrize(("seconds", "code", "output"), [("0", 0, "saved\n"), ("60", 143, "")])
def test_what_is_promised_is_done_unless_a_second_one_comes(seconds, code, output):
    process = start(PROMISED.replace("SECONDS", seconds))
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    if code:
        process.send_signal(signal.SIGTERM)
    with process:
        said, errors = process.stdout.read(), process.stderr.read()  # what is buffered, too
    assert (process.returncode, said) == (code, output)
    promise = "SIGINT: stopping: it is saved, in about 3 s. Once more: at once, without saving\n"
    left = "left without saving; the same command goes on from the last checkpoint\n"
    assert errors == promise + left * bool(code)


FORKED = """
child = __import__("os").fork()
if child == 0:
    time.sleep(60)
time.sleep(0.1)
__import__("os").kill(child, signal.SIGTERM)
print(__import__("os").waitpid(child, 0)[1], flush=True)
time.sleep(0.1)
"""


def test_a_signal_to_a_forked_child_is_not_the_parents():
    process = start(FORKED)
    said, errors = process.communicate(timeout=20)
    assert (process.returncode, said, errors) == (0, f"{int(signal.SIGTERM)}\n", "")


def test_the_first_line_comes_before_the_imports_and_a_signal_then_ends_in_order():
    command = [sys.executable, "-m", "experiments.train", "--config=none", "--workdir=none"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        began = time.monotonic()
        first = process.stdout.readline()
        assert time.monotonic() - began < 2
        assert first.startswith("train ") and f"process {process.pid} on" in first
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert errors.startswith("SIGINT: stopping") and "Traceback" not in errors


def test_quiet_commands_and_other_processes_say_nothing(monkeypatch):
    found = commands.run("experiments.train", "--config=none", "--workdir=none", "--quiet")
    assert (found.returncode, found.stdout) == (1, "") and found.stderr.startswith("error: ")
    assert screen.is_silent(["--process=1"]) and not screen.is_silent(["--process=0"])
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert screen.is_silent(["--distributed"]) and not screen.is_silent(["--workdir=run"])
