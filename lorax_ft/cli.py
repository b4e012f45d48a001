"""The program `lorax-ft`: train, eval, predict, generate, merge, inspect, plan, sweep, report.

    lorax-ft train --config=configs/quickstart.py:qlora --config.lora.rank=16 --run_dir=runs/mine
    lorax-ft eval --run_dir=runs/mine --split=validation
    lorax-ft predict --run_dir=runs/mine "a text" "another text"
    lorax-ft generate --run_dir=runs/story --do_sample --temperature=0.8 "Once upon a time"
    lorax-ft merge --run_dir=runs/mine --output=merged --dtype=bfloat16
    lorax-ft inspect --config=configs/quickstart.py
    lorax-ft plan --config=configs/llama.py:65b-qlora64 --device=a6000
    lorax-ft sweep --config=configs/trec.py --sweep=configs/sweeps/ranks.py --sweep_dir=runs/ranks
    lorax-ft sweep ... --launcher=ray --resource=num_gpus=1
    lorax-ft report runs/ranks

What is wrong with the input ends as one message and exit code 2; `--traceback` shows where it came
from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from lorax_ft import exit_codes, huge_pages, options

HELP = {"help", "--help", "-h"}
# What the library raises where its input is at fault. RuntimeError: another run has the directory;
# FloatingPointError: too many losses were not finite; MemoryError: the host cannot hold the states.
BAD_INPUT = (
    *(ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError, MemoryError),
    flags.Error,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (by default the process's own) and returns its exit code.

    It is 0, or one of `exit_codes`.
    """
    if argv is not None:
        return _main(list(argv), is_process=False)
    try:
        code = _main(list(sys.argv), is_process=True)
    except Exception:
        traceback.print_exc()
        code = 1
    if code not in (0, exit_codes.STOPPED) and "jax" in sys.modules:
        from lorax_ft.training import processes

        processes.leave(code)
    return code


def _main(argv: list[str], *, is_process: bool) -> int:
    word, *rest = argv[1:] or [""]
    if word in HELP:
        print(_usage())
        return 0
    if word not in COMMANDS:
        print(f"lorax-ft: there is no command {word!r}.\n{_usage()}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    command = COMMANDS[word]
    if HELP & set(rest):
        print(f"{command.description}\n{_define_flags(command, argv).get_help()}")
        return 0
    try:
        values = _define_flags(command, argv)
        arguments = values([argv[0], *rest])[1:]
        if is_process and values.huge_pages:
            huge_pages.restart()
        return command.run(values, arguments) or 0
    except BAD_INPUT as error:
        if any(re.fullmatch("--?traceback(=true)?", argument) for argument in rest):
            raise
        hint = "(--traceback shows where this comes from)"
        print(f"lorax-ft {word}: {_message(error)}\n{hint}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What a word of the program does, its flags, and its function of (flags, arguments).

    That returns the exit code, where it is not 0.
    """

    description: str
    define: Callable[[flags.FlagValues, list[str]], None]
    run: Callable[[Any, list[str]], int | None]


def train(values: Any, arguments: list[str]) -> int:
    _no_arguments(arguments)
    from lorax_ft import experiment

    directory = values.run_dir or default_run_dir(
        values["config"].config_filename, values["config"].override_values
    )
    command = command_line("train", values["config"], run_dir=directory)
    resources = resources_of(values.resource)
    if values.launcher == "ray":
        from lorax_ft import cluster

        cluster.train(_config(values), directory, resources, command=command)
        return 0
    if resources:
        raise ValueError(f"resources {resources} need a launcher: give --launcher=ray too.")
    results = experiment.train(_config(values), directory, command=command)
    return exit_codes.STOPPED if results.get("outcome") == "preempted" else 0


def evaluate(values: Any, arguments: list[str]) -> None:
    _no_arguments(arguments)
    from lorax_ft import evaluation, finished

    found = finished.evaluate(values.run_dir, values.split)
    print(evaluation.metrics_table({values.split: found.metrics}))
    if found.warning:
        print(f"WARNING: {found.warning}", file=sys.stderr)


def predict(values: Any, arguments: list[str]) -> None:
    from lorax_ft import finished

    for line in finished.predict(values.run_dir, _texts(values, arguments)):
        print(line)


def generate(values: Any, arguments: list[str]) -> None:
    from lorax_ft import finished
    from lorax_ft.generation import GenerationConfig

    names = [field.name for field in dataclasses.fields(GenerationConfig)]
    chosen = {name: values[name].value for name in names}
    if chosen["eos_token_id"] is not None:
        chosen["eos_token_id"] = tuple(map(int, chosen["eos_token_id"]))
    chosen["early_stopping"] = options.EARLY_STOPPING[chosen["early_stopping"]]
    config = GenerationConfig(**chosen)
    texts = _texts(values, arguments)
    for text, pieces in zip(
        texts, finished.generate(values.run_dir, texts, config, seed=values.seed)
    ):
        print(text, end="")
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def merge(values: Any, arguments: list[str]) -> None:
    _no_arguments(arguments)
    from lorax_ft import finished

    drift = finished.merge(values.run_dir, values.output, dtype=values.dtype)
    print(
        f"{values.output} is written in {values.dtype}. Its logits differ from the unmerged "
        f"model's by {drift.largest:.2e} at most, {drift.mean:.2e} on average, "
        f"{drift.relative:.2e} of their norm."
    )


def inspect(values: Any, arguments: list[str]) -> None:
    _no_arguments(arguments)
    from lorax_ft import experiment

    print(experiment.describe(_config(values)))


def plan(values: Any, arguments: list[str]) -> None:
    _no_arguments(arguments)
    from lorax_ft.planning import command

    command.run(
        lambda: _config(values),
        device=values.device,
        mesh=values.mesh,
        find_largest=values.largest,
        suggests=values.suggest,
        plot=values.plot,
    )


def sweep(values: Any, arguments: list[str]) -> int:
    _no_arguments(arguments)
    from lorax_ft.sweeps import load_sweep, one_for_each_core, train, write_report

    one_for_each_core()
    config_flag = values["config"]
    file, _, arguments_of_it = values.sweep.partition(":")
    name = "-".join(part for part in (pathlib.Path(file).stem, arguments_of_it) if part)
    overrides = {**config_flag.override_values, "sweep": name}
    directory = values.sweep_dir or default_run_dir(config_flag.config_filename, overrides)
    result = train(
        _config(values),
        load_sweep(values.sweep),
        directory,
        only_plan=values.only_plan,
        launcher=None if values.launcher == "none" else values.launcher,
        resources=resources_of(values.resource),
        command=command_line("sweep", config_flag, sweep=values.sweep, sweep_dir=directory),
    )
    if result.outcome == "preempted":
        return exit_codes.STOPPED
    if result.outcome == "finished":
        print(f"\n{write_report(directory)}")
    return 0


def report(values: Any, arguments: list[str]) -> None:
    from lorax_ft.sweeps import write_report

    if len(arguments) != 1:
        raise ValueError(f"report: expected one folder of a sweep, got {len(arguments)}.")
    print(write_report(arguments[0], metric=values.metric, mode=values.mode))


def default_run_dir(config_file: str, overrides: dict[str, Any]) -> str:
    """`runs/` and a name made of the config and what was overridden: the same command resumes.

    >>> default_run_dir("configs/quickstart.py:qlora", {"lora.rank": 16})
    'runs/quickstart-qlora-lora.rank=16'
    """
    path, _, argument = config_file.partition(":")
    parts = [pathlib.Path(path).stem, argument, *(f"{k}={v}" for k, v in overrides.items())]
    name = re.sub(r"[^\w.=+-]+", "_", "-".join(part for part in parts if part))
    if len(name) > 100:
        name = f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"runs/{name}"


def _texts(values: Any, arguments: list[str]) -> list[str]:
    """The texts that a command is given: arguments, lines of a file, or of stdin."""
    if values.file and arguments:
        raise ValueError(f"give texts or --file={values.file}, not both.")
    if values.file:
        return pathlib.Path(values.file).read_text("utf-8").splitlines()
    return arguments or [line.rstrip("\n") for line in sys.stdin]


def resources_of(items: Sequence[str]) -> dict[str, Any]:
    """What `--resource=NAME=VALUE` flags give: JSON where a value is that, else text.

    >>> resources_of(["num_gpus=1", "slurm_partition=long"])
    {'num_gpus': 1, 'slurm_partition': 'long'}
    """
    found: dict[str, Any] = {}
    for name, equals, value in (item.partition("=") for item in items):
        if not equals:
            raise ValueError(f"--resource={name}: expected NAME=VALUE, such as num_gpus=1.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def command_line(word: str, config: Any, **values: str) -> str:
    """A command with a config flag's file and overrides, and with other flags."""
    overrides = [f"--config.{key}={value}" for key, value in config.override_values.items()]
    others = [f"--{name}={value}" for name, value in values.items()]
    arguments = [f"--config={config.config_filename}", *overrides, *others]
    return shlex.join(["lorax-ft", word, *arguments])


def _config(values: Any) -> Any:
    from lorax_ft import config

    return config.parse(values.config, config.ExperimentConfig)


def _define_flags(command: Command, argv: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    options.add_common(values)
    command.define(values, argv)
    return values


COMMANDS = {
    "train": Command(
        description="Trains what a config says; the same command goes on with a stopped run.",
        define=options.add_train,
        run=train,
    ),
    "eval": Command(
        description="Evaluates a finished run on a part of its data.",
        define=options.add_evaluate,
        run=evaluate,
    ),
    "predict": Command(
        description="Labels texts: arguments, lines of --file, or lines of stdin.",
        define=options.add_predict,
        run=predict,
    ),
    "generate": Command(
        description="Continues texts with a language model; they are given as to predict.",
        define=options.add_generate,
        run=generate,
    ),
    "merge": Command(
        description="Writes a run's model, adapters merged, as a Hugging Face directory.",
        define=options.add_merge,
        run=merge,
    ),
    "inspect": Command(
        description="Shows a config's parameters: how each is used, held and trained.",
        define=options.add_config,
        run=inspect,
    ),
    "plan": Command(
        description="Says what a config's run takes of a device, by the device's own compiler.",
        define=options.add_plan,
        run=plan,
    ),
    "sweep": Command(
        description="Trains many runs as one program and reports them; the same command goes on.",
        define=options.add_sweep,
        run=sweep,
    ),
    "report": Command(
        description="Reports a sweep anew, by any metric: lorax-ft report DIR.",
        define=options.add_report,
        run=report,
    ),
}


def _no_arguments(arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"unexpected argument {arguments[0]!r}; flags are given as --name=value.")


def _usage() -> str:
    usage = "usage: lorax-ft COMMAND --flag=value ...; lorax-ft COMMAND --help shows its flags"
    return "\n".join([usage, *(f"  {name:8} {c.description}" for name, c in COMMANDS.items())])


def _message(error: BaseException) -> str:
    """An error's message, without the traceback that ml_collections puts in front of it."""
    message = str(error)
    if "Error whilst parsing config file" in message:
        message = message.strip().splitlines()[-1]
    return message or type(error).__name__
