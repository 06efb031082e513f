"""PyTorch's batch norm modules on fastbn's kernels: same parameters, buffers and state dicts."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm

from fastbn.torch.functional import batch_norm
from fastbn.torch.native import ended, is_preferred, unfused
from fastbn.torch.sync import synchronised


class _State:
    """What a forward pass asks of a module's state, before it is computed. TorchScript compiles it."""

    if TYPE_CHECKING:  # TorchScript does not know annotations of this form on a class
        activation: Literal["relu"] | None
        momentum: float | None
        training: bool
        track_running_stats: bool
        running_mean: Tensor | None
        running_var: Tensor | None
        num_batches_tracked: Tensor | None

    def _step(self) -> tuple[Tensor | None, Tensor | None, bool, float]:
        """Running statistics to use or update, whether to use the batch's, and the weight of the batch.

        `num_batches_tracked` counts; with ``momentum=None`` the running statistics are the average of all batches.
        """
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        training = self.training or (self.running_mean is None and self.running_var is None)
        if self.training and not self.track_running_stats:
            return None, None, True, momentum
        return self.running_mean, self.running_var, training, momentum

    def named_children(self) -> Any:
        """PyTorch's `convert_sync_batchnorm` asks for them when it has given the state to an `nn.SyncBatchNorm`.

        That class knows neither residual nor relu, nor the CPU. There is no other moment to make it another.
        """
        if not torch.compiler.is_compiling():  # a compiler cannot trace the caller's frame, nor does it convert
            made: Any = sys._getframe(1).f_locals.get("module_output")
            if type(made) is nn.SyncBatchNorm:
                made.__class__ = next(SYNCHRONISED[kind] for kind in type(self).__mro__ if kind in SYNCHRONISED)
                if "activation" in self.__dict__:
                    made.activation = self.__dict__["activation"]
        return super().named_children()  # type: ignore[misc]  # a module's


class _Mixin(_State):
    """The forward pass by fastbn's kernels, and what PyTorch's tools are told of it."""

    activation: Literal["relu"] | None = None
    where_faster: bool | None = None  # as for `fastbn.torch.batch_norm`; `convert` sets it

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # PyTorch's name
        module: Any = self
        vectors = module.running_mean, module.running_var, module.weight, module.bias
        if is_preferred(input, module.training, self.where_faster, *vectors) and not self._is_synchronised():
            return super().forward(input)  # type: ignore[misc]  # that of `torch.nn`
        return self._compute(input)

    def _compute(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002
        module: Any = self
        if isinstance(input, Proxy) or isinstance(residual, Proxy):
            return _leaf(module, input, residual)
        if input.is_quantized:
            raise RuntimeError(f"input: expected floating point, got {input.dtype}; {_HINT.format('quantising')}")
        module._check_input_dim(input)
        mean, var, training, momentum = self._step()
        if self._is_synchronised():
            return synchronised(
                input, mean, var, module.weight, module.bias, momentum, module.eps, module.process_group,
                residual=residual, activation=self.activation,
            )  # fmt: skip
        vectors = mean, var, module.weight, module.bias
        if is_preferred(input, training, self.where_faster, *vectors) or _is_exported_to_onnx():
            return unfused(
                input, mean, var, module.weight, module.bias, training, momentum, module.eps,
                residual=residual, activation=self.activation,
            )  # fmt: skip
        return batch_norm(
            input, mean, var, module.weight, module.bias, training, momentum, module.eps,
            residual=residual, activation=self.activation, where_faster=False,
        )  # fmt: skip

    def _is_synchronised(self) -> bool:
        return False

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(f"torch.jit.script cannot compile {type(self).__name__}; {_HINT.format('scripting')}")


_HINT = "call fastbn.torch.revert(model) before {}: it gives the model PyTorch's modules back"


def _leaf(module: Any, *arguments: Any) -> Any:
    """A node that calls the module, in the graph that `torch.fx` traces; as it makes them for modules of `torch.nn`."""
    tracer = next(a.tracer for a in arguments if isinstance(a, Proxy))
    if module is tracer.root:
        raise TraceError(f"torch.fx: expected a model that holds {type(module).__name__}, got the module itself")
    present = arguments if arguments[-1] is not None else arguments[:-1]
    return tracer.create_proxy("call_module", tracer.path_of_module(module), present, {})


def _is_exported_to_onnx() -> bool:
    """To a file that is to have ONNX's own operators. The last question imports, the first two are quick."""
    found: bool = (torch.jit.is_tracing() or torch.compiler.is_compiling()) and torch.onnx.is_in_onnx_export()
    return found


class BatchNorm1d(_Mixin, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on fastbn's kernels: (N, C) or (N, C, L).

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.BatchNorm1d(2)
    >>> norm(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach().round()
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """


class BatchNorm2d(_Mixin, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on fastbn's kernels: (N, C, H, W), contiguous or channels-last."""


class BatchNorm3d(_Mixin, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on fastbn's kernels: (N, C, D, H, W)."""


class _Activated(_Mixin):
    """With a residual and an activation."""

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, device: Any = None, dtype: Any = None, *,
        activation: Literal["relu"] | None = "relu", **keywords: Any,
    ) -> None:  # fmt: skip
        super().__init__(  # type: ignore[call-arg]  # a batch norm's
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, **keywords
        )
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002  # PyTorch's name
        return self._compute(input, residual)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"  # type: ignore[misc]


class BatchNormAct2d(_Activated, BatchNorm2d):
    """Batch norm, residual and relu in one pass over memory; the end of a residual block.

    ``forward(x, residual=None)`` is ``relu(batch_norm(x) + residual)``; with ``activation=None`` without the relu.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.BatchNormAct2d(3)
    >>> x = torch.randn(2, 3, 4, 4)
    >>> norm(x, residual=x).min() >= 0
    tensor(True)
    """


class SyncBatchNorm(_Mixin, _BatchNorm):
    """`torch.nn.SyncBatchNorm` on fastbn's kernels: one batch norm over the batches of all processes in a group.

    On the CPU (gloo) as well as on GPUs (nccl). Batches may differ in size, and be empty. All ranks compute the same
    bits, by one exchange of float64 moments forwards and one of sums backwards. In evaluation, and in one process, it
    is `BatchNorm2d` for any number of axes.

    It does not extend `torch.nn.SyncBatchNorm`, of which `torch.nn.parallel.DistributedDataParallel` takes none on the
    CPU.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, process_group: Any = None, device: Any = None, dtype: Any = None,
        **keywords: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, **keywords
        )
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  # PyTorch's name
        nn.SyncBatchNorm._check_input_dim(self, input)
        nn.SyncBatchNorm._check_non_zero_input_channels(self, input)

    def _is_synchronised(self) -> bool:
        """While it trains: evaluation may run on one rank alone."""
        there = self.training and torch.distributed.is_available() and torch.distributed.is_initialized()
        return there and torch.distributed.get_world_size(self.process_group) > 1

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Synchronise every batch norm of a model, in place; parameters, buffers, hooks and names stay.

        Parameters
        ----------
        module : torch.nn.Module
            May be a batch norm itself. `BatchNormAct2d` becomes `SyncBatchNormAct`, all others of `torch.nn` and
            fastbn become `SyncBatchNorm`. Classes that extend them, and lazy ones that have seen no data, are left as
            they are; the logger ``fastbn.torch`` warns of them.
        process_group : torch.distributed.ProcessGroup, optional
            The default one.

        Returns
        -------
        torch.nn.Module
            The same object.

        Raises
        ------
        TypeError
            For what is no module.

        Notes
        -----
        `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes fastbn's modules synchronised ones of fastbn as well,
        but new objects, without their hooks.

        Examples
        --------
        >>> import torch, fastbn.torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8))
        >>> model = fastbn.torch.SyncBatchNorm.convert_sync_batchnorm(model)
        >>> isinstance(model[1], fastbn.torch.SyncBatchNorm)
        True
        """
        return synchronise(module, process_group)


class SyncBatchNormAct(_Activated, SyncBatchNorm):
    """`BatchNormAct2d` over the batches of all processes in a group; for any number of axes."""


class UnfusedBatchNormAct2d(_State, nn.BatchNorm2d):
    """`BatchNormAct2d` by PyTorch's own operators, which its tools know; `fastbn.torch.revert` makes it."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002  # PyTorch's name
        if not torch.jit.is_scripting():  # noqa: SIM102  # which TorchScript reads no further, but would after an `and`
            if isinstance(input, Proxy) or isinstance(residual, Proxy):
                return _leaf(self, input, residual)
        self._check_input_dim(input)
        mean, var, training, momentum = self._step()
        return unfused(
            input, mean, var, self.weight, self.bias, training, momentum, self.eps,
            residual=residual, activation=self.activation,
        )  # fmt: skip


class UnfusedSyncBatchNormAct(_State, nn.SyncBatchNorm):
    """`SyncBatchNormAct`, likewise."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002  # PyTorch's name
        if isinstance(input, Proxy) or isinstance(residual, Proxy):
            return _leaf(self, input, residual)
        return ended(super().forward(input), residual, self.activation)


# --- what each class becomes ------------------------------------------------------------------------------------------

OURS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    UnfusedBatchNormAct2d: BatchNormAct2d,
    UnfusedSyncBatchNormAct: SyncBatchNormAct,
}
"""By `fastbn.torch.convert`."""

SYNCHRONISED: dict[type, type] = {
    **dict.fromkeys((BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm), SyncBatchNorm),
    **dict.fromkeys((BatchNormAct2d, SyncBatchNormAct), SyncBatchNormAct),
    **dict.fromkeys((UnfusedBatchNormAct2d, UnfusedSyncBatchNormAct), UnfusedSyncBatchNormAct),
}
"""What each becomes by `convert_sync_batchnorm`."""

_log = logging.getLogger("fastbn.torch")


def synchronise(model: nn.Module, process_group: Any) -> nn.Module:
    """`SyncBatchNorm.convert_sync_batchnorm`."""
    check_model(model)
    left = []
    for name, module in model.named_modules():
        kind = OURS.get(type(module), type(module))
        if kind in SYNCHRONISED:
            module.__class__ = SYNCHRONISED[kind]
            module.process_group = process_group
        elif isinstance(module, _BatchNorm):
            left.append((name, kind))
    warn_of("SyncBatchNorm.convert_sync_batchnorm", left)
    return model


def check_model(model: Any) -> None:
    """A module it must be."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def warn_of(caller: str, left: list[tuple[str, type]]) -> None:
    """What was left alone."""
    if left:
        named = ", ".join(f"{name or 'the model itself'} ({kind.__module__}.{kind.__name__})" for name, kind in left)
        _log.warning("fastbn.torch.%s left alone: %s", caller, named)
