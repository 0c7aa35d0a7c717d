"""The derivatives of one layer, registered with its ops and, for eager code, in front of them.

Two functions of a layer f of its primals x, which are input, states and weights:

    Layer     f(x)           layer_forward
    Gradient  f'(x)^T g      layer_backward, backward of Layer

Forward mode and second derivatives are the same ops on dual numbers (csrc/dual.h), which complex
tensors carry. What differentiates those goes through the reference.

Eager code on plain tensors applies the functions itself. Whoever meets an op anywhere else (a
graph that was compiled, exported or traced, torch.func, a subclass of Tensor) comes by the kernels
that are registered here, and applies the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from . import batching, ops, reference
from .cells import NOTHING, PLAIN, Call, Rest, call_of, compute_dtype, reference_weights
from .differentiable import gradients_of, jvp_of, or_zeros, tangents_of, vjp

Needed = tuple[bool, bool, bool]  # whether gradients of input, of states and of weights are


def run_layer(call: Call, primals: Sequence[Tensor], rest: Rest = NOTHING) -> Sequence[Tensor]:
    """Runs one layer, all directions (and heads) in one op call.

    Args:
        primals: input (T, B, I), or (T, B, R, I) where every one of R recurrences has its own; hx
            (R, B, P) and, for lstm, cx (R, B, H), or neither for zeros; for each recurrence the
            weights of ``call.table``.
        rest: what there is beside. With batch_sizes input (N, I), output and cells are packed, as
            the data of torch's PackedSequence.

    Returns:
        output (T, B, R * P), h_n (R, B, P), for lstm c_n (R, B, H), and the cells (T, B, R, H) in
        the compute dtype if wanted.
    """
    if torch.compiler.is_compiling() or not is_plain(primals):
        return _forward(call, primals, rest, save=False)
    if torch.is_grad_enabled() and True in [t.requires_grad for t in primals]:
        # A tensor may have outlived the transform that wrapped it.
        tensors = [None if t is None else _functorch.unwrap_if_dead(t) for t in (*rest, *primals)]
        return _apply_layer(call, *tensors)[: call.wanted]
    with ops.below_autograd():
        return _forward(call, primals, rest, save=False)


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether eager code may differentiate by itself what it does to these.

    There is more to do than it knows under torch.func, in forward mode, while torch.jit traces, and
    where a tensor or a mode overrides torch's functions.
    """
    return not (
        is_transformed()
        or torch._C._get_tracing_state() is not None
        or torch.overrides.has_torch_function(tensors)
    )


def is_transformed() -> bool:
    """Whether torch.func or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _forward(call: Call, primals: Sequence[Any], rest: Sequence[Any], save: bool) -> list[Tensor]:
    return ops.layer_forward(call.cell, primals, *rest, call.settings(save), call.variation)


def _backward(
    call: Call,
    needed: Needed,
    grads: Sequence[Any],
    primals: Sequence[Any],
    results: Sequence[Any],
    rest: Sequence[Any],
) -> list[Tensor]:
    return ops.layer_backward(
        call.cell, grads, primals, results, rest, call.settings(*needed), call.variation
    )


def _split(tensors: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    """Groups of these sizes, and what is left."""
    groups, begin = [], 0
    for size in sizes:
        groups.append(tensors[begin : begin + size])
        begin += size
    return [*groups, tensors[begin:]]


def _is_dual(primals: Sequence[Any]) -> bool:
    return primals[0].is_complex()


class Layer(torch.autograd.Function):
    """From (call, *rest, *primals) to the results of layer_forward, what it saves included."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Any) -> tuple[Tensor, ...]:
        transformed = is_transformed()
        with ops.at_lower_levels() if transformed else ops.below_autograd():
            results = tuple(_forward(call, tensors[4:], tensors[:4], save=True))
        ctx.call = call
        saved = results[call.wanted :]
        ctx.set_materialize_grads(False)
        if saved:
            ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*tensors, results[0], *saved)
        if transformed:
            ctx.save_for_forward(*tensors)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call, needs = ctx.call, ctx.needs_input_grad
        given: Sequence[Any] = _by_result(call, grads)
        if given[0] is given[1] is given[2] is given[3] is None:
            return (None,) * len(needs)
        tensors, end = ctx.saved_tensors, len(needs) - 1
        rest, primals, results = tensors[:4], tensors[4:end], tensors[end:]
        needed = _needed(call, needs[5:])
        if _is_dual(primals):
            # The gradient of value + tangent * e is that of the tangent + that of the value * e.
            found = _swap(_gradient(call, needed, _swap(given), primals, results, rest))
        else:
            found = _gradient(call, needed, given, primals, results, rest)
        return (None,) * 5 + _in_their_places(call, needed, found, len(primals))

    @staticmethod
    def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call, (rest, primals) = ctx.call, _split(ctx.saved_tensors, 4)
        along = tangents[4:]
        changes: Sequence[Tensor]
        if _is_dual(primals):
            changes = tangents_of(_by_reference(call), (*rest, *primals), tangents)
        else:
            with ops.in_forward_mode():
                results = _forward(call, _duals(primals, along), Rest(*rest), save=False)
                changes = _tangents(results, _result_dtypes(call, primals[0]))
        return (*changes, *(None,) * (_results(call) - call.wanted))


_apply_layer = super(torch.autograd.Function, Layer).apply  # which asks first what is_plain did


def _gradient(
    call: Call,
    needed: Needed,
    grads: Sequence[Any],
    primals: Sequence[Any],
    results: Sequence[Any],
    rest: Sequence[Any],
) -> list[Tensor]:
    """As ``_backward``, with a derivative of its own if anybody may ask for one."""
    if torch.is_grad_enabled() or is_transformed():
        return _backward(call, needed, grads, primals, results, rest)
    with ops.below_autograd():
        return _backward(call, needed, grads, primals, results, rest)


class Gradient(torch.autograd.Function):
    """From (call, needed, *gradients of the four results, *rest, *primals, *results) to the
    results of layer_backward; its results are what they are by the primals."""

    @staticmethod
    def forward(ctx: Any, call: Call, needed: Needed, *tensors: Any) -> tuple[Tensor, ...]:
        grads, rest, primals, results = _split(tensors, 4, 4, call.primals)
        with ops.at_lower_levels():
            found = tuple(_backward(call, needed, grads, primals, results, Rest(*rest)))
        ctx.call, ctx.needed, ctx.results = call, needed, len(results)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*grads, *rest, *primals)
        if is_transformed():
            ctx.save_for_forward(*grads, *rest, *primals)
        return found

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
        call, needed = ctx.call, ctx.needed
        grads, rest, primals = _split(ctx.saved_tensors, 4, 4)
        if all(v is None for v in directions):
            return (None,) * (10 + len(primals) + ctx.results)
        along = _in_their_places(call, needed, directions, len(primals))
        if _is_dual(primals):
            function = _gradient_by_reference(call, needed)
            given = or_zeros(directions, _where(call, needed, primals))
            found = gradients_of(function, (*rest, *grads, *primals), given)
            _, of_grads, of_primals = _split(found, 4, 4)
        else:
            needs = ctx.needs_input_grad[10 : 10 + len(primals)]
            of_grads, of_primals = _second(
                call, _needed(call, needs), (grads, primals), ((None,) * 4, along), Rest(*rest)
            )
        return (None, None, *of_grads, *(None,) * 4, *of_primals, *(None,) * ctx.results)

    @staticmethod
    def jvp(ctx: Any, _call: None, _needed: None, *tangents: Any) -> tuple[Tensor | None, ...]:
        call, needed = ctx.call, ctx.needed
        grads, rest, primals = _split(ctx.saved_tensors, 4, 4)
        of_grads, _, of_primals, _ = _split(tangents, 4, 4, len(primals))
        if _is_dual(primals):
            along = (*(None,) * 4, *of_grads, *of_primals)
            function = _gradient_by_reference(call, needed)
            return tangents_of(function, (*rest, *grads, *primals), along)
        with ops.in_forward_mode():
            _, changes = _second(
                call, needed, (grads, primals), (of_grads, of_primals), Rest(*rest)
            )
        return tuple(d for d in changes if d is not None)


def _second(
    call: Call,
    needed: Needed,
    at: tuple[Sequence[Any], Sequence[Any]],
    along: tuple[Sequence[Any], Sequence[Any]],
    rest: Rest,
) -> tuple[Sequence[Any], Sequence[Any]]:
    """At gradients g of results and primals x, along directions of both: the tangents J v of those
    results that have a gradient, and what the gradients J^T g change by, where needed."""
    (grads, primals), (of_grads, of_primals) = at, along
    duals = _duals(primals, of_primals)
    results = _forward(call, duals, rest, save=True)
    saved = [results[0], *results[call.wanted :]]
    found = _backward(call, needed, _duals(grads, of_grads), duals, saved, rest)
    dtypes = _result_dtypes(call, primals[0])
    tangents = _by_result(call, _tangents(results[: call.wanted], dtypes))
    changes = [d.imag.to(primals[0].dtype) for d in found]
    return (
        [None if g is None else t for g, t in zip(grads, tangents, strict=True)],
        _in_their_places(call, needed, changes, len(primals)),
    )


# ---- what arguments and results are


def _results(call: Call) -> int:
    """How many layer_forward has that saves."""
    saved = bool(call.saved_values) + call.traits.has_c + call.projected + (call.layer_norm > 0)
    return call.wanted + saved


def _by_result(call: Call, results: Sequence[Any]) -> tuple[Any, ...]:
    """output, h_n, c_n and cells, of which a layer may lack the latter two, which are None then."""
    return (*results[: call.wanted], None, None)[:4]


def _result_dtypes(call: Call, input: Tensor) -> list[torch.dtype]:
    dtypes = [input.dtype] * call.wanted
    if call.want_cells:
        dtypes[-1] = compute_dtype(input.dtype)
    return dtypes


def _needed(call: Call, needs: Sequence[bool]) -> Needed:
    begin = 1 + call.states
    return needs[0], True in needs[1:begin], True in needs[begin:]


def _in_their_places(
    call: Call, needed: Needed, found: Sequence[Any], primals: int
) -> tuple[Any, ...]:
    """Gradients of input, states and weights; None for those that are not needed."""
    places: list[Any] = []
    begin = 0
    for need, size in zip(needed, (1, call.states, primals - 1 - call.states), strict=True):
        places += found[begin : begin + size] if need else (None,) * size
        begin += need * size
    return tuple(places)


def _where(call: Call, needed: Needed, primals: Sequence[Any]) -> list[Any]:
    """Those of the primals whose gradients are needed."""
    input, states, weights = call.split(primals)
    groups = zip(needed, ((input,), states, weights), strict=True)
    return [primal for need, group in groups if need for primal in group]


# ---- dual numbers


def _duals(values: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """value + tangent * e in the compute dtype, as the ops take it; without a tangent that is 0."""
    return [
        None if value is None and tangent is None else _dual(value, tangent)
        for value, tangent in zip(values, tangents, strict=True)
    ]


def _dual(value: Tensor | None, tangent: Tensor | None) -> Tensor:
    like = tangent if value is None else value
    assert like is not None
    zeros = torch.zeros((), dtype=compute_dtype(like.dtype), device=like.device)
    real, imag = (zeros if t is None else t.to(zeros.dtype) for t in (value, tangent))
    return torch.complex(real.expand_as(like), imag.expand_as(like))


def _tangents(duals: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    # Laid out as what they are tangents of: else torch makes room for them as vmap cannot.
    return [dual.imag.to(dtype).contiguous() for dual, dtype in zip(duals, dtypes, strict=True)]


def _swap(duals: Sequence[Any]) -> list[Any]:
    return [None if dual is None else torch.complex(dual.imag, dual.real) for dual in duals]


# ---- through the reference, which has derivatives of any order


def by_reference(
    call: Call,
    primals: Sequence[Tensor],
    rest: Rest,
    trace: list[reference.Trace] | None = None,
) -> list[Tensor]:
    """What the layer returns, of its primals; ``trace`` as ``reference.layer``."""
    variation, traits = call.variation or PLAIN, call.traits
    lengths, batch_sizes, resets, seed = rest
    exists = None  # (T, B): the steps that a packed sequence holds, in its order
    if batch_sizes is not None:
        exists = torch.arange(int(batch_sizes[0])) < batch_sizes.unsqueeze(1)
        lengths = exists.sum(0)
    # In the compute dtype, as the kernels: half types would lose what they keep between steps.
    x, states, weights = call.split([t.to(compute_dtype(t.dtype)) for t in primals])
    if exists is not None:
        x = x.new_zeros((*exists.shape, x.shape[1])).masked_scatter(exists.unsqueeze(2), x)
    named = reference_weights(call, weights)
    rows, width = named[0].weight_hh.shape
    sizes = (width, rows // traits.gates)
    zeros = [x.new_zeros((call.recurrences, x.shape[1], n)) for n in sizes]
    hx, cx = (*states, *zeros[len(states) :])
    factors = reference.layer_factors(
        (*x.shape[:2], call.recurrences), sizes, (variation.zoneout_h, variation.zoneout_c),
        variation.recurrent_dropout, seed, x,
    )  # fmt: skip
    # As an op: autocast has had its say about the arguments.
    autocast = torch._C._is_any_autocast_enabled()
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        output, h_n, c_n, cells = reference.layer(
            traits.name, x, hx, cx if traits.has_c else None, named, lengths=lengths, resets=resets,
            directions=call.directions, factors=factors, eps=variation.layer_norm_eps, trace=trace,
        )  # fmt: skip
    if exists is not None:
        output, cells = output[exists], None if cells is None else cells[exists]
    like = primals[0].dtype
    results = [output.flatten(-2).to(like), h_n.to(like)]
    if c_n is not None:
        results.append(c_n.to(like))
    if call.want_cells and cells is not None:
        results.append(cells)
    return results


def _by_reference(call: Call) -> Callable[..., tuple[Tensor, ...]]:
    """The layer as a function of the rest and dual primals."""

    def function(*given: Any) -> tuple[Tensor, ...]:
        rest, duals = Rest(*given[:4]), given[4:]

        def layer(*primals: Tensor) -> tuple[Tensor, ...]:
            return tuple(by_reference(call, primals, rest))

        return _dual_of(layer, duals)

    return function


def _gradient_by_reference(call: Call, needed: Needed) -> Callable[..., tuple[Tensor, ...]]:
    """The gradient as a function of the rest, dual gradients of results, some None, and primals."""

    def function(*given: Any) -> tuple[Tensor, ...]:
        first, grads, duals = _split(given, 4, 4)
        rest = Rest(*first)
        there = [i for i, grad in enumerate(grads) if grad is not None]

        def gradient(*values: Tensor) -> tuple[Tensor, ...]:
            grads, primals = _split(values, len(there))

            def reached(*primals: Tensor) -> tuple[Tensor, ...]:
                results = _by_result(call, by_reference(call, primals, rest))
                return tuple(results[i] for i in there)

            found = vjp(reached, *primals)[1](tuple(grads))
            return tuple(_where(call, needed, found))

        return _dual_of(gradient, [*(grads[i] for i in there), *duals])

    return function


def _dual_of(
    function: Callable[..., tuple[Tensor, ...]], duals: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The function of reals at duals."""
    values, tangents = [d.real for d in duals], [d.imag for d in duals]
    found = zip(function(*values), jvp_of(function, values, tangents), strict=True)
    return tuple(torch.complex(value, tangent) for value, tangent in found)


# ---- whoever meets the ops below


def asks(*groups: Sequence[Tensor | None]) -> bool:
    """Whether somebody may ask for a derivative by one of these."""
    tensors = [t for group in groups for t in group if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    # Not by forward_ad's level, which compiled graphs do not keep.
    return any(torch._VF._unpack_dual(t, level=0).tangent is not None for t in tensors)


def apply_here(function: type[torch.autograd.Function], *arguments: Any) -> tuple[Any, ...]:
    """``function.apply``, at the level of torch.func that has met the op.

    The other levels meet the op that ``function`` calls.
    """
    with enable_single_level_autograd_function():
        apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        found: tuple[Any, ...] = apply(*arguments)
    return found


def _layer_forward(
    cell: str, primals: Any, lengths: Any, batch_sizes: Any, resets: Any, seed: Any, settings: Any,
    options: Any,
) -> list[Tensor]:  # fmt: skip
    rest = Rest(lengths, batch_sizes, resets, seed)
    if not asks(primals):
        with ops.below_autograd():
            return ops.layer_forward(cell, primals, *rest, settings, options)
    call, (save,) = call_of(cell, settings, options)
    results = apply_here(Layer, call, *rest, *primals)
    return list(results if save else results[: call.wanted])


def _layer_backward(
    cell: str, grads: Any, primals: Any, results: Any, rest: Any, settings: Any, options: Any
) -> list[Tensor]:
    if not asks(grads, primals):
        with ops.below_autograd():
            return ops.layer_backward(cell, grads, primals, results, rest, settings, options)
    call, needed = call_of(cell, settings, options)
    return list(apply_here(Gradient, call, needed, *grads, *rest, *primals, *results))


def _refusal(name: str, op: Any) -> Callable[..., list[Tensor]]:
    def refuse(*arguments: Any) -> list[Tensor]:
        if asks([t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]):
            raise RuntimeError(
                f"fused_rnn::{name} has no derivative, that is the layer's: call "
                "fused_rnn::layer_forward, or detach what needs a gradient"
            )
        with ops.below_autograd():
            found: list[Tensor] = op(*arguments)
        return found

    return refuse


class Dropout(torch.autograd.Function):
    """From (input, p, seed) to the result of dropout, whose factors do not depend on input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(seed)
        if is_transformed():
            ctx.save_for_forward(seed)
        with ops.at_lower_levels():
            return ops.dropout(input, p, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ops.dropout(grad, ctx.p, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _p: None, _seed: None) -> Tensor:
        with ops.in_forward_mode():
            return ops.dropout(tangent, ctx.p, *ctx.saved_tensors)


def _dropout(input: Tensor, p: float, seed: Tensor) -> Tensor:
    if asks((input,)):
        found: Any = apply_here(Dropout, input, p, seed)
        return found
    with ops.below_autograd():
        return ops.dropout(input, p, seed)


for _name, _op in (
    ("recurrence_forward", ops.recurrence_forward),
    ("recurrence_backward", ops.recurrence_backward),
):
    ops.library.impl(_name, _refusal(_name, _op), "Autograd")
ops.library.impl("dropout", _dropout, "Autograd")
batching.register(ops.dropout, batching.dropout_rule)
ops.library.impl("layer_forward", _layer_forward, "Autograd")
ops.library.impl("layer_backward", _layer_backward, "Autograd")
batching.register(ops.layer_forward, batching.forward_rule)
batching.register(ops.layer_backward, batching.backward_rule)
