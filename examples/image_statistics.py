"""Mean and standard deviation of a folder of images, per channel: what normalises the inputs of a network.

Images of different sizes are decoded one after another; of each one only count, mean and sum of squared deviations of
its three channels are kept, and these are merged (Chan et al. 1979)::

    seen = sum(fastbn.moments(pixels, channel_axis=-1) for pixels in images)    # uint8, (height, width, 3)
    mean, std = seen.mean, seen.std()

Beside it, on the same pixels: NumPy in float64, by sums and squares of each image (as they lie, and copied to one plane
a channel), and of all pixels at once; Pillow's histograms; and PyTorch's two usual loops: float32 sums and squares of
each image, and the mean of the images' means and standard deviations. Pixels are integers, so the true mean and
variance are fractions, and errors are taken against these.

Run ``python examples/image_statistics.py`` (half a minute; ``--quick``: seconds), which makes a folder of images out of
scikit-learn's two photographs, or add ``--folder PATH``. The picture: (a) the processor's time of decoding and of each
way; (b) memory, each way in a process of its own; (c) the error of the standard deviation.

Where it does not show: Pillow's histograms of 8-bit images are exact as well, and fast. Float32 sums are accurate
enough for what these numbers are used for, of a million images too; the mean of standard deviations is not.

Sources: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", Stanford
report STAN-CS-79-773, 1979; the mean of standard deviations: pytorch/vision#1439 and #1965, by which ImageNet's
(0.229, 0.224, 0.225) probably came about that way, where the deviations of its pixels are (0.281, 0.274, 0.288).
"""

import importlib.util
import math
import multiprocessing
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import numpy as np
from gallery import BLUE, GREEN, GREY, ORANGE, PURPLE, Array, one_thread, options, panels, progress, save, table
from PIL import Image, ImageEnhance

import fastbn

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
IMAGENET = 1_281_167  # training images
DECODING = "decoding"
EXACT = 1e-17  # where the picture's errors begin
PYTORCH = importlib.util.find_spec("torch") is not None


# --- images -----------------------------------------------------------------------------------------------------------


def decode(path: Path) -> Image.Image:
    """An image of 8-bit RGB. Grey and palettes become RGB, alpha is dropped."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(
                f"{path}: expected 8 bits a channel, got mode {image.mode}, which Pillow would clip to 255"
            )
        return image.convert("RGB")


def paths_in(folder: Path) -> list[Path]:
    """The images of a folder and the folders in it."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def make_images(folder: Path, count: int, rng: np.random.Generator) -> None:
    """Crops of two photographs, scaled, darker and brighter: a quarter PNG, some of them grey, some with alpha."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in bar(range(count), count, "making images"):
        photo = photos[number % len(photos)]
        width, height = (int(rng.integers(side // 4, side)) for side in photo.size)
        left, top = int(rng.integers(photo.width - width)), int(rng.integers(photo.height - height))
        scale = rng.uniform(0.5, 1.5)
        size = round(scale * width), round(scale * height)
        image = photo.resize(size, box=(left, top, left + width, top + height))
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.3))
        mode = ("RGB", "RGB", "L", "RGBA")[number % 4]
        image.convert(mode).save(folder / f"{number:05}{'.png' if mode == 'RGBA' else '.jpg'}", quality=90)


def bar(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    """The items, with a line that says how many of them have been."""
    for done, item in enumerate(items, 1):
        yield item
        progress(f"{what} [{'#' * (30 * done // total):<30}] {done} of {total}")
    progress("")


# --- the recipe -------------------------------------------------------------------------------------------------------


def of_image(path: Path) -> fastbn.Moments:
    return fastbn.moments(np.asarray(decode(path)), channel_axis=-1)


def of_folder(paths: Sequence[Path], threads: int) -> fastbn.Moments:
    """Pillow decodes, and kernels run, without Python's lock: each thread has an image of its own."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(bar(pool.map(of_image, paths), len(paths), f"the recipe, threads: {threads}"))


# --- the ways ---------------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """``whole([of_image(image, pixels) for each image])`` is mean and standard deviation, of pixels from 0 to 255."""

    of_image: Callable[[Image.Image, Array], Any]
    whole: Callable[[list[Any]], tuple[Array, Array]]
    colour: str


def merged(parts: list[fastbn.Moments]) -> tuple[Array, Array]:
    seen = sum(parts, start=0)
    return seen.mean, seen.std()


def numpys_sums(image: Image.Image, pixels: Array) -> tuple[int, Array, Array]:
    x = pixels.reshape(-1, 3).astype(np.float64)
    return len(x), x.sum(axis=0), np.square(x).sum(axis=0)


def numpys_planes(image: Image.Image, pixels: Array) -> tuple[int, Array, Array]:
    """Rows of three numbers are what NumPy's sums are slowest at."""
    x = np.ascontiguousarray(pixels.reshape(-1, 3).T).astype(np.float64)
    return x.shape[1], x.sum(axis=1), np.einsum("ci,ci->c", x, x)


def of_sums(parts: list[tuple[int, Any, Any]], unit: int = 1) -> tuple[Array, Array]:
    """``sqrt(E[x^2] - E[x]^2)``, in the dtype of the sums."""
    count, total, squares = (sum(column) for column in zip(*parts, strict=True))
    mean = total / count
    return unit * np.asarray(mean), unit * np.asarray((squares / count - mean**2) ** 0.5)


def at_once(parts: list[Array]) -> tuple[Array, Array]:
    x = np.concatenate([pixels.reshape(-1, 3) for pixels in parts]).astype(np.float64)
    return x.mean(axis=0), x.std(axis=0)


def of_histograms(parts: list[list[int]]) -> tuple[Array, Array]:
    counts, values = np.sum(parts, axis=0).reshape(3, 256), np.arange(256)
    count, total, squares = counts.sum(axis=1), counts @ values, counts @ values**2
    mean = total / count
    return mean, np.sqrt(squares / count - mean**2)


def to_tensor(pixels: Array) -> Any:
    """As torchvision's transform of that name: float32 from 0 to 1, channels first."""
    import torch

    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().float().div(255)


def pytorchs_sums(image: Image.Image, pixels: Array) -> tuple[int, Any, Any]:
    x = to_tensor(pixels)
    return x[0].numel(), x.sum((1, 2)), (x**2).sum((1, 2))


def pytorchs_stds(image: Image.Image, pixels: Array) -> tuple[Any, Any]:
    x = to_tensor(pixels)
    return x.mean((1, 2)), x.std((1, 2))


def averaged(parts: list[tuple[Any, Any]]) -> tuple[Array, Array]:
    """A small image counts as much as a large one, and how images differ from each other does not count."""
    mean, std = (255 * np.asarray(sum(column) / len(parts)) for column in zip(*parts, strict=True))
    return mean, std


WAYS = {
    "fastbn": Way(lambda image, pixels: fastbn.moments(pixels, channel_axis=-1), merged, BLUE),
    "Pillow, histograms": Way(lambda image, pixels: image.histogram(), of_histograms, GREEN),
    "NumPy, sums": Way(numpys_sums, of_sums, PURPLE),
    "NumPy, sums of planes": Way(numpys_planes, of_sums, PURPLE),
    "NumPy, all at once": Way(lambda image, pixels: pixels, at_once, PURPLE),
}
if PYTORCH:
    WAYS["PyTorch, float32 sums"] = Way(pytorchs_sums, partial(of_sums, unit=255), ORANGE)
    WAYS["PyTorch, mean of stds"] = Way(pytorchs_stds, averaged, ORANGE)


# --- what they take ---------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    images: int
    pixels: int
    seconds: dict[str, float]  # of the processor; of decoding, and of each way
    memory: dict[str, int]  # bytes, of decoding alone and of each way with it
    found: dict[str, tuple[Array, Array]]  # mean and standard deviation
    errors: dict[str, tuple[float, float]]  # of both, relative, of the worst channel
    many: tuple[float, float]  # the errors of float32 sums of as many images as ImageNet has
    streams: dict[int, float]  # seconds of the whole recipe by its threads


def seconds_of(ways: dict[str, Way], paths: Sequence[Path]) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """The processor's time on one thread, by turns on each image; and what each way keeps of the images."""
    seconds, parts = dict.fromkeys([DECODING, *ways], 0.0), {name: [] for name in ways}
    small = Image.new("RGB", (8, 8))
    for way in ways.values():
        way.whole([way.of_image(small, np.asarray(small))] * 2)  # imports and compiles
    names = [*ways]
    for path in bar(paths, len(paths), "times"):
        start = process_time()
        image = decode(path)
        pixels = np.asarray(image)
        seconds[DECODING] += process_time() - start
        names.append(names.pop(0))  # none is always first to read the pixels
        for name in names:
            start = process_time()
            part = ways[name].of_image(image, pixels)
            seconds[name] += process_time() - start
            parts[name].append(part)
    return seconds, parts


@contextmanager
def one_thread_each() -> Iterator[None]:
    """PyTorch's threads too: they spin after an operation, and would be counted to whatever comes next."""
    with one_thread():
        if PYTORCH:
            import torch

            threads = torch.get_num_threads()
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if PYTORCH:
                torch.set_num_threads(threads)


def memory_of(name: str, paths: Sequence[Path]) -> int:
    """Bytes by which this process grows while it goes through the images in one way, decoding included."""
    way = WAYS.get(name, Way(lambda image, pixels: None, lambda parts: (np.zeros(3), np.zeros(3)), GREY))
    small = Image.new("RGB", (8, 8))
    way.whole([way.of_image(small, np.asarray(small))] * 2)
    before = peak()
    way.whole([way.of_image(image, np.asarray(image)) for image in map(decode, paths)])
    return peak() - before


def peak() -> int:
    """The most bytes that this process has had in memory. (Linux counts its parent's as well in ru_maxrss.)"""
    if sys.platform == "linux":
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def counts_of(pixels: Array) -> Array:
    """How often each of 256 values comes in each channel."""
    return np.stack([np.bincount(channel, minlength=256) for channel in pixels.reshape(-1, 3).T])


def exact(counts: Array) -> list[tuple[Fraction, Fraction]]:
    """Mean and variance of each channel: integer sums without limit, divided once."""
    result = []
    for row in counts.tolist():
        n, total, squares = (sum(v**power * count for v, count in enumerate(row)) for power in (0, 1, 2))
        result.append((Fraction(total, n), Fraction(squares * n - total**2, n**2)))
    return result


def errors_of(found: tuple[Array, Array], truth: list[tuple[Fraction, Fraction]]) -> tuple[float, float]:
    """Relative, the worst channel's, of mean and standard deviation: ``r - 1 = (r^2 - 1) / (r + 1)``."""
    means, stds = zip(*truth, strict=True)
    squared = [Fraction(float(std)) ** 2 / var for std, var in zip(found[1], stds, strict=True)]
    return (
        max(abs(float(Fraction(float(value)) / mean - 1)) for value, mean in zip(found[0], means, strict=True)),
        max(abs(float(ratio - 1)) / (math.sqrt(ratio) + 1) for ratio in squared),
    )


def of_many(counts: list[Array], images: int, rng: np.random.Generator) -> tuple[float, float]:
    """Errors of running float32 sums of so many images: the folder's again and again, up to twice as large or small.

    Equal numbers would be rounded to the same side each time.
    """
    sizes = 2.0 ** rng.uniform(-1, 1, (images, 1))
    sums = [(np.array(counts) @ (np.arange(256) / 255) ** power)[np.arange(images) % len(counts)] for power in range(3)]
    count, total, squares = (sizes * each for each in sums)
    truth = of_sums([(count.sum(axis=0), total.sum(axis=0), squares.sum(axis=0))])
    running = (np.cumsum(each.astype(np.float32), axis=0)[-1] for each in (total, squares))
    found = of_sums([(count.sum(axis=0).astype(np.float32), *running)])
    mean, std = (float(np.abs(value / right - 1).max()) for value, right in zip(found, truth, strict=True))
    return mean, std


def measure(paths: Sequence[Path], threads: int, rng: np.random.Generator) -> Result:
    with one_thread_each():
        seconds, parts = seconds_of(WAYS, paths)
        found = {}
        for name, way in WAYS.items():
            progress(name)
            start = process_time()
            found[name] = way.whole(parts.pop(name))
            seconds[name] += process_time() - start
    counts = [counts_of(np.asarray(decode(path))) for path in bar(paths, len(paths), "exact sums")]
    truth = exact(sum(counts))
    errors = {name: errors_of(both, truth) for name, both in found.items()}
    names = [DECODING, *WAYS]
    fresh = multiprocessing.get_context("forkserver")  # a process each, with nothing in it but what is imported above
    fresh.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, fresh, max_tasks_per_child=1) as pool:
        sizes = pool.map(partial(memory_of, paths=paths), names)
        memory = dict(zip(names, bar(sizes, len(names), "memory"), strict=True))
    streams = {}
    for count in (1, threads):
        start = perf_counter()
        of_folder(paths, count)
        streams[count] = perf_counter() - start
    pixels = int(sum(counts)[0].sum())
    many = of_many(counts, IMAGENET, rng)
    return Result(len(paths), pixels, seconds, memory, found, errors, many, streams)


# --- what is shown ----------------------------------------------------------------------------------------------------


def report(result: Result) -> None:
    million = result.pixels / 1e6
    mean, std = (np.round(values / 255, 4) for values in result.found["fastbn"])
    print(f"{result.images} images, {million:.1f} million pixels: mean {mean}, standard deviation {std}\n")
    alone, rows = result.seconds[DECODING], []
    for name, seconds in result.seconds.items():
        errors = result.errors.get(name, ("", ""))
        ratio = f"{seconds / alone:.0%}"
        shown = [e if e == "" else f"{e:.0e}" for e in errors]
        rows.append((name, 1e3 * seconds / million, ratio, result.memory[name] / 1e6, *shown))
    table(("", "ms/megapixel", "of decoding", "MB", "error of mean", "of std"), rows)
    print("\nfloat32 sums of {:,} such images: error of mean {:.0e}, of std {:.0e}".format(IMAGENET, *result.many))
    print("the recipe, all in all: " + ", ".join(f"{s:.2f} s, threads: {n}" for n, s in result.streams.items()))


def draw(result: Result, output: str) -> None:
    titles = "processor's time", "memory, with decoding", "error of the standard deviation"
    figure, axes = panels("abc", titles, (11, 3.6))
    names = [DECODING, *WAYS]
    colours = [GREY, *(way.colour for way in WAYS.values())]
    million = result.pixels / 1e6
    columns = {
        "a": ("ms a megapixel", [1e3 * result.seconds[name] / million for name in names]),
        "b": ("MB", [max(result.memory[name] / 1e6, 0.1) for name in names]),
        "c": ("relative", [0, *(result.errors[name][1] for name in WAYS)]),
    }
    for letter, (unit, values) in columns.items():
        axis, errors = axes[letter], letter == "c"
        axis.barh(names, [max(value, EXACT) if errors else value for value in values], color=colours)
        axis.set(xscale="log", xlabel=unit)
        if errors:
            axis.set_xlim(EXACT, 10)
        else:
            axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.tick_params(labelleft=letter == "a")
        for at, value in enumerate(values):
            if not errors or names[at] in result.errors:
                text = "exact" if value == 0 else f"{value:.0e}" if errors else f"{value:.{0 if value > 10 else 1}f}"
                place = max(value, EXACT), at
                axis.annotate(text, place, (3, 0), textcoords="offset points", va="center", fontsize=8)
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> Result:
    parser = options(__doc__, "image_statistics.png")
    parser.add_argument("--folder", type=Path, help="of images; by default some are made")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="that decode; %(default)s")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as made:
        if args.folder is None:
            make_images(Path(made), 12 if args.quick else 240, rng)
        paths = paths_in(args.folder or Path(made))
        if not paths:
            parser.error(f"--folder: expected images in {args.folder}, found none of {', '.join(sorted(SUFFIXES))}")
        result = measure(paths, args.threads, rng)
    report(result)
    draw(result, args.output)
    return result


if __name__ == "__main__":
    main()
