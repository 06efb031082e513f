"""Kernels that come with an installation: for this processor, whole, of these sources, the same bits as others."""

import json
import platform
import shutil
from pathlib import Path

import pytest

import fastbn
from fastbn.cpu import code, shipped
from tests import interpreters

PACKAGE = Path(fastbn.__file__).parent
X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="levels are named as on x86-64")


def run(program, *arguments, path=PACKAGE.parent, **environment):
    """What a program prints that has the package from this folder."""
    command = interpreters.python(program, *arguments)
    return interpreters.run(command, timeout=600, cwd=path, PYTHONPATH=path, **environment)


# --- archives ---------------------------------------------------------------------------------------------------------

OBJECTS = {"one": b"\x7fELF one", "two": b"", "three": b"3" * 1000}


def test_archive(tmp_path):
    path = tmp_path / "level"
    shipped.write(path, "sources", OBJECTS)
    assert list(tmp_path.iterdir()) == [path]
    archive = shipped.Archive(path, "sources")
    assert len(archive) == len(OBJECTS)
    assert {name: archive.read(name) for name in OBJECTS} == OBJECTS
    assert archive.read("four") is None


def test_of_other_sources(tmp_path):
    shipped.write(tmp_path / "level", "sources", OBJECTS)
    other = shipped.Archive(tmp_path / "level", "others")
    assert (len(other), other.read("one")) == (0, None)
    assert len(shipped.Archive(tmp_path / "none", "sources")) == 0


def test_damaged(tmp_path):
    """Cut off anywhere, or with any byte changed: what is read is right, or nothing."""
    path = tmp_path / "level"
    shipped.write(path, "sources", OBJECTS)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 0x11
        for content in whole[:place], bytes(changed):
            path.write_bytes(content)
            archive = shipped.Archive(path, "sources")
            found = {name: archive.read(name) for name in OBJECTS}
            assert all(found[name] in (None, OBJECTS[name]) for name in OBJECTS), place
            refused += found != OBJECTS
    assert refused >= 2 * len(range(0, len(whole), 7)) - 1


def test_replaced_meanwhile(tmp_path):
    """As an upgrade does to a process that runs."""
    path = tmp_path / "level"
    shipped.write(path, "sources", OBJECTS)
    archive = shipped.Archive(path, "sources")
    shipped.write(path, "others", {"a": b"longer than before", **OBJECTS})
    assert archive.read("one") is None
    path.unlink()
    assert archive.read("one") is None


# --- levels -----------------------------------------------------------------------------------------------------------


@X86
def test_levels():
    v3, v4 = (",".join(f"+{f}" for f in shipped.LEVELS[level]) for level in ("x86-64-v3", "x86-64-v4"))
    assert shipped.level_of("znver3", v3) == "x86-64-v3"
    assert shipped.level_of("znver4", v4 + ",+avx512vnni") == "x86-64-v4"
    assert shipped.level_of("broken", v3.replace("+fma", "-fma")) is None
    assert shipped.level_of("knights-landing", v4.replace("+avx512bw", "-avx512bw")) == "x86-64-v3"
    assert shipped.level_of("x86-64-v3", "") == "x86-64-v3"
    assert shipped.level_of("x86-64-v2", "") is None


def test_levels_of_other_processors(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert shipped.level_of("neoverse-n1", "+neon") == "generic"
    assert shipped.levels_here() == ["generic"]


# --- which kernels are shipped ----------------------------------------------------------------------------------------

COVERED = """
import sys, warnings
import numpy as np
import fastbn
from fastbn import precompile, warmup
from fastbn.cpu import code
from fastbn.environment import float_dtypes

dtypes = list(float_dtypes())
known = set(precompile.kernels([*dtypes, *warmup.INTEGERS]))
assert code.compiled + code.loaded < 8, "what leads to kernels, no kernels"
asked = code.record()
warnings.simplefilter("ignore")
SHAPES = ((7, 3), 1), ((5, 4, 9), 0), ((2, 70, 3, 11), 1), ((6, 10, 10, 24), -1), ((8, 32, 56, 56), 1), ((1, 300000), 0)
for threads in 1, 3, 8, 64:
    fastbn.threads.set_num_threads(threads)
    for name in dtypes:
        for shape, axis in SHAPES:
            x = np.ones(shape, float_dtypes()[name])
            mask = np.ones([1 if i == axis % len(shape) else n for i, n in enumerate(shape)], bool)
            for options in {}, {"activation": "relu"}, {"residual": x}, {"where": mask}:
                y, saved = fastbn.batch_norm(x, channel_axis=axis, **options)
                fastbn.batch_norm_backward(x, saved)
                if "where" not in options:
                    fastbn.batch_norm_inference(x, saved.mean, saved.rstd, channel_axis=axis, **options)
            out = np.ones_like(x)
            y, saved = fastbn.batch_norm(x, channel_axis=axis, eps=0, out=out)
            fastbn.batch_norm_backward(y, saved, out=out)
            fastbn.batch_norm_inference(x, saved.mean, saved.rstd, channel_axis=axis, out=x)
            fastbn.mean(x, 0, out=np.ones_like(x[0]))
            fastbn.average(x, axis)
            fastbn.moments(x, channel_axis=axis, where=np.ones(shape, bool))
            moments = fastbn.moments(x, channel_axis=axis)
            fastbn.merge(*[moments] * 10)
            for dtype in np.float32, np.float64:
                running = np.ones(shape[axis], dtype)
                fastbn.update_running(running, running, moments)
            for one in None, 0, -1, tuple(i for i in range(len(shape)) if i != axis % len(shape)):
                for statistic in fastbn.mean, fastbn.std, fastbn.nanmean, fastbn.nanstd, fastbn.mean_var:
                    statistic(x, one), statistic(x[..., ::2], one), statistic(x.T, one)
    for name in warmup.INTEGERS:
        fastbn.mean(np.ones((40, 30), name), 0), fastbn.var(np.ones(3, name)), fastbn.moments(np.ones((40, 3), name))
new = set(asked) - known
print(len(known), len(asked), sorted(new))
"""


def test_they_are_those_that_calls_ask_for():
    """Of other shapes and numbers of threads than those that were recorded."""
    known, asked, new = run(COVERED).split(maxsplit=2)
    assert int(known) > int(asked) > 100
    assert new.strip() == "[]"


# --- running them -----------------------------------------------------------------------------------------------------

ANSWERS = """
import hashlib, os, pathlib, sys
import numpy as np
import fastbn
from fastbn.cpu import code, shipped
if len(sys.argv) > 1:
    shipped.FOLDER = pathlib.Path(sys.argv[1])
digest, rng = hashlib.sha256(), np.random.default_rng(0)
for dtype in np.float16, np.float32, np.float64:
    for shape, axis in ((6, 5, 40), 1), ((300, 20), 1):
        x, dy = (3 + rng.standard_normal((2, *shape))).astype(dtype)
        y, saved = fastbn.batch_norm(x, channel_axis=axis, activation="relu")
        grads = fastbn.batch_norm_backward(dy, saved)
        for a in y, saved.mean, saved.rstd, grads.x, grads.gamma, grads.beta, fastbn.var(x, 0), fastbn.nanmean(x):
            digest.update(np.ascontiguousarray(a).tobytes())
"""
KERNELS = "import json; print(json.dumps(sorted(code._known)))"
COUNTS = "print(digest.hexdigest(), code.loaded, code.compiled, 'numba' in sys.modules, code.level_here())"


def build(folder, levels, cache):
    """Archives of what that program needs."""
    kernels = json.loads(run(ANSWERS + KERNELS, NUMBA_CACHE_DIR=str(cache)))
    objects = {level: {} for level in levels}
    for name, kinds in kernels:
        symbol, codes = code.build(name, tuple(kinds), levels)
        for level, content in zip(levels, codes, strict=True):
            objects[level][symbol] = content
    folder.mkdir()
    for level in levels:
        shipped.write(folder / level, code.sources(), objects[level])
    return len(kernels)


@pytest.mark.slow  # compilation, three times
@X86
def test_every_level_has_the_same_bits(tmp_path):
    """As compiled here for this processor, shipped for each of its levels, and compiled for one without AVX and FMA.

    From an archive nothing is compiled nor written, and Numba is not imported.
    """
    own, cache, folder = tmp_path / "own", tmp_path / "cache", tmp_path / "archives"
    count = build(folder, list(shipped.LEVELS), own)
    expected, *_ = run(ANSWERS + COUNTS, tmp_path / "none", NUMBA_CACHE_DIR=str(own)).split()
    highest = code.level_here()
    for level in list(shipped.LEVELS)[list(shipped.LEVELS).index(highest) :] if highest else []:
        named = {} if level == highest else {"NUMBA_CPU_NAME": level, "NUMBA_CPU_FEATURES": ""}
        found = run(ANSWERS + COUNTS, folder, NUMBA_CACHE_DIR=str(cache), **named).split()
        assert found == [expected, str(count), "0", "False", level]
        assert not list(cache.rglob("*.o"))
    older = {"NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": ""}
    answer, loaded, compiled, *_ = run(ANSWERS + COUNTS, folder, NUMBA_CACHE_DIR=str(cache), **older).split()
    assert (answer, loaded, compiled) == (expected, "0", str(count))


def test_changed_sources_take_none(tmp_path):
    """Even a comment: what else a file says is not asked."""
    shutil.copytree(PACKAGE, tmp_path / "fastbn", ignore=shutil.ignore_patterns("__pycache__"))
    level = code.level_here()
    if level is None:
        pytest.skip("no kernels are shipped for this processor")
    archives = tmp_path / "fastbn" / "cpu" / "archives"
    archives.mkdir(exist_ok=True)
    shipped.write(archives / level, code.sources(), OBJECTS)
    program = "from fastbn.cpu import code; print(code.__file__, len(code.archive()))"
    path, found = run(program, path=tmp_path).split()
    assert (Path(path).parents[2], found) == (tmp_path, "3")
    with (tmp_path / "fastbn" / "cpu" / "sizes.py").open("a") as file:
        file.write("# changed\n")
    assert run(program, path=tmp_path).split()[1] == "0"
