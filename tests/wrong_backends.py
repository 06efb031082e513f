"""Backends with a fault, which checks must find."""

import types

from fastbn import cpu

PREPARING = (
    "prepare_forward", "prepare_gradients", "prepare_folding", "prepare_reductions", "direct_reductions",
    "reductions_by_moments", "merging", "saved",
)  # fmt: skip


def broken(name, change):
    """The CPU backend with one function's results changed: ``change(arguments, result)``."""
    wrong = types.SimpleNamespace(**{key: getattr(cpu, key) for key in cpu.__all__})
    prepare = getattr(cpu, name)

    def prepare_wrongly(*operands):
        run = prepare(*operands)
        return lambda *args: change(args, run(*args))

    setattr(wrong, name, prepare_wrongly)
    return wrong


def use(monkeypatch, backend):
    """For every call, none of which is prepared."""
    monkeypatch.setattr("fastbn.call._prepared", {})
    for module in PREPARING:
        monkeypatch.setattr(f"fastbn.{module}.backend_of", lambda kind: backend)


def written(position, factor):
    """A change: an argument that is a result, scaled where there is one."""

    def change(args, result):
        if args[position] is not None:
            args[position][...] *= factor
        return result

    return change
