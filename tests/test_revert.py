"""revert(): torch.nn's layers wherever a model keeps fused ones; TorchScript, which asks for it."""

from __future__ import annotations

import copy
import operator
import pickle
import types
from typing import Any

import pytest
import torch
from test_convert import (
    CLOSE,
    FUSED,
    TORCH,
    Configured,
    Grandchild,
    HalfPredictor,
    Plain,
    Predictor,
    Residual,
    Shared,
    Tagger,
    _CustomLSTM,
    data,
    every,
    flat,
    input_for,
    parametrized,
    value_and_gradients,
)
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn
from fused_rnn import convert, modules, patch, revert

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def fused_layers(model: nn.Module) -> list[nn.Module]:
    """Modules that still run code of ours."""
    ours = (*FUSED.values(), fused_rnn.torchaudio.PredictorLSTM)
    torchs = tuple(TORCH.values())
    found = []
    for module in model.modules():
        ways = [cls for cls in type(module).__mro__ if cls in ours or cls in torchs]
        found += [module] if ways and ways[0] in ours else []
    return found


def assert_reverts(model: Any, *args: Any) -> Any:
    """Reverts in place; same outputs, gradients, state_dict keys and Parameter objects."""
    before = value_and_gradients(model, *args)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keys, shown = list(model.state_dict()), repr(model)
    reverted = revert(model)
    torch.testing.assert_close(value_and_gradients(reverted, *args), before, **CLOSE)
    after = dict(reverted.named_parameters(remove_duplicate=False))
    assert list(after) == list(parameters)
    assert all(after[key] is parameters[key] for key in parameters)
    assert list(reverted.state_dict()) == keys
    assert repr(reverted) == shown
    assert not fused_layers(reverted)
    return reverted


@every
def test_bare_layer(name: str) -> None:
    layer = FUSED[name](4, 3, dtype=torch.float64)
    layer.remark = ["kept"]
    attributes = dict(layer.__dict__)
    twin = assert_reverts(layer, input_for(name))
    assert type(twin) is TORCH[name]
    assert type(layer) is FUSED[name] and layer.__dict__ == attributes
    assert twin.remark == ["kept"]
    # Nothing of ours is left, so that it is the same once more.
    made = set(TORCH[name](4, 3).__dict__)
    assert set(twin.__dict__) == made | {"remark"}
    again = convert(twin)
    assert type(again) is FUSED[name]
    assert all(map(operator.is_, again.parameters(), layer.parameters()))


def test_every_argument_comes_along() -> None:
    layer = fused_rnn.LSTM(4, 3, 2, bias=False, batch_first=True, dropout=0.5, bidirectional=True,
                           proj_size=2, dtype=torch.float64).eval()  # fmt: skip
    twin = assert_reverts(layer, data(2, 5, 4))
    assert not twin.training and twin.dropout == 0.5
    layer.dropout = 0.25  # which may be changed at any time
    assert revert(layer).dropout == 0.25
    relu = fused_rnn.RNN(4, 3, nonlinearity="relu", dtype=torch.float64)
    assert assert_reverts(relu, data(5, 2, 4)).nonlinearity == "relu"


def test_model_made_by_patch_or_convert() -> None:
    with patch():
        made = Tagger().double()
    for model in (made, convert(Tagger().double())):
        assert assert_reverts(model, data(5, 2, 4)) is model
        assert type(model.encoders[0]) is nn.LSTM
        assert type(model.cell) is nn.LSTMCell
        assert type(convert(model).cell) is fused_rnn.LSTMCell


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_comes_along(dtype: torch.dtype) -> None:
    model = revert(convert(Tagger().to(dtype)))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(o.dtype == dtype for o in model(torch.randn(5, 2, 4).to(dtype)))


def test_shared_layer_gets_one_twin() -> None:
    model = assert_reverts(convert(Shared().double()), data(5, 2, 4))
    assert model.left[0] is model.right["again"] is model.also
    assert type(model.also) is nn.LSTM


def test_hooks_come_along() -> None:
    model, seen = nn.Sequential(fused_rnn.LSTM(4, 3)).double(), []
    handle = model[0].register_forward_hook(lambda m, args, out: seen.append(type(m)))
    model[0].register_load_state_dict_pre_hook(lambda m, *rest: seen.append(type(m)))
    revert(model)
    model(data(5, 2, 4))
    model.load_state_dict(model.state_dict())
    assert seen == [nn.LSTM, nn.LSTM]
    handle.remove()
    assert not model[0]._forward_hooks


@every
@pytest.mark.parametrize("kind", ["hook", "weight_norm", "orthogonal", "custom"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrized(name: str, kind: str) -> None:
    layer, key = parametrized(kind, name)
    model = assert_reverts(convert(nn.Sequential(layer)), input_for(name))
    assert isinstance(model[0], TORCH[name])
    if kind != "hook":
        assert parametrize.is_parametrized(model[0], key)
        parametrize.remove_parametrizations(model[0], key)
        assert type(model[0]) is TORCH[name]


class OfOurs(fused_rnn.GRU):
    """A subclass of a fused layer that needs nothing but what torch.nn's has."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scale = nn.Parameter(torch.full((), 2.0, dtype=torch.float64))

    def forward(self, input: Any, hx: Any = None) -> Any:
        output, h_n = super().forward(input, hx)
        return output * self.scale, h_n


def test_subclass_of_a_fused_layer() -> None:
    layer = OfOurs(4, 3, dtype=torch.float64)
    twin = assert_reverts(layer, data(5, 2, 4))
    assert isinstance(twin, nn.GRU) and isinstance(twin, OfOurs)
    # What torch.nn's layers do alike is theirs, flatten_parameters above all.
    assert type(twin).flatten_parameters is nn.GRU.flatten_parameters
    assert type(twin).check_input is nn.GRU.check_input
    assert type(convert(twin)) is OfOurs
    for copied in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert type(copied) is type(twin)
        assert all(map(torch.equal, flat(copied(data(5, 2, 4))), flat(twin(data(5, 2, 4)))))
    inside = nn.Sequential(layer)
    assert_reverts(inside, data(5, 2, 4))
    assert type(convert(inside)[0]) is OfOurs


@pytest.mark.parametrize("cls", [Plain, Residual, Configured, Grandchild])
def test_converted_subclass_has_its_own_class_again(cls: Any) -> None:
    torch.manual_seed(0)
    layer = cls(4) if issubclass(cls, Configured) else cls(4, 3)
    model = assert_reverts(convert(nn.Sequential(layer.double())), data(5, 2, 4))
    assert type(model[0]) is cls


def test_torchaudio() -> None:
    model = convert(Predictor(layer_norm=True).double())
    assert_reverts(model, data(5, 2, 4), None)
    assert all(type(layer) is _CustomLSTM for layer in model.lstm_layers)
    half = convert(nn.ModuleList([HalfPredictor(4, 6)]))
    assert type(revert(half)[0]) is HalfPredictor


def test_layer_inside_a_layer() -> None:
    class Holds(fused_rnn.LSTM):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.inner = fused_rnn.GRU(4, 4)

        def forward(self, input: Any) -> Any:
            return super().forward(self.inner(input)[0])

    model = nn.Sequential(Holds()).double()
    original = model[0]
    assert_reverts(model, data(5, 2, 4))
    assert type(model[0].inner) is nn.GRU
    assert type(original.inner) is fused_rnn.GRU


def test_attention_decoder() -> None:
    """Its layer is asked for nothing that torch.nn's has not."""
    decoder = fused_rnn.AttentionDecoder(3, 4, 5).double()
    args = data(2, 3, 3), data(2, 6, 5)
    expected = flat(decoder(*args)[:3])
    revert(decoder)
    assert type(decoder.rnn) is nn.LSTM
    torch.testing.assert_close(flat(decoder(*args)[:3]), expected, **CLOSE)


def test_model_without_fused_layers() -> None:
    model = Tagger()
    before = list(model.modules())
    assert revert(model) is model
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"peephole": True}),
    ("LSTM", {"coupled": True}),
    ("LSTM", {"zoneout": (0.1, 0.2)}),
    ("GRU", {"reset_after": False}),
    ("GRU", {"num_heads": 3}),
    ("RNN", {"layer_norm": "joint"}),
    ("RNN", {"recurrent_dropout": 0.5}),
    ("GRU", {"weight_dropout": 0.5}),
    ("LSTMCell", {"coupled": True}),
    ("GRUCell", {"zoneout": 0.5}),
    ("RNNCell", {"layer_norm": "separate"}),
]


@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_option_that_torch_does_not_have(name: str, options: dict[str, Any]) -> None:
    model = nn.ModuleDict({"first": fused_rnn.GRU(4, 3), "second": FUSED[name](4, 3, **options)})
    before = list(model.modules())
    ((option, value),) = options.items()
    with pytest.raises(ValueError) as raised:
        revert(model)
    assert str(raised.value) == (
        f"fused_rnn.revert: second has {option}={value!r}, which torch.nn.{name} does not have"
    )
    assert list(model.modules()) == before
    with pytest.raises(ValueError, match=f"revert: {name} has {option}="):
        torch.jit.script(model["second"])


def test_rates_that_are_zero_again() -> None:
    layer = fused_rnn.GRU(4, 3, zoneout=0.5, layer_norm_eps=1e-3, dtype=torch.float64)
    layer.zoneout = 0.0
    twin = revert(layer)
    torch.testing.assert_close(twin(data(5, 2, 4)), layer(data(5, 2, 4)), **CLOSE)


def test_cell_that_torch_does_not_have() -> None:
    class Other(modules._Layer):
        def __init__(self) -> None:
            super().__init__("GRU", 4, 3)

    with pytest.raises(ValueError, match=r"revert: 0 is of a cell that torch\.nn does not have"):
        revert(nn.Sequential(Other()))


def test_layers_that_something_is_bound_to() -> None:
    layer = fused_rnn.GRU(4, 4)
    layer.forward = types.MethodType(lambda self, input: input, layer)
    with pytest.raises(ValueError, match="GRU cannot be replaced: its forward has been replaced"):
        revert(layer)
    compiled = nn.Sequential(torch.compile(fused_rnn.GRU(4, 4), backend="eager"))
    with pytest.raises(ValueError, match=r"0\._orig_mod cannot .* revert before compiling"):
        revert(compiled)


# TorchScript


class Scripted(nn.Module):
    """A layer and a cell, with and without states."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.encoder = source.LSTM(4, 5, 2, bidirectional=True)
        self.gru = source.GRU(10, 3)
        self.cell = source.GRUCell(3, 3)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, (h_n, _) = self.encoder(x)
        x, h = self.gru(x, h)
        return self.cell(x[0], self.cell(x[1])), h_n + h.sum()


def test_scripted_model(tmp_path: Any) -> None:
    model = Scripted(fused_rnn).double()
    args = data(5, 2, 4), data(1, 2, 3)
    expected = value_and_gradients(model, *args)
    parameters = list(model.parameters())
    scripted = torch.jit.script(copy.deepcopy(model))
    torch.testing.assert_close(value_and_gradients(scripted, *args), expected, **CLOSE)
    torch.jit.save(scripted, tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    torch.testing.assert_close(flat(loaded(*args)), expected[0], **CLOSE)
    assert len(fused_layers(model)) == 3
    # TorchScript takes what it is given: parameters are shared.
    itself = torch.jit.script(model)
    assert all(a is b for a, b in zip(itself.parameters(), parameters, strict=True))


@every
def test_scripted_layer(name: str) -> None:
    layer = FUSED[name](4, 3, dtype=torch.float64)
    scripted = torch.jit.script(nn.Sequential(layer))  # alone torch.nn's could not be called
    x = input_for(name)
    torch.testing.assert_close(scripted(x), layer(x), **CLOSE)
    assert type(layer) is FUSED[name]


class TakesPacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = fused_rnn.GRU(4, 3, dtype=torch.float64)

    def forward(self, packed: PackedSequence) -> torch.Tensor:
        output, _ = self.layer(packed)
        return output.data


def test_scripted_layer_takes_packed_input() -> None:
    model = TakesPacked()
    packed = pack_sequence([data(3, 4), data(2, 4)])
    expected = model(packed)
    torch.testing.assert_close(torch.jit.script(model)(packed), expected, **CLOSE)


class PlainCell(nn.GRUCell):
    """Of the layers TorchScript takes no subclass, of torch.nn's neither."""


def test_scripted_twins_of_other_classes() -> None:
    cell = convert(PlainCell(4, 3).double())
    torch.testing.assert_close(torch.jit.script(cell)(data(2, 4)), cell(data(2, 4)), **CLOSE)
    layer = convert(_CustomLSTM(4, 6, True).double())
    found, expected = torch.jit.script(layer)(data(5, 2, 4), None), layer(data(5, 2, 4), None)
    torch.testing.assert_close(flat(found), flat(expected), **CLOSE)
