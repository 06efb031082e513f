"""Outputs of any layout, and over inputs: of NumPy arrays."""

from tests.cases.outputs import *  # noqa: F403
