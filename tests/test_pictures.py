"""Pictures: every image is where it should be, pixel for pixel, and the text is there."""

import numpy as np
import pytest
import scipy.ndimage

from titok_jax.pictures import grids, plots


def coloured(count, size=8):
    """Images that differ in every pixel from each other and from the paper: uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(count)
    images = rng.integers(0, 200, (count, size, size, 3), np.uint8)
    images[..., 0] = np.arange(count)[:, None, None] * 7
    return images


def find(picture, image, scale):
    """(left, top) of the only place where the picture shows the image, enlarged."""
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


def markers(picture, colour):
    """Centres (x, y) of the discs of a colour, from left to right. Lines and words are thinner and fall away."""
    near = np.abs(np.asarray(picture).astype(int) - colour).max(-1) < 40
    labels, count = scipy.ndimage.label(scipy.ndimage.binary_erosion(near, np.ones((5, 5))))
    centres = scipy.ndimage.center_of_mass(labels > 0, labels, range(1, count + 1))
    return np.array(sorted((x, y) for y, x in centres))


def test_curves_pass_through_their_points():
    lines = {"one": [(10, 1.0), (20, 2.0), (40, 9.0)], "two": [(15, 8.0)]}
    names = {"one": ["a", "b", "c"], "two": ["d"]}
    picture = plots.curve(lines, x_label="IS", y_label="FID", title="a title", names=names)
    assert picture.size == (720, 540)
    one, two = (markers(picture, colour) for colour in plots._COLOURS[:2])
    assert len(one) == 3
    assert len(two) == 1
    # One scale for each axis, y upwards.
    x_scale, y_scale = (one[2] - one[0]) / (30, 8)
    assert x_scale > 0 > y_scale
    np.testing.assert_allclose(one[1], one[0] + (10 * x_scale, y_scale), atol=1)
    np.testing.assert_allclose(two[0], one[0] + (5 * x_scale, 7 * y_scale), atol=1)
    for x, y in one.astype(int):  # the words
        assert ink(picture, x + 5, y - 16, x + 16, y - 6)
    assert markers(plots.curve({"one": lines["one"]}, x_label="", y_label=""), plots._COLOURS[0]).size == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 10], ["0", "2", "4", "6", "8", "10"]),
        ([2.31, 2.77], ["2.3", "2.4", "2.5", "2.6", "2.7"]),
        ([-1000, 50000], ["0", "10,000", "20,000", "30,000", "40,000", "50,000"]),
        ([3], ["2.6", "2.8", "3.0", "3.2", "3.4"]),
        ([0, 0], ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
    ],
)
def test_axes_have_round_numbers(values, expected):
    assert [text for _, text in plots._ticks(np.array(values, float))] == expected


def test_curves_need_points():
    for lines in ({}, {"one": []}, {"one": [(0, np.nan)]}):
        with pytest.raises(ValueError, match="expected at least one, and all finite"):
            plots.curve(lines, x_label="", y_label="")


def test_tables_and_curves_stand_side_by_side():
    picture = grids.table([["a", "FID"], ["1", "12.34"], ["200", "5.67"]])
    assert ink(picture, 0, picture.height - 30, 40, picture.height)  # the last row
    whole = grids.beside(picture, picture.resize((300, 200)))
    assert whole.size == (picture.width + 300, 200)
    find(whole, np.asarray(picture), 1)
