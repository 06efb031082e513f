"""All that fastbn takes of Numba beside its public names; ``tests/cpu/test_compiler.py`` says what a new Numba changed.

Importing this, `threads` or `version` does not import Numba.
"""
