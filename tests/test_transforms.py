"""torch's transforms: compile, export, vmap, forward mode, and what they make together.

The checks are those of ``fused-rnn-bench transforms``; here they run on ragged input and under the
options too, beside what the table has no rows for.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_rnn.bench import transforms
from fused_rnn.bench.transforms import B, Case, H, I, T, assert_same, draw, stacked, total
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_rnn
from fused_rnn import functional

pytestmark = pytest.mark.usefixtures("one_thread")

STACKED = {"num_layers": 2, "bidirectional": True}
# What torch.nn's layers cannot do: the checks can fail.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "projected": ("LSTM", {"proj_size": 2, "bidirectional": True}),
    "peephole": ("LSTM", {"peephole": True}),
    "coupled": ("LSTM", {"coupled": True, "peephole": True}),
    "reset_before": ("GRU", {"reset_after": False}),
    "heads": ("LSTM", {"num_heads": 2, "bidirectional": True}),
    "layer_norm": ("LSTM", {"layer_norm": True}),
    "joint": ("GRU", {"layer_norm": "joint"}),
    "zoneout": ("LSTM", {"zoneout": (0.3, 0.2)}),
    "no_bias": ("GRU", {"bias": False}),
}
DERIVED = [
    check for check in transforms.CHECKS if check.startswith(("double", "vmap", "jvp", "hessian"))
]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cell", transforms.CELLS)
@pytest.mark.parametrize("check", transforms.CHECKS)
def test_check(check: str, cell: str, ragged: bool) -> None:
    assert transforms.run(check, Case(getattr(fused_rnn, cell), STACKED, ragged)) is None


@pytest.mark.parametrize("check", transforms.CHECKS)
def test_check_can_fail(check: str) -> None:
    """Of a layer that looks at its values, whose slope has lost its own, and that has no equal."""
    instances = itertools.count(1)

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.x = x.detach()
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.x * grad

    class Broken(fused_rnn.GRU):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.factor = next(instances)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, h_n = super().forward(*args, **kwargs)
            assert not bool(output.isnan().any())
            return self.factor * Square.apply(output), h_n

    assert transforms.run(check, Case(Broken, STACKED)) is not None


class Evaluated(nn.Module):
    """In eval mode, where nothing is drawn."""

    def __new__(cls, *args: Any, kind: str, **options: Any) -> Any:
        return getattr(fused_rnn, kind)(*args, **options).eval()


@pytest.mark.parametrize("check", DERIVED)
@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str, check: str) -> None:
    kind, options = OPTIONS[option]
    if option == "zoneout" and check.startswith("double"):
        pytest.skip("drawn in training; tests/test_variants.py has that")
    assert transforms.run(check, Case(Evaluated, {"kind": kind, **options}, ragged=True)) is None


@pytest.mark.parametrize("check", ["torch.export, dynamic T and B", "AOTInductor package"])
@pytest.mark.parametrize("option", ["projected", "heads", "layer_norm", "zoneout"])
def test_option_is_exported(option: str, check: str) -> None:
    kind, options = OPTIONS[option]
    assert transforms.run(check, Case(Evaluated, {"kind": kind, **options}, ragged=True)) is None


@pytest.mark.parametrize("option", ["relu", "peephole", "coupled", "reset_before", "heads"])
def test_option_is_an_onnx_operator(option: str) -> None:
    kind, options = OPTIONS[option]
    check = "ONNX, dynamic T and B"
    assert transforms.run(check, Case(Evaluated, {"kind": kind, **options}, ragged=True)) is None


@pytest.mark.parametrize(
    "options, arguments, what",
    [
        ({"proj_size": 2}, {}, "a projection"),
        ({"layer_norm": True}, {}, "layer normalisation"),
        ({}, {"resets": torch.zeros(T, B, dtype=torch.bool)}, "resets"),
    ],
)
def test_onnx_has_no_operator(options: Any, arguments: Any, what: str) -> None:
    model = transforms.Wrapped(fused_rnn.LSTM(I, H, **options)).eval()
    with pytest.raises(Exception) as raised:
        torch.onnx.export(
            model, (draw(T, B, I).float(),), kwargs=arguments, dynamo=True, verbose=False,
            custom_translation_table=fused_rnn.onnx.translation_table(),
        )  # fmt: skip
    causes = []
    error: BaseException | None = raised.value
    while error is not None:
        causes.append(str(error))
        error = error.__cause__
    assert any(f"no recurrent operator with {what}" in text for text in causes), causes


class Calls(TorchDispatchMode):
    """The ops of this library that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused_rnn":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_an_ensemble_is_one_call() -> None:
    case = Case(fused_rnn.LSTM, {})
    layers = [case.layer(seed=n) for n in range(5)]
    parameters, _ = torch.func.stack_module_state(layers)

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layers[0], parameters, (x,))[0]

    with Calls() as calls:
        output = vmap(call, (0, None))(parameters, draw(T, B, I))
        output.sum().backward()
    assert calls.names == ["layer_forward", "layer_backward"]


@pytest.mark.parametrize("length", [3, 50])
def test_a_gradient_penalty_is_four_calls(length: int) -> None:
    layer = fused_rnn.LSTM(I, H)
    x = torch.randn(length, B, I, requires_grad=True)
    with Calls() as calls:
        (slope,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert calls.names == ["layer_forward", "layer_backward"] * 2


@pytest.mark.parametrize("cell", transforms.CELLS)
def test_third_derivatives(cell: str) -> None:
    """Through the reference; modes in every order give the same."""
    layer = Case(getattr(fused_rnn, cell), {}).layer()
    x = draw(2, 2, I)
    ragged = {"lengths": torch.tensor([2, 1]), "resets": torch.tensor([[True, False]] * 2)}

    def loss(x: Tensor) -> Tensor:
        return total(layer(x, **ragged))

    expected = jacrev(jacrev(jacrev(loss)))(x)
    for modes in ((jacfwd, jacrev, jacrev), (jacrev, jacfwd, jacrev), (jacfwd, jacfwd, jacrev),
                  (jacrev, jacrev, jacfwd), (jacfwd, jacrev, jacfwd), (jacrev, jacfwd, jacfwd),
                  (jacfwd, jacfwd, jacfwd)):  # fmt: skip
        function: Callable[..., Any] = loss
        for mode in reversed(modes):
            function = mode(function)
        assert_same(function(x), expected, 1e-9)
    step = 1e-5
    slope = (jacrev(jacrev(loss))(x + step) - jacrev(jacrev(loss))(x - step)) / (2 * step)
    assert_same(expected.sum((-3, -2, -1)), slope, 1e-6)


@pytest.mark.parametrize("cell", transforms.CELLS)
def test_forward_mode_without_functorch(cell: str) -> None:
    """``torch.autograd.forward_ad``, of input or a weight alone, with grad mode on and off."""
    layer = Case(getattr(fused_rnn, cell), STACKED).layer()
    x, along = draw(T, B, I), draw(T, B, I).flip(0)
    expected = jvp(layer, (x,), (along,))[1]
    for enabled in (True, False):
        with forward_ad.dual_level(), torch.set_grad_enabled(enabled):
            results = tree_leaves(layer(forward_ad.make_dual(x, along)))
            tangents = [forward_ad.unpack_dual(r).tangent for r in results]
            assert_same(tangents, tree_leaves(expected))
    weight = layer.weight_hh_l0.detach()
    slope = torch.randn_like(weight)

    def call(weight: Tensor) -> Any:
        return functional_call(layer, {"weight_hh_l0": weight}, (x,))

    expected = jvp(call, (weight,), (slope,))[1]
    with forward_ad.dual_level():
        results = tree_leaves(call(forward_ad.make_dual(weight, slope)))
        assert_same([forward_ad.unpack_dual(r).tangent for r in results], tree_leaves(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tangents_of_other_dtypes(dtype: torch.dtype) -> None:
    layer = Case(fused_rnn.LSTM, STACKED).layer(dtype)
    x = draw(T, B, I, dtype=dtype)
    values, tangents = jvp(layer, (x,), (x,))
    expected = jvp(layer.double(), (x.double(),), (x.double(),))[1]
    for value, tangent in zip(tree_leaves(values), tree_leaves(tangents), strict=True):
        assert tangent.dtype == value.dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    assert_same(tangents, expected, tolerance)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_any_dimension_may_be_the_batch(dim: int) -> None:
    layer = Case(fused_rnn.GRU, STACKED).layer()
    xs = draw(4, T, B, I)
    moved = xs.movedim(0, dim)
    found = vmap(lambda x: layer(x)[0], dim, dim)(moved)
    assert_same(found.movedim(dim, 0), stacked([layer(x)[0] for x in xs]))


@pytest.mark.parametrize("cell", transforms.CELLS)
def test_batches_of_everything(cell: str) -> None:
    """Of states, lengths and resets without weights and with; batches of batches; chunks."""
    case = Case(getattr(fused_rnn, cell), STACKED)
    layer, x = case.layer(), draw(T, B, I)
    lengths, resets = torch.tensor([[T, 1, 0], [2, T, 3]]), torch.rand(2, T, B) < 0.3
    hx = draw(2, 4, B, H)
    hx = (hx, hx.flip(0)) if cell == "LSTM" else hx

    def each(results: Any, n: int) -> Any:
        return [leaf[n] for leaf in tree_leaves(results)]

    def call(parameters: Any, x: Tensor, hx: Any, lengths: Any, resets: Any) -> Any:
        ragged = {"lengths": lengths, "resets": resets}
        return functional_call(layer, parameters, (x, hx), ragged)

    own = {name: t.detach() for name, t in layer.named_parameters()}
    both = {name: torch.stack([t, t.flip(0)]) for name, t in own.items()}
    state_dims = (0, 0) if cell == "LSTM" else 0
    for parameters, dim in ((own, None), (both, 0)):
        found = vmap(call, (dim, None, state_dims, 0, 0))(parameters, x, hx, lengths, resets)
        for n in range(2):
            mine = own if dim is None else {name: t[n] for name, t in both.items()}
            state = tuple(h[n] for h in hx) if cell == "LSTM" else hx[n]
            assert_same(each(found, n), tree_leaves(call(mine, x, state, lengths[n], resets[n])))
    xs = draw(2, 3, T, B, I)
    plain = vmap(lambda p, x: functional_call(layer, p, (x,))[0], (None, 0))
    nested = vmap(plain, (0, None))(both, xs[0])
    members = [{name: t[n] for name, t in both.items()} for n in range(2)]
    assert_same(nested, stacked([plain(m, xs[0]) for m in members]))
    nested = vmap(plain, (0, 0))(both, xs)
    assert_same(nested, stacked([plain(m, x) for m, x in zip(members, xs, strict=True)]))
    chunked = vmap(lambda x: layer(x)[0], chunk_size=2)(xs[0])
    assert_same(chunked, stacked([layer(x)[0] for x in xs[0]]))


def test_what_is_drawn_under_vmap() -> None:
    """As vmap's randomness says: the same for all, or different; and it has to say."""
    layer = fused_rnn.LSTM(I, H, zoneout=0.5, dtype=torch.float64)
    x = draw(T, B, I).expand(3, T, B, I)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: layer(x)[0])(x)
    same = vmap(lambda x: layer(x)[0], randomness="same")(x)
    assert torch.equal(same[0], same[1]) and torch.equal(same[1], same[2])
    different = vmap(lambda x: layer(x)[0], randomness="different")(x)
    assert not torch.equal(different[0], different[1])


def test_packed_input_under_grad() -> None:
    layer = fused_rnn.LSTM(I, H, dtype=torch.float64)
    packed = nn.utils.rnn.pack_sequence([draw(3, I), draw(2, I)])

    def loss(data: Tensor) -> Tensor:
        return total(layer(packed._replace(data=data))[0].data)

    data = packed.data.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(data), data)
    assert_same(grad(loss)(packed.data), expected)


@pytest.mark.parametrize("cell", transforms.CELLS)
def test_the_functional_form_compiles(cell: str) -> None:
    layer = Case(getattr(fused_rnn, cell), STACKED).layer(torch.float32)
    weights = list(layer.parameters())
    name = "rnn" if cell == "RNN" else cell.lower()

    def call(x: Tensor, lengths: Tensor) -> Any:
        return getattr(functional, name)(
            x, None, weights, num_layers=2, bidirectional=True, lengths=lengths
        )

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for sizes in ((7, 2), (5, 6)):
        x, lengths = draw(*sizes, I, dtype=torch.float32), torch.arange(sizes[1]) % sizes[0]
        assert_same(compiled(x, lengths), call(x, lengths), 1e-5)


def test_compiled_training_under_autocast() -> None:
    layer = Case(fused_rnn.LSTM, STACKED).layer(torch.float32)
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for call in (compiled, layer):
        x = draw(T, B, I, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = call(x)[0]
        assert output.dtype == torch.bfloat16
        results.append(torch.autograd.grad(output.float().square().sum(), [x, *layer.parameters()]))
    assert_same(*results, 2e-2)


def test_transforms_give_no_warning_of_ours() -> None:
    layer = Case(fused_rnn.GRU, {}).layer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vmap(grad(lambda x: total(layer(x))))(draw(4, T, B, I))
        jvp(layer, (draw(T, B, I),), (draw(T, B, I),))
    assert [w for w in caught if not issubclass(w.category, DeprecationWarning)] == []


def attention_problem() -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """Additive attention that returns weights too, of query, key, value, weight and bias."""
    Tq, Tk, A, D = 3, 4, 5, 2
    mask = torch.rand(B, Tq, Tk) < 0.8
    lengths = torch.tensor([Tk, 2, 0])

    def function(*tensors: Tensor) -> Any:
        return functional.additive_attention(
            *tensors[:4], bias=tensors[4], lengths=lengths, mask=mask, return_weights=True
        )

    shapes = ((B, Tq, A), (B, Tk, A), (B, Tk, D), (A,), (A,))
    return function, tuple(draw(*shape) for shape in shapes)


@pytest.mark.parametrize("batched", [(0, 2), (0, 1, 2), (3,), (0, 4), range(5)])
def test_vmap_of_attention(batched: Any) -> None:
    function, tensors = attention_problem()
    members = [
        tuple(t.roll(n, -1) if i in batched else t for i, t in enumerate(tensors)) for n in range(3)
    ]
    dims = tuple(0 if i in batched else None for i in range(5))
    stack = tuple(
        torch.stack(ts) if i in batched else ts[0]
        for i, ts in enumerate(zip(*members, strict=True))
    )
    assert_same(vmap(function, dims)(*stack), stacked([function(*m) for m in members]))
    slope = grad(lambda *given: total(function(*given)), tuple(range(5)))
    with Calls() as calls:
        found = vmap(slope, dims)(*stack)
    assert set(calls.names) == {"additive_attention_forward", "additive_attention_backward"}
    assert_same(found, stacked([slope(*m) for m in members]))


def test_derivatives_of_attention() -> None:
    function, tensors = attention_problem()
    along, step = tuple(draw(*t.shape).flip(0) for t in tensors), 1e-6
    _, found = jvp(function, tensors, along)
    ahead, behind = (
        function(*(t + s * v for t, v in zip(tensors, along, strict=True))) for s in (step, -step)
    )
    slopes = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
    assert_same(found, tuple(slopes), 1e-6)

    def loss(weight: Tensor) -> Tensor:
        return total(function(*tensors[:3], weight, tensors[4]))

    expected = jacrev(jacrev(jacrev(loss)))(tensors[3])
    for modes in ((jacfwd, jacfwd, jacfwd), (jacrev, jacfwd, jacrev), (jacfwd, jacrev, jacrev)):
        result: Callable[..., Any] = loss
        for mode in modes:
            result = mode(result)
        assert_same(result(tensors[3]), expected, 1e-9)


@pytest.mark.parametrize("attention", ["additive", "dot"])
def test_a_decoder_is_transformed(attention: str) -> None:
    """A loop over steps with attention in each: vmap, gradients per sample, forward mode."""
    decoder = fused_rnn.AttentionDecoder(I, 4, 4, attention=attention).double()
    inputs, memory = draw(4, B, T, I), draw(B, 6, 4)
    parameters = {name: t.detach() for name, t in decoder.named_parameters()}

    def call(parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return functional_call(decoder, parameters, (inputs, memory))[0]

    expected = stacked([call(parameters, x) for x in inputs])
    assert_same(vmap(call, (None, 0))(parameters, inputs), expected)
    slope = grad(lambda p, x: total(call(p, x)))
    expected = stacked([slope(parameters, x) for x in inputs])
    assert_same(vmap(slope, (None, 0))(parameters, inputs), expected)
    x = inputs[0]
    found = jvp(lambda x: call(parameters, x), (x,), (x.flip(0),))[1]
    ahead, behind = (call(parameters, x + s * x.flip(0)) for s in (1e-6, -1e-6))
    assert_same(found, (ahead - behind) / 2e-6, 1e-6)
