"""curves.png: every number that was logged is drawn over its steps, a constant too, and stands in its place in the file."""

import json
import math

import numpy as np
import pytest
from etils import epath
from PIL import Image

from titok_jax.pictures import plots
from titok_jax.training.log import MetricLog


@pytest.fixture
def charts(monkeypatch):
    """What is drawn: y label -> (points, x label, picture) in the order of the charts; emptied by whoever draws again."""
    drawn, real = {}, plots.curve

    def curve(lines, *, x_label, y_label, **options):
        (points,) = lines.values()
        picture = real(lines, x_label=x_label, y_label=y_label, **options)
        assert y_label not in drawn
        drawn[y_label] = (points, x_label, picture)
        return picture

    monkeypatch.setattr(plots, "curve", curve)
    return drawn


def metrics(step: int) -> dict[str, float]:
    """Of one step: what falls, what never changes, what is always 0, and what some steps do not compute."""
    return {
        "loss": 8.0 / step,
        "lr": 1e-4,
        "disc_lr": 2e-5,
        "codebook_usage": 0.25,
        "quantizer_loss": 0.0,
        "disc_loss": 0.5 + step if step > 1 else math.nan,
        "d_weight": 0.1,
        "discriminator_factor": float(step > 1),
    }


def open_log(folder, first_step: int) -> MetricLog:
    return MetricLog(epath.Path(folder), first_step=first_step, num_steps=9, batch_size=4)


EXPECTED = {"loss", "lr", "disc_lr", "codebook_usage", "disc_loss", "images_per_second", "eval/psnr"}


def test_all_that_was_logged_is_drawn_also_before_a_restart(tmp_path, charts):
    log = open_log(tmp_path, 0)
    for step in (1, 2, 3, 4):
        log.write(step, metrics(step), shown="loss")
    log.write_evaluation(2, {"psnr": 20.0})
    log.close()
    log = open_log(tmp_path, 2)  # the last checkpoint: what came after it is done again
    log.write(3, metrics(3) | {"loss": 5.0}, shown="loss")
    log.draw_curves()
    log.close()
    assert set(charts) == EXPECTED
    points = {name: points for name, (points, _, _) in charts.items()}
    assert points["loss"] == [(1, 8.0), (2, 4.0), (3, 5.0)]
    assert points["lr"] == [(1, 1e-4), (2, 1e-4), (3, 1e-4)]
    assert points["disc_lr"] == [(1, 2e-5), (2, 2e-5), (3, 2e-5)]
    assert points["codebook_usage"] == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert points["disc_loss"] == [(2, 2.5), (3, 3.5)]
    assert points["eval/psnr"] == [(2, 20.0)]
    assert [step for step, _ in points["images_per_second"]] == [1, 2, 3]
    assert {x_label for _, x_label, _ in charts.values()} == {"step"}
    # The file holds these charts, three in a row.
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (3 * 280, 3 * 440, 3)
    for number, (_, _, chart) in enumerate(charts.values()):
        top, left = 280 * (number // 3), 440 * (number % 3)
        np.testing.assert_array_equal(pixels[top : top + 280, left : left + 440], np.asarray(chart))
    assert (pixels[2 * 280 :, 440:] == 255).all()  # the rest of the last row
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_line_is_drawn_where_its_values_are(tmp_path):
    """The pixels of a chart: a loss that falls, a rate that stays."""
    log = open_log(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 4.0 - step, "lr": 1e-4}, shown="loss")
    log.draw_curves()
    log.close()
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = np.asarray(picture).astype(int)
    blue = np.abs(pixels - plots._COLOURS[0]).max(-1) < 40
    falling, constant = (np.argwhere(blue[:280, left : left + 440]) for left in (0, 440))
    for line in (falling, constant):
        assert np.ptp(line[:, 1]) > 250  # from one side of the chart to the other
    slope, _ = np.polyfit(falling[:, 1], falling[:, 0], 1)
    np.testing.assert_allclose(slope, np.ptp(falling[:, 0]) / np.ptp(falling[:, 1]), rtol=0.05)  # y counts downwards
    assert np.ptp(falling[:, 0]) > 140
    assert np.ptp(constant[:, 0]) <= 3
    assert 100 < constant[:, 0].mean() < 180


def test_nothing_is_drawn_of_nothing_and_by_other_processes(tmp_path, charts):
    log = open_log(tmp_path, 0)
    log.draw_curves()
    log.close()
    other = MetricLog(epath.Path(tmp_path / "other"), first_step=0, num_steps=9, batch_size=4, active=False)
    other.write(1, metrics(1), shown="loss")
    other.draw_curves()
    other.close()
    assert not charts
    assert not (tmp_path / "curves.png").exists()
    assert not (tmp_path / "other").exists()


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path):
    log = open_log(tmp_path, 0)
    log.write(1, metrics(1), shown="loss")
    log.close()
    (line,) = (json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["disc_loss"] is None
    assert line["loss"] == 8.0
    assert line["step"] == 1
