"""Whoever meets our ops below our Python gets the gradient that eager code gets.

A module is taken to where others run it (exported, traced, compiled, as a graph of ATen's ops), and
trained there; torch's transforms are asked for derivatives in every way that they know.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import as_tuple
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn
from fused_rnn import functional, ops
from fused_rnn.cells import Call, Rest

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H = 4, 3, 3, 6  # noqa: E741


class Sum(nn.Module):
    """Something before a layer, the layer, and one number of all that it returns."""

    def __init__(self, layer: nn.Module, inputs: tuple[Tensor, ...], **arguments: Any) -> None:
        super().__init__()
        width = inputs[0].shape[-1]
        self.before, self.layer = nn.Linear(width, width, dtype=inputs[0].dtype), layer
        self.inputs, self.arguments = inputs, arguments

    def forward(self, *inputs: Tensor) -> Tensor:
        first, *others = inputs
        found = self.layer(self.before(first), *others, **self.arguments)
        return torch.stack([t.square().sum() for t in flat(found)]).sum()


def flat(value: Any) -> list[Tensor]:
    return [t for v in as_tuple(value) for t in (flat(v) if isinstance(v, tuple) else [v])]


def layer(name: str, arguments: dict[str, Any] | None = None, **options: Any) -> Callable[[], Sum]:
    """A layer of H units, in eval mode: what is drawn would be drawn anew in every place."""

    def make() -> Sum:
        module = getattr(fused_rnn, name)(I, H, **options).double().eval()
        for parameter in module.parameters():  # so that no normalisation is as it begins
            nn.init.uniform_(parameter, -0.8, 0.8)
        return Sum(module, (torch.randn(T, B, I).double(),), **(arguments or {}))

    return make


def cell(name: str, **options: Any) -> Callable[[], Sum]:
    return lambda: Sum(
        getattr(fused_rnn, name)(I, H, **options).double(), (torch.randn(B, I).double(),)
    )


def attention(score: str) -> Callable[[], Sum]:
    query, memory = torch.randn(B, 2, 5).double(), torch.randn(B, T, 5).double()
    lengths = torch.tensor([4, 2, 1])
    return lambda: Sum(
        fused_rnn.Attention(5, 5, score=score).double(), (query, memory), lengths=lengths
    )


def decoder() -> Sum:
    inputs, memory = torch.randn(B, 2, 4).double(), torch.randn(B, T, 5).double()
    return Sum(fused_rnn.AttentionDecoder(4, H, 5).double(), (inputs, memory))


RAGGED = {"lengths": torch.tensor([4, 0, 2]), "resets": torch.rand(T, B) < 0.3}
MODULES: dict[str, Callable[[], Sum]] = {
    "rnn": layer("RNN"),
    "gru": layer("GRU"),
    "lstm": layer("LSTM"),
    "deep": layer("LSTM", num_layers=2, bidirectional=True),
    "relu": layer("RNN", nonlinearity="relu", bias=False),
    "ragged": layer("GRU", RAGGED, bidirectional=True),
    "projected": layer("LSTM", proj_size=2, layer_norm=True),
    "cells": layer("LSTM", {"return_cells": True}, peephole=True, zoneout=0.2),
    "coupled": layer("LSTM", coupled=True, layer_norm="joint"),
    "before": layer("GRU", reset_after=False),
    "heads": layer("GRU", num_heads=3, zoneout=0.3),
    "gru_cell": cell("GRUCell"),
    "lstm_cell": cell("LSTMCell", peephole=True),
    "additive": attention("additive"),
    "dot": attention("dot"),
    "decoder": decoder,
}


def exported(module: Sum, strict: bool) -> Callable[..., Tensor]:
    return torch.export.export(module, module.inputs, strict=strict).module()


def traced(module: Sum, folder: Path) -> Callable[..., Tensor]:
    """Saved and loaded; torch.jit.trace holds it against the module itself."""
    torch.jit.save(torch.jit.trace(module, module.inputs), folder / "traced.pt")
    return torch.jit.load(folder / "traced.pt")


def graph(module: Sum, pre_dispatch: bool) -> Callable[..., Tensor]:
    return make_fx(lambda *inputs: module(*inputs), pre_dispatch=pre_dispatch)(*module.inputs)


ROUTES: dict[str, Callable[[Sum, Path], Callable[..., Tensor]]] = {
    "export": lambda module, _: exported(module, strict=False),
    "strict_export": lambda module, _: exported(module, strict=True),
    "trace": traced,
    "graph": lambda module, _: graph(module, pre_dispatch=False),
    "graph_before_dispatch": lambda module, _: graph(module, pre_dispatch=True),
    "compile": lambda module, _: torch.compile(module, fullgraph=True, backend="eager"),
    "compile_aot": lambda module, _: torch.compile(module, fullgraph=True, backend="aot_eager"),
}


def trained(module: Sum, function: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The value and all gradients, of inputs and of the parameters that the function holds."""
    # A graph holds the module's own, under other names.
    named = isinstance(function, nn.Module) and not isinstance(function, torch.fx.GraphModule)
    holder = function if named or hasattr(function, "before") else module
    parameters = {k.removeprefix("_orig_mod."): p for k, p in holder.named_parameters()}
    inputs = [t.clone().requires_grad_() for t in module.inputs]
    value = function(*inputs)
    names = [*(f"input {i}" for i in range(len(inputs))), *parameters]
    gradients = torch.autograd.grad(value, [*inputs, *parameters.values()], allow_unused=True)
    assert all(g is not None for g in gradients), dict(zip(names, gradients, strict=True))
    return {"value": value.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("taken_by", ROUTES)
@pytest.mark.parametrize("name", MODULES)
def test_trains_wherever_it_is_taken(name: str, taken_by: str, tmp_path: Path) -> None:
    module = MODULES[name]()
    expected = trained(module, module)
    torch._dynamo.reset()
    taken = copy.deepcopy(module)
    found = trained(taken, ROUTES[taken_by](taken, tmp_path))
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def of_first(module: Sum) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The module as a function of its first input."""
    first, *others = module.inputs
    return lambda x: module(x, *others), first


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap_grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x.sin()])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["gru", "lstm", "ragged", "projected", "lstm_cell", "additive"])
def test_compiled_transforms(name: str, transform: str) -> None:
    module = MODULES[name]()
    function, x = of_first(module)
    expected = TRANSFORMS[transform](function, x)
    reference = torch.func.grad(function)(x)
    if transform in ("grad", "vjp", "jacrev", "jacfwd"):
        leaf = x.clone().requires_grad_()
        (reference,) = torch.autograd.grad(function(leaf), leaf)
        torch.testing.assert_close(expected, reference, rtol=1e-10, atol=1e-12)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: TRANSFORMS[transform](function, x), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), expected, rtol=1e-10, atol=1e-12)


def test_compiled_gradients_of_weights() -> None:
    """A step of MAML: what is learnt is what a gradient step leaves."""
    module = MODULES["gru"]()
    parameters = dict(module.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, weights, module.inputs)

    def after_a_step(weights: dict[str, Tensor]) -> Tensor:
        slopes = torch.func.grad(loss)(weights)
        return loss({k: w - 0.01 * slopes[k] for k, w in weights.items()})

    detached = {k: p.detach() for k, p in parameters.items()}
    expected = torch.func.grad(after_a_step)(detached)
    compiled = torch.compile(torch.func.grad(after_a_step), backend="aot_eager")(detached)
    torch.testing.assert_close(compiled, expected, rtol=1e-10, atol=1e-12)
    leaves = {k: p.clone().requires_grad_() for k, p in detached.items()}
    slopes = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    left = loss({k: w - 0.01 * d for (k, w), d in zip(leaves.items(), slopes, strict=True)})
    eager = torch.autograd.grad(left, list(leaves.values()))
    torch.testing.assert_close(tuple(expected.values()), eager, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_batched_gradients(name: str) -> None:
    """torch.autograd's own vmap, and torch.func's over a graph that was there before."""
    module = MODULES[name]()
    first, *others = module.inputs
    leaf = first.clone().requires_grad_()
    output = flat(module.layer(module.before(leaf), *others, **module.arguments))[0]
    leaves = [leaf, *module.layer.parameters()]
    cotangents = torch.randn(5, *output.shape).double()

    def pull(cotangent: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            output, leaves, cotangent, retain_graph=True, allow_unused=True, **options
        )

    one_by_one = [pull(cotangent) for cotangent in cotangents]
    expected = [None if g[0] is None else torch.stack(g) for g in zip(*one_by_one, strict=True)]
    for found in (pull(cotangents, is_grads_batched=True), torch.func.vmap(pull)(cotangents)):
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["rnn", "lstm", "ragged", "cells", "gru_cell", "additive"])
def test_vectorized_jacobians_and_hessians(name: str) -> None:
    function, x = of_first(MODULES[name]())
    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    expected = jacobian(function, x), hessian(function, x)
    for strategy in ("reverse-mode", "forward-mode"):
        found = (
            jacobian(function, x, vectorize=True, strategy=strategy),
            hessian(function, x, vectorize=True, outer_jacobian_strategy=strategy),
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["gru", "cells", "projected", "lstm_cell"])
def test_gradcheck_in_every_way(name: str) -> None:
    function, x = of_first(MODULES[name]())
    leaf = x.clone().requires_grad_()
    options = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(
        function, (leaf,), check_forward_ad=True, check_batched_forward_grad=True, **options
    )
    assert torch.autograd.gradgradcheck(function, (leaf,), check_fwd_over_rev=True, **options)


@pytest.mark.parametrize("name", ["gru", "lstm", "cells", "heads", "additive"])
def test_nested_transforms(name: str) -> None:
    """Two and three levels of torch.func, each of which wants its derivative of the one inside."""
    module = MODULES[name]()
    function, x = of_first(module)
    grad, jvp, v = torch.func.grad, torch.func.jvp, x.sin()

    def along(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: jvp(f, (x,), (v,))[1]

    def slope(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (grad(f)(x) * v).sum()

    leaf = x.clone().requires_grad_()
    value, chain = function(leaf), []
    for _ in range(3):  # of eager code, whose second derivatives gradcheck has seen
        (found,) = torch.autograd.grad(value, leaf, create_graph=True)
        value = (found * v).sum()
        chain.append(value.detach())
    first, second, third = chain
    for outer in (along, slope):
        torch.testing.assert_close(outer(function)(x), first, rtol=1e-9, atol=1e-11)
        for inner in (along, slope):
            found = outer(inner(function))(x)
            torch.testing.assert_close(found, second, rtol=1e-9, atol=1e-11)
    found = slope(along(slope(function)))(x)
    torch.testing.assert_close(found, third, rtol=1e-8, atol=1e-10)


def test_parameters_outside_a_transform_get_gradients() -> None:
    """What torch.func.grad returns of a function that holds a layer depends on its weights."""
    module = MODULES["gru"]()
    function, x = of_first(module)
    slope = torch.func.grad(function)(x)
    found = torch.autograd.grad(slope.square().sum(), list(module.parameters()))
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    expected = torch.autograd.grad(slope.square().sum(), list(module.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def raw(call: Call, *primals: Tensor) -> list[Tensor]:
    return ops.layer_forward(call.cell, primals, *Rest(), call.settings(False), None)


def test_an_op_by_itself() -> None:
    """As a graph calls it, with nothing of ours around."""
    layer = fused_rnn.LSTM(I, H)
    call = Call("lstm", True, False, 0, 1, 1)
    x = torch.randn(T, B, I)
    output, *_ = raw(call, x, *layer.parameters())
    expected = layer(x)[0]
    assert torch.equal(output, expected)
    found = torch.autograd.grad(output.sum(), list(layer.parameters()))
    assert_equal(found, torch.autograd.grad(expected.sum(), list(layer.parameters())))
    with torch.no_grad():
        assert not raw(call, x, *layer.parameters())[0].requires_grad


def assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_the_recurrence_refuses_what_it_cannot_give() -> None:
    gates = torch.randn(T, B, 1, 4 * H, requires_grad=True)
    weight_hh = torch.randn(1, 4 * H, H)
    settings = Call("lstm", False, False, 0, 1, 1).settings(False, False)
    with pytest.raises(RuntimeError, match="recurrence_forward has no derivative"):
        ops.recurrence_forward("lstm", [gates, weight_hh], *Rest(), settings, None)


@pytest.mark.parametrize("name", ["compile", "export", "trace"])
def test_dropout_of_attention_is_drawn_where_it_runs(name: str) -> None:
    """Anew at every call, under a seed, and compiled once."""
    attention = fused_rnn.Attention(5, 5, dropout=0.4)
    query, memory = torch.randn(2, 3, 5), torch.randn(2, 7, 5)
    torch._dynamo.reset()
    if name == "compile":
        counter = torch._dynamo.testing.CompileCounter()
        function = torch.compile(attention, fullgraph=True, backend=counter)
    elif name == "export":
        function = torch.export.export(attention, (query, memory)).module()
    else:
        function = torch.jit.trace(attention, (query, memory), check_trace=False)
    torch.manual_seed(1)
    first, second = function(query, memory)[0], function(query, memory)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(function(query, memory)[0], first)
    torch.manual_seed(1)
    assert torch.equal(attention(query, memory)[0], first)
    if name == "compile":
        assert counter.frame_count == 1


def test_compiled_with_one_tensor_twice() -> None:
    torch._dynamo.reset()
    zeros, x = torch.zeros(1, B, H), torch.randn(T, B, I)
    layer = fused_rnn.LSTM(I, H)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, (zeros, zeros))[0], layer(x)[0])
    query, memory, weight = torch.randn(2, 3, 5), torch.randn(2, 4, 5), torch.randn(5)
    scores = torch.compile(functional.additive_attention, fullgraph=True, backend="aot_eager")
    expected = functional.additive_attention(query, memory, memory, weight)
    assert torch.equal(scores(query, memory, memory, weight), expected)
    tied = fused_rnn.GRU(H, H, num_layers=2)
    tied.weight_hh_l1, tied.weight_ih_l1 = tied.weight_hh_l0, tied.weight_hh_l0
    tied._init_flat_weights()
    compiled = torch.compile(tied, fullgraph=True, backend="aot_eager")
    x = torch.randn(T, B, H)
    compiled(x)[0].sum().backward()
    found, tied.weight_hh_l0.grad = tied.weight_hh_l0.grad, None
    tied(x)[0].sum().backward()
    torch.testing.assert_close(found, tied.weight_hh_l0.grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_flops_are_those_of_the_products(name: str, bias: bool) -> None:
    layer = getattr(fused_rnn, name)(I, H, num_layers=2, bidirectional=True, bias=bias)
    x = torch.randn(T, B, I)
    products = sum(w.numel() for k, w in layer.named_parameters() if k.startswith("weight"))
    with FlopCounterMode(display=False) as forward:
        output = layer(x)[0]
    assert forward.get_total_flops() == 2 * T * B * products
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    first = sum(layer.get_parameter(f"weight_ih_l0{d}").numel() for d in ("", "_reverse"))
    assert backward.get_total_flops() == 2 * T * B * (2 * products - first)  # x needs none


def test_flops_of_additive_attention() -> None:
    shapes = (2, 3, 5), (2, 7, 5), (2, 7, 4), (5,)
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        context = functional.additive_attention(*tensors)
    assert counter.get_total_flops() == 2 * 2 * 3 * 7 * (5 + 4)
    with FlopCounterMode(display=False) as counter:
        context.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 2 * 3 * 7 * (5 + 4)


def test_few_schemas() -> None:
    ours = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("fused_rnn::")]
    assert 0 < len(ours) <= 8


class Wrapper:
    """Holds a tensor and, as those in torch's own tests, is none: torch's functions see to it."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.data, name)
        if not callable(value):
            return wrapped(value)
        method = getattr(type(self.data), name)
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return wrapped(func(*unwrapped(args), **unwrapped(kwargs or {})))


def wrapped(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(wrapped(v) for v in value)
    return Wrapper(value) if isinstance(value, Tensor) else value


def unwrapped(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(unwrapped(v) for v in value)
    if isinstance(value, dict):
        return {k: unwrapped(v) for k, v in value.items()}
    return value.data if isinstance(value, Wrapper) else value


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_tensor_likes_override_torchs_functions(name: str, num_layers: int) -> None:
    layer = getattr(fused_rnn, name)(I, H, num_layers)
    x = torch.randn(T, B, I)
    found, _ = layer(Wrapper(x))
    assert isinstance(found, Wrapper)
    assert torch.equal(found.data, layer(x)[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_expanded_weights_get_gradients_per_sample(name: str, batch_first: bool) -> None:
    """Those of torch.nn's layer; cells and options by torch.func, since torch.nn has none."""
    arguments = (I, H, 2, *(["tanh"] if name == "RNN" else []), True, batch_first, 0.0, True)
    theirs = getattr(nn, name)(*arguments).double()
    ours = getattr(fused_rnn, name)(*arguments).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(*((B, T) if batch_first else (T, B)), I).double()
    for layer in (theirs, ours):
        call = per_sample(layer, batch_first=batch_first)
        flat(call(x))[0].square().sum().backward()
    for (k, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad_sample, a.grad_sample, rtol=1e-9, atol=1e-12, msg=k)
        assert b.grad is None


@pytest.mark.parametrize("name", ["gru_cell", "lstm_cell", "cells", "ragged", "heads"])
def test_expanded_weights_with_options(name: str) -> None:
    module = MODULES[name]()
    layer, (x,), given = module.layer, module.inputs, module.arguments
    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    flat(per_sample(layer, batch_first=x.dim() == 2)(x, **given))[0].square().sum().backward()
    for row in range(B):
        only: dict[str, Any] = {k: v for k, v in given.items() if k == "return_cells"}
        if "lengths" in given:
            only = {"lengths": given["lengths"][[row]], "resets": given["resets"][:, [row]]}
        one = x[[row]] if x.dim() == 2 else x[:, [row]]

        def loss(weights: dict[str, Tensor], one: Tensor = one, only: Any = only) -> Tensor:
            found = torch.func.functional_call(layer, weights, (one,), only)
            return flat(found)[0].square().sum()

        for k, d in torch.func.grad(loss)(parameters).items():
            found = layer.get_parameter(k).grad_sample[row]
            torch.testing.assert_close(found, d, rtol=1e-9, atol=1e-12, msg=k)


def per_sample(layer: nn.Module, batch_first: bool) -> Callable[..., Any]:
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    return call_for_per_sample_grads(
        layer, batch_size=B, loss_reduction="sum", batch_first=batch_first
    )
