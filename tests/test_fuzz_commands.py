"""Random overrides of every field, and random command lines.

Each makes what was asked, or ends with one line that names it: no traceback, no other field moves.
"""

import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import configs
from tests import commands
from tests.test_config import leaves, with_flags

WHOLE = st.one_of(st.integers(-3, 3), st.integers(-(2**70), 2**70)).map(str)
ODD = st.sampled_from(
    ["", " ", "None", "none", "nan", "-inf", "1e400", "1.5", "true", "0x10", "()", "(1,)", "[1,2]"]
    + [
        "(1,'a')",
        "(1,",
        "{}",
        "'",
        '"',
        "\\",
        "~",
        "gs://bucket/x",
        "a" * 5000,
        "é\u202e",
        "--",
        "*",
    ]
)
VALUES = st.one_of(WHOLE, ODD, st.text(st.characters(exclude_characters="\x00"), max_size=12))
SECTIONS = {path.partition(".")[0] for path, *_ in leaves(configs.named("ml1m_hstu"))}
FIELDS = {name: [path for path, *_ in leaves(configs.named(name))] for name in configs.CONFIGS}


@given(st.data())
@settings(max_examples=120)
def test_overrides(data):
    name = data.draw(st.sampled_from(sorted(configs.CONFIGS)))
    path, value = data.draw(st.sampled_from(FIELDS[name])), data.draw(VALUES)
    before = {path: value for path, _, value in leaves(configs.named(name))}
    try:
        config = with_flags(name, {path: value})
    except (flags.Error, ValueError, TypeError) as error:
        assert path in str(error) and len(str(error)) < 12_000
        return
    after = {path: value for path, _, value in leaves(config)}
    assert {one for one in after if repr(after[one]) != repr(before[one])} <= {path}
    try:
        config.validate()
    except ValueError as error:
        # Of fields that do not go together it may name the other one.
        assert any(f"{section}." in str(error) for section in SECTIONS)


@given(
    st.sampled_from(["train", "evaluate", "recommend", "export", "inspect"]),
    st.lists(
        st.one_of(
            st.sampled_from(["--config=ml1m_hstu", "--workdir=none/here", "--seeds=1,1", "--k=0"]),
            st.sampled_from(
                ["--user=1", "--history=1,x", "--requests=-", "--out=x.zip", "--split=x"]
            ),
            st.builds("--{}={}".format, st.sampled_from(["workdir", "record", "raw_dir"]), ODD),
            st.text(st.characters(exclude_characters="\x00\n"), max_size=8),
        ),
        max_size=5,
    ),
)
@settings(
    max_examples=10,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_command_lines(tmp_path, command, arguments):
    folder = tmp_path / "here"
    folder.mkdir(exist_ok=True)
    if command == "train":  # data that is not there: nothing starts
        arguments = [*arguments, "--config.data.raw_dir=nowhere"]
    done = commands.run(f"experiments.{command}", *arguments, folder=folder, seconds=60)
    if done.returncode == 0:
        pytest.fail(f"{command} {arguments} cannot have done anything: {done.stdout}")
    assert "Traceback" not in done.stderr and len(done.stderr) < 20_000, done.stderr
    assert "error" in done.stderr or "FATAL" in done.stderr or "--" in done.stderr, done.stderr
