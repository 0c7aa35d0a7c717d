"""Putting fused layers where torch.nn's are: in a model that exists, or in code that builds one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import modules, torchaudio

M = TypeVar("M", bound=nn.Module)

# Taken at import: inside patch() torch.nn's own names lead here.
_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: modules.RNNCell,
    nn.LSTMCell: modules.LSTMCell,
    nn.GRUCell: modules.GRUCell,
}


def convert(model: M) -> M:
    """Replaces every torch.nn RNN, LSTM, GRU and cell of a model by its fused twin, in place.

    And every LSTM of torchaudio's RNN-T predictor (``_CustomLSTM`` of torchaudio.models.rnnt, with
    or without layer normalisation), which is called, and returns its states, as before.

    The twins share the Parameter objects, so optimizers, tied weights and state_dicts stay valid;
    buffers, hooks, parametrizations, training mode and attributes come along. A subclass keeps its
    own methods, and what it inherits becomes fused. A layer that several parents hold is replaced
    by one twin in all of them. What TorchScript has compiled is left alone, ``layer.compile()`` is
    to be called again.

    Args:
        model: any module. Only references held as submodules are replaced; a layer that is also
            kept elsewhere (in a plain list, say) stays torch.nn's there.

    Returns:
        The model; a bare layer returns its twin and is left as it was.

    Raises:
        RuntimeError: parameters of a layer are sharded (``fully_shard``), for which PyTorch keeps
            the module that it gathers them into. The model is left as it was; convert it first.

    Warns:
        UserWarning: a layer is left alone, since its results would not be the same. A subclass has
            an attribute or a method that the fused layer has, too (``zoneout``, say); forward was
            replaced in the layer alone, or torch.compile has compiled just this layer. Of an LSTM
            of torchaudio's two normalisations differ in eps, or a submodule was replaced or has
            hooks (as old-style ``weight_norm`` sets). The message names the layer and the reason.
    """
    twins: dict[nn.Module, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if module not in twins:
            twins[module] = _twin(module, replaces=module is not model)
        return twins[module]

    def has_twin(module: nn.Module | None, name: str) -> bool:
        layer = None if module is None else _known_layer(type(module))
        if module is None or layer is None:
            return False
        reason = _refusal(module, layer) if layer in _FUSED else torchaudio.refusal(module)  # type: ignore[arg-type]
        if reason is None and name.rpartition(".")[2] == "_orig_mod":
            reason = "torch.compile has bound it; convert before compiling"
        if reason is not None:
            warnings.warn(f"fused_rnn.convert leaves {name} as it is: {reason}", stacklevel=3)
        return reason is None

    for path, module in model.named_modules():
        if _known_layer(type(module)) is None:
            continue
        if any(hasattr(parameter, "full_tensor") for parameter in module.parameters()):
            raise RuntimeError(
                f"fused_rnn.convert: {path or type(module).__name__} is sharded already, and its "
                "parameters would be gathered into the module that was; convert before sharding"
            )
    if has_twin(model, type(model).__name__):
        model = twin(model)  # type: ignore[assignment]
    for path, parent in list(model.named_modules()):
        parent = twins.get(parent, parent)  # a layer may hold others, and be replaced by now
        for name, child in parent._modules.items():
            if has_twin(child, f"{path}.{name}".removeprefix(".")):
                parent._modules[name] = twin(child)  # type: ignore[arg-type]
    return model


def _known_layer(cls: type) -> type[nn.Module] | None:
    """The layer of torch.nn or torchaudio that ``cls`` is or derives from, unless fused already."""
    if issubclass(cls, (*_FUSED.values(), torchaudio.PredictorLSTM)):
        return None
    known = (base for base in cls.__mro__ if base in _FUSED or torchaudio.is_predictor_lstm(base))
    return next(known, None)


def _refusal(module: nn.Module, layer: type[nn.Module]) -> str | None:
    """Why ``module``, a ``layer`` of torch.nn or derived from it, would not be the same fused."""
    if "forward" in vars(module):
        return "its forward has been replaced, by a function that is bound to it"
    mro = type(module).__mro__
    its_own = {
        *vars(module), *module._modules, *module._parameters, *module._buffers,
        *(name for base in mro[: mro.index(layer)] for name in vars(base)),
    }  # fmt: skip
    ours = {
        name
        for base in _FUSED[layer].__mro__
        if base.__module__ == modules.__name__
        for name in vars(base)
        if not name.startswith("__") and not hasattr(layer, name)
    }
    shared = sorted(its_own & ours)
    return (
        f"the fused layer has {', '.join(shared)} of its own; rename it there" if shared else None
    )


def _twin(module: nn.Module, replaces: bool) -> nn.Module:
    cls = type(module)
    fused: type[nn.Module]
    if parametrize.is_parametrized(module):
        # torch gave this module a class of its own, which holds its properties; so does its twin.
        own: dict[str, Any] = {
            k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")
        }
        fused = type(cls.__name__, (_fused_class(cls.__bases__[0]),), own)  # type: ignore[arg-type]
    else:
        fused = _fused_class(cls)  # type: ignore[arg-type]
    result = fused.__new__(fused)
    for key, value in module.__dict__.items():
        # Containers are copied and what they hold is shared, as in copy.copy of each; but a twin
        # that takes the module's place takes over its hooks: their handles know only these dicts.
        copied = isinstance(value, (dict, list, set)) and not (replaces and key.endswith("_hooks"))
        result.__dict__[key] = value.copy() if copied else value
    result._compiled_call_impl = None  # of layer.compile(): it would call the module
    hooks: dict[int, Any] = result._load_state_dict_pre_hooks
    for number, hook in hooks.items():
        if getattr(hook, "with_module", False):  # these keep the module, as one to call them with
            hooks[number] = type(hook)(hook.hook, result)
    return result


@functools.cache
def _fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    if cls in _FUSED:
        return _FUSED[cls]
    # A subclass. In (Subclass, Bridge) with Bridge(fused, torch's) the order of resolution is
    # Subclass, fused, torch's: the subclass's methods and its super() calls find the fused layer.
    base = _known_layer(cls)
    assert base is not None
    fused = _FUSED.get(base, torchaudio.PredictorLSTM)
    bridge = type(f"Fused{base.__name__}", (fused, base), {"__module__": __name__})
    bases = (bridge,) if cls is base else (cls, bridge)  # torchaudio's own class is one, too
    return type(cls.__name__, bases, {"__module__": cls.__module__, "__reduce__": _reduce,
                                              "_converted_from": cls})  # fmt: skip


def _reduce(self: Any) -> tuple[Any, ...]:
    get_state = getattr(self, "__getstate__", None)  # Python 3.10's object has none
    return _rebuild, (self._converted_from,), self.__dict__ if get_state is None else get_state()


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    fused = _fused_class(cls)  # type: ignore[arg-type]
    return fused.__new__(fused)


@contextmanager
def patch() -> Iterator[None]:
    """Inside, ``torch.nn.LSTM`` and its kin are the fused classes.

    For code that builds models from ``torch.nn`` names::

        with fused_rnn.patch():
            model = third_party.Model()

    Code that took a class earlier (``from torch.nn import LSTM``) keeps the one it took; use
    ``convert`` on its models. Not for concurrent use: torch.nn is one for all threads.
    """
    places = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)
    before = [(place, cls.__name__, getattr(place, cls.__name__))
              for place in places for cls in _FUSED]  # fmt: skip
    try:
        for place in places:
            for cls, fused in _FUSED.items():
                setattr(place, cls.__name__, fused)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
