"""Real processes of two CPU devices each train one run.

It has the losses of one process and loses no event, and it ends when one of the processes dies.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src import distributed
from rich.console import Console

from tests.ranking import small_everything
from tests.small_run import small_config, with_
from ultra_hstu.checkpoint import Checkpoints
from ultra_hstu.parallel import processes
from ultra_hstu.report import read_metrics
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir

ROOT = Path(__file__).parents[2]
EPOCHS = 6
FIELDS = dict(
    data__batch_tokens=128, data__placement="stream",
    data__stochastic_length=1.2, data__load_balance=True, data__recalibrate_every=2,
    model__layers=1, model__relative_bias=False, model__implementation="reference",
    loss__negatives=4, parallel__strategy="gather", parallel__groups=4, train__steps_per_call=2,
)  # fmt: skip
FAST = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "2",
}
SAID_OF_LOST = (
    "another process was lost in the middle of the run",
    "another task died",
)  # ours, and JAX's where it ends the process itself
OF_CLUSTERS = ("SLURM_", "OMPI_", "KUBERNETES_", "JAX_COORDINATOR")


def free_port():
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


class Processes:
    """Processes started together, each with a file of what it prints."""

    def __init__(self, folder, commands, environments=None):
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(OF_CLUSTERS)
        } | FAST
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [
            folder / f"output_{number}_{time.monotonic_ns()}" for number in range(len(commands))
        ]
        self.all = []
        for command, more, output in zip(
            commands, environments or [{}] * len(commands), self.outputs, strict=True
        ):
            with open(output, "w") as file:
                self.all.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=clean | more, stdout=file, stderr=subprocess.STDOUT
                    )
                )

    def said(self):
        return [output.read_text() for output in self.outputs]

    def wait(self, seconds):
        """Exit codes; processes that do not end in time are killed."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.all]
        except subprocess.TimeoutExpired:
            raise AssertionError("\n".join(["not ended in time", *self.said()])) from None
        finally:
            for process in self.all:
                process.kill()

    def until(self, epochs, folder, seconds=300):
        """Waits for so many epochs in the metrics."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and all(process.poll() is None for process in self.all):
            if folder.metrics.exists() and len(read_metrics(folder.metrics)) >= epochs:
                return
            time.sleep(0.02)
        for process in self.all:
            process.kill()
        raise AssertionError("\n".join([f"no {epochs} epochs", *self.said()]))


def start(config, workdir, count, data, context, **more):
    fields = FIELDS | dict(parallel__data=data, parallel__context=context, train__epochs=EPOCHS)
    fields |= more
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    common = [
        sys.executable,
        "-m",
        "experiments.train",
        f"--config=tests/small_config.py:{config.data.data_dir}",
        f"--workdir={workdir.path}",
    ]
    port = free_port()
    where = [
        [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={number}"]
        for number in range(count)
    ]
    return Processes(workdir.path.parent, [common + flags + one for one in where])


def config(folder, data, context):
    base = small_config(folder, epochs=EPOCHS)
    return with_(with_(base, **FIELDS), parallel__data=data, parallel__context=context)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a run: in this process, 2 x 4 devices; in four processes, one of them killed.

    In this process every device makes its group's batch; of the four, each reads users of its own.
    """
    root = tmp_path_factory.mktemp("processes")
    alone, killed = Workdir(root / "alone"), Workdir(root / "killed")
    train(config(root / "data", 2, 4), alone.path, console=Console(quiet=True))
    exchanged = dict(parallel__batches="exchanged")  # two processes share the rows of a group
    four = start(config(root / "data", 2, 4), killed, 4, data=2, context=4, **exchanged)
    four.until(2, killed)
    four.all[2].send_signal(signal.SIGKILL)
    started = time.monotonic()
    codes = four.wait(60)
    return alone, killed, codes, four.said(), time.monotonic() - started


def copy(folder, path):
    shutil.copytree(folder.path, path)
    return Workdir(path)


def require_same_losses(folder, expected, epochs=EPOCHS):
    found = read_metrics(folder.metrics)
    assert [record["step"] for record in found] == [
        record["step"] for record in expected[: len(found)]
    ] and len(found) >= epochs
    for record, want in zip(found, expected, strict=False):
        assert record["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert record["mrr"] == pytest.approx(want["mrr"], rel=1e-2)


def test_a_killed_process_ends_the_others_and_their_losses_were_those_of_one_process(runs):
    alone, killed, codes, said, seconds = runs
    assert codes[2] == -signal.SIGKILL and 0 not in codes and seconds < 60
    survivors = [text for number, text in enumerate(said) if number != 2]
    assert all(any(words in text for words in SAID_OF_LOST) for text in survivors), said
    require_same_losses(killed, read_metrics(alone.metrics), epochs=2)


def test_it_goes_on_in_two_processes(runs, tmp_path):
    alone, killed = runs[:2]
    folder = copy(killed, tmp_path / "run")
    two = start(config(alone.path.parent / "data", 2, 2), folder, 2, data=2, context=2)
    assert two.wait(300) == [0, 0], two.said()
    assert "going on from step" in two.said()[0] and "epoch" not in two.said()[1]
    require_same_losses(folder, read_metrics(alone.metrics))
    result, expected = (json.loads(one.result.read_text()) for one in (folder, alone))
    assert result["steps"] == expected["steps"] and result["best"]["mrr"] == pytest.approx(
        expected["best"]["mrr"], rel=1e-2
    )


def test_a_signal_to_one_stops_all_at_the_same_step_and_one_process_goes_on(runs, tmp_path):
    alone, killed = runs[:2]
    folder = copy(killed, tmp_path / "run")
    two = start(config(alone.path.parent / "data", 4, 1), folder, 2, data=4, context=1)
    two.until(3, folder)
    two.all[1].send_signal(signal.SIGTERM)
    assert two.wait(120) == [143, 143], two.said()
    assert "stopped by SIGTERM at step" in two.said()[0] and "Traceback" not in two.said()[1]
    assert len(read_metrics(folder.metrics)) < EPOCHS
    train(config(alone.path.parent / "data", 2, 4), folder.path, console=Console(quiet=True))
    require_same_losses(folder, read_metrics(alone.metrics))


def test_without_the_first_process_the_others_end(runs, tmp_path):
    alone, killed = runs[:2]
    folder = copy(killed, tmp_path / "run")
    two = start(config(alone.path.parent / "data", 4, 1), folder, 2, data=4, context=1)
    two.until(len(read_metrics(folder.metrics)) + 1, folder)
    two.all[0].send_signal(signal.SIGKILL)
    codes = two.wait(60)
    assert codes[0] == -signal.SIGKILL and codes[1] != 0
    assert any(words in two.said()[1] for words in (*SAID_OF_LOST, "process 0"))


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What four tasks of a SLURM step found."""
    folder = tmp_path_factory.mktemp("workers")
    small_everything.write_ratings(folder / "everything" / "raw")
    step = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "4",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    tasks = [
        step | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} for number in range(4)
    ]
    command = [sys.executable, "-m", "tests.parallel.process_worker", str(folder)]
    four = Processes(folder / "outputs", [command] * 4, tasks)
    assert four.wait(300) == [0] * 4, four.said()
    return [json.loads((folder / f"process_{number}.json").read_text()) for number in range(4)]


def test_every_event_is_read_once(workers):
    """Every mesh reads every event; processes that share a group read the same.

    Or, where they exchange rows, each device reads events of its own.
    """
    for mesh, first in workers[0]["read"].items():
        groups = {}
        for worker in workers:
            for number, events in worker["read"][mesh]:
                assert groups.setdefault(number, events) == events, mesh
        data = 8 if "exchanged" in mesh else int(mesh.split("x")[0])
        assert sorted(groups) == list(range(data)) and len(first) == max(data // 4, 1)
        assert sorted(event for events in groups.values() for event in events) == sorted(
            workers[0]["events"]
        ), mesh


def test_all_four_papers_in_one_step_of_four_processes(workers, tmp_path):
    """Their losses on 2 x 4 devices, of which two processes share a group, are those of one."""
    small_everything.write_ratings(tmp_path / "raw")
    expected = small_everything.first_steps(small_everything.everything(tmp_path))
    assert len(expected["loss"]) > 1
    for worker in workers:
        assert worker["everything"] == {
            name: pytest.approx(values, rel=1e-5) for name, values in expected.items()
        }


def test_bad_input_is_told_by_every_process(workers):
    for worker in workers:
        assert worker["errors"] == workers[0]["errors"]
        assert worker["agreed"] == [[0, 1, 2, 3], 10, 3]
    errors = workers[0]["errors"]
    assert (
        "process 3 has another configuration than process 0" in errors["configuration"]
        and "train.seed: 2 -> 3" in errors["configuration"]
    )
    assert "data=3 x context=2 must be the number of devices, 8" in errors["mesh"]
    assert (
        "4 processes with 8 devices" in errors["one device"]
        and "--config.parallel.data" in errors["one device"]
    )
    assert "is no run's folder" in errors["folder"]
    assert (
        "process 2 has another data set than process 0" in errors["data"]
        and "sha256" in errors["data"]
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--distributed", "--distributed found no cluster"),
        (
            "--coordinator=localhost:1 --processes=2 --process=1 --connect_seconds=1",
            "did not all meet at localhost:1 within 1 s",
        ),
    ],
)
def test_who_finds_no_other_says_so(tmp_path, flags, message):
    command = [
        sys.executable,
        "-m",
        "experiments.train",
        f"--config=tests/small_config.py:{tmp_path}",
        f"--workdir={tmp_path / 'run'}",
    ]
    one = Processes(tmp_path, [command + flags.split()])
    assert one.wait(120) == [1] and message in one.said()[0], one.said()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ((None, 2, 1, False), "--coordinator must be given too"),
        (("host:7000", 2, 2, False), "--process=2 must be from 0 to 1"),
        (("host", 2, 1, False), "--coordinator=host must be HOST:PORT"),
        (("host:7000", 2, 1, True), "give the one or the others"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(ValueError, match=message):
        processes.join(*flags[:3], detect=flags[3], seconds=5)


@pytest.mark.parametrize(
    "answer",
    [lambda *_: [None, "c/1: OSError: torn"], TimeoutError("process 1 did not answer within 60 s")],
)
def test_a_checkpoint_that_only_some_can_read_is_an_error(tmp_path, monkeypatch, answer):
    """Else they would go on from different ones.

    Processes that can read it wait inside Orbax for the others, which hear nothing from them.
    """
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"x": jnp.zeros(3)}, {"epoch": 1})
    checkpoints.close()

    def all_gather(*_):
        if isinstance(answer, Exception):
            raise answer
        return answer()

    monkeypatch.setattr(processes, "all_gather", all_gather)
    reader = Checkpoints(tmp_path / "c", read_only=True)
    with pytest.raises(
        ValueError,
        match=r"some processes cannot read a checkpoint.*(torn|did not answer).*delete .*/c/1",
    ):
        reader.restore({"x": jnp.zeros(3)})


class ServiceWithoutProcess0:
    """Stands in for the connection of a process to a coordination service that has ended."""

    def key_value_dir_get(self, folder):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE")


@pytest.mark.parametrize("ending", [False, True])
def test_process_0_may_leave_first_at_the_end_of_a_good_run(monkeypatch, ending):
    """Where a process closes its connection a little later, it must not report a lost process."""
    state = distributed.State()
    state.client, state.coordinator_address = ServiceWithoutProcess0(), "localhost:7000"
    state.process_id, state.num_processes = 1, 2
    monkeypatch.setattr(distributed, "global_state", state)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(processes, "_ending", threading.Event())

    def leave(message, code):
        assert "process 0 at localhost:7000 is gone" in message
        sys.exit(code)

    monkeypatch.setattr(processes, "_leave", leave)
    monkeypatch.setattr(jax.distributed, "shutdown", processes._watch)
    if ending:
        processes.end()
    else:
        with pytest.raises(SystemExit, match=str(processes.LOST)):
            processes._watch()


def test_a_port_that_is_taken():
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(ValueError, match="cannot listen on port"),
    ):
        processes.join(f"localhost:{taken.getsockname()[1]}", 2, 0, detect=False, seconds=5)
