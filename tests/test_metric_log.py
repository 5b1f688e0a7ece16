"""curves.png: every logged number, even a constant, is drawn over its steps and has its place in the file."""

import contextlib
import json
import math

import numpy as np
import pytest
from etils import epath
from matplotlib.colors import to_rgb
from PIL import Image

from titok_jax.pictures import plots
from titok_jax.training.log import MetricLog, TextLog
from titok_jax.training.log_files import LogFolder

FIGURES = {"images_per_second": 8.0, "data_wait": 0.25, "seconds_left": 60.0}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    made, real = [], plots.training_curves

    def training_curves(curves, changed):
        made.append(real(curves, changed))
        return made[-1]

    monkeypatch.setattr(plots, "training_curves", training_curves)
    return made


def metrics(step: int) -> dict[str, float]:
    """Metrics of one step: one falls, some never change, one is always 0, and some steps do not compute one."""
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
    return MetricLog(LogFolder(epath.Path(folder)), first_step=first_step, num_steps=9)


EXPECTED = {"loss", "lr", "disc_lr", "codebook_usage", "disc_loss", "images_per_second", "eval/psnr"}


def test_all_that_was_logged_is_drawn_also_before_a_restart(tmp_path, figures):
    log = open_log(tmp_path, 0)
    for step in (1, 2, 3, 4):
        log.write(step, metrics(step), shown="loss", figures=FIGURES)
    log.write_evaluation(2, {"psnr": 20.0})
    log.close()
    log = open_log(tmp_path, 2)  # from the last checkpoint, so later steps are repeated
    log.write(3, metrics(3) | {"loss": 5.0}, shown="loss", figures=FIGURES)
    log.draw_curves()
    log.close()
    (figure,) = figures
    points = {axes.get_title(loc="left"): list(map(tuple, axes.lines[0].get_xydata())) for axes in figure.axes}
    assert set(points) == EXPECTED
    assert points["loss"] == [(1, 8.0), (2, 4.0), (3, 5.0)]
    assert points["lr"] == [(1, 1e-4), (2, 1e-4), (3, 1e-4)]
    assert points["disc_lr"] == [(1, 2e-5), (2, 2e-5), (3, 2e-5)]
    assert points["codebook_usage"] == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert points["disc_loss"] == [(2, 2.5), (3, 3.5)]
    assert points["eval/psnr"] == [(2, 20.0)]
    assert [step for step, _ in points["images_per_second"]] == [1, 2, 3]
    assert {axes.get_xlabel() for axes in figure.axes} == {"step"}
    # The file holds these charts, three in a row.
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (3 * 280, 3 * 440, 3)
    for number in range(9):
        top, left = 280 * (number // 3), 440 * (number % 3)
        assert (pixels[top : top + 280, left : left + 440] < 255).any() == (number < len(EXPECTED))
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_dashed_line_says_where_the_run_went_on_with_changes(tmp_path, figures):
    options = {"first_step": 0, "num_steps": 9}
    log = MetricLog(LogFolder(epath.Path(tmp_path)), **options, changed=[2])
    for step in (1, 2, 3):
        log.write(step, {"loss": 4.0 - step}, shown="loss", figures=FIGURES)
    log.draw_curves()
    log.close()
    _, line = figures[0].axes[0].lines
    assert list(line.get_xdata()) == [2, 2]
    assert line.get_linestyle() == "--"


def test_a_line_is_drawn_where_its_values_are(tmp_path):
    """Checks the pixels of a chart with a falling loss and a constant rate."""
    log = open_log(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 4.0 - step, "lr": 1e-4}, shown="loss", figures=FIGURES)
    log.draw_curves()
    log.close()
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    blue = np.abs(pixels - np.array(to_rgb(plots.COLOURS[0])) * 255).max(-1) < 40
    falling, constant = (np.argwhere(blue[:280, left : left + 440]) for left in (0, 440))
    for line in (falling, constant):
        assert np.ptp(line[:, 1]) > 250  # from one side of the chart to the other
    slope, _ = np.polyfit(falling[:, 1], falling[:, 0], 1)
    np.testing.assert_allclose(slope, np.ptp(falling[:, 0]) / np.ptp(falling[:, 1]), rtol=0.05)  # y counts downwards
    assert np.ptp(falling[:, 0]) > 140
    assert np.ptp(constant[:, 0]) <= 3
    assert 100 < constant[:, 0].mean() < 180


def test_nothing_is_drawn_of_nothing_and_by_other_processes(tmp_path, figures):
    log = open_log(tmp_path, 0)
    log.draw_curves()
    log.close()
    other = MetricLog(None, first_step=0, num_steps=9)
    other.write(1, metrics(1), shown="loss", figures=FIGURES)
    other.draw_curves()
    other.close()
    assert not figures
    assert not (tmp_path / "curves.png").exists()


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path):
    log = open_log(tmp_path, 0)
    log.write(1, metrics(1), shown="loss", figures=FIGURES)
    log.close()
    (line,) = (json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["disc_loss"] is None
    assert line["loss"] == 8.0
    assert line["step"] == 1


@pytest.mark.parametrize("file", ["metrics.jsonl", "tensorboard", "curves.png", "log.txt"])
def test_a_full_disk_says_of_which_file_and_nothing_waits(file, tmp_path, full_disk):
    log, text = open_log(tmp_path, 0), TextLog()
    text.open(LogFolder(epath.Path(tmp_path)))
    not_computed = {f"of step {number}": math.nan for number in range(100)}  # TensorBoard gets no such number
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    write = {
        "metrics.jsonl": lambda step: log.write(step, metrics(step) | not_computed, shown="loss", figures=FIGURES),
        "tensorboard": lambda step: log.picture(step, "noise", noise),
        "curves.png": lambda step: (log.write(step, metrics(step), shown="loss", figures=FIGURES), log.draw_curves()),
        "log.txt": lambda step: text.write("words\n"),
    }[file]
    with full_disk(2000), pytest.raises(OSError, match=rf"^cannot write {tmp_path}/{file}: File too large$"):
        list(map(write, range(1, 200)))
    with contextlib.suppress(OSError):
        log.close()


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        "7",
        "{}",
        '{"step": "1", "loss": 2.0}',
        '{"step": true}',
        '{"step": 1, "loss": [2.0]}',
        '{"step": 1, "loss": "high"}',
        '{"step": 1, "loss": 1' + "0" * 400 + "}",
        "[" * 100_000,
        "loss,step",
        "\0\0",
    ],
)
def test_a_file_of_another_program_is_left_as_it_is(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1, "loss": 2.0}\n' + line + '\n{"step": 2, "loss": 1.0}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match=r"/metrics\.jsonl, line 2: expected a step and its numbers") as error:
        open_log(tmp_path, 5)
    assert "\n" not in str(error.value)
    assert path.read_text() == text


def test_the_last_line_of_a_killed_run_is_dropped(tmp_path, figures):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 2.0, "lr": null}\n{"step": 2, "loss": NaN, "lr": 1}\n'
    for rest in ('{"step": 3, "lo', b"\0\0\0".decode(), "\udcff"):
        path.write_bytes((whole + rest).encode(errors="surrogateescape"))
        log = open_log(tmp_path, 5)
        log.draw_curves()  # and what is not finite is not drawn
        log.close()
        assert [json.loads(line) for line in path.read_text().splitlines()] == [
            {"step": 1, "loss": 2.0, "lr": None},
            {"step": 2, "loss": None, "lr": 1.0},
        ]
