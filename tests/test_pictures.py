"""Pictures: every image is in its place, pixel for pixel, and the text is there."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from titok_jax.pictures import grids, plots


def coloured(count, size=8):
    """Images whose pixels all differ from each other's and from the background: uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(count)
    images = rng.integers(0, 200, (count, size, size, 3), np.uint8)
    images[..., 0] = np.arange(count)[:, None, None] * 7
    return images


def find(picture, image, scale):
    """(left, top) of the only place where the picture shows the enlarged image."""
    pixels = np.asarray(picture)
    cell = image.repeat(scale, 0).repeat(scale, 1)
    height, width = cell.shape[:2]
    places = [
        (x, y)
        for y, x in np.argwhere((pixels == cell[0, 0]).all(-1))
        if y + height <= len(pixels)
        and x + width <= pixels.shape[1]
        and (pixels[y : y + height, x : x + width] == cell).all()
    ]
    assert len(places) == 1
    return places[0]


@pytest.mark.parametrize("kind", ["plain", "labels", "row_labels"])
def test_images_stand_in_rows_unchanged(kind):
    images = coloured(5)
    texts = {"labels": ["a", "b", "c", "d", "e"], "row_labels": ["one", "two"]}
    options = {kind: texts[kind]} if kind in texts else {}
    picture = grids.grid(images, 3, scale=2, **options)
    places = [find(picture, image, 2) for image in images]
    xs, ys = [x for x, _ in places], [y for _, y in places]
    assert xs[:2] == xs[3:]
    assert xs[0] < xs[1] < xs[2]
    assert ys[0] == ys[1] == ys[2] < ys[3] == ys[4]
    assert xs[1] - xs[0] == xs[2] - xs[1] >= 16  # no overlap
    assert xs[2] + 16 <= picture.width
    assert ys[4] + 16 <= picture.height


def ink(picture, left, top, right, bottom):
    return (np.asarray(picture)[top:bottom, left:right] < 150).any()


def test_captions_are_under_their_images_and_empty_ones_take_no_room():
    images = coloured(4, 16)
    picture = grids.grid(images, 2, ["", "", "8", ""], scale=4)
    (_, y0), _, (x2, y2), (x3, y3) = [find(picture, image, 4) for image in images]
    assert y2 - y0 < 64 + 10
    assert ink(picture, x2, y2 + 64, x2 + 64, picture.height)
    assert not ink(picture, x3, y3 + 64, x3 + 64, picture.height)


def test_row_labels_and_title():
    images = coloured(4, 16)
    picture = grids.grid(images, 2, scale=4, row_labels=["3", ""], title="digits")
    (x0, y0), _, (_, y2), _ = [find(picture, image, 4) for image in images]
    assert ink(picture, 0, y0, x0, y0 + 64)
    assert not ink(picture, 0, y2, x0, y2 + 64)
    assert ink(picture, 0, 0, picture.width, y0)


def test_scale_is_chosen_for_small_images_and_floats_are_rounded():
    digit = coloured(1, 32)
    assert grids.grid(digit).width == grids.grid(digit, scale=2).width
    large = coloured(1, 256)
    assert find(grids.grid(large), large[0], 1)
    as_floats = (digit / 255.0 + 0.4 / 255).astype(np.float32)
    assert find(grids.grid(as_floats), digit[0], 2)


def test_a_caption_that_does_not_fit_is_cut():
    images = coloured(2, 16)
    long = grids.grid(images, 2, ["W" * 200, ""], scale=4)
    x1, y1 = find(long, images[1], 4)
    assert not ink(long, x1 + 2, y1 + 64, x1 + 64, long.height)  # does not run under its neighbour


def test_side_by_side():
    images = coloured(2, 32)
    picture = grids.side_by_side(images[0], images[1], "cat.png")
    (x0, y0), (x1, y1) = find(picture, images[0], 4), find(picture, images[1], 4)
    assert x0 + 128 <= x1
    assert y0 == y1
    assert ink(picture, 0, 0, picture.width, y0)


def test_comparison_puts_each_reconstruction_under_its_original():
    images = coloured(10, 16)
    picture = grids.comparison(images[:5], images[5:], 3, ["1", "2", "3", "4", "5"], 4)
    for original, reconstruction in zip(images[:5], images[5:], strict=True):
        (x0, y0), (x1, y1) = find(picture, original, 4), find(picture, reconstruction, 4)
        assert x0 == x1
        assert 64 <= y1 - y0 < 64 + 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["a"]}, "1 labels, expected 4"),
        ({"columns": 2, "row_labels": ["a"]}, "1 row_labels, expected 2"),
        ({"columns": 0}, "columns 0"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        grids.grid(coloured(4), **options)
    with pytest.raises(ValueError, match="at least one"):
        grids.grid(coloured(0))


def drawn(figure) -> np.ndarray:
    """The pixels of a figure, [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def test_a_sweep_is_drawn_through_its_points_beside_their_table():
    lines = {"one": [(10, 1.0), (20, 2.0), (40, 9.0)], "two": [(15, 8.0)]}
    names = {"one": ["a", "b", "c"], "two": ["d"]}
    table = [["name", "IS", "FID"], ["a", "10", "1.00"], ["d", "15", "8.00"]]
    figure = plots.sweep(lines, names, x_label="IS", y_label="FID", title="a title", table=table)
    pixels = drawn(figure)
    chart, words = figure.axes
    for colour, points in zip(plots.COLOURS, lines.values(), strict=False):
        near = np.abs(pixels - np.array(to_rgb(colour)) * 255).max(-1) < 40
        for x, y in chart.transData.transform(points).round().astype(int):
            assert near[len(pixels) - 1 - y, x], f"no marker at {x}, {y}"
    assert {text.get_text() for text in chart.texts} == set("abcd")
    assert [text.get_text() for text in chart.get_legend().get_texts()] == ["one", "two"]
    assert (chart.get_xlabel(), chart.get_ylabel(), chart.get_title(loc="left")) == ("IS", "FID", "a title")
    (cells,) = words.tables
    assert [[cells[row, column].get_text().get_text() for column in range(3)] for row in range(3)] == table


def test_curves_need_points():
    for points in ([], [(0, np.nan)], [(0, 1.0), (1, np.inf)]):
        with pytest.raises(ValueError, match="expected at least one, and all finite"):
            plots.training_curves({"loss": points})
