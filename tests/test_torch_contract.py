"""torch.nn's contract: what torch.nn's own tests look at, theirs and ours side by side."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fused_rnn
from fused_rnn import user_cells

LAYERS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
T, B, I, H = 5, 2, 4, 3  # noqa: E741

pytestmark = pytest.mark.usefixtures("route")

layers = pytest.mark.parametrize("name", LAYERS)
cells = pytest.mark.parametrize("name", CELLS)
every = pytest.mark.parametrize("name", LAYERS + CELLS)


def pair(name, *args, **kwargs):
    made = []
    for source in (nn, fused_rnn):
        torch.manual_seed(0)
        made.append(getattr(source, name)(*args, **kwargs))
    return made


def is_lstm(name):
    return name.startswith("LSTM")


def states(name, *shape, dtype=torch.float64, device=None):
    """hx of one shape, (h, c) of it for LSTM."""
    made = [torch.linspace(-1, 1, 1000)[: _count(shape)].reshape(shape) for _ in range(2)]
    made = [m.to(dtype=dtype, device=device) for m in made]
    return (made[0], made[1] / 2) if is_lstm(name) else made[0]


def _count(shape):
    return torch.Size(shape).numel()


def data(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def flat(result):
    """The tensors of a result, in order."""
    if isinstance(result, PackedSequence):
        return [t for t in result if t is not None]
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def outcome(call):
    """The result, or the type of what was raised."""
    try:
        return call()
    except Exception as error:
        return type(error)


def assert_same(theirs, ours, **tolerance):
    """Equal types raised, or equal tensors of equal dtype in equal structure."""
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-12}
    if isinstance(theirs, type) or isinstance(ours, type):
        assert theirs is ours, f"torch.nn: {theirs}, fused_rnn: {ours}"
        return
    assert type(theirs) is type(ours)
    a, b = flat(theirs), flat(ours)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(y, x, **tolerance)


def assert_same_or_refused(theirs, ours):
    """As assert_same, but where torch.nn stumbles with an IndexError ours may say what is wrong."""
    if theirs is IndexError:
        assert ours in (IndexError, RuntimeError, TypeError)
    else:
        assert_same(theirs, ours)


def sequence_shape(name):
    return (B, I) if name in CELLS else (T, B, I)


def state_shape(name):
    return (B, H) if name in CELLS else (1, B, H)


# Constructors


def construction(cls, args, kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = cls(*args, **kwargs)
        except Exception as error:
            return type(error)
    parameters = [(n, tuple(p.shape), p.dtype, p.device) for n, p in made.named_parameters()]
    return repr(made), parameters, [w.category for w in caught]


BOTH = [
    ((True, 3), {}),
    ((4, True), {}),
    (("4", 3), {}),
    ((4, "3"), {}),
    ((4.0, 3), {}),
    ((4, 3.0), {}),
    ((-1, 3), {}),
    ((0, 3), {}),
    ((4, 0), {}),
    ((4, -3), {}),
    ((None, 3), {}),
    ((4, None), {}),
    ((), {}),
    ((4,), {}),
    ((4, 3), {"bias": "yes"}),
    ((4, 3), {"bias": 1}),
    ((4, 3), {"bias": None}),
    ((4, 3), {"bias": False}),
    ((4, 3), {"device": "nonsense"}),
    ((4, 3), {"dtype": torch.int64}),
    ((4, 3), {"dtype": torch.float16}),
    ((4, 3), {"dtype": "float"}),
    ((4, 3), {"nonsense": 1}),
    ((), {"input_size": 4, "hidden_size": 3}),
    ((4, 3), {"input_size": 4}),
    ((4, 3), {"nonlinearity": "relu"}),
    ((4, 3), {"nonlinearity": "elu"}),
    ((4, 3), {"nonlinearity": "TANH"}),
    ((4, 3), {"nonlinearity": None}),
]
LAYERS_ONLY = [
    ((4, 3), {"num_layers": 0}),
    ((4, 3), {"num_layers": -1}),
    ((4, 3), {"num_layers": "2"}),
    ((4, 3), {"num_layers": 1.5}),
    ((4, 3), {"num_layers": True}),
    ((4, 3), {"batch_first": 1}),
    ((4, 3), {"batch_first": "no"}),
    ((4, 3), {"batch_first": None}),
    ((4, 3), {"dropout": -0.1}),
    ((4, 3), {"dropout": 1.1}),
    ((4, 3), {"dropout": True}),
    ((4, 3), {"dropout": False}),
    ((4, 3), {"dropout": "0.5"}),
    ((4, 3), {"dropout": "x"}),
    ((4, 3), {"dropout": None}),
    ((4, 3), {"dropout": float("nan")}),
    ((4, 3), {"dropout": 1j}),
    ((4, 3), {"dropout": 0.5}),
    ((4, 3), {"dropout": 1}),
    ((4, 3, 2), {"dropout": 0.5}),
    ((4, 3), {"bidirectional": True}),
    ((4, 3), {"bidirectional": 1}),
    ((4, 3), {"bidirectional": "yes"}),
    ((4, 3), {"proj_size": 0}),
    ((4, 3), {"proj_size": 2}),
    ((4, 3), {"proj_size": 3}),
    ((4, 3), {"proj_size": 4}),
    ((4, 3), {"proj_size": -1}),
    ((4, 3), {"proj_size": "2"}),
    ((4, 3), {"mode": "LSTM"}),
]


def shown(case):
    args, kwargs = case
    return ",".join([*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())])


@pytest.mark.one_route
@every
@pytest.mark.parametrize("case", BOTH, ids=shown)
def test_constructor_like_torch(name, case):
    theirs = construction(getattr(nn, name), *case)
    assert construction(getattr(fused_rnn, name), *case) == theirs


@pytest.mark.one_route
@layers
@pytest.mark.parametrize("case", LAYERS_ONLY, ids=shown)
def test_layer_constructor_like_torch(name, case):
    theirs = construction(getattr(nn, name), *case)
    assert construction(getattr(fused_rnn, name), *case) == theirs


FULL = {
    "RNN": (4, 3, 2, "relu", False, True, 0.25, True),
    "LSTM": (4, 3, 2, False, True, 0.25, True, 2, "cpu", torch.float64),
    "GRU": (4, 3, 2, False, True, 0.25, True),
    "RNNCell": (4, 3, False, "relu", "cpu", torch.float64),
    "LSTMCell": (4, 3, False, "cpu", torch.float64),
    "GRUCell": (4, 3, False, "cpu", torch.float64),
}


@pytest.mark.one_route
@every
def test_positional_arguments(name):
    for count in range(len(FULL[name]) + 1):
        args = FULL[name][:count]
        theirs = construction(getattr(nn, name), args, {})
        assert construction(getattr(fused_rnn, name), args, {}) == theirs
    # One too many: torch.nn's RNN and GRU hand it to RNNBase as proj_size.
    args = (*FULL[name], "cpu")
    theirs = construction(getattr(nn, name), args, {})
    assert isinstance(theirs, type)
    assert construction(getattr(fused_rnn, name), args, {}) == theirs


def written_out(function):
    """The parameters of a signature, all of which have names, without self."""
    parameters = inspect.signature(function).parameters
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert all(parameter.kind not in starred for parameter in parameters.values())
    return [name for name in parameters if name != "self"]


@pytest.mark.one_route
@every
def test_arguments_are_written_out(name):
    documented = ["input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first",
                  "dropout", "bidirectional", "proj_size", "device", "dtype"]  # fmt: skip
    if name in CELLS:
        documented = ["input_size", "hidden_size", "bias", "nonlinearity", "device", "dtype"]
    if not name.startswith("RNN"):
        documented.remove("nonlinearity")
    if name in ("RNN", "GRU"):
        documented.remove("proj_size")
    cls = getattr(fused_rnn, name)
    found = written_out(cls)
    assert found[: len(documented)] == documented
    assert {"num_heads", "layer_norm", "zoneout"} <= set(found)
    keywords = [] if name in CELLS else ["lengths", "resets"] + ["return_cells"] * is_lstm(name)
    assert written_out(cls.forward) == ["input", "hx", *keywords]
    assert "num_heads" in written_out(user_cells._OfUser)


@pytest.mark.one_route
@pytest.mark.parametrize("name, count", [("RNN", 8), ("GRU", 7)])
def test_projection_of_a_layer_that_has_none(name, count):
    """torch.nn's constructors hand on what comes after bidirectional: proj_size, device, dtype."""
    args = (4, 3, 2, *(("tanh",) if name == "RNN" else ()), True, False, 0.0, False)
    assert len(args) == count
    more = (0, "meta", torch.float64)
    theirs = construction(getattr(nn, name), (*args, *more), {})
    assert construction(getattr(fused_rnn, name), (*args, *more), {}) == theirs
    with pytest.raises(ValueError, match="proj_size"):
        getattr(fused_rnn, name)(*args, 2)


@pytest.mark.one_route
@every
def test_attributes(name):
    theirs, ours = pair(name, *FULL[name])
    for attribute in set(theirs.__dict__) - {"_flat_weights", "_flat_weight_refs"}:
        mine, other = getattr(ours, attribute), getattr(theirs, attribute)
        if not attribute.startswith("_") or attribute in ("_flat_weights_names", "_all_weights"):
            assert type(mine) is type(other)
            assert mine == other
    assert tuple(ours.__constants__) == tuple(theirs.__constants__)
    assert ours._version == theirs._version


@pytest.mark.one_route
@every
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"bias": False}, {"dtype": torch.float64}, {"device": "meta"}],
    ids=str,
)
def test_repr(name, kwargs):
    theirs, ours = pair(name, 4, 3, **kwargs)
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()


@pytest.mark.one_route
@layers
def test_repr_of_every_option(name):
    theirs, ours = pair(name, *FULL[name])
    assert repr(ours) == repr(theirs)
    assert "bidirectional=True" in repr(ours)


@pytest.mark.one_route
@every
def test_documented(name):
    cls = getattr(fused_rnn, name)
    assert "torch.nn" in cls.__doc__
    assert cls.forward.__doc__
    assert cls.__name__ == name


@pytest.mark.one_route
@layers
def test_derives_from_rnn_base(name):
    assert isinstance(getattr(fused_rnn, name)(4, 3), nn.RNNBase)
    assert issubclass(getattr(fused_rnn, name), nn.modules.rnn.RNNBase)


@pytest.mark.one_route
@cells
def test_derives_from_rnn_cell_base(name):
    assert isinstance(getattr(fused_rnn, name)(4, 3), nn.RNNCellBase)


# Parameters


@pytest.mark.one_route
@every
def test_parameters_under_a_seed(name):
    theirs, ours = pair(name, *FULL[name])
    names = [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_parameters()] == names
    assert list(ours.state_dict()) == list(theirs.state_dict()) == names
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    for module in (theirs, ours):
        torch.manual_seed(7)
        module.reset_parameters()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    assert list(ours.buffers()) == []


@every
def test_state_dict_both_ways(name):
    source, target = (getattr(s, name)(4, 3, dtype=torch.float64) for s in (nn, fused_rnn))
    x = data(*sequence_shape(name))
    for a, b in ((source, target), (target, source)):
        with torch.no_grad():
            for p in a.parameters():
                p.mul_(-1.5)
        assert (
            str(b.load_state_dict(a.state_dict(), strict=True)) == "<All keys matched successfully>"
        )
        assert_same(a(x), b(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict({}, strict=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        getattr(fused_rnn, name)(4, 5).load_state_dict(source.state_dict())


@every
def test_state_dict_assigned(name):
    theirs, ours = pair(name, 4, 3, dtype=torch.float64)
    state = {k: v * 2 for k, v in theirs.state_dict().items()}
    for module in (theirs, ours):
        module.load_state_dict(state, assign=True)
    assert_same(theirs(data(*sequence_shape(name))), ours(data(*sequence_shape(name))))


@pytest.mark.one_route
@layers
@pytest.mark.parametrize("bias", [True, False])
def test_all_weights(name, bias):
    theirs, ours = pair(name, 4, 3, 2, bias=bias, bidirectional=True)
    assert len(ours.all_weights) == 4
    for a, b in zip(theirs.all_weights, ours.all_weights, strict=True):
        assert len(a) == len(b) == (4 if bias else 2)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(w is p for w, p in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert [w for ws in ours.all_weights for w in ws] == ours._flat_weights


@layers
def test_weights_alias_after_conversion(name):
    layer = getattr(fused_rnn, name)(4, 3, 2)
    for change in (layer.double, layer.float, lambda: layer.to(torch.float64), layer.share_memory):
        change()
        for w, (key, p) in zip(layer._flat_weights, layer.named_parameters(), strict=True):
            assert w is p
            assert getattr(layer, key) is p
    assert layer(data(T, B, I))[0].dtype == torch.float64
    assert all(p.is_shared() for p in layer.parameters())


@every
def test_parameters_overwritten_in_place(name):
    theirs, ours = pair(name, 4, 3, dtype=torch.float64)
    x = data(*sequence_shape(name))
    before = ours(x)
    for module in (theirs, ours):
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(p * 3 + 0.1)
    assert_same(theirs(x), ours(x))
    assert not torch.allclose(flat(before)[0], flat(ours(x))[0])
    for module in (theirs, ours):
        for p in module.parameters():
            p.data = p.data / 2
    assert_same(theirs(x), ours(x))


@every
def test_parameter_replaced(name):
    theirs, ours = pair(name, 4, 3, dtype=torch.float64)
    x = data(*sequence_shape(name))
    weight = "weight_hh_l0" if name in LAYERS else "weight_hh"
    new = nn.Parameter(getattr(theirs, weight).detach() * 4)
    hx = states(name, *state_shape(name))
    for module in (theirs, ours):
        setattr(module, weight, new)
    assert_same(theirs(x, hx), ours(x, hx))
    flat(ours(x, hx))[0].sum().backward()
    assert new.grad is not None
    assert new.grad.abs().max() > 0


@every
def test_init_functions(name):
    theirs, ours = pair(name, 4, 3, dtype=torch.float64)
    for module in (theirs, ours):
        torch.manual_seed(3)
        for key, p in module.named_parameters():
            if "weight_hh" in key:
                nn.init.orthogonal_(p)
            elif "weight" in key:
                nn.init.xavier_uniform_(p)
            else:
                nn.init.constant_(p, 0.5)
    x = data(*sequence_shape(name))
    assert_same(theirs(x), ours(x))


@pytest.mark.one_route
@cells
def test_cell_without_bias(name):
    cell = getattr(fused_rnn, name)(4, 3, bias=False)
    assert cell.bias_ih is None
    assert cell._parameters["bias_ih"] is None
    assert cell._parameters["bias_hh"] is None
    assert list(cell.state_dict()) == ["weight_ih", "weight_hh"]


@layers
def test_layer_without_bias(name):
    theirs, ours = pair(name, 4, 3, 2, bias=False, bidirectional=True, dtype=torch.float64)
    assert not hasattr(ours, "bias_ih_l0")
    assert_same(theirs(data(T, B, I)), ours(data(T, B, I)))


@every
def test_copies_and_pickles(name):
    module = getattr(fused_rnn, name)(*FULL[name]).double().eval()
    module.remark = {"anything": [1]}
    x = data(*sequence_shape(name))
    expected = module(x)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    copies = [copy.deepcopy(module), copy.copy(module), torch.load(stream, weights_only=False)]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        copies.append(pickle.loads(pickle.dumps(module, protocol)))
    for twin in copies:
        assert type(twin) is type(module)
        assert twin.remark == module.remark
        assert not twin.training
        assert repr(twin) == repr(module)
        assert all(map(torch.equal, flat(twin(x)), flat(expected)))
    deep = copies[0]
    assert not {id(p) for p in deep.parameters()} & {id(p) for p in module.parameters()}
    with torch.no_grad():
        for p in deep.parameters():
            p.add_(1)
    assert not torch.equal(flat(deep(x))[0], flat(expected)[0])
    assert torch.equal(flat(module(x))[0], flat(expected)[0])


@pytest.mark.one_route
@layers
def test_flatten_parameters(name):
    layer = getattr(fused_rnn, name)(4, 3)
    addresses = [p.data_ptr() for p in layer.parameters()]
    assert layer.flatten_parameters() is None
    assert [p.data_ptr() for p in layer.parameters()] == addresses


@every
def test_meta_construction(name):
    theirs, ours = pair(name, *FULL[name][:2], device="meta")
    x = torch.empty(sequence_shape(name), device="meta")
    for a, b in zip(flat(theirs(x)), flat(ours(x)), strict=True):
        assert b.device.type == "meta"
        assert (b.shape, b.dtype) == (a.shape, a.dtype)
    donor = getattr(nn, name)(4, 3)
    ours = ours.to_empty(device="cpu")
    ours.load_state_dict(donor.state_dict())
    x = data(*sequence_shape(name), dtype=torch.float32)
    assert_same(donor(x), ours(x), rtol=1e-5, atol=1e-6)


@layers
def test_meta_forward_shapes_of_every_option(name):
    theirs, ours = pair(name, *FULL[name][:8], device="meta")
    x = torch.empty(B, T, I, device="meta")
    for a, b in zip(flat(theirs(x)), flat(ours(x)), strict=True):
        assert b.shape == a.shape


# Forward arguments

INPUTS = [
    (),
    (I,),
    (T, I),
    (T, B, I),
    (T, B, I, 1),
    (T, B, I + 1),
    (T, I - 1),
    (T, 0, I),
    (0, B, I),
    (0, I),
    (0, 0, I),
    (1, 1, I),
]


@layers
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", INPUTS, ids=str)
def test_input_shapes(name, shape, batch_first):
    for bidirectional in (False, True):
        modules = pair(
            name, I, H, batch_first=batch_first, bidirectional=bidirectional, dtype=torch.float64
        )
        x = data(*shape)
        theirs, ours = (outcome(lambda m=m, x=x: m(x)) for m in modules)
        assert_same(theirs, ours)


@layers
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (1, B, H),
        (2, B, H),
        (0, B, H),
        (1, B + 1, H),
        (1, 1, H),
        (1, B, H + 1),
        (1, B, 1),
        (B, 1, H),
        (1, T, H),
        (B, H),
        (1, H),
        (2, H),
        (1, H + 1),
        (H,),
        (1, 1, B, H),
        (),
    ],
    ids=str,
)
def test_hx_shapes(name, shape, batch_first):
    modules = pair(name, I, H, batch_first=batch_first, dtype=torch.float64)
    hx = states(name, *shape)
    for x in (data(T, B, I), data(T, I)):
        theirs, ours = (outcome(lambda m=m, x=x: m(x, hx)) for m in modules)
        assert_same(theirs, ours)


@pytest.mark.parametrize("h", [(1, B, H), (1, B, 2), (1, H), (1, 2)], ids=str)
@pytest.mark.parametrize("c", [(1, B, H), (1, B, 2), (1, 1, H), (2, B, H), (1, H)], ids=str)
@pytest.mark.parametrize("proj_size", [0, 2])
def test_lstm_states_differ(h, c, proj_size):
    modules = pair("LSTM", I, H, proj_size=proj_size, dtype=torch.float64)
    for x in (data(T, B, I), data(T, I)):
        theirs, ours = (outcome(lambda m=m, x=x: m(x, (data(*h), data(*c)))) for m in modules)
        assert_same(theirs, ours)


HX_KINDS = {
    "list": lambda h: [h, h / 2],
    "tuple": lambda h: (h, h / 2),
    "one": lambda h: (h,),
    "three": lambda h: (h, h, h),
    "none inside": lambda h: (h, None),
    "empty": lambda h: (),
    "tensor": lambda h: h,
    "string": lambda h: "hx",
    "number": lambda h: 0,
}


@every
@pytest.mark.parametrize("kind", HX_KINDS)
def test_hx_kinds(name, kind):
    modules = pair(name, I, H, dtype=torch.float64)
    hx = HX_KINDS[kind](data(*state_shape(name)))
    x = data(*sequence_shape(name))
    theirs, ours = (outcome(lambda m=m: m(x, hx)) for m in modules)
    assert_same_or_refused(theirs, ours)


@every
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64], ids=str
)
def test_wrong_input_dtype(name, dtype):
    x = torch.zeros(sequence_shape(name), dtype=dtype)
    theirs, ours = (outcome(lambda m=m: m(x)) for m in pair(name, I, H))
    assert_same(theirs, ours)
    if name in LAYERS:
        assert ours is ValueError


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_wrong_hx_dtype(name, dtype):
    x = data(*sequence_shape(name), dtype=torch.float32)
    hx = states(name, *state_shape(name), dtype=dtype)
    with pytest.raises(RuntimeError, match="hx"):
        getattr(fused_rnn, name)(I, H)(x, hx)


@every
def test_meta_mismatch(name):
    module = getattr(fused_rnn, name)(I, H)
    x = data(*sequence_shape(name), dtype=torch.float32)
    hx = states(name, *state_shape(name), dtype=torch.float32, device="meta")
    with pytest.raises(RuntimeError, match="device"):
        module(x.to("meta"))
    with pytest.raises(RuntimeError, match=r"hx.*device"):
        module(x, hx)


@every
@pytest.mark.parametrize("x", [None, [[1.0]], 1.0, "x"], ids=repr)
def test_input_is_no_tensor(name, x):
    theirs, ours = (outcome(lambda m=m: m(x)) for m in pair(name, I, H))
    assert isinstance(ours, type)
    assert ours is theirs


@every
def test_hx_by_keyword(name):
    theirs, ours = pair(name, I, H, dtype=torch.float64)
    x, hx = data(*sequence_shape(name)), states(name, *state_shape(name))
    assert_same(theirs(input=x, hx=hx), ours(input=x, hx=hx))
    assert_same(theirs(x, hx=hx), ours(x, hx))
    assert not torch.equal(flat(ours(x))[0], flat(ours(x, hx))[0])


@every
def test_strided_and_expanded_states(name):
    theirs, ours = pair(name, I, H, dtype=torch.float64)
    shape = state_shape(name)
    x = data(*sequence_shape(name), 2)[..., 1]
    strided = data(*shape[:-1], 2 * H)[..., ::2]
    expanded = data(H).expand(shape)
    for h in (strided, expanded, data(*reversed(shape)).permute(*reversed(range(len(shape))))):
        hx = (h, h * 0.5) if is_lstm(name) else h
        assert_same(theirs(x, hx), ours(x, hx))


@layers
def test_input_is_left_alone(name):
    layer = getattr(fused_rnn, name)(I, H, dtype=torch.float64)
    x, hx = data(T, B, I), states(name, 1, B, H)
    kept = [t.clone() for t in flat((x, hx))]
    layer(x, hx)
    assert all(map(torch.equal, flat((x, hx)), kept))


@layers
def test_nan_and_inf_propagate(name):
    for poison in (float("nan"), float("inf"), -float("inf")):
        modules = pair(name, I, H, 2, bidirectional=True, dtype=torch.float64)
        x = data(T, 3, I)
        x[2, 1, 0] = poison
        results = [m(x) for m in modules]
        for a, b in zip(*map(flat, results), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12, equal_nan=True)
        grads = []
        for module, (output, _) in zip(modules, results, strict=True):
            (grad,) = torch.autograd.grad(output[:, 0].sum(), [module.weight_hh_l0])
            grads.append(grad)
        torch.testing.assert_close(*grads[::-1], rtol=1e-9, atol=1e-11, equal_nan=True)


@layers
def test_nan_state_stays_in_its_row(name):
    layer = getattr(fused_rnn, name)(I, 37, dtype=torch.float64)
    hx = states(name, 1, 3, 37)
    for h in flat(hx):
        h[0, 1, 36] = float("nan")
    output, _ = layer(data(T, 3, I), hx)
    assert output[:, [0, 2]].isfinite().all()
    assert output[:, 1].isnan().any()


def test_rnn_relu_keeps_nan():
    modules = pair("RNN", I, H, nonlinearity="relu", dtype=torch.float64)
    x = data(T, B, I)
    x[1, 0] = float("nan")
    theirs, ours = (m(x)[0] for m in modules)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, equal_nan=True)
    assert ours[1:, 0].isnan().all()


@layers
def test_dropout_may_change(name):
    theirs, ours = pair(name, I, H, 2, dtype=torch.float64)
    x = data(T, B, I)
    plain = ours(x)
    for module in (theirs, ours):
        module.dropout = 1.0
    assert_same(theirs(x), ours(x))
    assert not torch.equal(flat(plain)[0], flat(ours(x))[0])
    assert_same(plain, ours.eval()(x))
    ours.train().dropout = 0.5
    torch.manual_seed(0)
    first = ours(x)[0]
    torch.manual_seed(0)
    assert torch.equal(first, ours(x)[0])
    assert not torch.equal(first, ours(x)[0])


# Packed sequences


def packed(enforce_sorted=True, width=I, dtype=torch.float64):
    lengths = [5, 3, 3, 1] if enforce_sorted else [1, 5, 3, 3]
    rows = [data(n, width, dtype=dtype) + i for i, n in enumerate(lengths)]
    return pack_sequence(rows, enforce_sorted=enforce_sorted)


@layers
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed(name, enforce_sorted, bidirectional, batch_first):
    modules = pair(
        name, I, H, 2, bidirectional=bidirectional, batch_first=batch_first, dtype=torch.float64
    )
    x = packed(enforce_sorted)
    hx = states(name, 4 if bidirectional else 2, 4, H)
    for args in ((x,), (x, hx)):
        theirs, ours = (m(*args) for m in modules)
        assert_same(theirs, ours)
        assert isinstance(ours[0], PackedSequence)
        for given, got in zip(x[1:], ours[0][1:], strict=True):
            assert (given is None) == (got is None)
            assert given is None or torch.equal(given, got)
        grads = []
        for module, (output, state) in zip(modules, (theirs, ours), strict=True):
            loss = output.data.square().sum() + flat(state)[0].sum()
            grads.append(torch.autograd.grad(loss, list(module.parameters())))
        assert_same(*grads, rtol=1e-9, atol=1e-11)


@layers
@pytest.mark.parametrize(
    "shape",
    [(1, 3, H), (1, 5, H), (2, 4, H), (1, 4, H + 1), (4, H), (1, H), (1, 1, 4, H), ()],
    ids=str,
)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_with_wrong_hx(name, shape, enforce_sorted):
    modules = pair(name, I, H, dtype=torch.float64)
    x, hx = packed(enforce_sorted), states(name, *shape)
    theirs, ours = (outcome(lambda m=m: m(x, hx)) for m in modules)
    assert_same_or_refused(theirs, ours)


@layers
def test_packed_wrong_input(name):
    modules = pair(name, I, H, dtype=torch.float64)
    wrong = [
        packed(width=I + 1),
        PackedSequence(data(12), torch.tensor([4, 3, 3, 1, 1])),
        PackedSequence(data(12, I, 1), torch.tensor([4, 3, 3, 1, 1])),
    ]
    for x in wrong:
        theirs, ours = (outcome(lambda m=m, x=x: m(x)) for m in modules)
        assert isinstance(theirs, type)
        assert_same(theirs, ours)


@layers
def test_packed_of_another_dtype(name):
    """ValueError as for padded input; torch.nn's LSTM only notices inside a matrix product."""
    with pytest.raises(ValueError, match="dtype"):
        getattr(fused_rnn, name)(I, H, dtype=torch.float64)(packed(dtype=torch.float32))


@layers
def test_packed_padded_with_zero_steps_after(name):
    padded = data(B, 6, I)
    x = pack_padded_sequence(padded, torch.tensor([2, 4]), batch_first=True, enforce_sorted=False)
    theirs, ours = (m(x) for m in pair(name, I, H, dtype=torch.float64))
    assert_same(theirs, ours)
    padded_output, lengths = nn.utils.rnn.pad_packed_sequence(ours[0], batch_first=True)
    assert padded_output.shape == (B, 4, H)
    assert lengths.tolist() == [2, 4]


def test_packed_projected():
    modules = pair("LSTM", I, H, 2, proj_size=2, bidirectional=True, dtype=torch.float64)
    theirs, ours = (m(packed(False)) for m in modules)
    assert_same(theirs, ours)
    assert ours[0].data.shape[1] == 4


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_projections(bidirectional, bias):
    modules = pair(
        "LSTM", I, H, 2, bias=bias, proj_size=2, bidirectional=bidirectional, dtype=torch.float64
    )
    D = 2 if bidirectional else 1
    x, h, c = data(T, B, I), data(2 * D, B, 2), data(2 * D, B, H)
    for args in ((x,), (x, (h, c)), (x[:, 0], (h[:, 0], c[:, 0])), (x, (c, c)), (x, (h, h))):
        theirs, ours = (outcome(lambda m=m, args=args: m(*args)) for m in modules)
        assert_same(theirs, ours)
    assert modules[1].weight_hr_l0.shape == (2, H)


# Cells


@cells
@pytest.mark.parametrize(
    "shape",
    [(), (I,), (B, I), (T, B, I), (B, I + 1), (I + 1,), (0, I), (0,), (1, I)],
    ids=str,
)
def test_cell_input_shapes(name, shape):
    modules = pair(name, I, H, dtype=torch.float64)
    theirs, ours = (outcome(lambda m=m: m(data(*shape))) for m in modules)
    assert_same(theirs, ours)


@cells
@pytest.mark.parametrize(
    "shape", [(), (H,), (B, H), (1, H), (B + 3, H), (B, H + 1), (H + 1,), (1, B, H)], ids=str
)
def test_cell_hx_shapes(name, shape):
    modules = pair(name, I, H, dtype=torch.float64)
    hx = states(name, *shape)
    for x in (data(B, I), data(I)):
        theirs, ours = (outcome(lambda m=m, x=x: m(x, hx)) for m in modules)
        assert_same(theirs, ours)


@pytest.mark.parametrize("c", [(B, H + 1), (B + 1, H), (1, H), (H,)], ids=str)
def test_lstm_cell_states_differ(c):
    modules = pair("LSTMCell", I, H, dtype=torch.float64)
    theirs, ours = (outcome(lambda m=m: m(data(B, I), (data(B, H), data(*c)))) for m in modules)
    assert isinstance(theirs, type)
    assert_same(theirs, ours)


@cells
def test_unbatched_cell_with_square_hx(name):
    """torch.nn's own check is passed by (H, H), read as (1, H, H), and its LSTMCell crashes."""
    with pytest.raises((RuntimeError, ValueError)):
        getattr(fused_rnn, name)(I, H, dtype=torch.float64)(data(I), states(name, H, H))


@cells
@pytest.mark.parametrize("bias", [False, True])
def test_cell_steps(name, bias):
    modules = pair(name, I, H, bias, dtype=torch.float64)
    results = []
    for cell in modules:
        hx = None
        for x in data(T, B, I):
            hx = cell(x, hx)
        results.append(hx)
        loss = sum(t.square().sum() for t in flat(hx))
        results[-1] = (*flat(hx), *torch.autograd.grad(loss, list(cell.parameters())))
    assert_same(*results)


def test_rnn_cell_nonlinearity():
    modules = pair("RNNCell", I, H, nonlinearity="relu", dtype=torch.float64)
    assert_same(*(m(data(B, I), data(B, H)) for m in modules))
    for module in modules:
        module.nonlinearity = "tanh"
    assert_same(*(m(data(B, I), data(B, H)) for m in modules))
    theirs, ours = (
        outcome(lambda m=m: m(data(B, I))) for m in pair("RNNCell", I, H, nonlinearity="elu")
    )
    assert theirs is ours is RuntimeError


@cells
def test_cell_does_not_ask_for_the_mode(name):
    """pytorch's test_if_train_and_eval_modes_differ; with zoneout there is a difference."""
    cell = getattr(fused_rnn, name)(I, H, dtype=torch.float64)
    drawing = getattr(fused_rnn, name)(I, H, dtype=torch.float64, zoneout=0.5)
    for module in (cell, drawing):
        del module.training
    cell(data(B, I))
    with pytest.raises(AttributeError, match="training"):
        drawing(data(B, I))


# Module machinery


@every
def test_hooks_run(name):
    module = getattr(fused_rnn, name)(I, H, dtype=torch.float64)
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    module.register_forward_hook(lambda m, args, out: seen.append("forward"))
    module.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    x = data(*sequence_shape(name)).requires_grad_()
    flat(module(x))[0].sum().backward()
    assert seen == ["pre", "forward", "backward"]
    assert x.grad.abs().max() > 0


@every
def test_zero_grad_and_frozen_parameters(name):
    theirs, ours = pair(name, I, H, dtype=torch.float64)
    x = data(*sequence_shape(name))
    for module in (theirs, ours):
        for key, p in module.named_parameters():
            p.requires_grad_("hh" in key)
        flat(module(x, states(name, *state_shape(name))))[0].square().sum().backward()
    for (key, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert (b.grad is None) == (a.grad is None) == ("hh" not in key)
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-12)
    ours.zero_grad()
    assert all(p.grad is None for p in ours.parameters())
    ours.requires_grad_(False)
    assert not flat(ours(x))[0].requires_grad


@every
def test_functional_call(name):
    theirs, ours = pair(name, I, H, dtype=torch.float64)
    x, hx = data(*sequence_shape(name)), states(name, *state_shape(name))
    before = ours(x, hx)
    new = {k: (v.detach() * 2).requires_grad_() for k, v in theirs.named_parameters()}
    results, grads = [], []
    for module in (theirs, ours):
        results.append(torch.func.functional_call(module, new, (x,), {"hx": hx}))
        loss = flat(results[-1])[0].sum()
        grads.append(torch.autograd.grad(loss, list(new.values())))
    assert_same(*results)
    assert_same(*grads)
    assert_same(before, ours(x, hx))


@layers
def test_functional_call_of_another_dtype(name):
    theirs, ours = pair(name, I, H)
    new = {k: v.detach().double() for k, v in theirs.named_parameters()}
    x = (data(T, B, I),)
    assert_same(*(torch.func.functional_call(m, new, x) for m in (theirs, ours)))
    with pytest.raises(ValueError, match="dtype"):
        ours(*x)


class Counted(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * 1


@every
def test_parametrization_computed_once_in_a_forward(name):
    key = "weight_hh_l0" if name in LAYERS else "weight_hh"
    module = getattr(fused_rnn, name)(I, H, dtype=torch.float64)
    parametrize.register_parametrization(module, key, Counted())
    counted = module.parametrizations[key][0]
    counted.calls = 0
    module(data(*sequence_shape(name)))
    assert counted.calls == 1


@every
def test_replica_uses_its_own_weights(name):
    results = []
    for module in pair(name, I, H, dtype=torch.float64):
        replica = module._replicate_for_data_parallel()
        for key, p in module._parameters.items():
            setattr(replica, key, p * 2)
        results.append(replica(data(*sequence_shape(name)), states(name, *state_shape(name))))
        assert all(isinstance(p, nn.Parameter) for p in module.parameters())
    assert_same(*results)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2

    def right_inverse(self, weight):
        return weight / 2


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "custom": lambda m, key: parametrize.register_parametrization(m, key, Doubled()),
    "hook": lambda m, key: torch.nn.utils.weight_norm(m, key),
}


@every
@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrized(name, kind):
    key = "weight_hh_l0" if name in LAYERS else "weight_hh"
    x, hx = data(*sequence_shape(name)), states(name, *state_shape(name))
    results, grads = [], []
    for module in pair(name, I, H, dtype=torch.float64):
        torch.manual_seed(0)
        PARAMETRIZATIONS[kind](module, key)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.5)
        module.train(kind != "spectral_norm")  # which changes its estimate at every look
        for _ in range(2):
            results.append(module(x, hx))
        loss = flat(results[-1])[0].sum()
        grads.append(torch.autograd.grad(loss, list(module.parameters())))
        assert key not in module._parameters
    theirs, theirs_again, ours, ours_again = results
    assert_same(theirs, ours)
    assert_same(theirs_again, ours_again)
    assert_same(*grads, rtol=1e-9, atol=1e-11)


@every
def test_parametrization_removed(name):
    key = "weight_hh_l0" if name in LAYERS else "weight_hh"
    module = getattr(fused_rnn, name)(I, H, dtype=torch.float64)
    expected = module(data(*sequence_shape(name)))
    parametrizations.weight_norm(module, key)
    parametrize.remove_parametrizations(module, key)
    assert type(module) is getattr(fused_rnn, name)
    assert isinstance(getattr(module, key), nn.Parameter)
    assert_same(expected, module(data(*sequence_shape(name))))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(name, dtype):
    """Error against float64 at most twice torch.nn's."""
    shape = (24, I) if name in CELLS else (12, 8, I)
    x = data(*shape).to(dtype)
    modules = pair(name, I, 24)
    modules = [m.half() if dtype == torch.float16 else m.bfloat16() for m in modules]
    exact = flat(copy.deepcopy(modules[0]).double()(x.double()))
    theirs, ours = (flat(m(x)) for m in modules)
    for e, a, b in zip(exact, theirs, ours, strict=True):
        assert b.dtype == a.dtype == dtype
        assert (b - e).square().mean().sqrt() <= 2 * (a - e).square().mean().sqrt()


@pytest.mark.one_route
@every
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(name, backend):
    torch._dynamo.reset()
    theirs, ours = pair(name, I, H, dtype=torch.float64)
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    x, hx = data(*sequence_shape(name)), states(name, *state_shape(name))
    for args in ((x,), (x, hx)):
        result = compiled(*args)
        assert_same(theirs(*args), result)
        grads = [
            torch.autograd.grad(flat(r)[0].square().sum(), list(m.parameters()))
            for m, r in ((theirs, theirs(*args)), (ours, result))
        ]
        assert_same(*grads)


@pytest.mark.one_route
@layers
def test_compiled_packed_options(name):
    torch._dynamo.reset()
    theirs, ours = pair(name, I, H, 2, bidirectional=True, batch_first=True, dtype=torch.float64)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for x in (data(B, T, I), data(T, I)):
        assert_same(theirs(x), compiled(x))


@pytest.mark.one_route
@layers
def test_compiled_batch_first_with_packed_input_and_states(name):
    torch._dynamo.reset()
    theirs, ours = pair(name, I, H, batch_first=True, dtype=torch.float64)
    x, hx = packed(), states(name, 1, 4, H)
    assert_same(theirs(x, hx), torch.compile(ours, backend="eager")(x, hx))


# What torch.nn does not have: lengths, resets, return_cells

BAD_LENGTHS = {
    "list": ([T, T], TypeError),
    "tuple": ((T, T), TypeError),
    "number": (T, TypeError),
    "string": ("T", TypeError),
    "float": (torch.full((B,), float(T)), RuntimeError),
    "bool": (torch.ones(B, dtype=torch.bool), RuntimeError),
    "complex": (torch.ones(B, dtype=torch.complex64), RuntimeError),
    "short": (torch.full((B - 1,), T), RuntimeError),
    "long": (torch.full((B + 1,), T), RuntimeError),
    "2-D": (torch.full((B, 1), T), RuntimeError),
    "0-D": (torch.tensor(T), RuntimeError),
    "beyond": (torch.tensor([T, T + 1]), RuntimeError),
    "negative": (torch.tensor([T, -1]), RuntimeError),
    "meta": (torch.full((B,), T, device="meta"), RuntimeError),
}
BAD_RESETS = {
    "list": ([[True] * B] * T, TypeError),
    "number": (True, TypeError),
    "float": (torch.zeros(T, B), RuntimeError),
    "int": (torch.zeros(T, B, dtype=torch.int64), RuntimeError),
    "one row less": (torch.zeros(T, B - 1, dtype=torch.bool), RuntimeError),
    "one step more": (torch.zeros(T + 1, B, dtype=torch.bool), RuntimeError),
    "3-D": (torch.zeros(T, B, 1, dtype=torch.bool), RuntimeError),
    "1-D": (torch.zeros(T, dtype=torch.bool), RuntimeError),
    "0-D": (torch.tensor(True), RuntimeError),
    "swapped": (torch.zeros(B, T, dtype=torch.bool), RuntimeError),
    "meta": (torch.zeros(T, B, dtype=torch.bool, device="meta"), RuntimeError),
}


def swapped(value, batch_first):
    if batch_first and isinstance(value, torch.Tensor) and value.dim() >= 2:
        return value.transpose(0, 1)
    return value


@layers
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", BAD_LENGTHS)
def test_bad_lengths(name, kind, batch_first):
    value, error = BAD_LENGTHS[kind]
    layer = getattr(fused_rnn, name)(I, H, batch_first=batch_first, dtype=torch.float64)
    with pytest.raises(error, match="lengths"):
        layer(data(B, T, I) if batch_first else data(T, B, I), lengths=value)


@layers
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", BAD_RESETS)
def test_bad_resets(name, kind, batch_first):
    value, error = BAD_RESETS[kind]
    value = swapped(value, batch_first)
    layer = getattr(fused_rnn, name)(I, H, batch_first=batch_first, dtype=torch.float64)
    with pytest.raises(error, match="resets"):
        layer(data(B, T, I) if batch_first else data(T, B, I), resets=value)


@layers
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "option, value, error",
    [
        ("lengths", [T], TypeError),
        ("lengths", T, TypeError),
        ("lengths", torch.tensor([T, T]), RuntimeError),
        ("lengths", torch.tensor([T + 1]), RuntimeError),
        ("lengths", torch.tensor([float(T)]), RuntimeError),
        ("resets", [True] * T, TypeError),
        ("resets", torch.zeros(T + 1, dtype=torch.bool), RuntimeError),
        ("resets", torch.zeros(T), RuntimeError),
        ("resets", torch.zeros(T, 2, dtype=torch.bool), RuntimeError),
        ("resets", torch.tensor(True), RuntimeError),
    ],
    ids=str,
)
def test_bad_options_unbatched(name, batch_first, option, value, error):
    layer = getattr(fused_rnn, name)(I, H, batch_first=batch_first, dtype=torch.float64)
    with pytest.raises(error, match=option):
        layer(data(T, I), **{option: value})


@layers
@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "value, error",
    [
        ([True], TypeError),
        (torch.zeros(5, 3, dtype=torch.bool), RuntimeError),
        (torch.zeros(6, 4, dtype=torch.bool), RuntimeError),
        (torch.zeros(5, 4), RuntimeError),
        (torch.tensor(True), RuntimeError),
    ],
    ids=str,
)
def test_bad_resets_packed(name, enforce_sorted, batch_first, value, error):
    layer = getattr(fused_rnn, name)(I, H, batch_first=batch_first, dtype=torch.float64)
    with pytest.raises(error, match="resets"):
        layer(packed(enforce_sorted), resets=swapped(value, batch_first))


@layers
def test_lengths_with_packed(name):
    layer = getattr(fused_rnn, name)(I, H, dtype=torch.float64)
    with pytest.raises(ValueError, match="lengths"):
        layer(packed(), lengths=torch.tensor([5, 3, 3, 1]))


@pytest.mark.parametrize("option, value", [("lengths", [T, T + 1]), ("resets", [1, 2])])
def test_messages_show_expected_and_given(option, value):
    layer = fused_rnn.LSTM(I, H, dtype=torch.float64)
    if option == "lengths":
        with pytest.raises(RuntimeError, match=rf"0\.\.{T}.*{T + 1}"):
            layer(data(T, B, I), lengths=torch.tensor(value))
        with pytest.raises(RuntimeError, match=r"\(2,\).*\(3,\)"):
            layer(data(T, B, I), lengths=torch.tensor([1, 1, 1]))
    else:
        with pytest.raises(RuntimeError, match=r"\(5, 2\).*\(1, 2\)"):
            layer(data(T, B, I), resets=torch.zeros(1, 2, dtype=torch.bool))
        layer.batch_first = True
        with pytest.raises(RuntimeError, match=r"\(2, 5\).*\(1, 2\)"):
            layer(data(B, T, I), resets=torch.zeros(1, 2, dtype=torch.bool))


@layers
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_lengths_of_every_integer_dtype(name, dtype):
    layer = getattr(fused_rnn, name)(I, H, dtype=torch.float64)
    lengths = torch.tensor([3, 0])
    expected = layer(data(T, B, I), lengths=lengths)
    result = layer(data(T, B, I), lengths=lengths.to(dtype))
    assert all(map(torch.equal, flat(result), flat(expected)))
    assert not expected[0][3:, 0].any()
    assert not expected[0][:, 1].any()


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_return_cells_is_lstm_only(name):
    with pytest.raises(TypeError, match="return_cells"):
        getattr(fused_rnn, name)(I, H)(data(T, B, I, dtype=torch.float32), return_cells=True)


def test_mixed_dtypes():
    layer = fused_rnn.LSTM(I, H)
    layer.weight_hh_l0.data = layer.weight_hh_l0.data.double()
    with pytest.raises(RuntimeError, match=r"weight_hh_l0.*float32.*float64"):
        layer(data(T, B, I, dtype=torch.float32))
    cell = fused_rnn.GRUCell(I, H)
    cell.bias_hh.data = cell.bias_hh.data.half()
    with pytest.raises(RuntimeError, match=r"bias_hh.*float32.*float16"):
        cell(data(B, I, dtype=torch.float32))
    layer = fused_rnn.LSTM(I, H)
    h = data(1, B, H, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"cx.*float32.*float64"):
        layer(data(T, B, I, dtype=torch.float32), (h, h.double()))


def test_cells_without_hidden_units():
    """hidden_size=0 is allowed in cells, and only there; nothing flows through them."""
    x = torch.randn(3, 10, requires_grad=True)
    for name in ("RNNCell", "GRUCell", "LSTMCell"):
        theirs, ours = getattr(torch.nn, name)(10, 0), getattr(fused_rnn, name)(10, 0)
        expected, found = theirs(x), ours(x)
        if name != "LSTMCell":
            expected, found = (expected,), (found,)
        assert [t.shape for t in found] == [t.shape for t in expected]
        (grad,) = torch.autograd.grad(sum(t.sum() for t in found), x)
        assert torch.equal(grad, torch.zeros_like(x))
