"""Kernels as Numba compiles them: plain functions of a range of tasks.

Nothing here is imported where the kernels are on disk (`fastbn.cpu.code`), nor Numba with it.
"""
