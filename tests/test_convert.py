"""convert() and patch(): fused layers wherever a model keeps torch.nn's."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import types
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fused_rnn
from fused_rnn import convert, patch

NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]
TORCH = {name: getattr(nn, name) for name in NAMES}
FUSED = {name: getattr(fused_rnn, name) for name in NAMES}

every = pytest.mark.parametrize("name", NAMES)
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def data(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def input_for(name):
    return data(2, 4) if name.endswith("Cell") else data(5, 2, 4)


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [t for r in result for t in flat(r)]


def value_and_gradients(model, *args):
    outputs = flat(model(*args))
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = sum(t.square().sum() for t in outputs)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return outputs, {i: grad for i, grad in enumerate(grads) if grad is not None}


def assert_converts(model, *args, expected=None):
    """Converts in place; same outputs, gradients, state_dict keys and Parameter objects."""
    before = value_and_gradients(model, *args)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keys = list(model.state_dict())
    shown = repr(model)
    converted = convert(model)
    torch.testing.assert_close(value_and_gradients(converted, *args), before, **CLOSE)
    after = dict(converted.named_parameters(remove_duplicate=False))
    assert list(after) == list(parameters)
    assert all(after[key] is parameters[key] for key in parameters)
    assert list(converted.state_dict()) == keys
    assert repr(converted) == shown
    assert not remaining(converted)
    return converted


def remaining(model):
    """Layers of the model that still run torch.nn's code."""
    theirs, ours = tuple(TORCH.values()), tuple(FUSED.values())
    return [m for m in model.modules() if isinstance(m, theirs) and not isinstance(m, ours)]


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.encoders = nn.ModuleList([nn.LSTM(4, 3, bidirectional=True), nn.GRU(6, 3)])
        self.heads = nn.ModuleDict({"a": nn.RNN(3, 2, nonlinearity="relu"), "b": nn.Linear(3, 2)})
        self.nested = nn.Sequential(nn.Sequential(nn.Identity(), nn.GRU(3, 5)))
        self.cell = nn.LSTMCell(3, 4)
        self.missing = None
        self.register_module("absent", None)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        x = self.embed(x) * self.scale
        for encoder in self.encoders:
            x, _ = encoder(x)
        h, c = None, None
        for step in x:
            h, c = self.cell(step, None if h is None else (h, c))
        return self.heads["a"](x)[0], self.nested(x)[0], h, c


class Plain(nn.LSTM):
    """A subclass that changes nothing."""


class Residual(nn.GRU):
    """Overrides forward and asks super."""

    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output + input[..., : self.hidden_size], h_n


class Configured(nn.LSTM):
    """Overrides __init__, keeps attributes, adds parameters and a method of its own."""

    def __init__(self, width, *, depth=1):
        super().__init__(width, 3, num_layers=depth)
        self.scale = nn.Parameter(torch.full((), 2.0))
        self.notes = ["made", width]

    def doubled(self, x):
        return self(x)[0] * self.scale

    def extra_repr(self):
        return f"configured, {super().extra_repr()}"


class Grandchild(Configured):
    def forward(self, input, hx=None):
        output, states = super().forward(input, hx)
        return output * self.scale, states


class GatedCell(nn.GRUCell):
    def forward(self, input, hx=None):
        return super().forward(input, hx).tanh()


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def test_model_with_layers_in_odd_places():
    torch.manual_seed(0)
    model = assert_converts(Tagger().double(), data(5, 2, 4))
    assert type(model.encoders[0]) is fused_rnn.LSTM
    assert type(model.encoders[1]) is fused_rnn.GRU
    assert type(model.heads["a"]) is fused_rnn.RNN
    assert type(model.nested[0][1]) is fused_rnn.GRU
    assert type(model.cell) is fused_rnn.LSTMCell
    assert model.absent is None
    assert type(model.heads["b"]) is nn.Linear


def test_returns_the_model_itself():
    model = Tagger()
    assert convert(model) is model


@every
def test_bare_layer(name):
    layer = TORCH[name](4, 3, dtype=torch.float64)
    layer.remark = ["kept"]
    attributes = dict(layer.__dict__)
    twin = assert_converts(layer, input_for(name))
    assert type(twin) is FUSED[name]
    assert twin is not layer
    assert type(layer) is TORCH[name]
    assert layer.__dict__ == attributes
    assert twin.remark == ["kept"]
    twin.extra = nn.Linear(2, 2)
    twin.register_forward_hook(lambda *_: None)
    assert not hasattr(layer, "extra")
    assert not layer._forward_hooks


@every
def test_cell_or_layer_inside(name):
    model = nn.Sequential(nn.Linear(4, 4), TORCH[name](4, 3)).double()
    assert_converts(model, input_for(name))


def test_every_option_comes_along():
    layer = nn.LSTM(4, 3, 2, bias=False, batch_first=True, dropout=0.5, bidirectional=True,
                    proj_size=2).double().eval()  # fmt: skip
    twin = assert_converts(layer, data(2, 5, 4))
    assert not twin.training
    relu = nn.RNN(4, 3, nonlinearity="relu", dtype=torch.float64)
    assert assert_converts(relu, data(5, 2, 4)).nonlinearity == "relu"


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.LSTM(4, 4))
        self.right = nn.ModuleDict({"again": self.left[0]})
        self.also = self.left[0]

    def forward(self, x):
        return self.right["again"](self.left(x)[0])[0] + self.also(x)[0]


def test_shared_layer_gets_one_twin():
    model = assert_converts(Shared().double(), data(5, 2, 4))
    assert model.left[0] is model.right["again"] is model.also
    assert type(model.also) is fused_rnn.LSTM
    assert len(list(model.parameters())) == 4


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.GRU(3, 3), nn.GRU(3, 3)
        self.b.weight_hh_l0 = self.a.weight_hh_l0

    def forward(self, x):
        return self.b(self.a(x)[0])[0]


def test_tied_parameter_stays_tied():
    model = Tied().double()
    model.b.weight_hh_l0 = model.a.weight_hh_l0
    model = assert_converts(model, data(5, 2, 3))
    assert model.a.weight_hh_l0 is model.b.weight_hh_l0
    assert model.b._flat_weights[1] is model.a.weight_hh_l0
    assert len(list(model.parameters())) == 7


@pytest.mark.parametrize("cls", [Plain, Residual, Configured, Grandchild, GatedCell])
def test_subclass(cls):
    torch.manual_seed(0)
    layer = cls(4) if issubclass(cls, Configured) else cls(4, 3)
    layer = layer.double()
    x = data(2, 4) if cls is GatedCell else data(5, 2, 4)
    twin = assert_converts(layer, x)
    assert isinstance(twin, cls)
    assert isinstance(twin, tuple(FUSED.values()))
    assert type(twin).__name__ == cls.__name__
    assert type(layer) is cls
    if issubclass(cls, Configured):
        assert twin.notes == ["made", 4]
        assert twin.scale is layer.scale
        torch.testing.assert_close(twin.doubled(x), layer.doubled(x), **CLOSE)
    for copied in (copy.deepcopy(twin), *(pickle.loads(pickle.dumps(twin, p)) for p in (2, 4, 5))):
        assert type(copied) is type(twin)
        assert all(map(torch.equal, flat(copied(x)), flat(twin(x))))
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in twin.parameters()}
    inside = assert_converts(nn.Sequential(layer), x)
    assert isinstance(inside[0], FUSED["GRUCell" if cls is GatedCell else cls.__mro__[-4].__name__])


@pytest.mark.parametrize("cls", [Plain, Configured])
def test_converted_subclass_takes_ours_options(cls):
    twin = convert(cls(4) if cls is Configured else cls(4, 3))
    output, _ = twin(torch.randn(5, 2, 4), lengths=torch.tensor([5, 2]))
    assert not output[2:, 1].any()


def parametrized(kind, name):
    key = "weight_hh" if name.endswith("Cell") else "weight_hh_l0"
    torch.manual_seed(0)
    layer = TORCH[name](4, 3, dtype=torch.float64)
    if kind == "hook":
        nn.utils.weight_norm(layer, key)
    elif kind == "weight_norm":
        parametrizations.weight_norm(layer, key)
    elif kind == "orthogonal":
        parametrizations.orthogonal(layer, key)
    else:
        parametrize.register_parametrization(layer, key, Doubled())
    return layer, key


@every
@pytest.mark.parametrize("kind", ["hook", "weight_norm", "orthogonal", "custom"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrized(name, kind):
    layer, key = parametrized(kind, name)
    model = assert_converts(nn.Sequential(layer), input_for(name))
    assert isinstance(model[0], FUSED[name])
    before = flat(model(input_for(name)))[0]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    assert not torch.allclose(before, flat(model(input_for(name)))[0])
    assert key not in model[0]._parameters


@every
def test_parametrization_may_be_removed_after_conversion(name):
    layer, key = parametrized("custom", name)
    model = convert(nn.Sequential(layer))
    expected = flat(model(input_for(name)))
    assert parametrize.is_parametrized(model[0], key)
    parametrize.remove_parametrizations(model[0], key, leave_parametrized=True)
    assert not parametrize.is_parametrized(model[0])
    assert isinstance(model[0], FUSED[name])
    assert isinstance(getattr(model[0], key), nn.Parameter)
    torch.testing.assert_close(flat(model(input_for(name))), expected, **CLOSE)


@every
def test_parametrized_after_conversion(name):
    key = "weight_hh" if name.endswith("Cell") else "weight_hh_l0"
    model = convert(nn.Sequential(TORCH[name](4, 3, dtype=torch.float64)))
    parametrizations.weight_norm(model[0], key)
    expected = copy.deepcopy(model)(input_for(name))
    torch.testing.assert_close(model(input_for(name)), expected, **CLOSE)
    parametrize.remove_parametrizations(model[0], key)
    torch.testing.assert_close(model(input_for(name)), expected, **CLOSE)


def test_second_parametrization_after_conversion():
    layers = [parametrized("custom", "LSTM")[0] for _ in range(2)]
    plain = copy.deepcopy(layers)
    model = convert(nn.Sequential(*layers))
    for first in (plain[0], model[0]):
        parametrize.register_parametrization(first, "weight_ih_l0", Doubled())
    assert parametrize.is_parametrized(model[0], "weight_ih_l0")
    assert not parametrize.is_parametrized(model[1], "weight_ih_l0")
    for fused, theirs in zip(model, plain, strict=True):
        torch.testing.assert_close(fused(data(5, 2, 4)), theirs(data(5, 2, 4)), **CLOSE)
        copied = copy.deepcopy(fused)(data(5, 2, 4))
        torch.testing.assert_close(copied, theirs(data(5, 2, 4)), **CLOSE)


def test_hooks_come_along():
    model = nn.Sequential(nn.LSTM(4, 3)).double()
    seen = []
    model[0].register_forward_pre_hook(lambda m, args: seen.append(("pre", type(m))))
    model[0].register_forward_hook(lambda m, args, out: (out[0] * 2, out[1]))
    model[0].register_full_backward_hook(lambda m, gi, go: seen.append(("backward", type(m))))
    model[0].weight_hh_l0.register_hook(lambda grad: seen.append(("grad", None)))
    model = assert_converts(model, data(5, 2, 4).requires_grad_())
    seen.clear()
    model(data(5, 2, 4).requires_grad_())[0].sum().backward()
    fused = fused_rnn.LSTM
    assert seen == [("pre", fused), ("backward", fused), ("grad", None)] or seen == [
        ("pre", fused), ("grad", None), ("backward", fused)
    ]  # fmt: skip


def test_hook_is_removed_by_its_handle_after_conversion():
    """A handle is all that its owner has; a hook it cannot reach would stay for ever."""
    model = nn.Sequential(nn.LSTM(4, 3))
    calls = []
    handle = model[0].register_forward_hook(lambda m, args, out: calls.append(1))
    convert(model)
    gc.collect()
    handle.remove()
    model(torch.randn(5, 2, 4))
    assert not calls


def test_buffers_modes_and_attributes_come_along():
    model = nn.Sequential(nn.GRU(4, 3, 2, dropout=0.5), nn.Linear(3, 3))
    layer = model[0]
    layer.register_buffer("steps", torch.tensor(3))
    layer.register_buffer("hidden", torch.tensor(4), persistent=False)
    layer.anything = {"a": 1}
    layer.weight_ih_l0.requires_grad_(False)
    model.eval()
    model = convert(model)
    twin = model[0]
    assert type(twin) is fused_rnn.GRU
    assert twin.steps is layer.steps
    assert twin.hidden is layer.hidden
    assert "0.steps" in model.state_dict()
    assert "0.hidden" not in model.state_dict()
    assert twin.anything == {"a": 1}
    assert not twin.training
    assert twin.dropout == 0.5
    assert not twin.weight_ih_l0.requires_grad
    assert model.train()[0].training
    layer.num_layers = 7
    assert twin.num_layers == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_comes_along(dtype):
    model = convert(Tagger().to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    output = model(torch.randn(5, 2, 4).to(dtype))
    assert all(o.dtype == dtype and o.isfinite().all() for o in output)
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}
    assert all(o.dtype == torch.float64 for o in model(data(5, 2, 4)))
    assert model.encoders[0]._flat_weights[0] is model.encoders[0].weight_ih_l0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_optimizer_from_before_stays_valid(optimizer):
    torch.manual_seed(0)
    models = [Tagger().double()]
    models.append(copy.deepcopy(models[0]))
    x = data(5, 2, 4)
    start = models[0](x)
    for i, model in enumerate(models):
        steps = optimizer(model.parameters(), lr=0.05)
        for step in range(3):
            if i == 1 and step == 1:
                convert(model)
            steps.zero_grad()
            sum(t.square().sum() for t in model(x)).backward()
            steps.step()
    torch.testing.assert_close(models[1](x), models[0](x), rtol=1e-6, atol=1e-8)
    assert not torch.allclose(models[1](x)[0], start[0], atol=1e-4)


def test_gradients_so_far_are_kept():
    model = nn.Sequential(nn.LSTM(4, 3)).double()
    model(data(5, 2, 4))[0].sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(p.grad is g for p, g in zip(convert(model).parameters(), grads, strict=True))


def test_deepcopy_and_pickle_of_a_converted_model():
    model = convert(nn.ModuleDict({"t": Tagger(), "c": Configured(4), "p": Plain(4, 3)}).double())
    x = data(5, 2, 4)
    expected = [model["t"](x), model["c"](x), model["p"](x)]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not remaining(twin)
        results = [twin["t"](x), twin["c"](x), twin["p"](x)]
        assert all(map(torch.equal, flat(results), flat(expected)))


def test_subclass_survives_torch_save(tmp_path):
    model = convert(nn.Sequential(Residual(4, 3))).double()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(data(5, 2, 4))[0], model(data(5, 2, 4))[0])
    assert isinstance(loaded[0], fused_rnn.GRU)
    assert isinstance(loaded[0], Residual)


def test_load_state_dict_after_conversion():
    donor, model = Tagger().double(), Tagger().double()
    convert(model).load_state_dict(donor.state_dict())
    torch.testing.assert_close(model(data(5, 2, 4)), donor(data(5, 2, 4)), **CLOSE)
    donor = Tagger().double()
    donor.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(data(5, 2, 4)), donor(data(5, 2, 4)), **CLOSE)


class Zoneout(nn.LSTM):
    def __init__(self, *args):
        super().__init__(*args)
        self.zoneout = 0.5

    def forward(self, input, hx=None):
        output, states = super().forward(input, hx)
        return output * self.zoneout, states


class Normalised(nn.GRU):
    def __init__(self, *args):
        super().__init__(*args)
        self.layer_norm = nn.LayerNorm(self.hidden_size)

    def forward(self, input, hx=None):
        return self.layer_norm(super().forward(input, hx)[0])


class Stepped(nn.LSTMCell):
    def _step(self, input):
        return super().forward(input)

    def forward(self, input):
        return self._step(input)


@pytest.mark.parametrize(
    ("cls", "names"),
    [(Zoneout, "zoneout"), (Normalised, "layer_norm"), (Stepped, "_step")],
)
def test_subclass_whose_names_mean_something_else_is_left_alone(cls, names):
    layer = cls(4, 3).double()
    model = nn.ModuleDict({"inner": layer, "other": nn.GRU(4, 3).double()})
    input = data(2, 4) if cls is Stepped else data(5, 2, 4)
    before = flat(layer(input))
    with pytest.warns(UserWarning, match=f"leaves inner as it is: the fused layer has {names} of"):
        convert(model)
    assert model["inner"] is layer
    assert isinstance(model["other"], fused_rnn.GRU)
    assert all(torch.equal(a, b) for a, b in zip(flat(layer(input)), before, strict=True))


@every
def test_names_that_are_set_on_a_plain_layer(name):
    layer = TORCH[name](4, 3)
    layer.recurrent_dropout = nn.Dropout(0.1)
    with pytest.warns(UserWarning, match="recurrent_dropout"):
        assert convert(layer) is layer


def test_layer_inside_a_subclass():
    class Holds(nn.LSTM):
        def __init__(self):
            super().__init__(4, 4)
            self.inner = nn.GRU(4, 4)

        def forward(self, input):
            return super().forward(self.inner(input)[0])

    model = nn.Sequential(Holds()).double()
    original = model[0]
    assert_converts(model, data(5, 2, 4))
    assert isinstance(model[0].inner, fused_rnn.GRU)
    assert type(original.inner) is nn.GRU


def test_layer_that_was_compiled():
    model = nn.Sequential(nn.LSTM(4, 4, 2, dropout=0.5)).double()
    model[0].compile(backend="eager")
    convert(model)
    model.eval()
    first, second = (model(data(5, 2, 4))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert isinstance(model[0], fused_rnn.LSTM)


def test_layer_that_torch_compile_has_bound():
    compiled = nn.Sequential(torch.compile(nn.LSTM(4, 4), backend="eager"))
    with pytest.warns(UserWarning, match=r"leaves 0\._orig_mod .* convert before compiling"):
        convert(compiled)
    assert type(compiled[0]._orig_mod) is nn.LSTM
    whole = torch.compile(nn.Sequential(nn.LSTM(4, 4)), backend="eager")
    convert(whole)
    assert isinstance(whole._orig_mod[0], fused_rnn.LSTM)


def test_layer_with_a_forward_of_its_own():
    layer = nn.GRU(4, 4)
    layer.forward = types.MethodType(lambda self, input: nn.GRU.forward(self, 2 * input), layer)
    with pytest.warns(UserWarning, match="its forward has been replaced"):
        assert convert(layer) is layer


@pytest.mark.parametrize("replaces", [True, False])
def test_hooks_before_loading_know_the_twin(replaces):
    layer, seen = nn.LSTM(4, 4), []
    handle = layer.register_load_state_dict_pre_hook(lambda module, *rest: seen.append(module))
    model = nn.Sequential(layer)
    if replaces:
        convert(model)
        twin = model[0]
    else:
        twin = convert(layer)
        layer.load_state_dict(layer.state_dict())
        assert seen.pop() is layer
    del layer
    gc.collect()
    twin.load_state_dict(twin.state_dict())
    assert seen.pop() is twin
    if replaces:
        handle.remove()
        twin.load_state_dict(twin.state_dict())
        assert seen == []


def test_bare_layer_shares_no_sets():
    layer = nn.LSTM(4, 4)
    convert(layer).register_buffer("mine", torch.zeros(1), persistent=False)
    assert layer._non_persistent_buffers_set == set()


def test_twice_is_once():
    model = convert(nn.Sequential(nn.LSTM(4, 3), Plain(3, 3)))
    before = list(model.modules())
    assert convert(model) is model
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    layer = fused_rnn.GRU(4, 3)
    assert convert(layer) is layer
    assert convert(model[1]) is model[1]


def test_model_without_recurrence():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    before = list(model.modules())
    assert convert(model) is model
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    linear = nn.Linear(1, 1)
    assert convert(linear) is linear


def test_nothing_else_is_touched():
    class Mine(nn.RNNBase):
        pass

    model = nn.Sequential(Mine("LSTM", 4, 3), nn.RNNCellBase(4, 3, True, 1))
    before = list(model)
    convert(model)
    assert list(model) == before


def test_within_no_grad():
    with torch.no_grad():
        model = convert(nn.Sequential(nn.LSTM(4, 3)).double())
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    model(data(5, 2, 4))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_meta_model():
    model = convert(Tagger().to("meta"))
    assert type(model.cell) is fused_rnn.LSTMCell
    assert all(p.device.type == "meta" for p in model.parameters())


def test_converted_layers_are_freed():
    model = nn.Sequential(nn.LSTM(4, 3))
    gone = weakref.ref(model[0])
    convert(model)
    gc.collect()
    assert gone() is None


# torchaudio's LSTM


class _CustomLSTM(nn.Module):
    """The equations of torchaudio's class of this name (models/rnnt.py), step by step."""

    def __init__(self, input_dim, hidden_dim, layer_norm=False, layer_norm_epsilon=1e-5):
        super().__init__()
        self.hidden_dim = hidden_dim
        self.x2g = nn.Linear(input_dim, 4 * hidden_dim, bias=not layer_norm)
        self.p2g = nn.Linear(hidden_dim, 4 * hidden_dim, bias=False)
        norms = [nn.Identity(), nn.Identity()]
        if layer_norm:
            norms = [nn.LayerNorm(n * hidden_dim, eps=layer_norm_epsilon) for n in (1, 4)]
            for norm in norms:  # which begin as nothing
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.uniform_(norm.bias, -0.5, 0.5)
        self.c_norm, self.g_norm = norms

    def forward(self, input, state: list[torch.Tensor] | None):
        if state is None:
            zeros = torch.zeros(input.size(1), self.hidden_dim, dtype=input.dtype)
            state = [zeros, zeros]
        h, c = state[0], state[1]
        outputs = []
        for x in self.x2g(input):
            i, f, g, o = self.g_norm(x + self.p2g(h)).chunk(4, dim=1)
            c = self.c_norm(f.sigmoid() * c + i.sigmoid() * g.tanh())
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), [h, c]


_CustomLSTM.__module__ = "torchaudio.models.rnnt"


class HalfPredictor(_CustomLSTM):
    def forward(self, input, state):
        output, state = super().forward(input, state)
        return output / 2, state


class Predictor(nn.Module):
    """As torchaudio's: layers over each other, each with a state of its own."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        sizes = (4, 6, 6)
        self.lstm_layers = nn.ModuleList(_CustomLSTM(n, 6, **options) for n in sizes)

    def forward(self, x, states):
        new = []
        for layer, state in zip(self.lstm_layers, states or [None] * 3, strict=True):
            x, state = layer(x, state)
            new.append(state)
        return x, new


def is_fused(layer):
    return isinstance(layer, fused_rnn.torchaudio.PredictorLSTM)


norm_or_not = pytest.mark.parametrize("layer_norm", [False, True])


@norm_or_not
@pytest.mark.parametrize("has_state", [False, True])
def test_torchaudio(layer_norm, has_state):
    model = Predictor(layer_norm=layer_norm).double()
    plain = copy.deepcopy(model)
    inputs = [data(5, 2, 4)]
    states = [[0.5 * data(2, 6), data(2, 6)] for _ in range(3)] if has_state else None
    assert_converts(model, *inputs, states)
    assert all(map(is_fused, model.lstm_layers))
    leaves = inputs + flat(states or [])
    for leaf in leaves:
        leaf.requires_grad_()
    results = []
    for m in (model, plain):
        outputs = flat(m(*inputs, states))
        coefficients = [data(*t.shape) for t in outputs]
        loss = sum((k * t).sum() for k, t in zip(coefficients, outputs, strict=True))
        results.append((outputs, torch.autograd.grad(loss, [*leaves, *m.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@norm_or_not
def test_torchaudio_in_pieces(layer_norm):
    layer = convert(_CustomLSTM(4, 6, layer_norm).double())
    assert is_fused(layer) and isinstance(layer, _CustomLSTM)
    x = data(5, 2, 4)
    output, state = layer(x, None)
    assert type(state) is list and [s.shape for s in state] == [(2, 6)] * 2
    first, between = layer(x[:2], None)
    second, after = layer(input=x[2:], state=tuple(between))
    torch.testing.assert_close(torch.cat([first, second]), output, **CLOSE)
    torch.testing.assert_close(after, state, **CLOSE)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x, None)[0], output)


def test_torchaudio_keeps_modes_hooks_and_tied_weights():
    model = nn.Sequential(_CustomLSTM(4, 6, True), nn.Identity()).double().eval()
    layer, calls = model[0], []
    layer.register_buffer("steps", torch.tensor(3))
    handle = layer.register_forward_hook(lambda m, args, out: calls.append(type(m)))
    keys = list(model.state_dict())
    convert(model)
    assert list(model.state_dict()) == keys
    assert model[0].x2g is layer.x2g and model[0].steps is layer.steps
    assert not model[0].training
    model[0](data(5, 2, 4), None)
    assert calls == [type(model[0])]
    handle.remove()
    assert not model[0]._forward_hooks
    assert convert(model)[0] is model[0]


@norm_or_not
def test_torchaudio_subclass_copies_and_pickles(layer_norm, monkeypatch):
    for name in ("torchaudio", "torchaudio.models", "torchaudio.models.rnnt"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torchaudio.models.rnnt"]._CustomLSTM = _CustomLSTM
    x = data(5, 2, 4)
    for cls in (_CustomLSTM, HalfPredictor):
        layer = cls(4, 6, layer_norm).double()
        twin = assert_converts(layer, x, None)
        assert is_fused(twin) and isinstance(twin, cls)
        for copied in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
            assert type(copied) is type(twin)
            assert all(map(torch.equal, flat(copied(x, None)), flat(twin(x, None))))


def test_torchaudio_with_another_epsilon():
    model = Predictor(layer_norm=True, layer_norm_epsilon=1e-3).double()
    twin = assert_converts(model.lstm_layers[0], data(5, 2, 4), None)
    assert is_fused(twin) and twin.g_norm.eps == 1e-3


def test_torchaudio_with_two_epsilons_is_left_alone():
    model = Predictor(layer_norm=True)
    for layer in model.lstm_layers:
        layer.c_norm.eps = 1e-3
    before = list(model.modules())
    message = (
        "convert leaves lstm_layers.[012] as it is: expected .* equal eps, got 1e-05 and 0.001"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        assert convert(model) is model
    assert len(caught) == 3 and "lstm_layers.2" in str(caught[2].message)
    assert caught[0].filename == __file__
    assert list(model.modules()) == before
    with pytest.warns(UserWarning, match="leaves _CustomLSTM as it is"):
        assert convert(model.lstm_layers[0]) is model.lstm_layers[0]


class Adapted(nn.Linear):
    def forward(self, input):
        return super().forward(input) + input.sum(-1, keepdim=True)


def adapt(layer):
    adapted = Adapted(*layer.p2g.weight.shape[::-1], bias=False).double()
    adapted.load_state_dict(layer.p2g.state_dict())
    layer.p2g = adapted


CHANGES = {
    "linear": adapt,
    "norm": lambda layer: setattr(layer, "c_norm", nn.Identity()),
    "bias": lambda layer: setattr(layer, "p2g", nn.Linear(6, 24).double()),
    "hook": lambda layer: layer.g_norm.register_forward_hook(lambda m, args, out: out * 2),
    "weight_norm": lambda layer: nn.utils.weight_norm(layer.x2g),
    "affine": lambda layer: setattr(layer, "c_norm", nn.LayerNorm(6, bias=False).double()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_torchaudio_with_other_submodules(change):
    """Left alone if they are there before, run by the layer's own loop if they come after."""
    plain = _CustomLSTM(4, 6, True).double()
    twin = convert(copy.deepcopy(plain))
    for layer in (plain, twin):
        torch.manual_seed(0)
        CHANGES[change](layer)
    with pytest.warns(UserWarning, match="expected, without hooks, torch.nn.Linear as x2g"):
        assert convert(plain) is plain
    x = data(5, 2, 4)
    torch.testing.assert_close(
        value_and_gradients(twin, x, None), value_and_gradients(plain, x, None), **CLOSE
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_torchaudio_parametrized(when):
    plain = _CustomLSTM(4, 6, True).double()
    model = nn.ModuleList([copy.deepcopy(plain)])
    if when == "after":
        convert(model)
    for layer in (plain, model[0]):
        parametrizations.weight_norm(layer.x2g)
    convert(model)
    assert is_fused(model[0]) and fused_rnn.torchaudio.refusal(model[0]) is None
    x = data(5, 2, 4)
    torch.testing.assert_close(
        value_and_gradients(model[0], x, None), value_and_gradients(plain, x, None), **CLOSE
    )


def test_torchaudio_under_autocast():
    plain = _CustomLSTM(4, 6, True)
    x = data(5, 2, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected, ours = flat(plain(x, None)), flat(convert(plain)(x, None))
    assert [t.dtype for t in ours] == [t.dtype for t in expected]
    torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)


def test_torchaudio_sizes_that_do_not_fit():
    layer = convert(_CustomLSTM(4, 6, True).double())
    x, h = data(5, 2, 4), data(2, 6)
    for given, message in [
        ((x[..., :3], None), r"input of shape \(T, B, 4\), got \(5, 2, 3\)"),
        ((x[0], None), r"input of shape \(T, B, 4\), got \(2, 4\)"),
        ((x, [h, h[:1]]), r"c in state of shape \(2, 6\), got \(1, 6\)"),
        ((x, [h[:, :5], h]), r"h in state of shape \(2, 6\), got \(2, 5\)"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            layer(*given)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_compiled_by_torchscript_is_left_alone():
    model = nn.ModuleDict({"a": torch.jit.script(_CustomLSTM(4, 6, True)),
                           "b": torch.jit.script(nn.LSTM(4, 6))})  # fmt: skip
    before = list(model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model)
    assert list(model.modules()) == before


def test_another_class_of_that_name_is_left_alone():
    layer = type("_CustomLSTM", (nn.Module,), {"__module__": "elsewhere"})()
    assert convert(layer) is layer


# patch

PLACES = [torch.nn, torch.nn.modules, torch.nn.modules.rnn]


def assert_restored():
    for place in PLACES:
        for name, cls in TORCH.items():
            assert getattr(place, name) is cls


@every
def test_names_inside_are_the_fused_classes(name):
    with patch():
        for place in PLACES:
            assert getattr(place, name) is FUSED[name]
        assert getattr(sys.modules["torch.nn.modules.rnn"], name) is FUSED[name]
        if not name.endswith("Cell"):
            assert isinstance(FUSED[name](4, 3), torch.nn.RNNBase)
    assert_restored()


def test_model_built_inside():
    torch.manual_seed(0)
    plain = Tagger().double()
    torch.manual_seed(0)
    with patch():
        model = Tagger().double()
    assert_restored()
    assert not remaining(model)
    assert type(model.encoders[0]) is fused_rnn.LSTM
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(model(data(5, 2, 4)), plain(data(5, 2, 4)), **CLOSE)
    with patch():
        torch.testing.assert_close(model(data(5, 2, 4)), plain(data(5, 2, 4)), **CLOSE)
    assert pickle.loads(pickle.dumps(model)) is not None


@every
def test_layers_work_inside(name):
    plain = TORCH[name](4, 3, dtype=torch.float64)
    with patch():
        fused = getattr(torch.nn, name)(4, 3, dtype=torch.float64)
        fused.load_state_dict(plain.state_dict())
        x = input_for(name)
        results = [value_and_gradients(m, x) for m in (fused, plain, copy.deepcopy(fused))]
        assert type(pickle.loads(pickle.dumps(fused))) is FUSED[name]
    torch.testing.assert_close(results[0], results[1], **CLOSE)
    torch.testing.assert_close(results[0], results[2], **CLOSE)


def test_restores_on_exception():
    with pytest.raises(KeyError, match="inside"), patch():
        raise KeyError("inside")
    assert_restored()


def test_nests():
    with patch():
        with patch():
            assert torch.nn.LSTM is fused_rnn.LSTM
        assert torch.nn.LSTM is fused_rnn.LSTM
        with pytest.raises(ZeroDivisionError), patch():
            _ = 1 / 0
        assert torch.nn.GRU is fused_rnn.GRU
    assert_restored()


def test_is_reusable_as_a_decorator():
    @patch()
    def build():
        return torch.nn.LSTM(4, 3)

    for _ in range(2):
        assert type(build()) is fused_rnn.LSTM
        assert_restored()


def test_keeps_what_another_patch_put_there(monkeypatch):
    class Mine(nn.LSTM):
        pass

    monkeypatch.setattr(torch.nn, "LSTM", Mine)
    with patch():
        assert torch.nn.LSTM is fused_rnn.LSTM
    assert torch.nn.LSTM is Mine


@pytest.mark.parametrize("cls", [Plain, Residual, Configured, Grandchild, GatedCell])
def test_outer_subclass_works_inside(cls):
    args = (4,) if issubclass(cls, Configured) else (4, 3)
    x = data(2, 4) if cls is GatedCell else data(5, 2, 4)
    torch.manual_seed(0)
    expected = cls(*args).double()(x)
    with patch():
        torch.manual_seed(0)
        layer = cls(*args).double()
        torch.testing.assert_close(layer(x), expected, **CLOSE)
        twin = convert(layer)
    assert isinstance(twin, tuple(FUSED.values()))
    torch.testing.assert_close(twin(x), expected, **CLOSE)


def test_subclass_made_inside_is_fused():
    with patch():

        class Inner(torch.nn.LSTM):
            def forward(self, input, hx=None):
                output, states = super().forward(input, hx)
                return output * 2, states

        layer = Inner(4, 3, dtype=torch.float64)
    assert isinstance(layer, fused_rnn.LSTM)
    assert convert(layer) is layer
    plain = nn.LSTM(4, 3, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(data(5, 2, 4))[0], plain(data(5, 2, 4))[0] * 2, **CLOSE)


def test_convert_inside():
    model = Tagger().double()
    with patch():
        model = assert_converts(model, data(5, 2, 4))
        bare = convert(TORCH["LSTM"](4, 3))
    assert type(bare) is fused_rnn.LSTM
    assert_restored()
