"""Gradients as autograd sees them: first and second order, partial, repeated; what they keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    GATES,
    LAYERS,
    as_tuple,
    assert_equal,
    assert_near,
    cotangents,
    dyadic,
    each_layer,
    fused,
    named_outputs,
    pair,
    run,
    states,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I = 3, 2, 2  # noqa: E741

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True},
    "no_bias": {"bias": False, "batch_first": True},
    "projected": {"bidirectional": True, "proj_size": 2},
    "lengths": {"bidirectional": True},
    "resets": {"bidirectional": True},
    "ragged_projected": {"bidirectional": True, "proj_size": 2},
    "cells": {"num_layers": 2},
    "ragged_cells": {"bidirectional": True, "proj_size": 1},
}
ONLY_LSTM = ("projected", "ragged_projected", "cells", "ragged_cells")
CASES = [(c, v) for c in LAYERS for v in VARIANTS if c == "lstm" or v not in ONLY_LSTM]


def problem(cell: str, variant: str) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """A function of input, states and parameters, and where to differentiate it."""
    layer = fused(cell, I, 3, **VARIANTS[variant], dtype=torch.float64)
    options: dict[str, Any] = {}
    if variant == "lengths" or variant.startswith("ragged"):
        options["lengths"] = torch.tensor([1, T])
    if variant == "resets" or variant.startswith("ragged"):
        options["resets"] = torch.tensor([[False, False], [False, True], [True, False]])
    if variant.endswith("cells"):
        options["return_cells"] = True
    x = torch.randn((B, T, I) if layer.batch_first else (T, B, I), dtype=torch.float64)
    hx = as_tuple(states(layer, B))
    names = [name for name, _ in layer.named_parameters()]

    def function(input: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state, values = rest[: len(hx)], rest[len(hx) :]
        result = torch.func.functional_call(
            layer,
            dict(zip(names, values, strict=True)),
            (input, state if cell == "lstm" else state[0]),
            options,
        )
        return tuple(named_outputs(result).values())

    at = (x, *(torch.randn_like(s) for s in hx), *layer.parameters())
    return function, tuple(t.detach().requires_grad_() for t in at)


@pytest.mark.parametrize("cell, variant", CASES)
def test_gradcheck(cell: str, variant: str) -> None:
    function, at = problem(cell, variant)
    assert gradcheck(function, at, fast_mode=variant != "plain")


@pytest.mark.parametrize("cell, variant", CASES)
def test_gradgradcheck(cell: str, variant: str) -> None:
    function, at = problem(cell, variant)
    plain = variant == "plain"
    assert gradgradcheck(function, at, fast_mode=not plain, check_undefined_grad=plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cell", LAYERS)
def test_create_graph_gives_the_same_gradient(cell: str, dtype: torch.dtype, device: str) -> None:
    options = {"dtype": dtype, "device": device}
    layer = fused(cell, 3, 17, num_layers=2, bidirectional=True, **options)
    for seed in range(3):
        x, hx = dyadic(4, 3, 3, **options), states(layer, 3, **options)
        assert_equal(run(layer, x, hx, seed=seed, create_graph=True), run(layer, x, hx, seed=seed))


@pytest.mark.parametrize("cell", LAYERS)
def test_create_graph_of_ragged_input_gives_the_same_gradient(cell: str, device: str) -> None:
    options = {"dtype": torch.float64, "device": device}
    layer = fused(cell, 3, 17, num_layers=2, bidirectional=True, **options)
    x, hx = dyadic(4, 3, 3, **options), states(layer, 3, **options)
    ragged: dict[str, Any] = {
        "lengths": torch.tensor([4, 0, 2], device=device),
        "resets": (torch.rand(4, 3) < 0.3).to(device),
    }
    if cell == "lstm":
        ragged["return_cells"] = True
    assert_equal(run(layer, x, hx, create_graph=True, **ragged), run(layer, x, hx, **ragged))


def penalty(layer: Any, x: Tensor, hx: Any) -> dict[str, Tensor]:
    """Gradients of (|d output / d input| - 1)^2, as in WGAN-GP."""
    x = x.detach().requires_grad_()
    output, _ = layer(x, hx)
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    loss = (grad.flatten(1).norm(dim=1) - 1).square().sum()
    leaves = {"x": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        k: torch.zeros_like(t) if g is None else g
        for (k, t), g in zip(leaves.items(), grads, strict=True)
    }


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@each_layer("variant", ["plain", "stacked", "projected"])
def test_gradient_penalty(cell: str, variant: str, train: bool) -> None:
    theirs, ours = pair(cell, 3, 5, **VARIANTS[variant], dtype=torch.float64)
    theirs.train(train), ours.train(train)
    x, hx = dyadic(4, 2, 3), states(ours, 2)
    assert_near(penalty(ours, x, hx), penalty(theirs, x, hx))


@pytest.mark.parametrize("cell", LAYERS)
def test_dropout_keeps_its_mask_under_create_graph(cell: str) -> None:
    layer = fused(cell, 3, 5, num_layers=2, dropout=0.5, dtype=torch.float64)
    x = dyadic(4, 2, 3)
    torch.manual_seed(5)
    fast = run(layer, x)
    torch.manual_seed(5)
    assert_near(run(layer, x, create_graph=True), fast)


def leaves_of(layer: Any, device: Any = "cpu") -> tuple[Tensor, Any, list[Tensor]]:
    """input, hx and everything that wants a gradient."""
    dtype = next(layer.parameters()).dtype
    x = torch.randn(4, 3, layer.input_size, dtype=dtype, device=device, requires_grad=True)
    hx = states(layer, 3, dtype=dtype, device=device)
    hx = tuple(s.requires_grad_() for s in hx) if isinstance(hx, tuple) else hx.requires_grad_()
    return x, hx, [x, *as_tuple(hx), *layer.parameters()]


@pytest.mark.parametrize("cell", LAYERS)
def test_backward_twice(cell: str, device: str) -> None:
    layer = fused(cell, 3, 17, num_layers=2, bidirectional=True, device=device)
    x, hx, leaves = leaves_of(layer, device)
    loss = layer(x, hx)[0].square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    first = [g.clone() for g in first]
    second = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", LAYERS)
def test_output_modified_in_place(cell: str, num_layers: int, device: str) -> None:
    layer = fused(cell, 3, 17, num_layers, device=device)
    output, _ = layer(torch.randn(4, 2, 3, device=device))
    total = output.sum()
    with torch.no_grad():
        output.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("cell", LAYERS)
def test_weight_modified_in_place(cell: str, device: str) -> None:
    layer = fused(cell, 3, 17, device=device)
    total = layer(torch.randn(4, 2, 3, device=device))[0].sum()
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("cell", LAYERS)
def test_final_state_may_be_modified(cell: str, device: str) -> None:
    """A training loop detaches or scales it; torch.nn allows that."""
    layer = fused(cell, 3, 17, device=device)
    x = torch.randn(4, 2, 3, device=device)
    output, final = layer(x)
    total = output.sum()
    with torch.no_grad():
        for state in as_tuple(final):
            state.zero_()
    total.backward()
    expected = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    for parameter, grad in zip(layer.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("wanted", ["input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_partial_gradients(cell: str, wanted: str, device: str) -> None:
    """Frozen weights, or inputs that want nothing: what is left is as it was."""
    layer = fused(cell, 3, 17, 2, bidirectional=True, dtype=torch.float64, device=device)
    x, hx = dyadic(4, 3, 3, device=device), states(layer, 3, device=device)
    expected = run(layer, x, hx)
    leaves = {}
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.startswith(wanted))
        if name.startswith(wanted):
            leaves[name] = parameter
    if wanted == "input":
        leaves["input"] = x.requires_grad_()
    if wanted == "hx":
        names = ("hx", "cx")
        leaves.update(zip(names, (s.requires_grad_() for s in as_tuple(hx)), strict=False))
    outputs = named_outputs(layer(x, hx))
    given = cotangents(outputs)
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(given.values()))
    found = {f"grad_{k}": g for k, g in zip(leaves, grads, strict=True)}
    assert_near(found, {k: expected[k] for k in found})


@pytest.mark.parametrize("cell", LAYERS)
def test_nothing_is_kept_where_nothing_is_wanted(cell: str) -> None:
    layer = fused(cell, 3, 17).requires_grad_(False)
    output, final = layer(torch.randn(4, 2, 3))
    assert not output.requires_grad
    assert not any(state.requires_grad for state in as_tuple(final))


@pytest.mark.parametrize("cell", LAYERS)
def test_a_tensor_that_outlived_its_transform(cell: str) -> None:
    """What torch.func hands to a function, kept, still leads back to the tensor it wraps."""
    layer = fused(cell, 3, 17)
    x = torch.randn(4, 2, 3, requires_grad=True)
    kept = []

    def function(input: Tensor) -> Tensor:
        kept.append(input)
        return input.sum()

    torch.func.grad(function)(x)
    layer(kept[0])[0].sum().backward()
    (expected,) = torch.autograd.grad(layer(x)[0].sum(), x)
    assert torch.equal(x.grad, expected)


@each_layer("variant", ["plain", "stacked", "projected"])
def test_accumulated_gradients_do_not_alias(cell: str, variant: str, device: str) -> None:
    """Optimisers write to .grad in place: to change one must leave all others as they are."""
    layer = fused(cell, I, 3, **VARIANTS[variant], device=device)
    x, hx, leaves = leaves_of(layer, device)
    output, final = layer(x, hx)
    (output.square().sum() + sum(s.square().sum() for s in as_tuple(final))).backward()
    before = [t.grad.clone() for t in leaves]
    for i, t in enumerate(leaves):
        t.grad.fill_(i + 1000.0)
    for i, t in enumerate(leaves):
        assert (t.grad == i + 1000.0).all()
        t.grad = before[i].clone()
    assert layer.bias_ih_l0.grad.data_ptr() != layer.bias_hh_l0.grad.data_ptr()
    output, final = layer(x, hx)
    (output.square().sum() + sum(s.square().sum() for s in as_tuple(final))).backward()
    for grad, t in zip(before, leaves, strict=True):
        assert torch.equal(t.grad, grad + grad)


@pytest.mark.parametrize("cell", LAYERS)
def test_one_layer_twice_in_a_graph(cell: str, device: str) -> None:
    theirs, ours = pair(cell, 5, 5, dtype=torch.float64, device=device)
    x, hx = dyadic(4, 3, 5, device=device), states(ours, 3, device=device)

    def twice(layer: Any) -> Callable[..., Any]:
        def call(input: Tensor, hx: Any) -> Any:
            output, final = layer(input, hx)
            return layer(output, final)

        return call

    assert_near(run(ours, x, hx, call=twice(ours)), run(theirs, x, hx, call=twice(theirs)))


@pytest.mark.parametrize("cell", LAYERS)
def test_truncated_backpropagation(cell: str) -> None:
    """States detached between chunks, gradients accumulated over them, as torch.nn has them."""
    theirs, ours = pair(cell, 3, 5, num_layers=2, dtype=torch.float64)
    x = dyadic(12, 2, 3)
    grads = []
    for layer in (theirs, ours):
        hx = None
        for chunk in x.split(4):
            output, hx = layer(chunk, hx)
            output.square().sum().backward()
            hx = tuple(s.detach() for s in hx) if cell == "lstm" else hx.detach()
        grads.append({n: p.grad for n, p in layer.named_parameters()})
    assert_near(grads[1], grads[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_layer("variant", ["plain", "projected"])
def test_memory_kept_for_backward(cell: str, variant: str, dtype: torch.dtype) -> None:
    """Beside input, weights and output, no more than the gates and the states of every step."""
    projected = variant == "projected"
    steps, rows, H = 7, 3, 16
    layer = fused(
        cell, 5, H, bidirectional=True, dtype=dtype, **({"proj_size": 4} if projected else {})
    )
    x = torch.randn(steps, rows, 5, dtype=dtype, requires_grad=True)
    kept: dict[int, tuple[int, int]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = (t.numel(), storage.nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output, _ = layer(x)
    for known in (x, output, *layer.parameters()):
        kept.pop(known.untyped_storage().data_ptr(), None)
    every_step = steps * rows * 2 * H
    state_count = 2 if cell == "lstm" else 1
    assert sum(n for n, _ in kept.values()) <= every_step * (GATES[cell] + state_count)
    # Nothing larger hides behind a view.
    assert all(size <= max(n * 4, 16) for n, size in kept.values())


def test_inference_keeps_nothing() -> None:
    layer = fused("lstm", 5, 16)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.no_grad(),
    ):
        layer(torch.randn(7, 3, 5))
    assert not kept


@pytest.mark.parametrize("cell", LAYERS)
def test_inference_mode(cell: str) -> None:
    layer = fused(cell, 5, 16, bidirectional=True)
    x = torch.randn(7, 3, 5)
    expected = {k: t.detach() for k, t in named_outputs(layer(x)).items()}
    with torch.inference_mode():
        assert_equal(named_outputs(layer(x)), expected)
