"""Gradients of gamma and beta in a dtype, of NumPy arrays."""

from tests.cases.gradient_dtypes import *  # noqa: F403
