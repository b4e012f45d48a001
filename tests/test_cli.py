"""The command line: overrides reach the config, bad input is one message and exit code 2."""

import dataclasses
import shlex

import pytest
from absl import flags

from lorax_ft import cli

CONFIG = '''"""A config."""

from ml_collections import ConfigDict


def get_config(argument="plain"):
    if argument not in ("plain", "other"):
        raise ValueError(f"unknown argument {argument!r}, expected plain or other")
    return ConfigDict({"lora": {"rank": 4}, "quantization": None, "argument": argument})
'''


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def seen(monkeypatch):
    """The configs that `lorax-ft train` was given, in place of training them."""
    configs = []
    command = dataclasses.replace(
        cli.COMMANDS["train"], run=lambda values, _: configs.append(values.config.to_dict())
    )
    monkeypatch.setitem(cli.COMMANDS, "train", command)
    return configs


def test_overrides_reach_keys_and_sections_that_the_config_file_does_not_have(config_file, seen):
    overrides = ["lora.rank=16", "lora.targets=('query','value')", "optimizer.learning_rate=1e-3"]
    arguments = [f"--config.{override}" for override in overrides]

    code = cli.main(["lorax-ft", "train", f"--config={config_file}:other", *arguments])

    assert code == 0
    assert seen == [
        {
            "argument": "other",
            "lora": {"rank": 16, "targets": ("query", "value")},
            "optimizer": {"learning_rate": 0.001},
            "quantization": None,
        }
    ]


def test_an_override_turns_on_a_part_that_the_config_file_has_off(config_file, seen):
    override = "--config.quantization.kind=nf4"

    assert cli.main(["lorax-ft", "train", f"--config={config_file}", override]) == 0
    assert seen[0]["quantization"] == {"kind": "nf4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no command ''"),
        (("trian",), "there is no command 'trian'"),
        (("train",), "--config is needed"),
        (("train", "--config=nowhere.py"), "No such file or directory: 'nowhere.py'"),
        (("train", "--config=FILE:third"), "unknown argument 'third', expected plain or other"),
        (("train", "--config=FILE", "--config.lora.rank=four"), "--config.lora.rank=four"),
        (("train", "--config=FILE", "--rundir=x"), "Did you mean: run_dir"),
        (("eval",), "--run_dir is needed"),
        (("eval", "--run_dir=x", "--split=dev"), "train|validation|test"),
        (("eval", "--run_dir=x", "--run_dri=y"), "Did you mean: run_dir"),
        (("merge", "--run_dir=x"), "--output is needed"),
        (("eval", "--run_dir=x", "stray"), "unexpected argument 'stray'"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(config_file, seen, capsys, arguments, message):
    arguments = [argument.replace("FILE", str(config_file)) for argument in arguments]

    assert cli.main(["lorax-ft", *arguments]) == 2

    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(("outcome", "code"), [("finished", 0), ("planned", 0), ("preempted", 75)])
def test_a_sweep_that_was_stopped_says_so_by_its_exit_code(
    config_file, tmp_path, monkeypatch, outcome, code
):
    from lorax_ft import sweeps

    asked = []

    def train(config, sweep, directory, **_):
        asked.append(str(directory))
        return sweeps.SweepResult(outcome=outcome, rows=[])

    monkeypatch.setattr(cli, "_config", lambda values: None)
    monkeypatch.setattr(sweeps, "train", train)
    reported = []
    monkeypatch.setattr(sweeps, "write_report", lambda folder: reported.append(folder) or "tables")
    file = tmp_path / "ranks.py"
    file.write_text("def get_sweep(top=4):\n    return [{'lora.rank': top}]\n")
    command = ["lorax-ft", "sweep", f"--config={config_file}", f"--sweep={file}:8"]

    assert cli.main(command) == code
    assert asked == ["runs/small-sweep=ranks-8"]
    assert reported == (asked if outcome == "finished" else [])


def test_traceback_shows_where_an_error_came_from(config_file, seen):
    with pytest.raises(flags.Error, match="unknown argument 'third'"):
        cli.main(["lorax-ft", "train", f"--config={config_file}:third", "--traceback"])


def test_the_command_that_an_adapters_card_tells_is_the_one_that_was_given(
    config_file, monkeypatch
):
    from lorax_ft import experiment

    seen = []
    monkeypatch.setattr(
        experiment, "train", lambda config, directory, command: seen.append(command) or {}
    )
    monkeypatch.setattr(cli, "_config", lambda values: values.config)
    arguments = ["--config.lora.rank=16", "--config.lora.targets=('query', 'value')"]
    arguments = [f"--config={config_file}:other", *arguments, "--run_dir=runs/a b"]

    assert cli.main(["lorax-ft", "train", *arguments]) == 0

    assert shlex.split(seen[0]) == ["lorax-ft", "train", *arguments]


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_shows_a_commands_flags(command, capsys):
    assert cli.main(["lorax-ft", command, "--help"]) == 0
    assert "--[no]traceback" in capsys.readouterr().out


def test_the_same_command_has_the_same_run_directory_and_another_override_another():
    plain = cli.default_run_dir("configs/a.py", {})
    changed = cli.default_run_dir("configs/a.py", {"lora.rank": 16})

    assert plain == "runs/a"
    assert changed == cli.default_run_dir("configs/a.py", {"lora.rank": 16}) != plain


def test_a_run_directory_is_one_folder_whatever_was_overridden():
    name = cli.default_run_dir("a.py:x/y", {"data.path": "../" * 80, "lora.rank": 1})

    assert name.count("/") == 1
    assert len(name) < 120
    assert name != cli.default_run_dir("a.py:x/y", {"data.path": "../" * 80, "lora.rank": 2})
