"""A user's own model before and after ``fused_rnn.convert``, as a whole and layer by layer."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

import fused_rnn

from . import timing
from .layers import Row
from .loading import Call, told
from .machine import UnusableError
from .shapes import MODES, Shape

WHOLE = "whole model"
BEFORE = "before"  # the peer


class NoShape(NamedTuple):
    """Of a whole model, which has no sizes that say what it costs."""

    def __str__(self) -> str:
        return ""


def share(rows: Sequence[Row], mode: str) -> tuple[float, float] | None:
    """Of the whole model's time, what the recurrent layers alone take, before and after."""
    times = {row.cell: row.time for row in rows if row.mode == mode}
    whole = times.pop(WHOLE, None)
    layers = [time for time in times.values() if time is not None]
    if whole is None or len(layers) < len(times):
        return None
    return (
        sum(time.peer_s for time in layers) / whole.peer_s,
        sum(time.ours_s for time in layers) / whole.ours_s,
    )


def measure(
    model: nn.Module,
    call: Call,
    budget_s: float,
    announce: Callable[[str], None],
    note: Callable[[str], None],
) -> Iterator[Row]:
    """Checks and times the model and each of its recurrent layers, each mode ``budget_s`` seconds.

    "forward" runs in eval mode without gradients. "training" runs forward and backward in training
    mode, from a random gradient of every result; no optimizer. A layer is timed alone, on all the
    inputs that one call of the model gives it. ``note`` is told what could not be measured, and
    what a check was held against if not float64.

    Raises:
        UnusableError: the model cannot be copied or run, or has no layer that convert replaces.
    """
    with told("copying the model"):
        before, after = copy.deepcopy(model), fused_rnn.convert(copy.deepcopy(model))
    twins = dict(after.named_modules())
    layers = {
        name: layer
        for name, layer in before.named_modules()
        if type(layer) is not type(twins[name])
    }
    if not layers:
        raise UnusableError(
            "no recurrent layer that fused_rnn.convert replaces: no RNN, LSTM, GRU or cell of "
            "torch.nn among the model's submodules"
        )
    for mode in MODES:
        for each in (before, after):
            each.train(mode == "training")
        announce(f"{mode}: inputs of the layers")
        calls = _calls(before, layers, call, mode)
        dtypes = {t.dtype for t in _tensors([list(before.parameters()), call.args, call.kwargs])}
        dtypes |= {each.autocast for its in calls.values() for each in its if each.autocast}
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        contestants: list[tuple[str, nn.Module, nn.Module, list[Call]]] = [
            (WHOLE, before, after, [call])
        ]
        for name, layer in layers.items():
            if calls[name]:
                shown = name or type(layer).__name__
                contestants.append((shown, layer, twins[name], calls[name]))
            else:
                note(f"{name}: not called in {mode}")
        for name, layer, twin, its in contestants:
            announce(f"{mode}: {name}")
            if mode == "training" and not _learns(layer, its):
                note(f"{name}: no gradient to compute, so no training")
                continue
            row, against = _row(name, layer, twin, its, mode, budget_s, eps)
            if against:
                note(f"{name}, {mode}: {against}")
            yield row


def _calls(
    model: nn.Module, layers: Mapping[str, nn.Module], call: Call, mode: str
) -> dict[str, list[Call]]:
    """What each layer is called with in one call of the model."""
    found: dict[str, list[Call]] = {name: [] for name in layers}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kind = _device(module, args).type
            cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            found[name].append(Call(tree_map(_kept, args), tree_map(_kept, kwargs), cast))

        return keep

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with told("the model's forward"), torch.set_grad_enabled(mode == "training"):
            model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _kept(leaf: Any) -> Any:
    """A copy that a later call does not change, and that backward ends at."""
    return _changed(leaf, lambda t: t.detach().clone().requires_grad_(t.requires_grad))


def _doubled(leaf: Any) -> Any:
    def double(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad)

    return _changed(leaf, lambda t: double(t) if t.is_floating_point() else t)


def _changed(leaf: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(leaf, PackedSequence):
        return PackedSequence(change(leaf.data), *leaf[1:])
    return change(leaf) if isinstance(leaf, Tensor) else leaf


def _tensors(value: Any) -> list[Tensor]:
    """All floating-point tensors in it."""
    leaves = (
        leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in tree_leaves(value)
    )
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _leaves(module: nn.Module, calls: Sequence[Call]) -> dict[str, Tensor]:
    """What gradients are computed of: parameters, and inputs that ask for it."""
    inputs = [t for call in calls for t in _tensors((call.args, call.kwargs))]
    named = {f"input {i}": t for i, t in enumerate(inputs)} | dict(module.named_parameters())
    return {name: t for name, t in named.items() if t.requires_grad}


def _learns(module: nn.Module, calls: Sequence[Call]) -> bool:
    if not _leaves(module, calls):
        return False
    with torch.enable_grad(), told("the model's forward"):
        results = _tensors([module(*call.args, **call.kwargs) for call in calls])
    return any(result.requires_grad for result in results)


def _run(module: nn.Module, calls: Sequence[Call], mode: str) -> timing.Run:
    cast = calls[0].autocast
    context: Callable[[], Any] = contextlib.nullcontext
    if cast is not None:
        kind = _device(module, calls[0].args).type

        def context() -> Any:
            return torch.autocast(kind, cast)

    def results() -> list[Tensor]:
        with context():
            return _tensors([module(*call.args, **call.kwargs) for call in calls])

    def forward() -> timing.Results:
        with torch.no_grad():
            return {f"result {i}": t for i, t in enumerate(results())}

    leaves = _leaves(module, calls)
    grads: list[Tensor] = []  # drawn by the first call, which is not timed

    def training() -> timing.Results:
        found = results()
        roots = [t for t in found if t.requires_grad]
        if not grads:
            generator = torch.Generator().manual_seed(0)
            grads.extend(torch.randn(t.shape, generator=generator).to(t) for t in roots)
        gradients = torch.autograd.grad(roots, list(leaves.values()), grads, allow_unused=True)
        named = {f"result {i}": t.detach() for i, t in enumerate(found)}
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                named[f"grad {name}"] = gradient
        return named

    return forward if mode == "forward" else training


def _row(
    name: str,
    before: nn.Module,
    after: nn.Module,
    calls: list[Call],
    mode: str,
    budget_s: float,
    eps: float,
) -> tuple[Row, str]:
    device = _device(before, calls[0].args)
    ours, peer = _run(after, calls, mode), _run(before, calls, mode)

    def exact() -> timing.Results:
        double = [Call(*(tree_map(_doubled, each) for each in call[:2])) for call in calls]
        module = copy.deepcopy(before).double()
        return _certain(module, _run(module, double, mode), len(calls))()

    check, note = check_against(
        _certain(after, ours, len(calls)), _certain(before, peer, len(calls)), exact, eps
    )
    pair = timing.Pair(ours, peer, exact, device)
    time = timing.interleave(pair, budget_s) if check.passed else None
    dtype = str(_first(before, calls[0].args).dtype).removeprefix("torch.")
    shape = NoShape() if name == WHOLE else _shape(before, calls)
    return Row(name, mode, shape, str(device), dtype, check, time, peer=BEFORE), note


def check_against(
    ours: timing.Run, before: timing.Run, exact: timing.Run, eps: float
) -> tuple[timing.Check, str]:
    """As for a layer: at most twice the error that the model had before, against float64.

    ``eps`` is that of the coarsest numbers of the model. Where float64 fails or computes something
    else (off by more than the root of it, of the largest element), the results after are held
    against those before: at most that root off. The second value says so.
    """
    with told("the model"):
        peer = before()
    relative = math.sqrt(eps)
    try:
        truth = exact()
        comparable = timing.compare(lambda: peer, peer, truth, relative).passed
        why = "float64 computes something else"
    except Exception as failure:  # of the user's code: whatever
        reason = (str(failure).splitlines() or [""])[0]
        comparable, why = False, f"no float64 ({type(failure).__name__}: {reason})"
    if comparable:
        return timing.compare(ours, peer, truth, rounding=eps), ""
    alone = {name: t.double() for name, t in peer.items()}
    note = f"{why}; results may differ by {relative:.1g} of the largest element"
    return timing.compare(ours, peer, alone, relative), note


def _certain(module: nn.Module, run: timing.Run, calls: int) -> timing.Run:
    """The run without dropout, and with the same seed for whatever else is drawn.

    What several calls return is one result: the steps of a cell are those of a layer.
    """

    def joined(found: timing.Results) -> timing.Results:
        returned = [t for name, t in found.items() if name.startswith("result ")]
        if not returned:
            raise UnusableError("a result without floating-point tensors cannot be checked")
        each = max(1, len(returned) // calls)
        named = {
            f"result {i}": torch.cat([t.flatten() for t in returned[i::each]]) for i in range(each)
        }
        return named | {n: t for n, t in found.items() if not n.startswith("result ")}

    def certain() -> timing.Results:
        kept: list[tuple[nn.Module, str, Any]] = []
        for each in module.modules():
            for kind, attribute in ((nn.modules.dropout._DropoutNd, "p"), (nn.RNNBase, "dropout")):
                if isinstance(each, kind):
                    kept.append((each, attribute, getattr(each, attribute)))
                    setattr(each, attribute, 0.0)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return joined(run())
        finally:
            for each, attribute, value in kept:
                setattr(each, attribute, value)

    return certain


def _shape(layer: nn.Module, calls: Sequence[Call]) -> NamedTuple:
    """T is that of all calls together: of a cell, how often it is called."""
    if not isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
        return NoShape()
    T = B = 0
    for call in calls:
        input = call.args[0] if call.args else call.kwargs["input"]
        if isinstance(input, PackedSequence):
            steps, B = len(input.batch_sizes), int(input.batch_sizes[0])
        elif isinstance(layer, nn.RNNCellBase):
            steps, B = 1, input.shape[0] if input.dim() == 2 else 1
        elif input.dim() == 2:
            steps, B = input.shape[0], 1
        else:
            steps, B = input.shape[:2][::-1] if layer.batch_first else input.shape[:2]
        T += steps
    return Shape(T, B, layer.input_size, layer.hidden_size)


def _first(module: nn.Module, args: Any) -> Tensor:
    return next(iter([*module.parameters(), *_tensors(args)]), torch.empty(0))


def _device(module: nn.Module, args: Any) -> torch.device:
    return _first(module, args).device
