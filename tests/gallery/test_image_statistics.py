"""Statistics of a folder of images: exact, in the memory of an image, and the loops beside them as wrong as said."""

import math
from fractions import Fraction

import numpy as np
import pytest

import fastbn
from tests.pages import recipe_of

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def program(example):
    return example("image_statistics")


@pytest.fixture
def folder(tmp_path):
    """Files of different sizes, modes and formats, in folders; and their pixels as RGB."""
    rng, pixels = np.random.default_rng(0), []
    (tmp_path / "in" / "folders").mkdir(parents=True)
    for number, (mode, size) in enumerate([("RGB", (31, 9)), ("L", (5, 40)), ("RGBA", (2, 1)), ("RGB", (64, 48))]):
        x = rng.integers(0, 256, (*size, len(mode)), dtype=np.uint8)
        x[..., :3] //= number + 1  # so that images differ
        Image.fromarray(x.squeeze(-1) if mode == "L" else x).save(
            tmp_path / ("in/folders" if number else "") / f"{number}.PNG"
        )
        pixels.append(np.broadcast_to(x, (*size, 3)) if mode == "L" else x[..., :3])
    (tmp_path / "README.txt").write_text("no image")
    return tmp_path, pixels


def test_claims(program, tmp_path, capsys):
    picture = tmp_path / "image_statistics.png"
    result = program.main(["--quick", "--threads", "2", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "12 images" in capsys.readouterr().out

    for name in ("fastbn", "Pillow, histograms", "NumPy, sums", "NumPy, sums of planes"):
        assert max(result.errors[name]) < 1e-14  # 1e-16 measured: some 2 million pixels
    assert 1e-14 < result.errors["NumPy, all at once"][1] < 1e-9  # 3e-12: rows of three are added one after another
    assert result.seconds["NumPy, sums"] > 2 * result.seconds["NumPy, sums of planes"]  # 7 times measured

    # In float64 every pixel at once takes 24 bytes a pixel, and its standard deviation as much again.
    beside = {name: size - result.memory[program.DECODING] for name, size in result.memory.items()}
    assert beside["NumPy, all at once"] > 40 * result.pixels
    assert beside["fastbn"] < 0.4 * beside["NumPy, all at once"]  # an eighth measured: an image's, not the folder's


def test_pytorchs_loops(program, tmp_path):
    pytest.importorskip("torch")
    program.make_images(tmp_path, 12, np.random.default_rng(0))
    images = [program.decode(path) for path in program.paths_in(tmp_path)]
    truth = program.exact(sum(program.counts_of(np.asarray(image)) for image in images))
    errors = {}
    for name in ("PyTorch, float32 sums", "PyTorch, mean of stds"):
        way = program.WAYS[name]
        errors[name] = program.errors_of(way.whole([way.of_image(i, np.asarray(i)) for i in images]), truth)
    assert 1e-9 < max(errors["PyTorch, float32 sums"]) < 1e-5  # 4e-7 measured
    assert errors["PyTorch, mean of stds"][1] > 0.1  # 0.3 measured


def test_a_folder(program, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "WAYS", {"fastbn": program.WAYS["fastbn"]})
    path, pixels = folder
    result = program.main(["--folder", str(path), "--threads", "3", "--output", str(tmp_path / "p.png")])
    assert (result.images, result.pixels) == (4, sum(x[..., 0].size for x in pixels))
    assert max(result.errors["fastbn"]) < 1e-15
    assert set(result.streams) == {1, 3}


def test_every_way_but_the_last_is_right(program, folder):
    path, pixels = folder
    images = [program.decode(p) for p in program.paths_in(path)]
    whole = np.concatenate([x.reshape(-1, 3) for x in pixels]).astype(np.float64)
    for name, way in program.WAYS.items():
        mean, std = way.whole([way.of_image(image, np.asarray(image)) for image in images])
        right = np.allclose(mean, whole.mean(axis=0), rtol=1e-6) and np.allclose(std, whole.std(axis=0), rtol=1e-5)
        assert right == (name != "PyTorch, mean of stds"), name


def test_the_recipe_is_the_programs(program, folder):
    """And has the same bits on any number of threads."""
    path, pixels = folder
    paths = program.paths_in(path)
    assert [p.name for p in paths] == ["0.PNG", "1.PNG", "2.PNG", "3.PNG"]
    ours = program.of_folder(paths, 1)
    whole = fastbn.moments(np.concatenate([x.reshape(-1, 3) for x in pixels]))
    for found, expected in zip(ours, whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-13)
    of_page = recipe_of("image_statistics.md")["of_folder"]
    for threads in (1, 4):
        mean, std = of_page(path, "**/*.PNG", threads)
        np.testing.assert_array_equal(mean, ours.mean / 255)
        np.testing.assert_array_equal(std, ours.std() / 255)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits(program, tmp_path, mode):
    """Pillow itself would clip them to 255."""
    path = tmp_path / "deep.tif"
    values = np.full((2, 2), 1000)
    Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])).save(path)
    with pytest.raises(ValueError, match=rf"deep\.tif: expected 8 bits a channel, got mode {mode}"):
        program.decode(path)


def test_no_images(program, tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["--folder", str(tmp_path)])
    assert "--folder: expected images" in capsys.readouterr().err


def test_exact(program):
    """1, 2, 2, 5: mean 5/2, variance 9/4; the second channel is 255, 0, 0, 0."""
    pixels = np.array([[[1, 255, 0], [2, 0, 0]], [[2, 0, 0], [5, 0, 3]]], np.uint8)
    truth = program.exact(program.counts_of(pixels))
    thirds = Fraction(255**2 * 3, 16), Fraction(27, 16)
    assert truth == [(Fraction(5, 2), Fraction(9, 4)), (Fraction(255, 4), thirds[0]), (Fraction(3, 4), thirds[1])]
    stds = [math.sqrt(var) for _, var in truth]
    means = [float(mean) for mean, _ in truth]
    assert max(program.errors_of((means, stds), truth)) < 2e-16
    for error in (1e-15, 1e-9, 0.5, -0.5):
        found = program.errors_of((np.multiply(means, [1, 1 + error, 1]), np.multiply(stds, [1, 1, 1 + error])), truth)
        np.testing.assert_allclose(found, abs(error), rtol=0.5 if error == 1e-15 else 1e-6)


def test_images_that_are_made(program, tmp_path):
    """The same for the same seed; of every mode, and of many sizes."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        program.make_images(tmp_path / name, 8, np.random.default_rng(1))
    first, second = (program.paths_in(tmp_path / name) for name in ("a", "b"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    modes, sizes = zip(*((image.mode, image.size) for image in map(Image.open, first)), strict=True)
    assert set(modes) == {"RGB", "L", "RGBA"}
    assert len(set(sizes)) == 8


def test_sums_of_many_images(program):
    """Float32 sums are no worse for fewer images; a wrong rounding of a few of them would be 1e-7."""
    rng = np.random.default_rng(0)
    counts = [program.counts_of(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)) for _ in range(5)]
    few, many = (max(program.of_many(counts, images, np.random.default_rng(1))) for images in (100, 300_000))
    assert few < 1e-6 < many < 1e-2
