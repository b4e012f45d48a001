"""Storages of studies: each search finds its own trials, and nobody the password."""

import pytest

from lorax_ft import sweeps
from lorax_ft.sweeps.directory import check_directory, describe, write_record
from lorax_ft.sweeps.search import storages
from lorax_ft.sweeps.search.fields import fields
from lorax_ft.sweeps.search.study import StudyQueue
from tests.test_study import drain, queue_of, results, search
from tests.test_sweep import config_of, folder  # noqa: F401

URL = "postgresql://me:p%40ss@db.example:5432/studies?sslpassword=undisclosed"
SECRETS = ("p@ss", "p%40ss", "undisclosed")


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'shared.db'}"


def test_a_search_finds_its_own_trials_in_a_shared_storage_and_no_others(folder, tmp_path, url):  # noqa: F811
    sweep = search(storage=url)
    mine = queue_of(folder, tmp_path / "mine" / "search", sweep)
    first, *_ = drain(mine)
    mine.finish(first, results(0.5))

    other = queue_of(folder, tmp_path / "other" / "search", sweep)
    again = queue_of(folder, tmp_path / "mine" / "search", sweep)

    assert other.left == 4
    assert again.left == 3
    assert other.next().name == first.name
    (tmp_path / "shared.db").unlink()
    with pytest.raises(ValueError, match="does not have the study that was begun"):
        queue_of(folder, tmp_path / "mine" / "search", sweep)


OTHERS = [
    (False, {}, {"trials": 5}, r"sweep\.search\.trials: 4 there, 5 here"),
    (False, {"seed": 1}, {}, r"config\.seed: 0 there, 1 here"),
    (True, {"seed": 1}, {}, r"config\.seed: 0 there, 1 here"),
    (True, {}, {"mode": "min"}, r"sweep\.mode: None there, 'min' here"),
    (True, {}, {"metric": "validation.loss"}, r"sweep\.metric: 'validation\.accuracy' there"),
    (True, {}, {"sampler": "tpe"}, r"sweep\.search\.sampler: 'random' there, 'tpe' here"),
    (True, {}, {"pruner": "median"}, r"sweep\.search\.pruner: None there, 'median' here"),
]


@pytest.mark.parametrize(("shared", "changes", "options", "message"), OTHERS)
def test_a_study_of_another_search_is_refused(
    folder,  # noqa: F811
    tmp_path,
    url,
    shared,
    changes,
    options,
    message,
):
    storage = {"storage": url} if shared else {}
    queue_of(folder, tmp_path / "sweep", search(**storage))
    config, sweep = sweeps.change(config_of(folder), changes), search(**storage, **options)
    (field,) = fields(config, sweep)

    with pytest.raises(ValueError, match=f"another config or sweep file(?s:.*){message}"):
        StudyQueue(field, config, sweep, tmp_path / "sweep")


def test_a_sweep_goes_on_with_another_password_and_host_but_not_elsewhere(folder, tmp_path):  # noqa: F811
    config = config_of(folder)
    write_record(tmp_path, describe(config, search(storage=URL)))

    text = (tmp_path / "sweep.json").read_text()
    assert not any(word in text for word in SECRETS)
    check_directory(tmp_path, config, search(storage="postgresql://you:new@localhost/studies"))
    for url in (
        "postgresql://me:p%40ss@db.example:5432/others",
        "mysql://db.example/studies",
        None,
    ):
        with pytest.raises(
            ValueError, match=r"sweep\.search\.storage: 'postgresql:///studies' there"
        ):
            check_directory(tmp_path, config, search(storage=url))


def test_no_error_of_a_storage_has_its_password(folder, tmp_path, monkeypatch):  # noqa: F811
    def fail(**options):
        raise RuntimeError(f"no way to {options['storage']} with p@ss or p%40ss and undisclosed")

    monkeypatch.setattr(storages.load_optuna(), "create_study", fail)
    with pytest.raises(
        OSError, match=r"at postgresql://me:\*\*\*@db\.example:5432/studies"
    ) as caught:
        queue_of(folder, tmp_path, search(storage=URL))
    assert not any(word in str(caught.value) for word in SECRETS)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    "url", ["nonsense", "postgres//me:p@ss/studies", "mysql://me:p@ss:word/studies"]
)
def test_a_storage_that_is_no_url_is_named_and_not_told(folder, tmp_path, url):  # noqa: F811
    with pytest.raises(ValueError, match=r"Search\.storage is no URL of a database") as caught:
        queue_of(folder, tmp_path, search(storage=url))
    assert "p@ss" not in str(caught.value)


def test_a_storage_that_cannot_be_reached_is_named(folder, tmp_path):  # noqa: F811
    with pytest.raises(OSError, match=r"nowhere/studies\.db cannot be reached"):
        queue_of(folder, tmp_path, search(storage=f"sqlite:///{tmp_path}/nowhere/studies.db"))
