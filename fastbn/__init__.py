"""Batch-normalization kernels for people who hold arrays: NumPy arrays on the CPU, CuPy arrays on the GPU."""

from fastbn import threads as threads
from fastbn.functional import batch_norm, batch_norm_backward, batch_norm_inference
from fastbn.layer import BatchNorm
from fastbn.merging import Moments, merge, population, update_running
from fastbn.nan_reductions import nanmean, nanstd, nanvar
from fastbn.primitives import fold, grad_input, grad_sums, normalize
from fastbn.reductions import average, mean, mean_var, moments, std, var
from fastbn.saved import Gradients, Saved

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "Gradients",
    "Moments",
    "Saved",
    "average",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "fold",
    "grad_input",
    "grad_sums",
    "mean",
    "mean_var",
    "merge",
    "moments",
    "nanmean",
    "nanstd",
    "nanvar",
    "normalize",
    "population",
    "std",
    "update_running",
    "var",
]
