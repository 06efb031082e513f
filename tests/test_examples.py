"""The examples run in their short form, and what they show holds."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def digits(monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("digits_example", EXAMPLES / "digits.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_digits(digits, tmp_path, capsys):
    picture = tmp_path / "digits.png"
    runs = digits.main(["--quick", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "batch norm x30" in capsys.readouterr().out

    _, images, _, labels = digits.load()
    for run in runs:
        logits, _ = digits.infer(run.layers, images)
        accuracy = digits.accuracy_of(logits, labels)
        if run.network == digits.PLAIN:
            # Nothing learnt yet: neither would a network whose batch norm does not normalize.
            assert accuracy < 0.5
            continue
        assert accuracy > 0.9
        without_batch_norm = digits.folded(run.layers)
        assert all(layer.gamma is None for layer in without_batch_norm)
        same, _ = digits.infer(without_batch_norm, images)
        # float32 rounding through four layers; 1e-6 measured
        np.testing.assert_allclose(same, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
