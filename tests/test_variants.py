"""Options that make another cell of a layer, against the plain loops of ``reference.py``."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from helpers import (
    as_tuple,
    assert_close_like_torch,
    assert_equal,
    assert_near,
    by_reference,
    double,
    dyadic,
    named_outputs,
    run,
    states,
)
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import functional, reference
from fused_rnn.cells import CELLS, compute_dtype

pytestmark = pytest.mark.usefixtures("one_thread")

I, H, T, B = 5, 18, 7, 4  # noqa: E741

Variant = tuple[str, dict[str, Any]]

EVERYWHERE: list[dict[str, Any]] = [
    {"num_heads": 3},
    {"layer_norm": True},
    {"layer_norm": "joint"},
    {"zoneout": 0.3},
    {"recurrent_dropout": 0.4},
    {"weight_dropout": 0.5},
]
OF_LSTM: list[dict[str, Any]] = [{"peephole": True}, {"coupled": True}, {"zoneout": (0.5, 0.2)}]

# The layer's class and its options: each alone.
VARIANTS: list[Variant] = [
    *((name, options) for name in ("RNN", "LSTM", "GRU") for options in EVERYWHERE),
    *(("LSTM", options) for options in OF_LSTM),
    ("LSTM", {"zoneout": (0.0, 0.3)}),
    ("LSTM", {"layer_norm": "joint", "layer_norm_eps": 0.1}),
    ("GRU", {"layer_norm": "separate", "layer_norm_eps": 0.1}),
    ("RNN", {"num_heads": 2, "nonlinearity": "relu"}),
    ("RNN", {"layer_norm": True, "nonlinearity": "relu"}),
    ("RNN", {"zoneout": 0.3, "nonlinearity": "relu"}),
    ("GRU", {"num_heads": 18}),
    ("GRU", {"reset_after": False}),
]


def pairs(name: str, options: list[dict[str, Any]]) -> list[Variant]:
    """Any two options, and all of them at once."""
    chosen: list[Variant] = [
        (name, a | b) for a, b in itertools.combinations(options, 2) if not a.keys() & b.keys()
    ]
    everything = {k: v for option in options for k, v in option.items()}
    return [*chosen, (name, everything), (name, everything | {"layer_norm": True})]


PAIRS = [
    *pairs("RNN", EVERYWHERE),
    *pairs("GRU", EVERYWHERE),
    *pairs("LSTM", [*EVERYWHERE, *OF_LSTM]),
    *(
        ("GRU", {"reset_after": False} | options)
        for options in (*EVERYWHERE, {"num_heads": 3, "zoneout": 0.2, "recurrent_dropout": 0.4})
        if "layer_norm" not in options
    ),
]


def over(variants: list[Variant]) -> Any:
    ids = ["-".join([name, *(f"{k}={v}" for k, v in o.items())]) for name, o in variants]
    return pytest.mark.parametrize("name, options", variants, ids=ids)


every_variant = over(VARIANTS)
every_pair = over([*VARIANTS, *PAIRS])
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "projected": {"bidirectional": True, "proj_size": 6},
    "bare": {"bias": False, "bidirectional": True},
}


def make(name: str, *sizes: int, **options: Any) -> Any:
    layer = getattr(fused_rnn, name)(*(sizes or (I, H)), **options)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if key.startswith("ln_"):  # which begin as nothing
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return layer


def seeded(layer: Any) -> Any:
    """``layer``, drawing the same at every call."""

    def call(*given: Any, **options: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return layer(*given, **options)

    return call


def ragged() -> dict[str, Tensor]:
    return {"lengths": torch.tensor([T, 0, 3, 5]), "resets": torch.rand(T, B) < 0.3}


@every_pair
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_ragged", [False, True], ids=["dense", "ragged"])
def test_equals_reference(name, options, shape, is_ragged):
    """Values and all gradients in float64, to 1e-10."""
    if shape == "projected" and (name != "LSTM" or "num_heads" in options):
        pytest.skip("no projection")
    layer = make(name, dtype=torch.float64, **SHAPES[shape], **options)
    layer.train(shape != "bare")
    arguments: dict[str, Any] = ragged() if is_ragged else {}
    arguments |= {"return_cells": True} if name == "LSTM" else {}
    x = dyadic(T, B, I)
    if layer.batch_first:
        x = x.transpose(0, 1)
        if is_ragged:
            arguments["resets"] = arguments["resets"].T
    for hx in (None, states(layer, B)):
        expected = run(layer, x, hx, call=by_reference(layer._cell(), layer), **arguments)
        assert_near(run(layer, x, hx, **arguments), expected)


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tolerance_rule(name, options, dtype):
    layer = make(name, bidirectional=True, **options).to(dtype)
    exact, arguments = double(layer), ragged()
    ours, plain, truth = [], [], []
    for _ in range(3):
        x, hx = dyadic(T, B, I, dtype=dtype), states(layer, B, dtype=dtype)
        call = by_reference(layer._cell(), layer)
        ours.append(run(layer, x, hx, **arguments))
        plain.append(run(layer, x, hx, call=call, **arguments))
        truth.append(run(exact, double(x), double(hx), **arguments))
    assert_close_like_torch(ours, plain, truth)


@every_variant
def test_packed_equals_lengths(name, options):
    layer = make(name, dtype=torch.float64, **options)
    lengths = torch.tensor([T, 5, 3, 1])
    x = dyadic(T, B, I)
    exists = torch.arange(T).unsqueeze(1) < lengths
    padded, padded_final = seeded(layer)(x, lengths=lengths)
    packed, packed_final = seeded(layer)(pack_padded_sequence(x, lengths))
    assert torch.equal(packed.data, padded[exists])
    assert all(map(torch.equal, as_tuple(packed_final), as_tuple(padded_final)))
    grads = [
        torch.autograd.grad(
            output.square().sum() + sum(s.sum() for s in as_tuple(final)), list(layer.parameters())
        )
        for output, final in ((padded, padded_final), (packed.data, packed_final))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every_variant
def test_gradcheck_twice(name, options):
    heads = options.get("num_heads", 1)
    layer = make(name, 2, heads * max(1, 3 // heads), dtype=torch.float64, **options)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, weights, strict=True))
        output, final = seeded(torch.func.functional_call)(layer, given, (x,))
        return output, *as_tuple(final)

    leaves = [torch.randn(3, 2, 2, dtype=torch.float64), *(p.detach() for p in layer.parameters())]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@every_variant
def test_same_bits_on_any_number_of_threads(name, options):
    layer = make(name, 33, 72, bidirectional=True, **options)
    x, hx = dyadic(40, 9, 33, dtype=torch.float32), states(layer, 9, dtype=torch.float32)
    expected = run(layer, x, hx)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_equal(run(layer, x, hx), expected)


@every_variant
def test_compiled_without_a_break(name, options):
    layer = make(name, num_layers=2, bidirectional=True, **options)
    x = dyadic(T, B, I, dtype=torch.float32)
    torch.compiler.reset()  # the variants before have filled the cache of this frame
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_equal(run(layer, x, call=lambda *given: compiled(*given)), run(layer, x))


@every_variant
def test_cell_is_one_step_of_the_layer(name, options):
    if "recurrent_dropout" in options or "weight_dropout" in options:
        with pytest.raises(TypeError, match="_dropout"):  # which are of a whole sequence
            make(f"{name}Cell", **options)
        return
    layer = make(name, dtype=torch.float64, **options)
    cell = make(f"{name}Cell", dtype=torch.float64, **options)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x, hx = dyadic(1, B, I), states(layer, B)
    _, expected = seeded(layer)(x, hx)
    given = tuple(s[0] for s in as_tuple(hx))
    found = seeded(cell)(x[0], given if name == "LSTM" else given[0])
    for a, b in zip(as_tuple(found), as_tuple(expected), strict=True):
        assert torch.equal(a, b[0])
    text = repr(cell).replace("'", "")  # torch.nn's cells quote what its layers do not
    assert all(shown(option, value) in text for option, value in options.items())


def shown(option: str, value: Any) -> str:
    """An option as ``repr`` shows it."""
    if option == "layer_norm" and value is True:
        value = "separate"
    return f"{option}={value}"


@every_variant
def test_parameters(name, options):
    """Named and shaped as documented, with torch.nn's initial values; saved, copied, pickled."""
    layer = getattr(fused_rnn, name)(I, H, num_layers=2, bidirectional=True, **options)
    gates = {"RNN": 1, "GRU": 3, "LSTM": 3 if options.get("coupled") else 4}[name]
    heads = options.get("num_heads", 1)
    expected = {}
    for k, suffix in itertools.product(range(2), ("", "_reverse")):
        end = f"_l{k}{suffix}"
        expected |= {
            "weight_ih" + end: (gates * H, I if k == 0 else 2 * H),
            "weight_hh" + end: (gates * H, H)
            if heads == 1
            else (heads, gates * H // heads, H // heads),
            "bias_ih" + end: (gates * H,),
            "bias_hh" + end: (gates * H,),
        }
        if options.get("peephole"):
            expected["weight_ch" + end] = ((gates - 1) * H,)
        both = ["ih", "hh"]
        kinds = {True: both, "separate": both, "joint": ["g"]}
        norms = kinds.get(options.get("layer_norm"), [])
        for of in [*norms, "c"] if norms and name == "LSTM" else norms:
            rows = H if of == "c" else gates * H
            expected |= {f"ln_{of}_weight{end}": (rows,), f"ln_{of}_bias{end}": (rows,)}
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == expected
    assert list(layer.state_dict()) == list(expected)
    assert [n for names in layer._all_weights for n in names] == list(expected)
    assert len(layer._flat_weights) == len(expected)
    for key, parameter in layer.named_parameters():
        if key.startswith("ln_"):
            assert torch.equal(parameter, torch.full_like(parameter, "weight" in key))
            continue
        assert 0.5 * H**-0.5 < parameter.abs().max() <= H**-0.5
    x = torch.randn(T, B, I)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(seeded(other)(x)[0], seeded(layer)(x)[0])
        assert repr(other) == repr(layer)
    for option, value in options.items():
        assert option == "nonlinearity" or shown(option, value) in repr(layer)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_defaults_leave_the_layer_as_it_is(name):
    torch.manual_seed(0)
    plain = getattr(torch.nn, name)(I, H, 2)
    torch.manual_seed(0)
    defaults = {"layer_norm": False, "zoneout": 0.0, "recurrent_dropout": 0, "weight_dropout": 0.0}
    of_some = {"LSTM": {"peephole": False, "coupled": False}, "GRU": {"reset_after": True}}
    defaults |= of_some.get(name, {})
    ours = make(name, I, H, 2, **defaults)
    assert ours._options() is None  # so that the plain op is called
    assert list(plain.state_dict()) == list(ours.state_dict())
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    assert repr(plain) == repr(ours)


@every_variant
def test_functional_form(name, options):
    layer = make(name, num_layers=2, **options)
    x = torch.randn(T, B, I)
    chosen = {k: v for k, v in options.items() if k != "num_heads"}  # weight_hh tells
    call = seeded(getattr(functional, name.lower()))
    found = call(x, None, list(layer.parameters()), num_layers=2, train=True, **chosen)
    output, final = seeded(layer)(x)
    assert all(map(torch.equal, found, (output, *as_tuple(final))))


def test_peepholes_of_zero_are_none():
    plain = make("LSTM", dtype=torch.float64)
    layer = make("LSTM", dtype=torch.float64, peephole=True)
    layer.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        layer.weight_ch_l0.zero_()
    x = dyadic(T, B, I)
    torch.testing.assert_close(layer(x)[0], plain(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_heads_are_a_block_diagonal_recurrence(name, bidirectional):
    """torch.nn's layer, whose weight_hh is zero between units of different heads."""
    heads = 3
    layer = make(name, dtype=torch.float64, num_heads=heads, bidirectional=bidirectional)
    plain = getattr(torch.nn, name)(I, H, bidirectional=bidirectional, dtype=torch.float64)
    weights = layer.state_dict()
    for key in [key for key in weights if key.startswith("weight_hh")]:
        blocks = weights[key].unflatten(1, (-1, H // heads))  # (N, G, H/N, H/N)
        weights[key] = torch.cat([torch.block_diag(*blocks[:, g]) for g in range(blocks.shape[1])])
    plain.load_state_dict(weights)
    x, hx = dyadic(T, B, I), states(layer, B)
    ours, theirs = layer(x, hx), plain(x, hx)
    for a, b in zip((ours[0], *as_tuple(ours[1])), (theirs[0], *as_tuple(theirs[1])), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_evaluation_draws_nothing():
    layer = make("LSTM", zoneout=0.3, recurrent_dropout=0.4, weight_dropout=0.5, num_layers=2)
    x = torch.randn(T, B, I)
    before = torch.get_rng_state()
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(torch.get_rng_state(), before)
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("option", ["recurrent_dropout", "weight_dropout"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_dropouts_do_nothing_in_evaluation(name, option):
    layer = make(name, **{option: 0.4}).eval()
    plain = make(name)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I)
    assert torch.equal(layer(x)[0], plain(x)[0])


def test_rates_may_be_changed_at_any_time():
    layer = make("LSTM")
    x = torch.randn(T, B, I)
    plain = layer(x)[0]
    layer.zoneout, layer.recurrent_dropout = (0.2, 0.1), 0.3
    expected = make("LSTM", zoneout=(0.2, 0.1), recurrent_dropout=0.3)
    expected.load_state_dict(layer.state_dict())
    assert torch.equal(seeded(layer)(x)[0], seeded(expected)(x)[0])
    layer.zoneout = layer.recurrent_dropout = 0.0
    assert torch.equal(layer(x)[0], plain)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_zoneout_keeps_units_as_often_as_asked(name):
    """As the outputs show it: where a unit stayed, it is bitwise what it was before."""
    p, steps, rows, units = 0.25, 100, 16, 96
    layer = make(name, 4, units, zoneout=p)
    output, _ = layer(torch.randn(steps, rows, 4))
    stayed = (output[1:] == output[:-1]).double()
    count = stayed.numel()
    assert abs(stayed.mean() - p) < 5 * (p * (1 - p) / count) ** 0.5
    # Neither steps nor rows nor units know of each other.
    for dim in range(3):
        a, b = (
            stayed.narrow(dim, 1, stayed.shape[dim] - 1),
            stayed.narrow(dim, 0, stayed.shape[dim] - 1),
        )
        correlation = ((a - p) * (b - p)).mean() / (p * (1 - p))
        assert abs(correlation) < 5 / count**0.5


def test_recurrent_dropout_is_one_mask_for_a_sequence():
    """With W_hh the identity, what h passes on shows which units the product does not see."""
    layer = make("RNN", 1, 200, nonlinearity="relu", bias=False, recurrent_dropout=0.4)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.eye(200))
        layer.weight_ih_l0.fill_(1)
    output, _ = layer(torch.ones(5, 8, 1))
    seen = output[1:] > 1
    assert torch.equal(seen, seen[:1].expand_as(seen))
    assert 0.5 < seen.double().mean() < 0.7
    assert not torch.equal(seen[0, 0], seen[0, 1])
    torch.testing.assert_close(output[1][seen[0]], torch.tensor(1 + 1 / 0.6).expand(seen[0].sum()))


def test_words_are_random():
    """Rates and pairwise independence of what is chosen: units, rows, streams, seeds."""
    p, shape = 0.3, (64, 5, 200)
    base = reference.chosen(11, 1, shape, p)
    tolerance = 5 / base.numel() ** 0.5

    def correlation(a: Tensor, b: Tensor) -> float:
        return (((a.double() - p) * (b.double() - p)).mean() / (p * (1 - p))).abs().item()

    assert abs(base.double().mean() - p) < tolerance
    assert correlation(base[..., 1:], base[..., :-1]) < tolerance
    assert correlation(base[..., 16:], base[..., :-16]) < tolerance
    assert correlation(base[1:], base[:-1]) < tolerance
    for other in (reference.chosen(11, 2, shape, p), reference.chosen(12, 1, shape, p)):
        assert correlation(base, other) < tolerance
    assert torch.equal(base, reference.chosen(torch.tensor(11), 1, shape, p))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (5, 64), (2, 7, 65), (0, 4), (4, 0), (300, 300)], ids=str)
def test_dropout_of_weights(dtype, shape):
    x, seed = torch.randn(shape, dtype=dtype), torch.tensor(2**61 + 12345)
    found = torch.ops.fused_rnn.dropout(x, 0.3, seed)
    compute = compute_dtype(dtype)
    factors = reference.dropout_factors(seed, reference.WEIGHT_DROPOUT, shape, 0.3, x.to(compute))
    assert torch.equal(found, (x.to(compute) * factors).to(dtype))
    torch.set_num_threads(2)
    assert torch.equal(found, torch.ops.fused_rnn.dropout(x.t() if x.dim() == 0 else x, 0.3, seed))
    if x.numel():
        torch.library.opcheck(torch.ops.fused_rnn.dropout, (x, 0.3, seed))


def test_gradient_of_weight_dropout():
    seed = torch.tensor(5)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return torch.ops.fused_rnn.dropout(x, 0.3, seed)

    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("layer_norm", ["separate", "joint"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_layer_norm_does_not_see_the_scale_of_weights(name, layer_norm):
    layer = make(name, dtype=torch.float64, layer_norm=layer_norm, bias=False)
    x = dyadic(T, B, I)
    expected = layer(x)[0]
    with torch.no_grad():
        for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
            weight.mul_(1000)
    assert (layer(x)[0] - expected).abs().max() < 1e-2  # eps is what is left of it


EVERY_CLASS = pytest.mark.parametrize(
    "name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]
)


@pytest.mark.parametrize("suffix", ["", "Cell"])
@pytest.mark.parametrize(
    "name, option", [("LSTM", "peephole"), ("LSTM", "coupled"), ("GRU", "reset_after")]
)
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_options_of_another_type_are_refused(name, suffix, option, value):
    with pytest.raises(TypeError, match=f"{option} should be of type bool, got: "):
        make(name + suffix, **{option: value})


@EVERY_CLASS
def test_heads_that_do_not_fit_are_refused(name):
    for value in (0, -1, 4, 19):
        with pytest.raises(ValueError, match=rf"divide hidden_size, got num_heads={value} .*=18"):
            make(name, num_heads=value)
    for value in (1.0, True, None):
        with pytest.raises(TypeError, match="num_heads should be of type int, got: "):
            make(name, num_heads=value)


def test_heads_with_a_projection_are_refused():
    with pytest.raises(ValueError, match="num_heads=3 and proj_size=6"):
        make("LSTM", num_heads=3, proj_size=6)


@EVERY_CLASS
@pytest.mark.parametrize("option", ["zoneout", "recurrent_dropout", "weight_dropout"])
def test_rates_outside_are_refused(name, option):
    if name.endswith("Cell") and option != "zoneout":
        with pytest.raises(TypeError, match=option):
            make(name, **{option: 0.1})
        return
    for value in (1.0, -0.1, 2, float("nan")):
        with pytest.raises(ValueError, match=rf"{option} should be a probability in \[0, 1\), got"):
            make(name, **{option: value})
    for value in ("0.1", None, True):
        with pytest.raises(TypeError, match=f"{option} should be a number, got: "):
            make(name, **{option: value})


@EVERY_CLASS
def test_norms_that_do_not_exist_are_refused(name):
    for value in (-1e-5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="layer_norm_eps should be finite"):
            make(name, layer_norm=True, layer_norm_eps=value)
    with pytest.raises(TypeError, match="layer_norm_eps should be a number, got: str"):
        make(name, layer_norm=True, layer_norm_eps="1e-5")
    with pytest.raises(ValueError, match="'separate' or 'joint', got 'batch'"):
        make(name, layer_norm="batch")
    for value in (None, 1, 0.0):
        with pytest.raises(TypeError, match="layer_norm should be a bool or a str, got: "):
            make(name, layer_norm=value)


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_norms_with_a_late_gate_are_refused(name):
    with pytest.raises(ValueError, match="layer_norm should be False with reset_after=False"):
        make(name, layer_norm=True, reset_after=False)


@EVERY_CLASS
def test_pairs_of_zoneout_are_lstms(name):
    if name.startswith("LSTM"):
        for value in ((0.1,), (0.1, 0.2, 0.3)):
            with pytest.raises(ValueError, match="a pair of them for h and c"):
                make(name, zoneout=value)
    else:
        with pytest.raises(ValueError, match="for LSTM only"):
            make(name, zoneout=(0.1, 0.2))


@pytest.mark.parametrize(
    "option, names",
    [("peephole", ("RNN", "GRU")), ("coupled", ("RNN", "GRU")), ("reset_after", ("RNN", "LSTM"))],
)
def test_options_are_refused_where_they_mean_nothing(option, names):
    for name in (*names, *(f"{name}Cell" for name in names)):
        with pytest.raises(TypeError, match=option):
            make(name, **{option: True})


def test_a_reset_gate_of_one_makes_no_difference():
    """r = 1, whichever way it is applied; and the initial values are the same."""
    torch.manual_seed(0)
    plain = make("GRU", dtype=torch.float64)
    torch.manual_seed(0)
    layer = make("GRU", dtype=torch.float64, reset_after=False)
    x, hx = dyadic(T, B, I), states(layer, B)
    assert (layer(x, hx)[0] - plain(x, hx)[0]).abs().max() > 1e-3
    with torch.no_grad():
        for gru in (plain, layer):
            gru.bias_ih_l0[:H] = 100
    torch.testing.assert_close(layer(x, hx)[0], plain(x, hx)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "weight, shape, expected",
    [("weight_ch", (2 * H,), (3 * H,)), ("weight_hh", (2, 36, 9), (3, 24, 6))],
)
def test_a_weight_that_does_not_fit_is_named(weight, shape, expected):
    layer = make("LSTM", num_layers=2, bidirectional=True, peephole=True, num_heads=3)
    setattr(layer, f"{weight}_l1_reverse", torch.nn.Parameter(torch.zeros(shape)))
    with pytest.raises(RuntimeError) as caught:
        layer(torch.randn(T, B, I))
    message = f"{weight}_l1_reverse of shape {expected} in input's dtype"
    assert message in str(caught.value) and f"got {shape}" in str(caught.value)


def test_states_that_do_not_fit_are_named():
    layer = make("GRU", num_heads=3)
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 4, 18\), got"):
        layer(torch.randn(T, B, I), torch.zeros(1, B, H // 3))
    with pytest.raises(RuntimeError, match=r"Expected hx of shape \(1, 4, 18\)"):
        functional.gru(torch.randn(T, B, I), torch.zeros(1, B, 6), list(layer.parameters()))


@pytest.mark.parametrize("shape", SHAPES)
@over([*VARIANTS, *PAIRS, ("LSTM", {}), ("GRU", {}), ("RNN", {})])
def test_meta_tensors_have_the_shapes_of_values(name, options, shape):
    """Where no CPU op checks: on meta, and so on CUDA and in compiled and exported graphs."""
    chosen = SHAPES[shape] | options
    if "num_heads" in options or name != "LSTM":
        chosen.pop("proj_size", None)
    layer, x = make(name, **chosen), torch.randn(T, B, I)
    expected, found = (
        {key: t.shape for key, t in named_outputs(result).items()}
        for result in (layer(x), layer.to("meta")(x.to("meta")))
    )
    assert found == expected


def test_projected_normalised_layer_compiles():
    torch._dynamo.reset()
    layer = make("LSTM", proj_size=5, layer_norm="joint", peephole=True)
    x = torch.randn(T, B, I)
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(named_outputs(found), named_outputs(layer(x)))


@pytest.mark.parametrize(
    ("function", "hx", "given"),
    [
        ("lstm", "h only", "tuple of Tensor"),
        ("lstm", "h, None", "tuple of Tensor, NoneType"),
        ("lstm", "h", "Tensor"),
        ("gru", "h only", "tuple of Tensor"),
        ("rnn", "h, None", "tuple of Tensor, NoneType"),
    ],
)
def test_states_of_the_functional_forms(function, hx, given):
    layer, h = make(function.upper()), torch.zeros(1, B, H)
    states = {"h only": (h,), "h, None": (h, None), "h": h}[hx]
    expected = "a tuple of two tensors, h and c," if function == "lstm" else "a tensor"
    with pytest.raises(TypeError) as caught:
        getattr(functional, function)(torch.randn(T, B, I), states, list(layer.parameters()))
    assert str(caught.value) == f"hx should be {expected} or None, got: {given}"


@pytest.mark.parametrize("function", [functional.lstm, functional.gru, functional.rnn])
def test_no_params_and_no_layers(function):
    with pytest.raises(RuntimeError, match=r"Expected params of at least one layer.* got 0 params"):
        function(torch.randn(T, B, I), None, [])
    params = list(make("RNN").parameters())
    with pytest.raises(RuntimeError, match="got 4 params for 0 layers"):
        function(torch.randn(T, B, I), None, params, num_layers=0)


def test_every_cell_is_somebodys():
    """Each cell in the ops is the reference's, and some layer's."""
    assert set(CELLS) == set(reference.CELLS)
    plain = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("GRU", {}), ("LSTM", {})]
    chosen = [*plain, *VARIANTS, *PAIRS]
    assert set(fused_rnn._C.cells()) == {make(name, **options)._cell() for name, options in chosen}


@pytest.mark.parametrize("options", [{}, {"coupled": True}, {"proj_size": 3}, {"num_heads": 2}])
def test_forget_bias_is_a_constant_in_the_forget_gate(options: dict[str, Any]) -> None:
    """Results and gradients are those of a layer whose bias has it; the parameter has not."""
    arguments = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64, **options}
    layer = fused_rnn.LSTM(I, H, forget_bias=1.5, **arguments)
    plain = fused_rnn.LSTM(I, H, **arguments)
    plain.load_state_dict(layer.state_dict())
    gate = 0 if options.get("coupled") else 1
    with torch.no_grad():
        for name, bias in plain.named_parameters():
            if name.startswith("bias_ih"):
                bias[gate * H : (gate + 1) * H] += 1.5
    x = torch.randn(T, B, I, dtype=torch.float64)
    found, expected = layer(x)[0], plain(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = (
        torch.autograd.grad(output.square().sum(), list(each.parameters()))
        for output, each in ((found, layer), (expected, plain))
    )
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert "forget_bias=1.5" in repr(layer)


def test_forget_bias_of_a_cell_and_of_the_function() -> None:
    layer = fused_rnn.LSTM(I, H, forget_bias=1.0)
    cell = fused_rnn.LSTMCell(I, H, forget_bias=1.0)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(2, B, I)  # from zeros there is nothing to forget
    expected = layer(x)[0]
    torch.testing.assert_close(cell(x[1], cell(x[0]))[0], expected[1])
    params = list(layer.parameters())
    assert torch.equal(functional.lstm(x, None, params, forget_bias=1.0)[0], expected)
    assert not torch.equal(functional.lstm(x, None, params)[0], expected)


def test_forget_bias_needs_a_bias_and_a_number() -> None:
    for make in (fused_rnn.LSTM, fused_rnn.LSTMCell):
        with pytest.raises(ValueError, match=r"forget_bias should be 0 without bias, got 1.0"):
            make(I, H, bias=False, forget_bias=1.0)
        with pytest.raises(ValueError, match="forget_bias should be finite, got inf"):
            make(I, H, forget_bias=float("inf"))
        with pytest.raises(TypeError, match="forget_bias should be a number, got: str"):
            make(I, H, forget_bias="1")
    weights = [p for p in fused_rnn.LSTM(I, H, bias=False).parameters()]
    with pytest.raises(ValueError, match="without bias"):
        functional.lstm(torch.randn(T, B, I), None, weights, False, forget_bias=1.0)
