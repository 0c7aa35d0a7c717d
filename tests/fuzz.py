"""Calls the ops and layers with arguments that are right, nearly right and absurd.

Each case follows from its number. It has to end in an exception of the kinds that torch raises, or
in what the plain loop of ``reference.py`` says. A case that crashes, hangs or is wrong is the last
one that was printed:

    python tests/fuzz.py --seconds 3600      # an hour of them
    python tests/fuzz.py --first 4711 --count 1
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import sys
import time
from typing import Any

import torch
from helpers import largest
from test_ops import (
    CELLS,
    VARIANTS,
    VARIATIONS,
    backward_arguments,
    forward_arguments,
    op_arguments,
)
from torch import Tensor

import fused_rnn
from fused_rnn import ops, reference
from fused_rnn.cells import CELLS as TRAITS
from fused_rnn.cells import call_of, reference_weights

REFUSALS = (
    RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, OverflowError,
    MemoryError,
    AttributeError,  # torch.nn's word for what is no tensor
)  # fmt: skip
MEMORY = 12 << 30  # bytes that the process may ask for
HANG_S = 60
MOST_STEPS = 10**6  # of the plain loop
HUGE = (2**31, 2**40, 2**62)
INTEGERS = (-(2**62), -1, 0, 1, 2, 3, 7, 2**31, 2**62)
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.bool, torch.complex64, torch.complex128, torch.uint8,
)  # fmt: skip

Arguments = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=sys.maxsize)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    chosen = parser.parse_args()
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(2)
    end = time.monotonic() + chosen.seconds
    done = refused = 0
    for number in range(chosen.first, chosen.first + chosen.count):
        if time.monotonic() > end:
            break
        draw = random.Random(number)
        torch.manual_seed(number)
        kind = draw.choice((forward_op, forward_op, backward_op, layer, attention))
        print(f"case {number}: {kind.__name__}", end=" ", flush=True)
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        accepted = kind(draw)
        faulthandler.cancel_dump_traceback_later()
        print("accepted" if accepted else "refused", flush=True)
        done += 1
        refused += not accepted
    print(f"{done} cases, {refused} refused")
    return 0


def small(draw: random.Random) -> int:
    return draw.choice((0, 1, 1, 2, 3, 4, 5, 8, 17, 33))


def ops_arguments(draw: random.Random, make: Any) -> tuple[str, Arguments]:
    while True:
        cell, variant = draw.choice(CELLS), draw.choice(VARIANTS)
        if variant.endswith("projected") and not TRAITS[cell].has_c:
            continue
        if variant in VARIATIONS and VARIATIONS[variant][0] and TRAITS[cell].late_gate:
            continue
        sizes = {"T": small(draw), "B": small(draw), "H": max(small(draw), 1)}
        if variant.startswith("packed"):
            sizes = {"T": max(sizes["T"], 1), "B": max(sizes["B"], 1), "H": sizes["H"]}
        dtype = draw.choice((torch.float64, torch.float64, torch.float32, torch.bfloat16))
        print(cell, variant, sizes, dtype, end=" ", flush=True)
        given = make(cell, variant, dtype=dtype, **sizes)
        # Larger ones make a recurrence chaotic: then any rounding becomes any error.
        given["weights"] = [weight / 8 for weight in given["weights"]]
        return cell, given


def forward_op(draw: random.Random) -> bool:
    cell, given = ops_arguments(draw, forward_arguments)
    mutate(draw, given)
    try:
        found = ops.layer_forward(*op_arguments("forward", cell, given))
    except REFUSALS:
        return False
    if found[0].is_meta or "seed" in given or given["input"].is_complex():
        return True
    if given["input"].shape[0] > MOST_STEPS:  # of no rows, which the op knows at once
        return True
    for result, expected in zip(found, by_reference(cell, given), strict=False):
        check(result, expected)
    return True


def by_reference(cell: str, given: Arguments) -> list[Tensor]:
    traits, L = TRAITS[cell], given["recurrences"]
    x, lengths = given["input"].double(), given["lengths"]
    if given["batch_sizes"] is not None:
        sizes = given["batch_sizes"]
        exists = torch.arange(int(sizes[0])) < sizes.unsqueeze(1)
        lengths = exists.sum(0)
        x = x.new_zeros((*exists.shape, x.shape[1])).masked_scatter(exists.unsqueeze(2), x)
    # What torch has made of the settings: of a tensor a number.
    call, _ = call_of(cell, *op_arguments("forward", cell, given)[-2:])
    weights = reference_weights(call, [w.double() for w in given["weights"]])
    rows, P = weights[0].weight_hh.shape
    sizes = (P, rows // traits.gates)
    zeros = [x.new_zeros((L, x.shape[1], n)) for n in sizes]
    hx, cx = (*(s.double() for s in given["states"]), *zeros[len(given["states"]) :])
    output, h_n, _, _ = reference.layer(
        cell, x, hx, cx if traits.has_c else None, weights, lengths=lengths,
        resets=given["resets"], directions=given["directions"],
    )  # fmt: skip
    if given["batch_sizes"] is not None:
        output = output[exists]
    return [output.flatten(-2), h_n]


def backward_op(draw: random.Random) -> bool:
    cell, given = ops_arguments(draw, backward_arguments)
    changed = mutate(draw, given)
    try:
        ops.layer_backward(*op_arguments("backward", cell, given))
    except REFUSALS:
        if not changed:
            raise
        return False
    return True


def layer(draw: random.Random) -> bool:
    name = draw.choice(("RNN", "GRU", "LSTM"))
    options: Arguments = {
        "num_layers": draw.choice((1, 2)), "bidirectional": draw.random() < 0.4,
        "batch_first": draw.random() < 0.3, "bias": draw.random() < 0.7,
        "layer_norm": draw.choice((False, False, True, "joint")),
        "num_heads": draw.choice((1, 1, 2, 3)), "zoneout": draw.choice((0.0, 0.0, 0.5, 1.5)),
    }  # fmt: skip
    T, B, I, H = (small(draw) for _ in range(4))  # noqa: E741
    print(name, (T, B, I, H), options, end=" ", flush=True)
    try:
        made = getattr(fused_rnn, name)(I, H, dtype=torch.float64, **options)
        given: Arguments = {
            "input": torch.randn(T, B, I, dtype=torch.float64),
            "lengths": torch.randint(0, T + 1, (B,)) if draw.random() < 0.3 else None,
            "resets": torch.rand(T, B) < 0.3 if draw.random() < 0.3 else None,
        }
        mutate(draw, given)
        if isinstance(given["input"], Tensor) and given["input"].is_floating_point():
            given["input"].requires_grad_()
        output = made(**given)[0]
        if output.is_floating_point() and output.requires_grad:
            output.sum().backward()
    except REFUSALS:
        return False
    return True


def attention(draw: random.Random) -> bool:
    B, Q, K, A, D = (small(draw) for _ in range(5))
    print((B, Q, K, A, D), end=" ", flush=True)

    def random_(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    given: Arguments = {
        "query": random_(B, Q, A), "key": random_(B, K, A), "value": random_(B, K, D),
        "weight": random_(A), "bias": random_(A) if draw.random() < 0.5 else None,
        "lengths": torch.randint(0, K + 1, (B,)) if draw.random() < 0.5 else None,
        "mask": torch.rand(B, K) < 0.7 if draw.random() < 0.3 else None,
        "causal": draw.random() < 0.3,
    }  # fmt: skip
    mutate(draw, given)
    try:
        found = fused_rnn.functional.additive_attention(**given)
    except REFUSALS:
        return False
    # Beside a size of zero another may be so large that the plain formula cannot count its pairs.
    assert found.shape == (*given["query"].shape[:2], given["value"].shape[2])
    if not found.is_meta and found.numel() > 0:
        pairs = (*given["query"].shape[:2], given["key"].shape[1])
        mask = given["mask"]
        mask = mask.unsqueeze(1) if mask is not None and mask.dim() == 2 else mask
        allowed = reference.allowed_pairs(
            pairs, given["lengths"], mask, given["causal"], found.device
        )
        inputs = [given[name] for name in ("query", "key", "value", "weight", "bias")]
        expected, *_ = reference.additive_attention(*inputs, allowed)
        # What may not be attended to may be NaN; the plain formula makes NaN of it, ours need not.
        assert not (found.isnan() & ~expected.isnan()).any()
        if given["lengths"] is None and given["mask"] is None and not given["causal"]:
            assert torch.equal(found.isnan(), expected.isnan())
        unclear = expected.isnan()
        check(found.masked_fill(unclear, 0), expected.masked_fill(unclear, 0))
    return True


def check(found: Tensor, expected: Tensor) -> None:
    """Float64 as everywhere in the tests; in other types the shape, for one draw says nothing."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if found.dtype != torch.float64:
        return
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = found.nan_to_num(), expected.nan_to_num()
    assert largest(found - expected) <= 1e-10 * max(largest(expected), 1e-300)


def mutate(draw: random.Random, given: Arguments) -> bool:
    """Changes none, one or two of the arguments; whether any."""
    changes = draw.choice((0, 1, 1, 1, 2))
    for _ in range(changes):
        name = draw.choice(list(given))
        before = given[name]
        try:
            given[name] = changed(draw, before)
        except RuntimeError:  # torch has no such tensor
            continue
        print(f"{name} -> {told(given[name])}", end=" ", flush=True)
    return changes > 0


def told(value: Any) -> str:
    if isinstance(value, Tensor):
        text = f"{tuple(value.shape)} {value.dtype} {value.device}"
        return text if value.layout != torch.strided else f"{text} {value.stride()}"
    return str([told(v) for v in value]) if isinstance(value, list) else repr(value)


def changed(draw: random.Random, value: Any) -> Any:
    if draw.random() < 0.05:
        return draw.choice((None, "text", 1, 1.5, [], torch.zeros(())))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice(INTEGERS)
    if isinstance(value, float):
        return draw.choice((-1.0, 0.5, 1.0, float("nan"), float("inf")))
    if isinstance(value, list):
        return changed_list(draw, value)
    return changed_tensor(draw, value) if isinstance(value, Tensor) else value


def changed_list(draw: random.Random, value: list[Any]) -> list[Any]:
    value = list(value)
    if not value:
        return [torch.randn(2, 2)]
    at = draw.randrange(len(value))
    how = draw.choice(("tensor", "tensor", "drop", "twice", "swap", "empty"))
    if how == "tensor":
        value[at] = changed(draw, value[at])
    elif how == "drop":
        del value[at]
    elif how == "twice":
        value.insert(at, value[at])
    elif how == "swap":
        value[at], value[0] = value[0], value[at]
    else:
        value = []
    return value


def changed_tensor(draw: random.Random, value: Tensor) -> Tensor:
    how = draw.choice(
        (
            "dtype",
            "meta",
            "longer",
            "shorter",
            "huge",
            "more",
            "fewer",
            "strided",
            "offset",
            "values",
        )
    )
    dim = draw.randrange(value.dim()) if value.dim() else None
    if how == "dtype":
        return value.to(draw.choice(DTYPES))
    if how == "meta":
        return value.to("meta")
    if how == "more":
        return value.unsqueeze(draw.randrange(value.dim() + 1))
    if how == "values" and value.numel():
        value = value.clone()
        extreme = draw.choice((-1, 2**40)) if value.dtype == torch.int64 else float("nan")
        if value.dtype != torch.bool:
            value.view(-1)[draw.randrange(value.numel())] = extreme
        return value
    if dim is None:
        return value
    if how == "fewer":
        return value.select(dim, 0) if value.shape[dim] else value
    if how == "shorter":
        return value.narrow(dim, 0, max(value.shape[dim] - 1, 0))
    if how == "longer":
        return torch.cat([value, value.narrow(dim, 0, min(value.shape[dim], 1))], dim)
    if how == "huge":
        one = value.narrow(dim, 0, min(value.shape[dim], 1))
        if one.shape[dim] == 0:
            one = value.new_zeros([1 if d == dim else n for d, n in enumerate(value.shape)])
        return one.expand([draw.choice(HUGE) if d == dim else n for d, n in enumerate(one.shape)])
    if how == "strided":
        return value.movedim(dim, 0).contiguous().movedim(0, dim)
    wide = torch.cat([value, value], dim)
    return wide.narrow(dim, value.shape[dim] // 2, value.shape[dim]).copy_(value)


if __name__ == "__main__":
    raise SystemExit(main())
