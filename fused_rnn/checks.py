"""The one place where Python checks what callers give; the ops check what memory depends on."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import CELLS, LAYER_NORMS, PLAIN, Call, Variation


class Options(NamedTuple):
    """The options of a layer that change the step around its cell, or the weights in use."""

    layer_norm: Any = False  # checked, one of LAYER_NORMS by its number
    layer_norm_eps: float = 1e-5
    zoneout: Any = 0.0  # checked, a pair: of h and c
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    forget_bias: float = 0.0


class Layers(NamedTuple):
    """What layers over each other are, beside their weights."""

    cell: str  # a name in CELLS
    has_biases: bool = True
    num_layers: int = 1
    dropout: float = 0.0  # between layers, in training
    train: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    options: Options | None = None  # None if all are at their defaults

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def layer_norm(self) -> int:
        return 0 if self.options is None else self.options.layer_norm

    @property
    def variation(self) -> Variation | None:
        """What the options change in the step around the cell."""
        options = self.options
        if options is None:
            return None
        recurrent_dropout = options.recurrent_dropout if self.train else 0.0
        zoneout_h, zoneout_c = options.zoneout
        variation = Variation(options.layer_norm, zoneout_h, zoneout_c, recurrent_dropout)
        if options.layer_norm:
            variation = variation._replace(layer_norm_eps=options.layer_norm_eps)
        return None if variation == PLAIN else variation


def check_options(given: Options, has_c: bool, has_biases: bool) -> Options | None:
    """The options as ``functional.run`` takes them, None if all are at their defaults.

    Raises:
        TypeError, ValueError: an option is not what ``fused_rnn.LSTM`` documents.
    """
    if given.layer_norm is False and given == _DEFAULTS:
        return None
    norm = "separate" if given.layer_norm is True else given.layer_norm
    if not isinstance(norm, (bool, str)):
        raise TypeError(f"layer_norm should be a bool or a str, got: {type(norm).__name__}")
    if norm not in LAYER_NORMS:
        raise ValueError(f"layer_norm should be False, True, 'separate' or 'joint', got {norm!r}")
    zones = given.zoneout if isinstance(given.zoneout, (tuple, list)) else (given.zoneout,) * 2
    if zones is given.zoneout and (not has_c or len(zones) != 2):
        raise ValueError(
            "zoneout should be a probability or, for LSTM only, a pair of them for h and c, "
            f"got {given.zoneout}"
        )
    numbers = {name: (value,) for name, value in given._asdict().items() if name != "layer_norm"}
    for name, values in (numbers | {"zoneout": zones}).items():
        for value in values:
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{name} should be a number, got: {type(value).__name__}")
            value = float(value)
            if name == "layer_norm_eps" and not 0 <= value < math.inf:
                raise ValueError(f"{name} should be finite and not negative, got {value}")
            if name == "forget_bias" and not (math.isfinite(value) and (has_biases or not value)):
                needs = "finite" if has_biases else "0 without bias"
                raise ValueError(f"{name} should be {needs}, got {value}")
            if name not in ("layer_norm_eps", "forget_bias") and not 0 <= value < 1:
                raise ValueError(f"{name} should be a probability in [0, 1), got {value}")
    checked = given._replace(
        layer_norm=LAYER_NORMS.index(norm), zoneout=(zones[0], zones[1] if has_c else 0.0)
    )
    plain = Options(0, given.layer_norm_eps, (0.0, 0.0))
    return None if checked == plain else checked


_DEFAULTS = Options()


def check_states(hx: Any, count: int) -> tuple[Tensor, ...]:
    """The initial states: ``count`` of them, or none for zeros."""
    if hx is None:
        return ()
    states = (hx,) if count == 1 else tuple(hx) if isinstance(hx, (tuple, list)) else ()
    if len(states) == count and all(isinstance(state, Tensor) for state in states):
        return states
    expected = "a tensor" if count == 1 else "a tuple of two tensors, h and c,"
    kinds = [type(each).__name__ for each in hx] if isinstance(hx, (tuple, list)) else []
    given = f"{type(hx).__name__}" + (f" of {', '.join(kinds)}" if kinds else "")
    raise TypeError(f"hx should be {expected} or None, got: {given}")


class Plan(NamedTuple):
    """What follows for layers from the sizes of what they are given."""

    call: Call  # of a layer
    names: list[str]  # of the weights of all layers
    shapes: list[tuple[int, ...]]
    widths: tuple[int, int]  # of h and c


def _plan(
    layers: Layers, states: int, want_cells: bool, params: int, input_size: int,
    of_weight_hh: tuple[int, ...],
) -> Plan:  # fmt: skip
    D, traits, norm = layers.directions, CELLS[layers.cell], layers.layer_norm
    # How many weights there are tells whether there is a projection.
    each, rest = divmod(params, layers.num_layers * D)
    without = len(traits.table(layers.has_biases, False, norm))
    if rest or each - without not in ((0, 1) if traits.has_c else (0,)):
        more = f" (or {without + 1} with a projection)" if traits.has_c else ""
        raise RuntimeError(
            f"Expected {without} params{more} for each of {layers.num_layers} layers and {D} "
            f"directions, got {params}"
        )
    projected = each > without
    table = traits.table(layers.has_biases, projected, norm)
    H, heads = hidden_size(layers.cell, of_weight_hh)
    P = of_weight_hh[-1] if projected else H
    names, shapes = [], []
    for k in range(layers.num_layers):
        for suffix in ("", "_reverse")[:D]:
            sizes = {"I": input_size if k == 0 else P * D, "H": H, "P": P}
            for weight in table:
                shape = weight.shape(sizes)
                if heads and weight.name == "weight_hh":
                    shape = (heads, traits.gates * H // heads, H // heads)
                names.append(f"{weight.name}_l{k}{suffix}")
                shapes.append(shape)
    call = Call(
        layers.cell, layers.has_biases, projected, states, D, D, want_cells, layers.variation
    )
    return Plan(call, names, shapes, (P, H))


_known_plan = functools.lru_cache(1024)(_plan)


def plan_of(
    layers: Layers,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    want_cells: bool,
    is_plain: bool,
) -> Plan:
    """That of a call, which has not been checked for anything but the number of params.

    It is remembered of what ``is_plain``: symbols cannot be, and torch.compile does not look there.
    """
    plan = _known_plan if is_plain else _plan
    sizes = input.shape[-1], params[1].shape
    return plan(layers, len(states), want_cells, len(params), *sizes)


def check_layers(
    layers: Layers,
    plan: Plan,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    batch_size: int,
) -> None:
    """Names the weight or state whose shape, dtype or device does not fit."""
    dtype, device = input.dtype, input.device
    for name, tensor, shape in zip(plan.names, params, plan.shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise RuntimeError(
                f"Expected {name} of shape {shape} in input's dtype {dtype} on its device "
                f"{device}, got {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}"
            )
    count = layers.num_layers * layers.directions
    for name, state, n in zip(("hx", "cx"), states, plan.widths, strict=False):
        if state.shape != (count, batch_size, n):
            raise RuntimeError(
                f"Expected {name} of shape {(count, batch_size, n)}, got {tuple(state.shape)}"
            )
        if state.dtype != dtype or state.device != device:
            raise RuntimeError(
                f"Expected {name} in the weights' dtype {dtype} on their device {device}, got "
                f"{state.dtype} on {state.device}"
            )


def hidden_size(cell: str, of_weight_hh: tuple[int, ...]) -> tuple[int, int]:
    """H and, if the recurrence is block-diagonal, the number of heads, else 0; of a shape."""
    heads = of_weight_hh[0] if len(of_weight_hh) == 3 else 0
    return of_weight_hh[-2] * max(heads, 1) // CELLS[cell].gates, heads


def expect_tensor(name: str, value: Any, shape: tuple[int, ...], like: Tensor) -> None:
    """Refuses what is not a tensor of this shape, or has no data where ``like`` has."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise RuntimeError(f"Expected {name} of shape {shape}, got {tuple(value.shape)}")
    if value.is_meta and not like.is_meta:
        raise RuntimeError(f"Expected {name} on a device with data like {like.device}, got meta")


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_lengths(
    lengths: Tensor | None, like: Tensor, B: int, limit: int, what: str = "", by_op: bool = False
) -> Tensor | None:
    """(B,) int64 lengths within 0..limit on the device of ``like``; the CPU op may check that."""
    if lengths is None:
        return None
    expect_tensor("lengths", lengths, (B,), like)
    if lengths.dtype not in _INTEGERS:
        raise RuntimeError(f"Expected lengths of an integer dtype, got {lengths.dtype}")
    if not (lengths.is_meta or (by_op and like.device.type in ("cpu", "meta"))):
        inside = ((lengths >= 0) & (lengths <= limit)).all()
        message = f"Expected lengths within 0..{limit}" + (f" ({what})" if what else "")
        # A device is not waited for, nor a graph broken or asked for values while it is made.
        if lengths.device.type != "cpu" or torch.compiler.is_compiling() or _is_watched():
            torch._assert_async(inside, message)
        elif not inside:
            raise RuntimeError(f"{message}, got {lengths.tolist()}")
    return lengths.to(device=like.device, dtype=torch.int64, non_blocking=True)


def _is_watched() -> bool:
    """Whether a mode of torch, such as a tracer, sees every call."""
    return bool(torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack())


def check_batch_sizes(batch_sizes: Tensor, data: Tensor) -> None:
    """Names what is wrong with a PackedSequence: torch's own ops write where batch_sizes say."""
    if batch_sizes.shape == (0,):
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64:
        raise RuntimeError(
            "Expected batch_sizes of shape (T) and dtype torch.int64, got "
            f"{tuple(batch_sizes.shape)} and {batch_sizes.dtype}"
        )
    if torch.compiler.is_compiling():
        return  # their values are not known
    sizes: list[int] = batch_sizes.tolist()
    if sizes[-1] < 1 or sizes != sorted(sizes, reverse=True):
        raise RuntimeError(f"Expected batch_sizes of at least 1 that never increase, got {sizes}")
    if sum(sizes) != data.size(0):
        raise RuntimeError(
            f"Expected batch_sizes that add up to the {data.size(0)} rows of data, got {sizes}"
        )


def first_batch_size(batch_sizes: Tensor) -> int:
    """B of a packed sequence; the op checks the other steps."""
    if batch_sizes.dim() != 1:
        raise RuntimeError(
            f"Expected batch_sizes of shape (T,), got batch_sizes of {tuple(batch_sizes.shape)}"
        )
    return int(batch_sizes[0])


def check_resets(resets: Tensor, T: int, B: int, input: Tensor, batch_first: bool) -> Tensor:
    """Time-major resets on input's device."""
    expect_tensor("resets", resets, (B, T) if batch_first else (T, B), input)
    if resets.dtype != torch.bool:
        raise RuntimeError(f"Expected resets of dtype torch.bool, got {resets.dtype}")
    resets = resets.to(device=input.device, non_blocking=True)
    return resets.transpose(0, 1) if batch_first else resets
