"""README's Python runs, its commands parse, and its files are there."""

import pathlib
import re
import shlex

import pytest

from lorax_ft import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Every `lorax-ft` command, with what comes before it in a chain left out."""
    lines = "\n".join(blocks("bash")).splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if "lorax-ft" in part]


PYTHON = blocks("python")


@pytest.fixture(scope="module")
def quickstart(minilm, tmp_path_factory):
    """A folder in which the quickstart has run, on a base in four bits and cut short: of two steps,
    a few texts of one length to be tested on, and layers that are compiled once."""
    folder = tmp_path_factory.mktemp("quickstart")
    arguments = ["--config.train.steps=2", "--config.baseline=False"]
    arguments += ["--config.data.split.test=0.03", "--config.data.loader.buckets=(48,)"]
    arguments += ["--config.model.compute.scan_layers=True"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = f"--config={ROOT / 'configs/quickstart.py'}:qlora"
        code = cli.main(
            ["lorax-ft", "train", config, "--run_dir=runs/quickstart", *arguments, "--traceback"]
        )
    assert code == 0
    return folder


@pytest.mark.parametrize("code", [c for c in PYTHON if "runs/" not in c])
def test_the_python_stands_by_itself(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("code", [c for c in PYTHON if "runs/" in c])
def test_the_python_reads_what_the_quickstart_leaves(code, quickstart, monkeypatch):
    monkeypatch.chdir(quickstart)
    names = {}

    exec(compile(code, "README.md", "exec"), names)

    assert names["logits"].shape == (1, 12)


@pytest.mark.parametrize(
    "command", [c for c in commands() if shlex.split(c)[1] in ("eval", "predict", "merge")]
)
def test_a_command_works_on_what_the_quickstart_leaves(command, quickstart, monkeypatch, capsys):
    monkeypatch.chdir(quickstart)

    assert cli.main([*shlex.split(command), "--traceback"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [c for c in commands() if shlex.split(c)[1] in ("train", "inspect")]
)
def test_a_config_command_parses(command, monkeypatch):
    from lorax_ft import experiment

    seen = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(experiment, "train", lambda config, run_dir, **_: seen.append(config) or {})
    monkeypatch.setattr(experiment, "describe", lambda config: seen.append(config))

    assert cli.main([*shlex.split(command), "--traceback"]) == 0
    assert len(seen) == 1


def test_the_files_that_are_linked_are_there():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)

    assert links
    assert all((ROOT / link).exists() for link in links)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_one_that_the_program_takes(path, monkeypatch):
    from lorax_ft import experiment

    monkeypatch.setattr(experiment, "train", lambda config, run_dir, **_: {})

    size = "7b-" if path.stem == "llama" else ""
    for method in ("lora", "qlora16" if size else "qlora"):
        config = f"--config={path}:{size}{method}"
        assert cli.main(["lorax-ft", "train", config, "--traceback"]) == 0


@pytest.mark.parametrize("command", [c for c in commands() if shlex.split(c)[1] == "sweep"])
def test_a_sweep_command_makes_its_runs(command, minilm, monkeypatch):
    from lorax_ft import experiment, sweeps
    from lorax_ft.sweeps import worker

    seen = []

    def train(config, sweep, *_, **__):
        seen.extend(sweeps.make_runs(config, sweep))
        dataset = experiment.load_data(config)[1]
        for group in sweeps.group_runs(seen):
            worker.check_evaluations(sweep, group, dataset)
        return sweeps.SweepResult(outcome="finished", rows=[])

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sweeps, "train", train)
    monkeypatch.setattr(sweeps, "write_report", lambda folder: "")

    assert cli.main([*shlex.split(command), "--traceback"]) == 0
    assert len(sweeps.group_runs(seen)) > 1
