"""Options: the flags of the program's commands; each function adds those of one.

They are given the command line too, since a config's flags depend on which of its keys it names.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from absl import flags

EARLY_STOPPING: dict[str, bool | str] = {"false": False, "true": True, "never": "never"}


def add_common(values: flags.FlagValues) -> None:
    """The flags of every command."""
    flags.DEFINE_boolean("traceback", False, "show where an error came from", flag_values=values)
    flags.DEFINE_boolean(
        "huge_pages",
        True,
        "on a CPU, start again with huge pages for arrays, which are faster",
        flag_values=values,
    )


def add_config(values: flags.FlagValues, argv: list[str]) -> None:
    from ml_collections import ConfigDict
    from ml_collections.config_flags import config_flags

    class Parser(config_flags.ConfigFileFlagParser):
        """Gives a config the sections that overrides name and its file leaves at their defaults."""

        def parse(self, path: str) -> Any:
            config: Any = super().parse(path)
            if config is None:
                raise ValueError(f"{path}: get_config() returns nothing.")
            config.unlock()  # raises where the file could not be read
            for names in re.findall(r"^--?(?:no)?config\.([\w.]+)\.\w+", "\n".join(argv), re.M):
                section = config
                for name in names.split("."):
                    if section.get(name) is None:
                        section[name] = ConfigDict()
                    section = section[name]
            return config

    # A config file states only what differs, so an override may name a key that it does not have.
    # `config.parse` refuses those that are nowhere.
    config_flags.DEFINE_config_file(
        "config",
        help_string="path of a config file, with an argument after a colon; --config.key=value "
        "overrides a key of it",
        flag_values=values,
        lock_config=False,
        accept_new_attributes=True,
        sys_argv=argv,
    )
    values["config"].parser = Parser(name="config", lock_config=False)
    _require(values, "config")


def _add_run_dir(values: flags.FlagValues, argv: list[str]) -> None:
    flags.DEFINE_string("run_dir", None, "folder of a run", flag_values=values)
    _require(values, "run_dir")


def add_train(values: flags.FlagValues, argv: list[str]) -> None:
    add_config(values, argv)
    flags.DEFINE_string(
        "run_dir",
        None,
        "folder of the run, which goes on where it stopped (default: runs/ and the config's name "
        "with what was overridden)",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "launcher",
        "none",
        ["none", "ray"],
        "who trains: this process, or workers of the cluster of RAY_ADDRESS, or of one started "
        "here, as processes of one run",
        flag_values=values,
    )
    _add_resource(values, "ray.train.ScalingConfig", "num_workers=2, use_gpu=true")


def add_evaluate(values: flags.FlagValues, argv: list[str]) -> None:
    _add_run_dir(values, argv)
    splits = ["train", "validation", "test"]
    flags.DEFINE_enum("split", "test", splits, "part of the data", flag_values=values)


def add_predict(values: flags.FlagValues, argv: list[str]) -> None:
    _add_run_dir(values, argv)
    flags.DEFINE_string("file", None, "file with one text a line", flag_values=values)


def add_generate(values: flags.FlagValues, argv: list[str]) -> None:
    add_predict(values, argv)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    real = functools.partial(flags.DEFINE_float, flag_values=values)
    integer("max_new_tokens", 64, "how long a continuation may be")
    flags.DEFINE_boolean("do_sample", False, "draw tokens", flag_values=values)
    real("temperature", 1.0, "of what is drawn")
    integer("top_k", None, "draw from so many of the likeliest tokens")
    real("top_p", 1.0, "draw from the likeliest tokens that have this probability together")
    integer("seed", 0, "of what is drawn")
    integer("num_beams", 1, "of a beam search")
    real("length_penalty", 1.0, "of beams: scores are divided by length to this power")
    flags.DEFINE_enum(
        "early_stopping", "false", list(EARLY_STOPPING), "when beams end", flag_values=values
    )
    flags.DEFINE_list(
        "eos_token_id",
        None,
        "tokens that end a text (default: the model's and the tokenizer's)",
        flag_values=values,
    )


def add_merge(values: flags.FlagValues, argv: list[str]) -> None:
    _add_run_dir(values, argv)
    flags.DEFINE_string("output", None, "folder to write, which must not exist", flag_values=values)
    dtypes = ["float32", "bfloat16", "float16"]
    flags.DEFINE_enum("dtype", "float32", dtypes, "of the merged weights", flag_values=values)
    _require(values, "output")


def add_plan(values: flags.FlagValues, argv: list[str]) -> None:
    add_config(values, argv)
    values.set_default("huge_pages", False)  # no arrays are made
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    string("device", None, "a6000, h100:8, tpu-v5e:4x4, cpu:2, ...: what it is planned for")
    string("mesh", None, "data=1,fsdp=8,tensor=2 (default: the config's, or fsdp over all)")
    string("plot", None, "file for a picture of memory by part")
    flags.DEFINE_enum(
        "largest",
        "batch",
        ["batch", "length", "none"],
        "find the largest that fits, by a few more compiles",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "suggest", False, "try what may make it fit, a compile for each", flag_values=values
    )
    _require(values, "device")


def add_sweep(values: flags.FlagValues, argv: list[str]) -> None:
    add_config(values, argv)
    flags.DEFINE_string(
        "sweep", None, "file with get_sweep(), with an argument after a colon", flag_values=values
    )
    flags.DEFINE_string(
        "sweep_dir",
        None,
        "folder of the sweep, which goes on where it stopped (default: runs/ and the names of "
        "config and sweep)",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "only_plan", False, "print groups, memory and time, and train nothing", flag_values=values
    )
    flags.DEFINE_string(
        "launcher",
        "none",
        "who trains its groups: none (this process, one after another), local:4 (so many processes "
        "of this machine), ray (the cluster of RAY_ADDRESS, or one started here), slurm",
        flag_values=values,
    )
    _add_resource(values, "ray.remote or submitit", "num_gpus=1, slurm_partition=long")
    _require(values, "sweep")


def add_report(values: flags.FlagValues, argv: list[str]) -> None:
    flags.DEFINE_string(
        "metric",
        None,
        "a split's, as validation.accuracy (default: the sweep's)",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "mode",
        None,
        ["max", "min"],
        "which of it is better (default: the sweep's, or as the name of another metric says)",
        flag_values=values,
    )


def _add_resource(values: flags.FlagValues, names: str, examples: str) -> None:
    flags.DEFINE_multi_string(
        "resource",
        [],
        f"NAME=VALUE, what a launcher's workers are given, as {names} names it: {examples}; may be "
        "repeated",
        flag_values=values,
    )


def _require(values: flags.FlagValues, name: str) -> None:
    flags.register_validator(
        name, lambda value: value is not None, f"--{name} is needed", flag_values=values
    )
