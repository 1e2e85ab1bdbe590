"""Writes a trained ranking run as one file that scores candidates without this code: see
`ultra_hstu.serving.export`.

python -m experiments.export --workdir=runs/assistments_rank_ultra --out=scorer.zip
    --candidates=1024 [--users=1] [--raw_dir=PATH]
"""

from typing import cast

from absl import flags

from experiments import command
from ultra_hstu import progress, report, tasks
from ultra_hstu.data.codebook import Codebook
from ultra_hstu.nn.key_values import KINDS, CacheDtype
from ultra_hstu.serving import export, load_params
from ultra_hstu.serving.score import MICRO_BATCH
from ultra_hstu.workdir import Workdir

_WORKDIR, _RAW_DIR = command.define_run("folder of a trained ranking run")
_OUT = command.as_path(flags.DEFINE_string("out", None, "the file to write", required=True))
_CANDIDATES = flags.DEFINE_integer(
    "candidates", None, "most candidates of a call, of all users together", required=True
)
_USERS = flags.DEFINE_integer("users", 1, "most users of a call")
_MICRO_BATCH = flags.DEFINE_integer(
    "micro_batch", MICRO_BATCH, "candidates that are worked on at one time"
)
_KIND = flags.DEFINE_enum(
    "kind", "same", KINDS, "how keys and values are kept between the two calls"
)
_PLATFORMS = flags.DEFINE_list(
    "platforms", None, "cpu, cuda or both; that of this machine without it"
)


def main(_: list[str]) -> None:
    folder, working = Workdir(_WORKDIR.value), command.progress_console(stderr=True)
    task = tasks.of_run(folder, _RAW_DIR.value, console=working)
    config = task.config
    if not config.rank.tasks:
        raise ValueError(
            f"{_WORKDIR.value} is a retrieval run: only ranking runs score given candidates"
        )
    with progress.waiting(working, "export", f"reading the checkpoint, tracing, {_OUT.value}"):
        step, params = load_params(folder, task.recipe)
        task, params = task.folded(params)
        export.save(
            _OUT.value,
            task.recipe.model(params),
            config=task.config,
            catalog=task.interactions.catalog,
            vocabulary=Codebook.of(config, task.interactions),
            candidates=_CANDIDATES.value,
            users=_USERS.value,
            micro_batch=_MICRO_BATCH.value,
            kind=cast(CacheDtype, _KIND.value),
            platforms=_PLATFORMS.value,
        )
    report.make_console().print(
        f"{_OUT.value}: {config.name}, step {step}, "
        f"{_CANDIDATES.value} candidates of {_USERS.value} users"
    )


if __name__ == "__main__":
    command.run(main)
