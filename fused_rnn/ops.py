"""The compiled ops: their handles, and the shapes and devices of their results.

Schemas stand in ``csrc/binding``, with what each argument is. ``autograd.py`` and ``additive.py``
register derivatives and batching rules, so that whoever meets an op below our Python has all of
it. On CUDA layers are composed of torch's products and the ops of recurrences (``composed.py``).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import composed, flops
from .binary import _C
from .cells import RESERVE_BLOCK, Call, call_of, compute_dtype

Settings = Sequence[int]
Options = Sequence[float] | None

layer_forward = torch.ops.fused_rnn.layer_forward.default
layer_backward = torch.ops.fused_rnn.layer_backward.default
recurrence_forward = torch.ops.fused_rnn.recurrence_forward.default
recurrence_backward = torch.ops.fused_rnn.recurrence_backward.default
dropout = torch.ops.fused_rnn.dropout.default
attention_forward = torch.ops.fused_rnn.additive_attention_forward.default
attention_backward = torch.ops.fused_rnn.additive_attention_backward.default

library = torch.library.Library("fused_rnn", "IMPL")  # what it implements, it takes along

# Calls within it go past what differentiates ops: a Python function, which takes its time.
below_autograd = torch._C._AutoDispatchBelowAutograd


def at_lower_levels() -> AbstractContextManager[Any]:
    """``below_autograd`` within an autograd.Function's forward.

    There torch has turned gradients off, for other levels of torch.func too, which want theirs.
    """
    if not torch._C._are_functorch_transforms_active():
        return below_autograd()
    contexts = ExitStack()
    contexts.enter_context(below_autograd())
    contexts.enter_context(torch.enable_grad())
    contexts.enter_context(forward_ad._set_fwd_grad_enabled(True))
    return contexts


def in_forward_mode() -> AbstractContextManager[Any]:
    """What surrounds the operations of an autograd.Function's jvp, for the same reason.

    Outside torch.func there are no other levels, but somebody may want gradients of tangents.
    """
    return at_lower_levels() if torch._C._are_functorch_transforms_active() else nullcontext()


# ---- shapes


def _check_devices(input: Tensor, *others: Tensor | None, names: Sequence[str] = ()) -> None:
    # Torch takes a tensor of the meta device among others for a question about shapes.
    for i, tensor in enumerate(others):
        if tensor is not None and tensor.device != input.device:
            name = names[i] if i < len(names) else "all tensors"
            raise RuntimeError(
                f"Expected {name} on input's device {input.device}, got {tensor.device}"
            )


def _sizes(call: Call, primals: Sequence[Tensor], batch_sizes: Tensor | None) -> dict[str, Any]:
    """T, B, H and P, by their letters; B is among the values of batch_sizes, and may be unknown."""
    input, states, weights = call.split(primals)
    weight_hh = weights[1]
    sizes = {"H": weight_hh.shape[0] // call.traits.gates, "P": weight_hh.shape[1]}
    if batch_sizes is None:
        return sizes | {"T": input.shape[0], "B": input.shape[1]}
    if batch_sizes.device.type != "cpu":
        raise RuntimeError(f"Expected batch_sizes on the CPU, got {batch_sizes.device}")
    B = states[0].shape[1] if states else torch.library.get_ctx().new_dynamic_size()
    return sizes | {"T": batch_sizes.shape[0], "B": B}


@torch.library.register_fake("fused_rnn::layer_forward")
def _layer_forward_fake(
    cell: str,
    primals: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    seed: Tensor | None,
    settings: Settings,
    options: Options,
) -> list[Tensor]:
    call, (save,) = call_of(cell, settings, options)
    suffixes = ("_l0", "_l0_reverse")[: call.directions] * (call.recurrences // call.directions)
    weights = [weight.name + suffix for suffix in suffixes for weight in call.table]
    names = (*("hx", "cx")[: call.states], *weights, "lengths", "resets", "seed")
    _check_devices(*primals, lengths, resets, seed, names=names)
    input, L = primals[0], call.recurrences
    sizes = _sizes(call, primals, batch_sizes)
    T, B, H, P = (sizes[letter] for letter in "TBHP")
    rows = input.shape[:2] if batch_sizes is None else input.shape[:1]
    new = input.new_empty
    c_dtype = compute_dtype(input.dtype)

    def reserve(values: int, dtype: torch.dtype) -> Tensor:
        if input.device.type == "cuda":
            return new((T, B, L, values * H), dtype=dtype)
        blocks = -(-H // RESERVE_BLOCK)
        return new((T, L, blocks, B, values, RESERVE_BLOCK), dtype=dtype)

    has_c = call.traits.has_c
    results = [new((*rows, L * P)), new((L, B, P))]
    results += [new((L, B, H))] if has_c else []
    results += [new((*rows, L, H), dtype=c_dtype)] if call.want_cells else []
    if save:
        cells = 1 + (call.variation is not None and call.variation.zoneout_c > 0)
        norms = len(norms_of(call))
        results += [reserve(call.saved_values, input.dtype)] if call.saved_values else []
        results += [reserve(cells, c_dtype)] if has_c else []
        results += [new((*rows, L, H))] if call.projected else []
        results += [new((T, L, B, norms), dtype=c_dtype)] if norms else []
    return results


def norms_of(call: Call) -> list[str]:
    """What is normalised, by the letters of its weights."""
    return [w.name[3:-7] for w in call.table if w.name.startswith("ln_") and "_weight" in w.name]


@torch.library.register_fake("fused_rnn::layer_backward")
def _layer_backward_fake(
    cell: str,
    grads: Sequence[Tensor | None],
    primals: Sequence[Tensor],
    results: Sequence[Tensor],
    rest: Sequence[Tensor | None],
    settings: Settings,
    options: Options,
) -> list[Tensor]:
    call, (need_input, need_states, need_weights) = call_of(cell, settings, options)
    lengths, batch_sizes, *others = rest
    _check_devices(*primals, *grads, *results, lengths, *others)
    input, _, weights = call.split(primals)
    sizes = _sizes(call, primals, batch_sizes)
    L, B, H, P = call.recurrences, sizes["B"], sizes["H"], sizes["P"]
    shapes: list[Any] = [input.shape] if need_input else []
    if need_states:
        shapes += [(L, B, P), (L, B, H)] if call.traits.has_c else [(L, B, P)]
    shapes += [weight.shape for weight in weights] if need_weights else []
    return [input.new_empty(shape) for shape in shapes]


# dropout(input, p, seed): input * reference.dropout_factors(seed, WEIGHT_DROPOUT, input.shape, p).


@torch.library.register_fake("fused_rnn::dropout")
def _dropout_fake(input: Tensor, p: float, seed: Tensor) -> Tensor:
    _check_devices(input, seed)
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@torch.library.register_fake("fused_rnn::additive_attention_forward")
def _attention_forward_fake(
    primals: Sequence[Tensor],
    lengths: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    settings: Settings,
) -> tuple[Tensor, ...]:
    _check_devices(*primals, lengths, mask, seed)
    query, key, value, *_ = primals
    _, want_weights, want_scores = settings
    B, Tq, _ = query.shape
    pairs = (B, Tq, key.shape[1])
    return (
        query.new_empty((B, Tq, value.shape[2])),
        query.new_empty((B, Tq), dtype=compute_dtype(query.dtype)),
        query.new_empty(pairs if want_weights else (0,)),
        query.new_empty(pairs if want_scores else (0,)),
    )


@torch.library.register_fake("fused_rnn::additive_attention_backward")
def _attention_backward_fake(
    grads: Sequence[Tensor | None],
    primals: Sequence[Tensor],
    results: Sequence[Tensor],
    rest: Sequence[Tensor | None],
    dropout_p: float,
    settings: Settings,
) -> list[Tensor]:
    _check_devices(*primals, *grads, *results, *rest)
    return [primals[0].new_empty(t.shape) for t in primals]


flops.register()


# ---- CUDA


def compose_layers(
    lib: torch.library.Library = library,
    device: str = "CUDA",
    forward: Callable[..., Any] = recurrence_forward,
    backward: Callable[..., Any] = recurrence_backward,
) -> None:
    """Has ``lib`` implement the ops of layers on a device by those of recurrences."""
    for name, implementation, recurrence in (
        ("layer_forward", composed.forward, forward),
        ("layer_backward", composed.backward, backward),
    ):
        implement = functools.partial(_compose, implementation, recurrence, device.lower())
        lib.impl(name, implement, device)


def _compose(
    implementation: Callable[..., list[Tensor]], recurrence: Any, device: str, *args: Any
) -> list[Tensor]:
    # As every op: no graph inside, and dtypes that depend on the arguments alone.
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return implementation(recurrence, *args)


if _C.build_info()["cuda"] is not None:
    compose_layers()


def _triton_kernels() -> Any:
    # When first needed: triton is there where CUDA is, and slow to import.
    return importlib.import_module("fused_rnn.kernels.attention_scores")


@torch.library.impl("fused_rnn::additive_attention_forward", "CUDA")
def _attention_forward_cuda(
    primals: Sequence[Tensor],
    lengths: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    settings: Settings,
) -> tuple[Tensor, ...]:
    causal, *wanted = map(bool, settings)
    tensors = (*primals, None)[:5]
    return _triton_kernels().forward(*tensors, lengths, mask, causal, dropout_p, seed, *wanted)


@torch.library.impl("fused_rnn::additive_attention_backward", "CUDA")
def _attention_backward_cuda(
    grads: Sequence[Tensor | None],
    primals: Sequence[Tensor],
    results: Sequence[Tensor],
    rest: Sequence[Tensor | None],
    dropout_p: float,
    settings: Settings,
) -> list[Tensor]:
    lengths, mask, seed = rest
    tensors = (*primals, None)[:5]
    found = _triton_kernels().backward(
        *grads, *tensors, lengths, mask, bool(settings[0]), dropout_p, seed, *results
    )
    return list(found[: len(primals)])
