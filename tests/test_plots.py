"""The picture of a run is drawn from whatever its records hold, and from nothing raises."""

import pytest

from lorax_ft.plots import plot_run

TRAIN = [{"step": s, "kind": "train", "loss": 1 / s} for s in (1, 2, 3)]


@pytest.mark.parametrize(
    ("records", "panels"),
    [
        (TRAIN, 1),
        ([*TRAIN, {"step": 4, "kind": "train", "loss": None}], 1),
        ([*TRAIN, {"step": 3, "kind": "eval", "loss": 0.5, "accuracy": 0.75}], 2),
    ],
)
def test_a_run_is_drawn_with_its_metric_beside_the_loss_where_there_is_one(
    records, panels, tmp_path
):
    from PIL import Image

    path = tmp_path / "loss.png"
    plot_run(records, path, title="a run", metric="accuracy")

    with Image.open(path) as image:
        assert image.size == (600 * panels, 420)


def test_a_run_without_records_has_no_picture(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        plot_run([], tmp_path / "loss.png", title="a run", metric=None)
