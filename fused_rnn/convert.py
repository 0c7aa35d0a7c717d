"""Putting fused layers where torch.nn's are, in a model that exists or in code that builds one, and
torch.nn's where fused ones are."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
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
_TORCHS = {fused: layer for layer, fused in _FUSED.items()}
_TORCHS_FORWARD = inspect.signature(nn.LSTM.forward)


def convert(model: M) -> M:
    """Replaces every torch.nn RNN, LSTM, GRU and cell of a model by its fused twin, in place.

    And every LSTM of torchaudio's RNN-T predictor (``_CustomLSTM`` of torchaudio.models.rnnt, with
    or without layer normalisation), which is called, and returns its states, as before.

    The twins share the Parameter objects, so optimizers, tied weights and state_dicts stay valid;
    buffers, hooks, parametrizations, training mode and attributes come along. A subclass keeps its
    own methods, and what it inherits becomes fused. A layer that several parents hold is replaced
    by one twin in all of them. What TorchScript has compiled is left alone, ``layer.compile()`` is
    to be called again.

    Where a method of the module that holds a layer asks ``isinstance(self.lstm, nn.LSTM)``, as
    TorchRL's LSTMModule does, the twin's class derives from torch.nn's, too. torch.compile takes
    it, as it does the twin of a subclass, where ``torch._dynamo.config.allow_rnn`` is set.

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
            replaced in the layer alone, or torch.compile has compiled just this layer; its
            parameters are complex. Of an LSTM of torchaudio's two normalisations differ in eps, or
            a submodule was replaced or has hooks (as old-style ``weight_norm`` sets). The message
            names the layer and the reason.
    """
    asked_about = {
        child
        for holder in model.modules()
        for name, child in holder._modules.items()
        if child is not None
        and (cls := _own_class(child)) in _FUSED
        and _asks_about(type(holder), name, cls.__name__)
    }

    def twin_class(module: nn.Module, name: str) -> type[nn.Module] | None:
        layer = _layer(type(module))
        if layer is None or _is_fused(layer):
            return None
        reason = _refusal(module, layer, name)
        if reason is not None:
            warnings.warn(f"fused_rnn.convert leaves {name} as it is: {reason}", stacklevel=5)
            return None
        cls = _own_class(module)
        return _bridged(cls) if module in asked_about else _twin_class(cls)  # type: ignore[arg-type]

    _check_not_sharded(model, "convert", lambda layer: not _is_fused(layer))
    return _replace(model, twin_class)


def revert(model: M) -> M:
    """Replaces every fused layer and cell of a model by torch.nn's, in place: the way back.

    What ``convert`` says of parameters, hooks, subclasses and shared layers holds here, too: a
    subclass of a fused layer keeps its own methods and inherits from torch.nn's layer, and what
    ``convert`` has replaced, torchaudio's LSTM included, has its own class again.

    ``torch.jit.script`` asks for this by itself, and puts torch.nn's layers into the model that it
    is given: script a ``copy.deepcopy`` to keep the fused ones.

    Args:
        model: any module. Only references held as submodules are replaced.

    Returns:
        The model; a bare layer returns its twin and is left as it was.

    Raises:
        ValueError: torch.nn has no such layer: one with an option of ours, one of
            ``fused_rnn.load_cell``, one whose forward has been replaced or that torch.compile has
            bound. The message names the layer and the reason; the model is left as it was.
        RuntimeError: parameters of a layer are sharded (``fully_shard``).
    """
    for path, module in model.named_modules():
        reason = _why_torch_has_none(module, path)
        if reason is not None:
            raise ValueError(f"fused_rnn.revert: {path or type(module).__name__} {reason}")
    _check_not_sharded(model, "revert", _is_fused)

    def twin_class(module: nn.Module, name: str) -> type[nn.Module] | None:
        layer = _layer(type(module))
        return None if layer is None or not _is_fused(layer) else _twin_class(_own_class(module))

    return _replace(model, twin_class)


# torch.jit.script asks every module for what is to be compiled in its place.
for _cls in (modules._Options, torchaudio.PredictorLSTM):
    setattr(_cls, "__prepare_scriptable__", revert)  # noqa: B010


def _replace(model: M, twin_class: Callable[[nn.Module, str], type[nn.Module] | None]) -> M:
    """Puts a twin wherever ``twin_class``, given a module and its name, knows the twin's class."""
    twins: dict[nn.Module, nn.Module] = {}

    def twin(module: nn.Module, name: str) -> nn.Module:
        """The module itself if it has no twin."""
        cls = twin_class(module, name)
        if cls is None:
            return module
        if module not in twins:
            twins[module] = _twin(module, cls, replaces=module is not model)
        return twins[module]

    found = twin(model, type(model).__name__)
    for path, parent in list(found.named_modules()):
        parent = twins.get(parent, parent)  # a layer may hold others, and be replaced by now
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = twin(child, f"{path}.{name}".removeprefix("."))
    return found  # type: ignore[return-value]


def _check_not_sharded(
    model: nn.Module, verb: str, concerns: Callable[[type[nn.Module]], bool]
) -> None:
    for path, module in model.named_modules():
        layer = _layer(type(module))
        if layer is None or not concerns(layer):
            continue
        if any(hasattr(parameter, "full_tensor") for parameter in module.parameters()):
            raise RuntimeError(
                f"fused_rnn.{verb}: {path or type(module).__name__} is sharded already, and its "
                f"parameters would be gathered into the module that was; {verb} before sharding"
            )


def _layer(cls: Any) -> type[nn.Module] | None:
    """The layer of torch.nn, torchaudio or ours whose forward ``cls`` inherits, if it does."""
    for base in cls.__mro__:
        if base in _FUSED or base in _TORCHS or base is torchaudio.PredictorLSTM:
            return base
        # A twin of torchaudio's class has its name.
        if torchaudio.is_predictor_lstm(base) and not issubclass(base, torchaudio.PredictorLSTM):
            return base
    return None


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``, or the one it had before a parametrization gave it another."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _is_fused(layer: type[nn.Module]) -> bool:
    return layer in _TORCHS or layer is torchaudio.PredictorLSTM


def _asks_about(holder: type, name: str, layer: str) -> bool:
    """Whether a method of ``holder`` but its constructor says ``isinstance(self.name, nn.layer)``.

    That is told by the names in its code.
    """
    for base in holder.__mro__:
        for key, member in vars(base).items():
            function = inspect.unwrap(getattr(member, "fget", None) or member)
            code = None if key == "__init__" else getattr(function, "__code__", None)
            if code is not None and {"isinstance", name, layer} <= _names(code):
                return True
    return False


def _names(code: CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _refusal(module: nn.Module, layer: type[nn.Module], name: str) -> str | None:
    """Why ``convert`` leaves ``module``, whose ``_layer`` is ``layer``, as it is."""
    return _why_bound(module, name, "convert") or (
        _difference(module, layer) if layer in _FUSED else torchaudio.refusal(module)
    )


def _why_bound(module: nn.Module, name: str, verb: str) -> str | None:
    """Why something would go on calling ``module`` in place of a twin."""
    if "forward" in vars(module):
        return "its forward has been replaced, by a function that is bound to it"
    if name.rpartition(".")[2] == "_orig_mod":
        return f"torch.compile has bound it; {verb} before compiling"
    return None


def _difference(module: nn.Module, layer: type[nn.Module]) -> str | None:
    """What ``module``, a ``layer`` of torch.nn or derived from it, would not have fused."""
    of_parametrizations = getattr(module, "parametrizations", nn.Module()).parameters()
    if any(p.is_complex() for p in (*module.parameters(recurse=False), *of_parametrizations)):
        return "its parameters are complex, which the engines do not know"
    if "_converted_from" in vars(_own_class(module)):
        return None  # it was a fused layer's subclass once
    mro = type(module).__mro__
    its_own = {
        *vars(module), *module._modules, *module._parameters, *module._buffers,
        *(name for base in mro[: mro.index(layer)] for name in vars(base)),
    }  # fmt: skip
    shared = sorted(name for name in its_own & _names_of(_FUSED[layer]) if not hasattr(layer, name))
    return (
        f"the fused layer has {', '.join(shared)} of its own; rename it there" if shared else None
    )


def _names_of(fused: type[nn.Module]) -> set[str]:
    """The attributes and methods that a fused layer has from its own classes."""
    ours = (base for base in fused.__mro__ if base.__module__ == modules.__name__)
    return {name for base in ours for name in vars(base) if not name.startswith("__")}


def _why_torch_has_none(module: nn.Module, name: str) -> str | None:
    """Why ``revert`` refuses ``module``; None, too, if it is not for it."""
    layer = _layer(type(module))
    if layer is None and isinstance(module, modules._Options):
        return "is of a cell that torch.nn does not have"
    if layer is None or not _is_fused(layer):
        return None
    reason = _why_bound(module, name, "revert")
    if reason is not None:
        return f"cannot be replaced: {reason}"
    options = module._chosen() if isinstance(module, modules._Options) else {}
    if options.keys() - {"layer_norm_eps"}:  # which alone does nothing
        chosen = ", ".join(f"{option}={value!r}" for option, value in options.items())
        return f"has {chosen}, which torch.nn.{layer.__name__} does not have"
    return None


def _twin(module: nn.Module, cls: type[nn.Module], replaces: bool) -> nn.Module:
    layer = _layer(type(module))
    assert layer is not None
    if parametrize.is_parametrized(module):
        # torch gave this module a class of its own, which holds its properties; so does its twin.
        own: dict[str, Any] = {
            k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")
        }
        cls = type(type(module).__name__, (cls,), own)
    result = cls.__new__(cls)
    for key, value in module.__dict__.items():
        # Containers are copied and what they hold is shared, as in copy.copy of each; but a twin
        # that takes the module's place takes over its hooks: their handles know only these dicts.
        copied = isinstance(value, (dict, list, set)) and not (replaces and key.endswith("_hooks"))
        result.__dict__[key] = value.copy() if copied else value
    # layer.compile() has left what would call the module.
    for name in ("_compiled_call_impl", *(modules.OWN_ATTRIBUTES if _is_fused(layer) else ())):
        result.__dict__.pop(name, None)
    if not _is_fused(layer) and isinstance(result, modules._Options):
        result.__module__ = modules.LEAF
    hooks: dict[int, Any] = result._load_state_dict_pre_hooks
    for number, hook in hooks.items():
        if getattr(hook, "with_module", False):  # these keep the module, as one to call them with
            hooks[number] = type(hook)(hook.hook, result)
    if isinstance(result, nn.RNNBase):
        result.flatten_parameters()  # which torch.nn's layer does when it is made
    return result


def _twin_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that takes the place of ``cls``: torch.nn's or a fused one, whichever it is not."""
    known = _FUSED.get(cls) or _TORCHS.get(cls) or vars(cls).get("_converted_from")
    return known or _bridged(cls)  # type: ignore[arg-type]


@functools.cache
def _bridged(cls: type[nn.Module]) -> type[nn.Module]:
    """As ``cls``, but that it inherits from its layer's twin what it inherited from the layer."""
    # In (Subclass, Bridge) with Bridge(twin, layer) the order of resolution is Subclass, twin,
    # layer: the subclass's methods and its super() calls find the twin.
    layer = _layer(cls)
    assert layer is not None
    twin = _FUSED.get(layer) or _TORCHS.get(layer, torchaudio.PredictorLSTM)
    members: dict[str, Any] = {"__module__": __name__}
    if layer in _TORCHS:  # what torch.nn's layers share comes last in that order, after ours
        members |= {n: getattr(twin, n) for n in _names_of(layer) if hasattr(twin, n)}
    bridge = type(f"Twin{layer.__name__}", (twin, layer), members)
    bases = (bridge,) if cls is layer else (cls, bridge)
    module = __name__ if cls in _FUSED else cls.__module__
    return type(cls.__name__, bases, {"__module__": module, "__reduce__": _reduce,
                                      "_converted_from": cls})  # fmt: skip


def _reduce(self: Any) -> tuple[Any, ...]:
    get_state = getattr(self, "__getstate__", None)  # Python 3.10's object has none
    return _rebuild, (self._converted_from,), self.__dict__ if get_state is None else get_state()


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    twin = _bridged(cls)  # type: ignore[arg-type]
    return twin.__new__(twin)


@contextmanager
def patch() -> Iterator[None]:
    """Inside, ``torch.nn.LSTM`` and its kin are the fused classes.

    For code that builds models from ``torch.nn`` names::

        with fused_rnn.patch():
            model = third_party.Model()

    Code that took a class earlier (``from torch.nn import LSTM``) keeps the one it took; use
    ``convert`` on its models. Not for concurrent use: torch.nn is one for all threads.

    To ``inspect``, too, their calls look like torch.nn's there: SpeechBrain's containers hand
    fractions of the longest row to whatever has a parameter called ``lengths``.
    """
    places = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)
    put: list[tuple[Any, str, Any]] = [
        (place, cls.__name__, fused) for place in places for cls, fused in _FUSED.items()
    ]
    for forward in (modules.RNN.forward, modules.LSTM.forward):  # GRU's is RNN's
        put.append((forward, "__signature__", _TORCHS_FORWARD))
    before = [(place, name, getattr(place, name, None)) for place, name, _ in put]
    try:
        for place, name, value in put:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
