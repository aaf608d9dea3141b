"""Pictures in a folder become what a viewer shows, or are refused by name; what is no picture never shifts a label."""

import io
import os
import shutil
import struct
import zlib
from math import ceil

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import released
from get_nb.lab import folders
from get_nb.lab.core import ConfigError, FileError
from get_nb.lab.folders import load_files, load_folder

N = 16
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (N, N), np.uint8)
RGB = RNG.integers(0, 256, (N, N, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (N, N), np.uint16)
OPACITY = RNG.choice(np.array([0, 0, 77, 255], np.uint8), (N, N))


@pytest.fixture(autouse=True)
def no_bars(monkeypatch):
    monkeypatch.setenv("GET_NB_PROGRESS", "off")


def put(folder, name, image, **options):
    "A file in a class folder; `image` is an array, a PIL image or bytes."
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def pictures(folder, **options):
    "What a folder of pictures becomes: (N, H, W) if grey, else (N, H, W, 3)."
    images = load_folder(folder, "all", **options).images.numpy().transpose(0, 2, 3, 1)
    return images[..., 0] if images.shape[-1] == 1 else images


def refusal(call, *args):
    "The one line that refuses."
    with pytest.raises((ConfigError, FileError)) as e:
        call(*args)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


def on_white(colours, opacity):
    share = (opacity / 255.0).reshape(opacity.shape + (1,) * (colours.ndim - 2))
    return colours * share + 255 * (1 - share)


# Files that Pillow cannot write


def png(rows, bits, colour, transparent=b""):
    "A PNG from rows of packed bytes; colour: 0 grey, 2 RGB, 4 grey with opacity, 6 RGBA."

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", N, len(rows), bits, colour, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes(r) for r in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + key + data + chunk(b"IEND", b"")


def tif(pixels, bits, photometric=1, sign=1, extra=None, order="<", samples=1):
    "An uncompressed tif of N x N pixels; sign: 1 unsigned, 2 signed, 3 floating point."
    tags = {256: N, 257: N, 258: bits, 259: 1, 262: photometric, 273: 0, 277: samples, 278: N, 279: len(pixels)}
    tags |= {339: sign} if samples == 1 else {}
    tags |= {338: extra} if extra is not None else {}
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = start
    if samples == 2:
        tags[258] = bits * 65537  # two values of 16 bits in one field
    body = struct.pack(order + "H", len(tags))
    for tag, value in sorted(tags.items()):
        two = tag == 258 and samples == 2
        long = tag in (273, 279)
        value = struct.pack(order + ("I" if long or two else "HH"), *((value,) if long or two else (value, 0)))
        body += struct.pack(order + "HHI", tag, 4 if long else 3, 2 if two else 1) + value
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", 8) + body + bytes(4) + bytes(pixels)


def packed(values, bits):
    "Rows of values of a few bits each, most significant first."
    spread = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return [np.packbits(row.astype(np.uint8).ravel()).tobytes() for row in spread]


# Orientation

SHOWN = {  # what EXIF's orientation makes of the stored pixels
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
STORED = SHOWN | {6: SHOWN[8], 8: SHOWN[6]}  # the way back
BLOCKS = np.kron(np.array([[20, 90], [150, 230]], np.uint8), np.ones((8, 8), np.uint8))  # jpg keeps flat blocks
COLOURS = np.stack([BLOCKS, BLOCKS[::-1], BLOCKS.T], 2)
PRECISE = dict(jpg=dict(quality=100, subsampling=0), webp=dict(lossless=True, exact=True))
VEILED = np.concatenate([RGB, OPACITY[..., None]], 2)
ORIENTED = {
    "png L": (".png", GREY, GREY, {}),
    "png 1": (".png", GREY > 99, np.uint8(255) * (GREY > 99), {}),
    "png 16 bits": (".png", DEEP, DEEP >> 8, {}),
    "png RGB": (".png", RGB, RGB, {}),
    "png RGBA": (".png", VEILED, on_white(RGB, OPACITY), {}),
    "jpg L": (".jpg", BLOCKS, BLOCKS, dict(quality=100)),
    "jpg RGB": (".jpg", COLOURS, COLOURS, PRECISE["jpg"]),
    "jpg MPO": (".jpeg", COLOURS, COLOURS, dict(format="MPO", save_all=True) | PRECISE["jpg"]),
    "webp RGB": (".webp", RGB, RGB, PRECISE["webp"]),
    "webp RGBA": (".webp", VEILED, on_white(RGB, OPACITY), PRECISE["webp"]),
    "tif L": (".tif", GREY, GREY, {}),
    "tif 16 bits": (".tif", DEEP, DEEP >> 8, {}),
    "tif RGB lzw": (".tiff", RGB, RGB, dict(compression="tiff_lzw")),
    "tif RGBA deflate": (".tif", VEILED, on_white(RGB, OPACITY), dict(compression="tiff_adobe_deflate")),
}


@pytest.mark.parametrize("kind", ORIENTED)
def test_all_eight_orientations_are_shown_upright_once(kind, tmp_path):
    suffix, stored, truth, options = ORIENTED[kind]
    for k in SHOWN:
        exif = Image.Exif()
        exif[274] = k
        image = np.ascontiguousarray(STORED[k](stored))
        more = dict(append_images=[Image.fromarray(image[::-1])]) if "save_all" in options else {}
        put(tmp_path, f"c/{k}{suffix}", image, exif=exif, **options, **more)
    for k, read in zip(SHOWN, pictures(tmp_path)):
        assert np.abs(read - np.asarray(truth, float)).max() <= (2 if "jpg" in kind else 0.51), k


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(value, tmp_path):
    exif = Image.Exif()
    exif[274] = value
    for suffix in ("png", "jpg", "webp"):
        put(tmp_path, f"c/{suffix}.{suffix}", COLOURS, exif=exif, **PRECISE.get(suffix, {}))
    put(tmp_path, "c/x.jpg", COLOURS, exif=b"Exif\0\0no such thing", **PRECISE["jpg"])
    assert np.abs(pictures(tmp_path) - COLOURS.astype(float)).max() <= 2


def test_an_orientation_is_heeded_beside_tags_that_make_no_sense(tmp_path):
    orientation = struct.pack("<HHIHH", 274, 3, 1, 6, 0)
    resolution = struct.pack("<HHI4s", 282, 2, 2, b"x")  # a fraction, given as text
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + orientation + resolution + bytes(4)
    for suffix in ("jpg", "png", "webp"):
        put(tmp_path, f"c/{suffix}.{suffix}", np.rot90(COLOURS).copy(), exif=exif, **PRECISE.get(suffix, {}))
    assert np.abs(pictures(tmp_path) - COLOURS.astype(float)).max() <= 2


# Modes, depths and opacity

CMYK = RNG.integers(0, 256, (N, N, 4), np.uint8)
INK = (255 - CMYK[..., :3].astype(float)) * (255 - CMYK[..., 3:]) / 255
PALETTE = RNG.integers(0, 256, (4, 3), np.uint8)
GREYS = np.repeat(RNG.integers(0, 256, (4, 1), np.uint8), 3, 1)
INDEX = RNG.integers(0, 4, (N, N), np.uint8)


def indexed(palette, mode="P"):
    image = Image.fromarray(INDEX, "L").convert("P")
    image.putpalette(palette.tobytes() + bytes(768 - palette.size))
    if mode == "PA":
        image = image.convert("PA")
        image.putalpha(Image.fromarray(OPACITY))
    return image


def two(values, opacity, dtype=">u2"):
    return [row.astype(dtype).tobytes() for row in np.concatenate([values, opacity[..., None]], 2)]


WIDE = RNG.integers(0, 65536, (N, N, 3), np.uint16)
HALF = np.where(INDEX == 2, 0, 255)
LIGHT = np.where(INDEX == 0, 0, np.where(INDEX == 1, 77, 255))
PREMULTIPLIED = (GREY.astype(int) * OPACITY // 255).astype(np.uint8)
READ = {
    "png L": ("x.png", GREY, GREY, {}),
    "bmp L": ("x.bmp", GREY, GREY, {}),
    "gif L": ("x.gif", GREY, GREY, {}),
    "tif L white is zero": ("x.tif", tif(GREY, 8, photometric=0), 255 - GREY, {}),
    "png 1": ("x.png", GREY > 99, 255 * (GREY > 99), {}),
    "bmp 1": ("x.bmp", GREY > 99, 255 * (GREY > 99), {}),
    "tif 1": ("x.tif", GREY > 99, 255 * (GREY > 99), {}),
    "png 2 bits": ("x.png", png(packed(INDEX, 2), 2, 0), INDEX * 85, {}),
    "png 4 bits": ("x.png", png(packed(GREY >> 4, 4), 4, 0), (GREY >> 4) * 17, {}),
    "png 16 bits": ("x.png", DEEP, DEEP >> 8, {}),
    "tif 16 bits": ("x.tif", DEEP, DEEP >> 8, {}),
    "tif 16 bits lzw": ("x.tif", DEEP, DEEP >> 8, dict(compression="tiff_lzw")),
    "tif 16 bits big endian": ("x.tif", tif(DEEP.astype(">u2").tobytes(), 16, order=">"), DEEP >> 8, {}),
    "tif 12 bits": ("x.tif", tif(b"".join(packed(DEEP >> 4, 12)), 12), DEEP >> 8, {}),
    "png RGB 16 bits": ("x.png", png([r.astype(">u2").tobytes() for r in WIDE], 16, 2), WIDE >> 8, {}),
    "png RGBA 16 bits": (
        "x.png",
        png(two(WIDE, OPACITY * np.uint16(257)), 16, 6),
        on_white((WIDE >> 8).astype(float), OPACITY),
        {},
    ),
    "png LA 16 bits": (
        "x.png",
        png(two(DEEP[..., None], OPACITY * np.uint16(257)), 16, 4),
        on_white((DEEP >> 8).astype(float), OPACITY),
        {},
    ),
    "png RGB": ("x.png", RGB, RGB, {}),
    "bmp RGB": ("x.bmp", RGB, RGB, {}),
    "tif RGB": ("x.tif", RGB, RGB, {}),
    "webp RGB": ("x.webp", RGB, RGB, PRECISE["webp"]),
    "png RGBA": ("x.png", VEILED, on_white(RGB, OPACITY), {}),
    "tif RGBA": ("x.tif", VEILED, on_white(RGB, OPACITY), {}),
    "webp RGBA": ("x.webp", VEILED, on_white(RGB, OPACITY), PRECISE["webp"]),
    "png LA": ("x.png", np.stack([GREY, OPACITY], 2), on_white(GREY, OPACITY), {}),
    "tif LA": ("x.tif", np.stack([GREY, OPACITY], 2), on_white(GREY, OPACITY), {}),
    "tif La": (
        "x.tif",
        tif(np.stack([PREMULTIPLIED, OPACITY], 2).tobytes(), 8, extra=1, samples=2),
        PREMULTIPLIED + 255.0 - OPACITY,
        {},
    ),
    "png L with a key": ("x.png", INDEX * np.uint8(50), np.where(INDEX == 1, 255, INDEX * 50), dict(transparency=50)),
    "png 2 bits with a key": ("x.png", png(packed(INDEX, 2), 2, 0, b"\0\2"), np.where(HALF == 0, 255, INDEX * 85), {}),
    "png 4 bits with a key": ("x.png", png(packed(INDEX, 4), 4, 0, b"\0\2"), np.where(HALF == 0, 255, INDEX * 17), {}),
    "png 1 with a key": ("x.png", png(packed(INDEX > 1, 1), 1, 0, b"\0\0"), np.full((N, N), 255), {}),
    "png RGB with a key": (
        "x.png",
        PALETTE[INDEX],
        on_white(PALETTE[INDEX], HALF),
        dict(transparency=tuple(map(int, PALETTE[2]))),
    ),
    "png P": ("x.png", indexed(PALETTE), PALETTE[INDEX], {}),
    "gif P": ("x.gif", indexed(PALETTE), PALETTE[INDEX], {}),
    "bmp P": ("x.bmp", indexed(PALETTE), PALETTE[INDEX], {}),
    "tif P": ("x.tif", indexed(PALETTE), PALETTE[INDEX], {}),
    "png P grey": ("x.png", indexed(GREYS), GREYS[INDEX][..., 0], {}),
    "tif P grey": ("x.tif", indexed(GREYS), GREYS[INDEX][..., 0], {}),
    "png P with a key": ("x.png", indexed(PALETTE), on_white(PALETTE[INDEX], HALF), dict(transparency=2)),
    "gif P with a key": ("x.gif", indexed(PALETTE), on_white(PALETTE[INDEX], HALF), dict(transparency=2)),
    "png P with opacities": ("x.png", indexed(PALETTE), on_white(PALETTE[INDEX], LIGHT), dict(transparency=b"\0M")),
    "png P grey with opacities": (
        "x.png",
        indexed(GREYS),
        on_white(GREYS[INDEX][..., 0], LIGHT),
        dict(transparency=b"\0M"),
    ),
    "tif PA": ("x.tif", indexed(PALETTE, "PA"), on_white(PALETTE[INDEX], OPACITY), {}),
    "tif CMYK": ("x.tif", Image.fromarray(CMYK, "CMYK"), INK, {}),
    "tif YCbCr": ("x.tif", Image.fromarray(COLOURS).convert("YCbCr"), COLOURS, {}),
    "jpg L": ("x.jpg", BLOCKS, BLOCKS, dict(quality=100)),
    "jpg RGB": ("x.jpg", COLOURS, COLOURS, PRECISE["jpg"]),
    "a png called jpg": ("x.jpg", RGB, RGB, dict(format="png")),
    "capital letters": ("X.PNG", RGB, RGB, dict(format="png")),
}


@pytest.mark.parametrize("kind", READ)
def test_a_picture_is_read_as_a_viewer_shows_it(kind, tmp_path):
    name, image, truth, options = READ[kind]
    put(tmp_path, f"c/{name}", image, **options)
    read, truth = pictures(tmp_path), np.asarray(truth, float)
    assert read.shape[1:] == truth.shape
    assert np.abs(read - truth).max() <= (2 if "jpg " in kind or "YCbCr" in kind else 1 if "CMYK" in kind else 0.51)


def test_a_cmyk_jpg_is_not_inverted(tmp_path):
    flat = Image.new("CMYK", (N, N), (200, 40, 0, 51))
    put(tmp_path, "c/x.jpg", flat, quality=100)
    assert np.abs(pictures(tmp_path)[0].astype(float) - [44, 172, 204]).max() <= 3


def test_colours_under_transparency_do_not_bleed_when_resampled(tmp_path):
    image = np.zeros((N, N, 4), np.uint8)
    image[:, N // 2 :] = 255
    image[:, : N // 2, :3] = (255, 0, 0)
    put(tmp_path, "c/x.png", image)
    assert (pictures(tmp_path, size=4) == 255).all()


def test_channels_and_size_are_those_of_the_whole_folder(tmp_path):
    for i in range(10):
        put(tmp_path, f"c/{i}.png", GREY)
    assert load_folder(tmp_path, "train").shape == load_folder(tmp_path, "test").shape == (1, N, N)
    for i in range(10):  # whichever part the picture in colour is in
        put(tmp_path, f"c/{i}.png", RGB)
        assert load_folder(tmp_path, "train").shape == load_folder(tmp_path, "test").shape == (3, N, N)
        put(tmp_path, f"c/{i}.png", RGB[:8, :8])
        for split in ("train", "test"):
            assert "of one size" in refusal(load_folder, tmp_path, split)
        put(tmp_path, f"c/{i}.png", GREY)


# Colour profiles


def profile_of_swapped_colours():
    "sRGB with red and blue exchanged, under another name."
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for a, b in ((b"rXYZ", b"swap"), (b"bXYZ", b"rXYZ"), (b"swap", b"bXYZ")):
        data = data.replace(a, b)
    return data.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


def linear_grey_profile():
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"mine\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061),
        b"kTRC": b"curv" + bytes(4) + struct.pack(">I", 0),
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 132 + 12 * len(tags) + len(body), b"", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + table + body


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_a_colour_profile_is_applied_as_viewers_do(suffix, tmp_path):
    options = PRECISE.get(suffix, {})
    put(tmp_path, f"c/0.{suffix}", RGB, icc_profile=profile_of_swapped_colours(), **options)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    put(tmp_path, f"c/1.{suffix}", RGB, icc_profile=srgb, **options)
    swapped, same = pictures(tmp_path)
    assert np.abs(swapped.astype(int) - RGB[..., ::-1]).max() <= 2
    assert np.array_equal(same, RGB)


def test_a_grey_profile_is_applied_and_one_for_other_colours_changes_nothing(tmp_path):
    put(tmp_path, "c/0.png", GREY, icc_profile=linear_grey_profile())
    put(tmp_path, "c/1.png", GREY, icc_profile=profile_of_swapped_colours())
    linear, same = pictures(tmp_path)
    light = GREY / 255
    shown = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(linear - shown)[GREY > 31].max() <= 1.5 and np.array_equal(same, GREY)  # lcms is coarse in the dark


# Refusals


def written(suffix, image=RGB, **options):
    file = io.BytesIO()
    kind = dict(jpg="jpeg", tif="tiff").get(suffix, suffix)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


FRAMES = dict(save_all=True, append_images=[Image.fromarray(RGB[::-1])])
HUGE = png([], 8, 0)
REFUSED = {
    "animated gif": ("x.gif", written("gif", **FRAMES), "2 pictures"),
    "animated webp": ("x.webp", written("webp", **FRAMES), "2 pictures"),
    "animated png": ("x.png", written("png", **FRAMES), "2 pictures"),
    "tif of two pages": ("x.tif", written("tif", **FRAMES), "2 pictures"),
    "floating point": ("x.tif", written("tif", RGB[..., 0].astype(np.float32)), "floating-point"),
    "32 bits": ("x.tif", written("tif", RGB[..., 0].astype(np.int32)), "32 bits"),
    "16 bits with a sign": ("x.tif", tif(DEEP.tobytes(), 16, sign=2), "with a sign"),
    "8 bits with a sign": ("x.tif", tif(GREY.tobytes(), 8, sign=2), "with a sign"),
    "16 bits, white is zero": ("x.tif", tif(DEEP.tobytes(), 16, photometric=0), "white is zero"),
    "LAB": ("x.tif", written("tif", Image.frombytes("LAB", (N, N), RGB.tobytes())), "LAB"),
    "16 bits with a key": ("x.png", png([r.astype(">u2").tobytes() for r in DEEP], 16, 0, b"\0\0"), "transparent"),
    "16 bits RGB with a key": ("x.png", png([r.astype(">u2").tobytes() for r in WIDE], 16, 2, bytes(6)), "transparent"),
    "empty": ("x.png", b"", "not an image"),
    "text": ("x.jpg", b"<html>not found</html>", "not an image"),
    "eps": ("x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n", "not an image"),
    "100 million pixels": ("x.png", HUGE.replace(HUGE[16:24], struct.pack(">II", 10000, 10000)), "not an image"),
    "400 million pixels": ("x.png", HUGE.replace(HUGE[16:24], struct.pack(">II", 20000, 20000)), "not an image"),
    "damaged profile": ("x.png", written("png", icc_profile=b"no profile"), "not an image"),
}
for _suffix in ("png", "jpg", "webp", "gif", "bmp", "tif"):
    for _part in (0.03, 0.3, 0.6, 0.95):
        _whole = written(_suffix)
        REFUSED[f"{_suffix} cut at {_part}"] = (f"x.{_suffix}", _whole[: int(_part * len(_whole))], "not an image")
for _compression in ("tiff_lzw", "tiff_adobe_deflate"):
    _whole = written("tif", compression=_compression)
    REFUSED[f"{_compression} cut"] = ("x.tif", _whole[: len(_whole) // 2], "not an image")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_certain_look_is_refused_by_name(kind, tmp_path, recwarn):
    name, data, reason = REFUSED[kind]
    put(tmp_path, "c/0.png", RGB)
    put(tmp_path, f"c/{name}", data)
    line = refusal(load_folder, tmp_path, "all")
    assert f"c/{name}: " in line and reason in line and not recwarn.list


def test_a_link_to_nowhere_and_what_may_not_be_read_are_refused(tmp_path, monkeypatch):
    put(tmp_path, "c/0.png", RGB)
    (tmp_path / "c/1.png").symlink_to(tmp_path / "gone.png")
    assert "c/1.png: not an image" in refusal(load_folder, tmp_path, "all")
    (tmp_path / "c/1.png").unlink()

    def denied(*args, **kw):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folders.Image, "open", denied)
    assert "c/0.png: the system does not let us read it (Permission denied)" in refusal(load_folder, tmp_path, "all")
    monkeypatch.setattr(folders.os, "scandir", denied)
    assert "the system does not let us list it" in refusal(load_folder, tmp_path, "all")


# What is no data


def set_of_two(folder):
    for i in range(5):
        put(folder, f"cat/{i}.png", np.full((4, 4), i, np.uint8))
        put(folder, f"dog/{i}.png", np.full((4, 4), 100 + i, np.uint8))


def is_set_of_two(read):
    return (
        read.classes == ("cat", "dog")
        and read.labels.tolist() == [0] * 5 + [1] * 5
        and read.images[:, 0, 0, 0].tolist() == [*range(5), *range(100, 105)]
    )


CLUTTER = {
    ".ipynb_checkpoints/0.png": "hidden",
    "._0.png": "hidden",
    ".DS_Store": "hidden",
    "cat/._0.png": "hidden",
    "cat/.DS_Store": "hidden",
    "cat/.ipynb_checkpoints/0-checkpoint.png": "hidden",
    "Thumbs.db": "hidden",
    "dog/Thumbs.db": "hidden",
    "desktop.ini": "hidden",
    "__MACOSX/cat/._0.png": "hidden",
    "__MACOSX/0.png": "hidden",
    "README.txt": "another kind",
    "dog/labels.csv": "another kind",
    "dog/0.heic": "another kind",
    "dog/png": "another kind",
    "alone.png": "beside the class folders",
    "aaa/notes.txt": "folders without pictures",
    "aaa/.0.png": "folders without pictures",
    "aaa/deep/0.png": "folders without pictures",
    "cat/raw/0.png": "inside class folders",
    "cat/raw.png/0.png": "inside class folders",
}


@pytest.mark.parametrize("name", CLUTTER)
def test_what_is_no_data_shifts_no_label_and_is_said_once(name, tmp_path, capsys):
    set_of_two(tmp_path)
    put(tmp_path, name, b"nothing")
    assert is_set_of_two(load_folder(tmp_path, "all"))
    load_folder(tmp_path, "train")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and str(tmp_path) in said[0] and CLUTTER[name] in said[0]


def test_all_clutter_at_once_is_one_line_and_a_clean_folder_says_nothing(tmp_path, capsys):
    set_of_two(tmp_path)
    load_folder(tmp_path, "all")
    assert not capsys.readouterr().err
    for name in CLUTTER:
        put(tmp_path, name, b"nothing")
    assert is_set_of_two(load_folder(tmp_path, "all"))
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "hidden entries: 11 " in said and "another kind: 5 " in said


def test_a_pipe_with_the_name_of_a_picture_is_not_waited_for(tmp_path, capsys):
    set_of_two(tmp_path)
    os.mkfifo(tmp_path / "cat/5.png")
    (tmp_path / "cat/6.png").symlink_to(tmp_path / "cat/5.png")
    assert is_set_of_two(load_folder(tmp_path, "all")) and "another kind: 2" in capsys.readouterr().err


def test_links_are_followed(tmp_path):
    set_of_two(tmp_path / "disk")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/dog").symlink_to(tmp_path / "disk/dog")
    shutil.copytree(tmp_path / "disk/cat", tmp_path / "here/cat")
    (tmp_path / "here/cat/4.png").unlink()
    (tmp_path / "here/cat/4.png").symlink_to(tmp_path / "disk/cat/4.png")
    assert is_set_of_two(load_folder(tmp_path / "here", "all"))


def test_two_suffixes_are_two_pictures_and_any_bytes_may_name_one(tmp_path):
    put(tmp_path, "c/0.png", GREY)
    put(tmp_path, "c/0.bmp", 255 - GREY)
    os.rename(tmp_path / "c/0.png", os.fsencode(tmp_path) + b"/c/\xff\n.png")
    assert np.array_equal(pictures(tmp_path), [255 - GREY, GREY])
    (tmp_path / "c/0.bmp").write_bytes(b"")
    refusal(load_folder, tmp_path, "all").encode("utf-8")
    os.rename(tmp_path / "c/0.bmp", tmp_path / "c/0.txt")
    with open(os.fsencode(tmp_path) + b"/c/\xff\n.png", "wb"):
        pass
    assert refusal(load_folder, tmp_path, "all").isprintable()


@pytest.mark.parametrize("name", [b"\xff\xfe", b"two\nlines", b"tab\there", b"\xe9t\xe9"])
def test_a_class_that_cannot_be_printed_is_refused(name, tmp_path):
    set_of_two(tmp_path)
    os.rename(tmp_path / "cat", os.fsencode(tmp_path) + b"/" + name)
    line = refusal(load_folder, tmp_path, "all")
    assert line.isprintable() and "rename it" in line


def test_a_folder_without_a_class_says_what_it_holds(tmp_path):
    assert "no such folder" in refusal(load_folder, tmp_path / "gone", "all")
    assert "no images in its sub-folders" in refusal(load_folder, tmp_path, "all")
    put(tmp_path, "0.png", GREY)
    assert "no such folder" in refusal(load_folder, tmp_path / "0.png", "all")
    assert "beside the class folders: 1 (such as 0.png)" in refusal(load_folder, tmp_path, "train")
    put(tmp_path, "train/cat/0.png", GREY)
    assert "folders inside class folders: 1 (such as train/cat)" in refusal(load_folder, tmp_path, "train")


@pytest.mark.parametrize("name", ["folder:", "folder:@8", "x@0", "x@-1", "x@8.5", "x@4097", "x@" + "9" * 5000])
def test_a_name_without_a_folder_or_a_size_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_of_two(tmp_path / "x")
    set_of_two(tmp_path)
    refusal(load_files, name if name.startswith("folder:") else f"folder:{name}", "train")


def test_a_path_may_hold_the_sign_of_a_size(tmp_path):
    set_of_two(tmp_path / "me@home/x")
    assert load_files(f"folder:{tmp_path}/me@home/x", "train").shape == (1, 4, 4)
    assert load_files(f"folder:{tmp_path}/me@home/x@2", "train").shape == (1, 2, 2)


# The split


def counted(folder, counts):
    "A folder with so many pictures in each class, each of its own shade."
    shutil.rmtree(folder, ignore_errors=True)
    for c, count in enumerate(counts):
        for i in range(count):
            put(folder, f"class {c}/{i:02d}.bmp", np.full((1, 1), 12 * c + i, np.uint8))
    return folder


def checked_split(folder, counts):
    "Split or refused? Either way as stated."
    counted(folder, counts)
    parts = []
    for split in ("train", "test"):
        try:
            parts.append(load_folder(folder, split))
        except ConfigError as e:
            assert (
                len(str(e).splitlines()) == 1
                and str(folder) in str(e)
                and "5 of each class are always enough" in str(e)
            )
    assert len(parts) in (0, 2)
    if not parts:
        return False
    train, test = parts
    both = sorted(torch.cat([train.images, test.images]).flatten().tolist())
    assert both == [12 * c + i for c, count in enumerate(counts) for i in range(count)]
    assert len(test) == ceil(0.2 * sum(counts)) and set(train.labels.tolist()) == set(test.labels.tolist())
    for part in parts:
        assert part.classes == tuple(f"class {c}" for c in range(len(counts)))
        assert torch.equal(part.labels, part.images.flatten().long() // 12)
    return True


@pytest.mark.parametrize("classes", range(1, 6))
def test_every_small_folder_is_split_with_each_class_in_both_parts_or_refused(classes, tmp_path):
    fits = [checked_split(tmp_path / "set", [count] * classes) for count in range(1, 13)]
    assert all(fits[4:]) and not fits[0]


def test_uneven_classes_are_split_with_each_class_in_both_parts_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    results = [checked_split(tmp_path / "set", rng.integers(1, 13, rng.integers(2, 6)).tolist()) for _ in range(20)]
    assert set(results) == {True, False}


def test_one_class_is_enough(tmp_path):
    assert len(load_folder(counted(tmp_path / "set", [12]), "test")) == 3
    assert load_folder(counted(tmp_path / "set", [1]), "all").labels.tolist() == [0]


def test_another_split_of_too_few_cifar_images_is_refused(tmp_path, monkeypatch):
    released.write_cifar(tmp_path, 3)
    data = np.zeros((1, 3072), np.uint8)
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(released.cifar_bytes(data, [9]))
    monkeypatch.setenv("GET_NB_DATA", str(tmp_path))
    assert "of each class are always enough" in refusal(load_files, "cifar10-unverified", "train", 1)
