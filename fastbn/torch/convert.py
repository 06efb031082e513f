"""Models with PyTorch's batch norms made models with fastbn's, and back: modules change their class, in place."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastbn.torch import modules
from fastbn.torch.modules import OURS, _Mixin, check_model, warn_of

THEIRS = {ours: theirs for theirs, ours in OURS.items()}
LAZY: dict[type, type] = {
    nn.LazyBatchNorm1d: modules.BatchNorm1d,
    nn.LazyBatchNorm2d: modules.BatchNorm2d,
    nn.LazyBatchNorm3d: modules.BatchNorm3d,
}


def convert(model: nn.Module, *, where_faster: bool | None = True) -> nn.Module:
    """Give every batch norm of a model fastbn's kernels, in place; parameters, buffers, hooks and names stay.

    Parameters
    ----------
    model : torch.nn.Module
        May be a batch norm itself. Lazy batch norms become fastbn's with their first batch. Classes that extend
        PyTorch's batch norms are left as they are, since they may compute something else; the logger ``fastbn.torch``
        warns of them, by name: ``logging.getLogger("fastbn.torch").setLevel("ERROR")`` is for those who know.
    where_faster : bool, optional
        True: the kernels compute what they are faster at than PyTorch, which is larger tensors, outside of compiled
        graphs; no step becomes slower. False: everything, for the sake of float64 statistics. None: everything but
        compiled graphs. Batch norms that are fastbn's already take it over as well.

    Returns
    -------
    torch.nn.Module
        The same object.

    Raises
    ------
    TypeError
        For what is no module.

    See Also
    --------
    revert : the way back.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> isinstance(fastbn.torch.convert(model)[1], fastbn.torch.BatchNorm2d)
    True
    """
    check_model(model)
    left = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind in OURS:
            module.__class__ = OURS[kind]  # the object stays: optimizers, hooks and shared modules hold it
        elif kind in LAZY:
            module.cls_to_become = LAZY[kind]
        if kind in LAZY or isinstance(module, _Mixin):
            module.where_faster = where_faster
        elif isinstance(module, _BatchNorm) and not isinstance(module, _Mixin):
            left.append((name, kind))
    warn_of("convert", left)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Give a model PyTorch's own batch norms back, in place: the inverse of `convert`.

    For tools that know PyTorch's modules by their exact class, or that cannot look into fastbn's kernels:
    `torch.jit.script`, conv-BN fusion by `torch.fx.experimental.optimization.fuse` and
    `torch.ao.quantization.fuse_modules`, and quantisation, which builds on it. `torch.fx.symbolic_trace`,
    `torch.nn.utils.fusion`, `torch.export` and `torch.onnx.export` take converted models as they are.

    Parameters
    ----------
    model : torch.nn.Module
        May be a batch norm itself. Parameters, buffers, hooks, names and modes stay. A `BatchNormAct2d`, which PyTorch
        has no class for, computes the same by PyTorch's operators, and remains a `torch.nn.BatchNorm2d`; `convert`
        makes it `BatchNormAct2d` again. Classes that extend fastbn's are left as they are; the logger ``fastbn.torch``
        warns of them.

    Returns
    -------
    torch.nn.Module
        The same object.

    Raises
    ------
    TypeError
        For what is no module.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), fastbn.torch.BatchNorm2d(8)).eval()
    >>> fused = torch.ao.quantization.fuse_modules(fastbn.torch.revert(model), ["0", "1"])
    >>> fused[1]
    Identity()
    """
    check_model(model)
    left = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind in THEIRS or kind in LAZY:
            module.__class__ = THEIRS.get(kind, kind)
            for name_of_ours in ("cls_to_become", "where_faster"):
                module.__dict__.pop(name_of_ours, None)
        elif isinstance(module, _Mixin):
            left.append((name, kind))
    warn_of("revert", left)
    return model
