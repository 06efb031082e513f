"""Faults of running statistics that a forward pass updates (`tests.cuda.faults`)."""

from tests.cuda.fault import Fault

FAULTS = [
    # moments.cuh: running statistics
    Fault(
        "running: where a block has a channel to itself", "forward",
        "if (p.running_mean != nullptr)", "if (p.running_mean != nullptr && p.splits == 1)", "forward, cluster",
    ),
    Fault(
        "running: where blocks share a channel", "forward",
        "if (p.running_mean != nullptr)", "if (p.running_mean != nullptr && p.splits > 1)", "forward, block, rows",
    ),
    Fault(
        "running: not after parts", "finish_moments",
        "if (p.running_mean != nullptr)", "if (p.running_mean != nullptr && p.splits > 1)", "forward, two passes",
    ),
    Fault(
        "running: not by a single block", "statistics",
        "if (p.running_mean != nullptr)", "if (false)", "forward, two passes, one split",
    ),
    Fault(
        "running: the first part of the mean", "forward",
        "Batch{partial.n, mean, m2}", "Batch{partial.n, partial.origin, m2}", "forward, cooperative",
    ),
    Fault(
        "running: M2 in its unit", "forward",
        "Batch{partial.n, mean, m2}", "Batch{partial.n, mean, partial.m2}", "running statistics, block, float64, small",
    ),
    Fault(
        "running: the rate of the old", "forward",
        "Batch{partial.n, mean, m2}, p.rate", "Batch{partial.n, mean, m2}, 1 - p.rate", "forward, block, rows, all",
    ),
    Fault(
        "running: always the same correction", "finish_moments",
        "p.rate, p.correction, false", "p.rate, 1, false", "forward, two passes",
    ),
    Fault(
        "running: the mean of the type of the variance", "forward",
        "p.running_mean_type, p.running_var_type, at", "p.running_var_type, p.running_var_type, at",
        "forward, block, runs",
    ),
    Fault(
        "merged: rest of the mean not written", "finish_moments",
        "if (p.partials != nullptr) p.partials[at] = found.rest;", "", "forward, two passes, float64, far from 0",
    ),
    Fault(
        "merged: rest of the mean not read", "normalize",
        "read_shared_with_others(p.partials + at),", "0.0,", "forward, two passes, float64, far from 0",
    ),
    Fault(
        "merged: m2 in the place of rstd", "normalize",
        "p.results + 3 * all + at", "p.results + all + at", "forward, two passes",
    ),
]  # fmt: skip
