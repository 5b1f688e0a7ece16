"""Pictures of any origin: what is opened, what is decoded, and how much memory that takes."""

import io
import os
import socket
import struct

import numpy as np
import pytest
from PIL import Image

from titok_jax import reconstruct
from titok_jax.data import image_files, records, sources, transforms
from titok_jax.runtime.paths import read_bytes


def encoded(image_format: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    """A grey picture, `size` (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, (90, 90, 90)).save(file, image_format)
    return file.getvalue()


def header(width: int, height: int) -> bytes:
    """A BMP that claims a size and ends there."""
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_what_is_decoded(image_format):
    image = transforms.decode_image(encoded(image_format))
    assert image.shape == (30, 40, 3)
    assert np.abs(image.astype(int) - 90).max() <= 3


def test_no_other_program_is_started_and_no_other_format_read():
    """Pillow would start Ghostscript for EPS, whatever the name of the file says."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    for data in (eps, *map(encoded, ("PPM", "ICO", "TGA", "PCX"))):
        with pytest.raises(
            ValueError, match=r"^a\.jpg: cannot read .* \(JPEG, PNG, WebP, BMP, GIF, TIFF\): it is none of these"
        ):
            transforms.decode_image(data, "a.jpg")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (2**30, 2**30), (90_000_000, 1)])
def test_no_more_pixels_are_decoded_than_fit_memory(size):
    with pytest.raises(ValueError, match=r"^a\.bmp: cannot read .*(at most 89,478,485 in all are read|exceeds limit)"):
        transforms.decode_image(header(*size), "a.bmp")


CROPS = {
    "torchvision": lambda image, size: transforms.center_crop_torchvision(image, size),
    "adm": lambda image, size: transforms.center_crop_adm(image, size),
    "ten": lambda image, size: transforms.ten_crop(image, size)[4],
    "random": lambda image, size: transforms.random_resize_crop_flip(
        image, np.random.default_rng(3), resize_shorter_edge=size + 9, crop_size=size
    ),
}


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
def test_a_long_picture_takes_little_memory(crop, monkeypatch):
    resize, made = Image.Image.resize, []

    def watched(self, size, *arguments, **options):
        made.append(size[0] * size[1])
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    long = np.repeat(np.arange(20_000) // 100, 3).reshape(20_000, 1, 3).astype(np.uint8)
    for image in (long, long.transpose(1, 0, 2)):
        found = crop(image, 256)
        assert found.shape == (256, 256, 3)
        assert np.ptp(found) <= 2  # at most three of the source's pixels are shown
    assert sum(made) < 2**22
    assert 95 < CROPS["torchvision"](long, 256).mean() < 105  # the centre


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
def test_a_window_that_is_resized_alone_shows_the_same(crop, monkeypatch):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(40, 216, (60, 5, 3), dtype=np.uint8))
    for size in ((30, 700), (700, 30), (41, 33), (300, 171)):
        image = np.asarray(noise.resize(size, Image.Resampling.BILINEAR))
        whole = crop(image, 24).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(transforms, "_WHOLE_RESIZE", 0)
            alone = crop(image, 24)
        assert np.abs(whole - alone).max() <= 2


def test_only_regular_files_are_read(tmp_path, capsys):
    """A pipe would wait for ever, a device would fill the memory."""
    os.mkfifo(tmp_path / "pipe.png")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket.png"))
    for path, kind in ((tmp_path / "pipe.png", "pipe"), ("/dev/zero", "device")):
        with pytest.raises(ValueError, match=f"it is a {kind}, expected a file"):
            read_bytes(path)
        assert reconstruct.main([str(path), "--out", str(tmp_path / "out")]) == 2
        assert f"{path}: it is a {kind}, expected a file" in capsys.readouterr().err
    for name, kind in (("pipe", "pipe"), ("socket", "socket")):
        folder = tmp_path / name
        folder.mkdir()
        (tmp_path / f"{name}.png").rename(folder / "a.png")
        (folder / "b.png").write_bytes(encoded())
        for found in (sources.FolderSource, lambda folder: image_files.find_images([str(folder)])):
            with pytest.raises(ValueError, match=rf"{name}/a\.png: it is a {kind}, expected a file"):
                found(folder)
    listener.close()


def test_a_link_in_a_folder_stays_in_it(tmp_path):
    """A folder from elsewhere could otherwise name any file of this machine. What a user names himself may be a link."""
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    (images / "b").mkdir()
    (images / "a" / "0.png").write_bytes(encoded())
    (images / "b" / "0.png").symlink_to("../a/0.png")
    (tmp_path / "key").write_bytes(encoded())
    assert len(sources.FolderSource(images)) == 2
    (images / "b" / "1.png").symlink_to(tmp_path / "key")
    for found in (sources.FolderSource, lambda folder: image_files.find_images([str(folder)])):
        with pytest.raises(ValueError, match=rf"b/1\.png: it is a link out of the folder, to {tmp_path}/key; copy the file"):
            found(images)
    assert len(image_files.find_images([str(images / "b" / "1.png")])) == 1
    (images / "b" / "notes.txt").symlink_to(tmp_path / "key")  # no image
    (images / "b" / "1.png").unlink()
    assert len(sources.FolderSource(images)) == 2
    # A linked folder is one of the user's, and links in it may lead within it.
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "0.png").write_bytes(encoded())
    (tmp_path / "more" / "1.png").symlink_to("0.png")
    (images / "c").symlink_to(tmp_path / "more")
    assert len(sources.FolderSource(images)) == 4
    (images / "b" / "2.png").symlink_to("nothing")
    with pytest.raises(ValueError, match=r"b/2\.png: it is a link to nothing, which does not exist"):
        sources.FolderSource(images)


def test_no_file_is_read_that_is_larger_than_any_picture(tmp_path, monkeypatch):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**42)  # takes no room on the disk
    with pytest.raises(ValueError, match=r"a\.png: 4,398,046,511,104 bytes to read at once, expected at most 715,827,880"):
        sources.FolderSource(tmp_path)[0]
    monkeypatch.setattr(image_files, "MAX_BYTES", 20)
    (tmp_path / "a.png").write_bytes(encoded())
    assert len(image_files.read_image(tmp_path / "a.png", 8, 20)) == 20
    with pytest.raises(ValueError, match="21 bytes to read at once"):
        image_files.read_image(tmp_path / "a.png", 8, 21)
    with pytest.raises(ValueError, match="bytes to read at once"):
        image_files.read_image(tmp_path / "a.png")


def test_records_decode_as_files_do(tmp_path):
    with records.image_writer(tmp_path / "a.array_record") as write:
        write(encoded("PPM"), 3)
    with pytest.raises(ValueError, match=r"a\.array_record, record 0: cannot read .*: it is none of these"):
        sources.make_source({"name": "array_record", "paths": str(tmp_path / "a.array_record")})[0]
