"""The derivatives of one layer: ``autograd.Function`` around the compiled ops.

Four functions of a layer f of input, states and weights, here together x:

    Layer     f(x)
    Gradient  f'(x)^T g, the gradient: backward of Layer
    Tangent   f'(x) v, the derivative along v: jvp of Layer
    Second    the derivative of both along directions: backward and jvp of Gradient, and
              backward of Tangent

The first two are the engine's ops, the others the same ops on dual numbers (csrc/dual.h), which
complex tensors carry. What differentiates Second, and the jvp of Tangent, go through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from . import batching, ops, reference
from .batching import Call
from .differentiable import gradients_of, jvp_of, or_zeros, tangents_of, vjp


def run_layer(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    lanes: int,
    directions: int,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    want_cells: bool = False,
    batch_sizes: Tensor | None = None,
    variation: ops.Variation | None = None,
    seed: Tensor | None = None,
) -> Sequence[Tensor]:
    """Runs one layer, all directions (and heads) in one op call.

    Args:
        cell: a name in ``ops.CELLS``.
        input: (T, B, I), or (T, B, D, I) where every lane has its own.
        states: hx (D, B, P) and, for lstm, cx (D, B, H); empty for zeros.
        weights: for every direction weight_ih, weight_hh, bias_ih and bias_hh if ``has_biases``,
            weight_hr if there is a projection, weight_ch if the cell has weights of its own, weight
            and bias of every normalisation.
        lanes: how many recurrences there are, each with weights of its own: D above.
        directions: 1, or 2: then every second lane runs backwards in time.
        lengths: (B,) int64 on input's device. resets: (T, B) bool on input's device.
        want_cells: whether the states c of every step are wanted (lstm).
        batch_sizes: (T,) int64, on the CPU only and in place of lengths. Then input (N, I), output
            and cells are packed, as the data of torch's PackedSequence.
        variation: what options change in the step around the cell, or None for nothing.
        seed: () int64 on input's device, of what is drawn; without it zoneout is its expectation.

    Returns:
        output (T, B, D * P), h_n (D, B, P), for lstm c_n (D, B, H), and the cells (T, B, D, H) in
        the compute dtype if wanted.
    """
    is_compiling = torch.compiler.is_compiling()
    transformed = not is_compiling and _is_transformed()
    if transformed or (
        torch.is_grad_enabled()
        and (input.requires_grad or any([t.requires_grad for t in (*weights, *states)]))
    ):
        begin = 2 + len(states)
        end = begin + len(weights)
        call: Call = (cell, has_biases, lanes, directions, want_cells, begin, end, variation)
        tensors: tuple[Tensor | None, ...] = (input, *states, *weights)
        if not (lengths is None and batch_sizes is None and resets is None and seed is None):
            tensors += (lengths, batch_sizes, resets, seed)
        if transformed:
            results = TransformedLayer.apply(call, *tensors)
        elif is_compiling:
            results = Layer.apply(call, *tensors)
        else:
            results = _apply_layer(call, tensors)
        return results[: _wanted_results(cell, want_cells)]
    return ops.forward_op(cell, variation is not None)(
        input, states, weights, has_biases, lengths, batch_sizes, resets, lanes, directions, False,
        want_cells, *_last_arguments(variation, seed),
    )  # fmt: skip


def is_transformed() -> bool:
    """Whether there is more to do than the fast path knows: torch.func, or forward mode."""
    return not torch.compiler.is_compiling() and _is_transformed()


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _last_arguments(variation: ops.Variation | None, seed: Tensor | None) -> tuple[Any, ...]:
    """What the varied ops take more than the plain ones."""
    return () if variation is None else (*variation, seed)


def _wanted_results(cell: str, want_cells: bool) -> int:
    """How many results precede what is saved for backward."""
    return 2 + ops.CELLS[cell].has_c + want_cells


_NO_REST = (None, None, None, None)


def _forward(call: Call, tensors: Sequence[Any]) -> tuple[Tensor, ...]:
    """What Layer returns."""
    cell, has_biases, lanes, directions, want_cells, begin, end, variation = call
    lengths, batch_sizes, resets, seed = tensors[end - 1 :] or _NO_REST
    return tuple(
        ops.forward_op(cell, variation is not None)(
            tensors[0], tensors[1 : begin - 1], tensors[begin - 1 : end - 1], has_biases, lengths,
            batch_sizes, resets, lanes, directions, True, want_cells,
            *_last_arguments(variation, seed),
        )
    )  # fmt: skip


def _save(
    ctx: Any, call: Call, tensors: Sequence[Tensor | None], results: tuple[Tensor, ...]
) -> None:
    """Keeps in ctx what Layer's backward needs."""
    ctx.call = call
    ctx.wanted = _wanted_results(call[0], call[4])
    saved = results[ctx.wanted :]
    ctx.set_materialize_grads(False)
    if saved:
        ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(results[0], *tensors, *saved)


class Layer(torch.autograd.Function):
    """From (call, input, *states, *weights), and (lengths, batch_sizes, resets, seed) if one of
    these is given, to the results of ``{cell}_forward``."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        results = _forward(call, tensors)
        _save(ctx, call, tensors, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call = ctx.call
        cell, has_biases, lanes, directions, _, begin, end, variation = call
        needs = ctx.needs_input_grad
        # Of the arguments all but the first are there, each in its place; then what forward saved.
        tensors, count = ctx.saved_tensors, len(needs)
        output, input = tensors[:2]
        states, weights = tensors[2:begin], tensors[begin:end]
        rest = tensors[end:count] or _NO_REST
        # Compiled graphs hand over gradients even for outputs marked as having none.
        given = (*grads[: ctx.wanted], None, None)[:4]
        if given[0] is given[1] is given[2] is given[3] is None:
            return (None,) * count
        needed = (needs[1], True in needs[2:begin], True in needs[begin:])
        if torch.is_grad_enabled():
            found = Gradient.apply(
                call, needed, *given, input, *states, *weights, *rest, output, *tensors[count:]
            )
        else:
            lengths, batch_sizes, resets, seed = rest
            found = ops.backward_op(cell, variation is not None)(
                *given, input, states, weights, has_biases, lengths, batch_sizes, resets, lanes,
                directions, output, tensors[count:], *needed, *_last_arguments(variation, seed),
            )  # fmt: skip
        return (None, *_in_their_places(call, needed, found), *(None,) * (count - end))


def _in_their_places(
    call: Call, needed: tuple[bool, bool, bool], found: Sequence[Any]
) -> Sequence[Any]:
    """Gradients of input, states and weights; None for those that are not needed."""
    need_input, need_states, need_weights = needed
    begin, end = call[5], call[6]
    if need_input and need_weights and need_states == (begin > 2):
        return found
    first = int(need_input)  # of the states among what was found
    last = first + (begin - 2 if need_states else 0)
    return (
        found[0] if need_input else None,
        *(found[first:last] or (None,) * (begin - 2)),
        *(found[last:] or (None,) * (end - begin)),
    )


_apply_base = super(torch.autograd.Function, Layer).apply


def _apply_layer(call: Call, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """``Layer.apply`` where there is no transform, which is what it first takes its time to see."""
    # But tensors may have outlived the transform that wrapped them.
    return _apply_base(call, *[None if t is None else unwrap_if_dead(t) for t in tensors])


class TransformedLayer(Layer):
    """Layer for torch.func and for forward mode, which torch.compile will not hear of."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:  # type: ignore[override]
        return _forward(call, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        _save(ctx, call, tensors, output)
        ctx.save_for_forward(*tensors)
        ctx.results = len(output)

    @staticmethod
    def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call, n = ctx.call, ctx.call[6] - 1
        primals, rest = ctx.saved_tensors[:n], ctx.saved_tensors[n:] or _NO_REST
        found = Tangent.apply(call, *primals, *tangents[:n], *rest)
        return (*found, *(None,) * (ctx.results - len(found)))

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], call: Call, *tensors: Any) -> Any:
        primals = batching.kinds_of_primals(call)
        return batching.vmap(
            TransformedLayer.apply, info, dims[1:], (call,), tensors,
            (*primals, *batching.REST[: len(tensors) - len(primals)]),
            (*batching.kinds_of_results(call), *batching.kinds_of_saved(call, _device(tensors))),
        )  # fmt: skip


def _device(tensors: Sequence[Tensor | None]) -> str:
    return next(t for t in tensors if t is not None).device.type


class Gradient(torch.autograd.Function):
    """From (call, needed, *gradients of the four results, input, *states, *weights, *rest, output,
    *saved) to the results of ``{cell}_backward``."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        call, needed, *tensors = args
        cell, has_biases, lanes, directions, _, begin, end, variation = call
        grads, primals = tensors[:4], tensors[4 : 3 + end]
        lengths, batch_sizes, resets, seed, output, *saved = tensors[3 + end :]
        return tuple(
            ops.backward_op(cell, variation is not None)(
                *grads, primals[0], primals[1 : begin - 1], primals[begin - 1 :], has_biases,
                lengths, batch_sizes, resets, lanes, directions, output, saved, *needed,
                *_last_arguments(variation, seed),
            )
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, ctx.needed, *tensors = inputs
        ctx.set_materialize_grads(False)
        kept = tensors[: 4 + ctx.call[6] - 1 + 4]
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
        count, n = len(ctx.needs_input_grad), ctx.call[6] - 1
        if all(v is None for v in directions):
            return (None,) * count
        tensors = ctx.saved_tensors
        tangents = _in_their_places(ctx.call, ctx.needed, directions)
        needed = _needed(ctx.call, ctx.needs_input_grad[6:])
        of_results, _, of_primals = _second(
            ctx.call, needed, tensors[: 4 + n], (*_NO_REST, *tangents), tensors[4 + n :]
        )
        return (None, None, *of_results, *of_primals, *(None,) * (count - 6 - n))

    @staticmethod
    def jvp(
        ctx: Any, _call: None, _needed: None, *tangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        n, tensors = ctx.call[6] - 1, ctx.saved_tensors
        _, _, changes = _second(
            ctx.call, ctx.needed, tensors[: 4 + n], tangents[: 4 + n], tensors[4 + n :]
        )
        return tuple(d for d in changes if d is not None)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], call: Call, needed: Any, *tensors: Any) -> Any:
        primals = batching.kinds_of_primals(call)
        kinds = (
            *_RESULTS, *primals, *batching.REST, "output",
            *batching.kinds_of_saved(call, _device(tensors)),
        )  # fmt: skip
        found = [kind for kind in primals if needed[_GROUPS.index(kind)]]
        return batching.vmap(Gradient.apply, info, dims[2:], (call, needed), tensors, kinds, found)


_GROUPS = ("input", "state", "weight")
_RESULTS = ("output", "state", "state", "cells")  # that a gradient may reach


def _needed(call: Call, of_primals: Sequence[bool]) -> tuple[bool, bool, bool]:
    begin, end = call[5], call[6]
    return (
        of_primals[0], True in of_primals[1 : begin - 1], True in of_primals[begin - 1 : end - 1]
    )  # fmt: skip


def _by_result(call: Call, results: Sequence[Any]) -> tuple[Any, ...]:
    """output, h_n, c_n and cells, of which a layer may lack the latter, which is None then."""
    return (*results, None, None)[:4]


class Tangent(torch.autograd.Function):
    """From (call, input, *states, *weights, the same of their tangents, *rest) to the tangents of
    what the layer returns."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        call, *tensors = args
        n = call[6] - 1
        primals, tangents, rest = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        results = _dual_forward(call, _duals(primals, tangents), rest, save=False)
        like = primals[0].dtype
        kinds = batching.kinds_of_results(call)
        return tuple(
            r.imag.to(ops.compute_dtype(like) if kind == "cells" else like)
            for r, kind in zip(results, kinds, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call, n, tensors = ctx.call, ctx.call[6] - 1, ctx.saved_tensors
        given = _by_result(call, grads)
        if all(g is None for g in given):
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[1:]
        needed = _needed(call, [a or b for a, b in zip(needs[:n], needs[n : 2 * n], strict=True)])
        _, of_tangents, of_primals = _second(
            call, needed, (*given, *tensors[:n]), (*_NO_REST, *tensors[n : 2 * n]),
            tensors[2 * n :],
        )  # fmt: skip
        return (None, *of_primals, *of_tangents, *_NO_REST)

    @staticmethod
    def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call, n, tensors = ctx.call, ctx.call[6] - 1, ctx.saved_tensors

        def tangent(*given: Any) -> tuple[Tensor, ...]:
            rest = given[2 * n :]
            return jvp_of(
                lambda *primals: tuple(by_reference(call, primals, rest)),
                given[:n], given[n : 2 * n],
            )  # fmt: skip

        along = or_zeros(tensors[n : 2 * n], tensors[:n])
        return tangents_of(tangent, (*tensors[:n], *along, *tensors[2 * n :]), tangents)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], call: Call, *tensors: Any) -> Any:
        primals = batching.kinds_of_primals(call)
        return batching.vmap(
            Tangent.apply, info, dims[1:], (call,), tensors,
            (*primals, *primals, *batching.REST), batching.kinds_of_results(call),
        )  # fmt: skip


class Second(torch.autograd.Function):
    """From (call, needed, *gradients of the four results, *primals, the tangents of all these,
    *rest), the primals being input, *states and *weights, to

    - the tangents of the results that have a gradient: J v,
    - the gradients of the primals that are needed: J^T g,
    - and what that changes by along the tangents.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        call, needed, *tensors = args
        n = 4 + call[6] - 1
        given, tangents, rest = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        cell, has_biases, lanes, directions, want_cells, begin, _, variation = call
        primals = _duals(given[4:], tangents[4:])
        results = _dual_forward(call, primals, rest, save=True)
        wanted = _wanted_results(cell, want_cells)
        lengths, batch_sizes, resets, seed = rest
        found = ops.backward_op(cell, variation is not None)(
            *_duals(given[:4], tangents[:4]), primals[0], primals[1 : begin - 1],
            primals[begin - 1 :], has_biases, lengths, batch_sizes, resets, lanes, directions,
            results[0], results[wanted:], *needed, *_last_arguments(variation, seed),
        )  # fmt: skip
        of_primals = _in_their_places(call, needed, found)
        of_results = _by_result(call, results[:wanted])
        return (
            *(None if g is None else r.imag.to(g.dtype)
              for r, g in zip(of_results, given[:4], strict=True)),
            *(None if d is None else d.real.to(p.dtype)
              for d, p in zip(of_primals, given[4:], strict=True)),
            *(None if d is None else d.imag.to(p.dtype)
              for d, p in zip(of_primals, given[4:], strict=True)),
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.call, ctx.needed, *tensors = inputs
        ctx.there = [result is not None for result in output]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def _function(call: Call, needed: tuple[bool, bool, bool]) -> Callable[..., Any]:
        """The results that there are, by the reference."""
        n = 4 + call[6] - 1

        def function(*given: Any) -> tuple[Tensor, ...]:
            found = _second_by_reference(call, needed, given[:n], given[n : 2 * n], given[2 * n :])
            return tuple(t for t in found if t is not None)

        return function

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        function = Second._function(ctx.call, ctx.needed)
        given = [g for g in grads if g is not None]
        return (None, None, *gradients_of(function, ctx.saved_tensors, given))

    @staticmethod
    def jvp(ctx: Any, _call: None, _needed: None, *tangents: Any) -> tuple[Tensor | None, ...]:
        function = Second._function(ctx.call, ctx.needed)
        found = iter(tangents_of(function, ctx.saved_tensors, tangents))
        return tuple(next(found) if is_there else None for is_there in ctx.there)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], call: Call, needed: Any, *tensors: Any) -> Any:
        primals = batching.kinds_of_primals(call)
        given = (*_RESULTS, *primals)
        return batching.vmap(
            Second.apply, info, dims[2:], (call, needed), tensors, (*given, *given, *batching.REST),
            (*_RESULTS, *primals, *primals),
        )  # fmt: skip


def _second(
    call: Call,
    needed: tuple[bool, bool, bool],
    given: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    rest: Sequence[Tensor | None],
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """The three groups of what Second returns."""
    n = call[6] - 1
    found = Second.apply(call, needed, *given, *tangents, *rest)
    return found[:4], found[4 : 4 + n], found[4 + n :]


# ---- on dual numbers


def _duals(
    values: Sequence[Tensor | None], tangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """value + tangent * e in the compute dtype, as the ops take it; without a tangent that is 0."""
    return [
        None if value is None and tangent is None else _dual(value, tangent)
        for value, tangent in zip(values, tangents, strict=True)
    ]


def _dual(value: Tensor | None, tangent: Tensor | None) -> Tensor:
    like = tangent if value is None else value
    assert like is not None
    zeros = torch.zeros((), dtype=ops.compute_dtype(like.dtype), device=like.device)
    real, imag = (zeros if t is None else t.to(zeros.dtype) for t in (value, tangent))
    return torch.complex(real.expand_as(like), imag.expand_as(like))


def _dual_forward(
    call: Call, primals: Sequence[Any], rest: Sequence[Tensor | None], save: bool
) -> Sequence[Tensor]:
    cell, has_biases, lanes, directions, want_cells, begin, _, variation = call
    *ragged, seed = rest
    return ops.forward_op(cell, variation is not None)(
        primals[0], primals[1 : begin - 1], primals[begin - 1 :], has_biases, *ragged, lanes,
        directions, save, want_cells, *_last_arguments(variation, seed),
    )  # fmt: skip


# ---- through the reference, which has derivatives of any order


def by_reference(
    call: Call,
    primals: Sequence[Tensor],
    rest: Sequence[Tensor | None],
    trace: list[reference.Trace] | None = None,
) -> list[Tensor]:
    """What the layer returns, of input, states and weights; ``trace`` as ``reference.layer``."""
    cell, has_biases, lane_count, directions, want_cells, begin, _, varied = call
    lengths, batch_sizes, resets, seed = rest
    variation = varied or ops.PLAIN
    traits = ops.CELLS[cell]
    exists = None  # (T, B): the steps that a packed sequence holds, in its order
    if batch_sizes is not None:
        exists = torch.arange(int(batch_sizes[0])) < batch_sizes.unsqueeze(1)
        lengths = exists.sum(0)
    # In the compute dtype, as the kernels: half types would lose what they keep between steps.
    x, *tensors = (t.to(ops.compute_dtype(t.dtype)) for t in primals)
    if exists is not None:
        x = x.new_zeros((*exists.shape, x.shape[1])).masked_scatter(exists.unsqueeze(2), x)
    states, weights = tensors[: begin - 2], tensors[begin - 2 :]
    lanes = traits.by_lane(weights, has_biases, lane_count, variation.layer_norm)
    rows, width = lanes[0].weight_hh.shape
    sizes = (width, rows // traits.gates)
    zeros = [x.new_zeros((lane_count, x.shape[1], n)) for n in sizes]
    hx, cx = (*states, *zeros[len(states) :])
    factors = reference.layer_factors(
        (*x.shape[:2], lane_count), sizes, (variation.zoneout_h, variation.zoneout_c),
        variation.recurrent_dropout, seed, x,
    )  # fmt: skip
    # As an op: autocast has had its say about the arguments.
    autocast = torch._C._is_any_autocast_enabled()
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        output, h_n, c_n, cells = reference.layer(
            traits.name, x, hx, cx if traits.has_c else None, lanes, lengths, resets, directions,
            factors, variation.layer_norm_eps, trace,
        )  # fmt: skip
    if exists is not None:
        output, cells = output[exists], None if cells is None else cells[exists]
    like = primals[0].dtype
    results = [output.flatten(-2).to(like), h_n.to(like)]
    if c_n is not None:
        results.append(c_n.to(like))
    if want_cells and cells is not None:
        results.append(cells)
    return results


def _second_by_reference(
    call: Call,
    needed: tuple[bool, bool, bool],
    given: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    rest: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """As Second."""
    begin, primals = call[5], [t for t in given[4:] if t is not None]
    wanted = (
        needed[0], *(needed[1],) * (begin - 2), *(needed[2],) * (call[6] - begin)
    )  # fmt: skip
    reached = [i for i in range(4) if given[i] is not None]

    def gradient(grads: Sequence[Tensor], *primals: Tensor) -> tuple[Tensor, ...]:
        def reached_results(*primals: Tensor) -> tuple[Tensor, ...]:
            results = _by_result(call, by_reference(call, primals, rest))
            return tuple(results[i] for i in reached)

        found: tuple[Tensor, ...] = vjp(reached_results, *primals)[1](tuple(grads))
        return found

    grads = [g for g in given[:4] if g is not None]
    of_primals, pull = vjp(gradient, grads, *primals)
    of_grads, *changes = pull(tuple(or_zeros(tangents[4:], primals)))
    if any(tangents[i] is not None for i in reached):
        more = gradient(or_zeros([tangents[i] for i in reached], grads), *primals)
        changes = [a + b for a, b in zip(changes, more, strict=True)]
    found = dict(zip(reached, of_grads, strict=True))
    return (
        *(found.get(i) for i in range(4)),
        *(d if is_wanted else None for d, is_wanted in zip(of_primals, wanted, strict=True)),
        *(d if is_wanted else None for d, is_wanted in zip(changes, wanted, strict=True)),
    )
