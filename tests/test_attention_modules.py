"""Attention, AttentionDecoder and decoding, against formulas and loops written here row by row."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Named,
    as_tuple,
    assert_close_like_torch,
    assert_equal,
    assert_near,
    cotangents,
    double,
    dyadic,
)
from torch import Tensor, nn

from fused_rnn import Attention, AttentionDecoder
from fused_rnn.attention import (
    SCORES,
    DecoderState,
    Hypothesis,
    beam_search,
    coverage_loss,
    greedy_decode,
)

WITH_TANH = ("additive", "concat")
ATTENTIONS = (*SCORES, "location")
COVERED = (*WITH_TANH, "location")

pytestmark = pytest.mark.usefixtures("one_thread")


def evaluate(call: Callable[..., Named], module: nn.Module, tensors: Named) -> Named:
    """The outputs of ``call(**tensors)``, and gradients of tensors and parameters (``grad_*``)."""
    given = {k: t.detach().requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
    outputs = call(**given)
    leaves = {k: t for k, t in given.items() if t.requires_grad} | dict(module.named_parameters())
    grads = torch.autograd.grad(
        list(outputs.values()),
        list(leaves.values()),
        list(cotangents(outputs).values()),
        allow_unused=True,
    )
    found = {
        f"grad_{k}": torch.zeros_like(t) if g is None else g
        for (k, t), g in zip(leaves.items(), grads, strict=True)
    }
    return {k: t.detach() for k, t in (outputs | found).items()}


def redraw(module: nn.Module) -> nn.Module:
    """Gives every parameter numbers that all dtypes hold exactly."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(dyadic(*parameter.shape) / 2)
    return module


# The formulas.


def plain_score(attention: Attention, q: Tensor, k: Tensor) -> Tensor:
    """The score of one query and one key, from the memory's row and not from a projection."""
    p = dict(attention.named_parameters())
    if attention.score == "additive":
        summed = p["weight_query"] @ q + p["weight_key"] @ k + p["bias"]
        return (p["weight_score"] * torch.tanh(summed)).sum()
    if attention.score == "concat":
        return (p["weight_score"] * torch.tanh(p["weight_concat"] @ torch.cat([q, k]))).sum()
    if attention.score == "general":
        return (q * (p["weight_general"] @ k)).sum()
    product = (q * k).sum()
    return product if attention.score == "dot" else product / k.numel() ** 0.5


def plain_weights(scores: list[Tensor], at: list[int], Tk: int, like: Tensor) -> Tensor:
    """A row of weights: the softmax of ``scores`` at the keys ``at``, zero elsewhere."""
    row = [like.new_zeros(()) for _ in range(Tk)]
    if at:
        largest = max(s.item() for s in scores)
        raised = [torch.exp(s - largest) for s in scores]
        for j, r in zip(at, raised, strict=True):
            row[j] = r / torch.stack(raised).sum()
    return torch.stack(row)


def plain_attention(
    attention: Attention, query: Tensor, memory: Tensor, value: Tensor, allowed: Tensor
) -> Named:
    rows = []
    for b in range(query.shape[0]):
        for i in range(query.shape[1]):
            at = allowed[b, i].nonzero().flatten().tolist()
            scores = [plain_score(attention, query[b, i], memory[b, j]) for j in at]
            rows.append(plain_weights(scores, at, memory.shape[1], memory))
    weights = torch.stack(rows).view(*query.shape[:2], memory.shape[1])
    context = (weights.unsqueeze(-1) * value.unsqueeze(1)).sum(2)
    return {"context": context, "weights": weights}


def plain_cell(cell: str, p: Named, k: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    names = (f"rnn.{name}_l{k}" for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh"))
    weight_ih, bias_ih, weight_hh, bias_hh = (p[name] for name in names)
    input_gates, hidden_gates = x @ weight_ih.t() + bias_ih, h @ weight_hh.t() + bias_hh
    if cell == "lstm":
        i, f, g, o = (input_gates + hidden_gates).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    (xr, xz, xn), (hr, hz, hn) = input_gates.chunk(3, dim=1), hidden_gates.chunk(3, dim=1)
    z = torch.sigmoid(xz + hz)
    return (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h, c


def plain_term(decoder: AttentionDecoder, p: Named, j: int, last: Tensor, sums: Tensor) -> Any:
    """What location (Chorowski et al. eq. 8, 9) and coverage (See et al. eq. 11) add for key j."""
    term: Any = 0
    if decoder.location:
        filters, width = p["location_filter"].shape
        f = last.new_zeros(filters)
        for r in range(width):
            if 0 <= j + r - width // 2 < len(last):
                f = f + p["location_filter"][:, r] * last[j + r - width // 2]
        term = term + p["location_weight"] @ f
    if decoder.coverage:
        term = term + p["coverage_weight"] * sums[j]
    return term


def plain_decoder(
    decoder: AttentionDecoder, inputs: Tensor, memory: Tensor, hx: Any, lengths: Tensor | None
) -> Named:
    p = dict(decoder.named_parameters())
    (B, T, _), S = inputs.shape, memory.shape[1]
    hs = list(as_tuple(hx)[0])
    cs = list(as_tuple(hx)[-1])
    context = memory.new_zeros(B, memory.shape[2])
    last = sums = memory.new_zeros(B, S)
    steps = []
    for t in range(T):
        x = torch.cat([inputs[:, t], context], 1) if decoder.input_feeding else inputs[:, t]
        for k in range(decoder.num_layers):
            hs[k], cs[k] = plain_cell(decoder.cell, p, k, x, hs[k], cs[k])
            x = hs[k]
        rows = []
        for b in range(B):
            at = list(range(S if lengths is None else int(lengths[b])))
            scores = []
            for j in at:
                term = plain_term(decoder, p, j, last[b], sums[b])
                if isinstance(term, Tensor):
                    v = p["attention.weight_score"]
                    if decoder.attention.score == "concat":
                        inner = p["attention.weight_concat"] @ torch.cat([x[b], memory[b, j]])
                    else:
                        inner = p["attention.weight_query"] @ x[b] + p["attention.bias"]
                        inner = inner + p["attention.weight_key"] @ memory[b, j]
                    scores.append((v * torch.tanh(inner + term)).sum())
                else:
                    scores.append(plain_score(decoder.attention, x[b], memory[b, j]))
            rows.append(plain_weights(scores, at, S, memory))
        last = torch.stack(rows)
        sums = sums + last
        context = (last.unsqueeze(-1) * memory).sum(1)
        output = torch.tanh(torch.cat([x, context], 1) @ p["output.weight"].t())
        steps.append((output, context, last))
    outputs, contexts, weights = (torch.stack(s, dim=1) for s in zip(*steps, strict=True))
    final = {"outputs": outputs, "contexts": contexts, "weights": weights, "h_n": torch.stack(hs)}
    return final | ({"c_n": torch.stack(cs)} if decoder.cell == "lstm" else {})


# Attention.

QUERIES, KEYS = 4, 5


def attention_case(score: str, **options: Any) -> tuple[Attention, Named]:
    sizes = (6, 6) if score in ("dot", "scaled_dot") else (6, 3)
    hidden = {"hidden_size": 7} if score in WITH_TANH else {}
    attention = redraw(Attention(*sizes, 2, score=score, dtype=torch.float64, **hidden, **options))
    tensors = {
        "query": dyadic(3, QUERIES, 6),
        "memory": dyadic(3, KEYS, sizes[1]),
        "value": dyadic(3, KEYS, 2),
    }
    return attention, tensors


def named_attention(attention: Attention, **fixed: Any) -> Callable[..., Named]:
    def call(**tensors: Tensor) -> Named:
        context, weights = attention(**tensors, **fixed)
        return {"context": context} | ({} if weights is None else {"weights": weights})

    return call


def masking(kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """The arguments that restrict attention, and the pairs that remain, row 2 without any."""
    everything = torch.ones(3, QUERIES, KEYS, dtype=torch.bool)
    lengths = torch.tensor([KEYS, 2, 0], dtype=torch.int32)
    inside = torch.arange(KEYS) < lengths.view(3, 1, 1)
    keys = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
    pairs = torch.rand(3, QUERIES, KEYS) > 0.4
    pairs[0, 1] = False
    return {
        "none": ({}, everything),
        "lengths": ({"lengths": lengths}, everything & inside),
        "keys": ({"mask": keys}, everything & keys.unsqueeze(1)),
        "pairs": ({"mask": pairs}, pairs),
        "both": ({"mask": pairs, "lengths": lengths}, pairs & inside),
    }[kind]


MASKINGS = ("none", "lengths", "keys", "pairs", "both")


@pytest.mark.parametrize("kind", MASKINGS)
@pytest.mark.parametrize("score", SCORES)
def test_attention_is_the_formula(score: str, kind: str) -> None:
    attention, tensors = attention_case(score)
    restriction, allowed = masking(kind)
    ours = evaluate(named_attention(attention, **restriction), attention, tensors)
    expected = evaluate(
        lambda **t: plain_attention(attention, **t, allowed=allowed), attention, tensors
    )
    assert_near(ours, expected)
    nothing = ~allowed.any(dim=-1)
    assert nothing.any() == (kind != "none")
    for name in ("context", "weights", "grad_query"):
        assert ours[name][nothing].eq(0).all()


@pytest.mark.parametrize("kind", MASKINGS)
@pytest.mark.parametrize("score", SCORES)
def test_attention_without_weights(score: str, kind: str) -> None:
    """torch's own attention for the products, the fused op for the others."""
    attention, tensors = attention_case(score)
    restriction, allowed = masking(kind)
    call = named_attention(attention, need_weights=False, **restriction)
    assert attention(**tensors, need_weights=False, **restriction)[1] is None

    def plain(**t: Tensor) -> Named:
        return {"context": plain_attention(attention, **t, allowed=allowed)["context"]}

    ours = evaluate(call, attention, tensors)
    assert_near(ours, evaluate(plain, attention, tensors))
    assert ours["grad_query"][~allowed.any(dim=-1)].eq(0).all()


@pytest.mark.parametrize("need_weights", (True, False))
@pytest.mark.parametrize("score", SCORES)
def test_attention_has_no_nan_on_the_way(score: str, need_weights: bool) -> None:
    """Rows without a key do not stop those who look for NaN in backward."""
    attention, tensors = attention_case(score)
    restriction, _ = masking("both")
    call = named_attention(attention, need_weights=need_weights, **restriction)
    with torch.autograd.set_detect_anomaly(True):
        evaluate(call, attention, tensors)


ODD = (math.nan, math.inf, -math.inf)


def planted(tensors: Named, met: Named) -> Named:
    """With NaN and infinities in rows of ``tensors`` that are not ``met`` (bool, of their rows)."""
    dirty = {name: t.clone() for name, t in tensors.items()}
    for name, rows in met.items():
        for n, place in enumerate((~rows).nonzero().tolist()):
            dirty[name][tuple(place)] = ODD[n % 3]
    return dirty


@pytest.mark.parametrize("projected", (False, True))
@pytest.mark.parametrize("need_weights", (True, False))
@pytest.mark.parametrize("kind", ("lengths", "keys", "pairs", "both"))
@pytest.mark.parametrize("score", SCORES)
def test_nothing_excluded_reaches_attention(
    score: str, kind: str, need_weights: bool, projected: bool
) -> None:
    """Not even NaN, neither results nor the gradients of inputs and parameters."""
    attention, tensors = attention_case(score)
    restriction, allowed = masking(kind)
    if kind in ("pairs", "both"):
        allowed[0, :, 3] = restriction["mask"][0, :, 3] = False

    def call(query: Tensor, memory: Tensor, value: Tensor) -> Named:
        key = attention.project_memory(memory, **restriction) if projected else None
        fixed = {"key": key, "need_weights": need_weights, **restriction}
        return named_attention(attention, **fixed)(query=query, memory=memory, value=value)

    met = {"query": allowed.any(2), "memory": allowed.any(1), "value": allowed.any(1)}
    dirty = planted(tensors, met)
    assert not any(t.isfinite().all() for t in dirty.values())
    assert_equal(evaluate(call, attention, dirty), evaluate(call, attention, tensors))


@pytest.mark.parametrize("name", ("memory", "value"))
@pytest.mark.parametrize("need_weights", (True, False))
@pytest.mark.parametrize("score", SCORES)
def test_who_may_not_attend_to_nan_does_not_notice(
    score: str, need_weights: bool, name: str
) -> None:
    attention, tensors = attention_case(score)
    mask = torch.ones(3, QUERIES, KEYS).tril().bool()
    call = named_attention(attention, need_weights=need_weights, mask=mask)
    meets = mask[:, :, 2] & torch.tensor([[True], [False], [False]])
    dirty = {k: t.clone() for k, t in tensors.items()}
    dirty[name][0, 2, 1] = math.nan
    found, expected = evaluate(call, attention, dirty), evaluate(call, attention, tensors)
    for result in found.keys() & {"context", "weights", "grad_query"}:
        torch.testing.assert_close(found[result][~meets], expected[result][~meets])
    assert found["context"][meets].isnan().any(-1).all()


def test_project_memory_refuses_a_mask_of_another_shape() -> None:
    attention, tensors = attention_case("additive")
    with pytest.raises(RuntimeError, match=r"mask of shape \(3, 5\) or \(3, Tq, 5\), got \(3, 4\)"):
        attention.project_memory(tensors["memory"], mask=torch.ones(3, 4, dtype=torch.bool))


@pytest.mark.parametrize("need_weights", (True, False))
@pytest.mark.parametrize("score", SCORES)
def test_attention_of_one_query_per_row(score: str, need_weights: bool) -> None:
    attention, tensors = attention_case(score)
    restriction, _ = masking("lengths")
    query = tensors.pop("query")[:, 1]
    tensors["query"] = query
    call = named_attention(attention, need_weights=need_weights, **restriction)
    single = evaluate(call, attention, tensors)
    assert single["context"].shape == (3, 2)
    long = evaluate(call, attention, tensors | {"query": query.unsqueeze(1)})
    for name in ("context", "grad_query", *(["weights"] if need_weights else [])):
        long[name] = long[name].squeeze(1)
    assert_equal(single, long)
    mask = torch.tensor([[1, 0, 1, 1, 0]] * 3).bool()
    by_keys = attention(**tensors, mask=mask)
    by_pairs = attention(**tensors, mask=mask.unsqueeze(1))
    assert torch.equal(by_keys[1], by_pairs[1]) and by_keys[1].shape == (3, KEYS)


@pytest.mark.parametrize("score", SCORES)
def test_attention_with_projected_memory(score: str) -> None:
    """The keys may be computed before; values default to the memory."""
    attention, tensors = attention_case(score)
    attention.value_size = attention.key_size
    query, memory = tensors["query"], tensors["memory"]
    key = attention.project_memory(memory)
    assert key.shape == (3, KEYS, 7 if score in WITH_TANH else 6)
    direct = attention(query, memory)
    explicit = attention(query, memory, memory, key=key)
    for a, b in zip(direct, explicit, strict=True):
        assert torch.equal(a, b)
    other = attention(query, memory, key=key.flip(1))
    torch.testing.assert_close(other[1], direct[1].flip(2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("need_weights", (True, False))
@pytest.mark.parametrize("score", SCORES)
def test_attention_to_an_empty_memory(score: str, need_weights: bool) -> None:
    attention, tensors = attention_case(score)
    tensors = {k: t if k == "query" else t[:, :0] for k, t in tensors.items()}
    call = named_attention(attention, need_weights=need_weights)
    for name, found in evaluate(call, attention, tensors).items():
        assert found.eq(0).all(), name


@pytest.mark.parametrize("score", SCORES)
def test_attention_dropout(score: str) -> None:
    """In training a weight is dropped or scaled; what is returned is the weight before."""
    attention, tensors = attention_case(score, dropout=0.25)
    attention.value_size = 40
    attention.eval()
    memory = dyadic(3, 40, attention.key_size)
    query, value = tensors["query"], torch.eye(40).double().expand(3, 40, 40)
    context, weights = attention(query, memory, value)
    torch.testing.assert_close(context, weights, rtol=0, atol=1e-15)
    attention.train()
    for need_weights in (True, False):
        dropped, before = attention(query, memory, value, need_weights=need_weights)
        if need_weights:
            torch.testing.assert_close(before, weights, rtol=0, atol=1e-15)
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], weights[kept] / 0.75, rtol=1e-12, atol=0)
        assert 0.15 < 1 - kept.double().mean() < 0.35


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_attention_dtypes(score: str, dtype: torch.dtype) -> None:
    """At most twice the error of the formula in the same dtype."""
    ours, baseline, exact = [], [], []
    for _ in range(8):
        attention, tensors = attention_case(score)
        restriction, allowed = masking("both")
        low = copy.deepcopy(attention).to(dtype)
        low_tensors = {k: t.to(dtype) for k, t in tensors.items()}

        def formula(m: Attention, t: Named, allowed: Tensor = allowed) -> Named:
            return evaluate(lambda **t: plain_attention(m, **t, allowed=allowed), m, t)

        ours.append(evaluate(named_attention(low, **restriction), low, low_tensors))
        baseline.append(formula(low, low_tensors))
        exact.append(formula(attention, tensors))
    assert_close_like_torch(ours, baseline, exact)


@pytest.mark.parametrize("score", ("general", "dot", "scaled_dot"))
def test_attention_second_derivatives(score: str) -> None:
    attention, tensors = attention_case(score)
    restriction, _ = masking("lengths")
    leaves = [t[:, :2].requires_grad_() for t in tensors.values()]
    lengths = restriction["lengths"].clamp(max=2)
    assert torch.autograd.gradgradcheck(lambda *t: attention(*t, lengths=lengths), leaves)


def test_attention_initial_values() -> None:
    attention = Attention(50, 200, hidden_size=800)
    fan_in = {"weight_query": 50, "weight_key": 200, "bias": 50, "weight_score": 800}
    parameters = dict(attention.named_parameters())
    assert parameters.keys() == fan_in.keys()
    for name, parameter in parameters.items():
        bound = fan_in[name] ** -0.5
        assert 0.97 * bound < parameter.max() <= bound
        assert -bound <= parameter.min() < -0.97 * bound
    shapes = {k: tuple(v.shape) for k, v in Attention(2, 3, score="concat").named_parameters()}
    assert shapes == {"weight_concat": (2, 5), "weight_score": (2,)}
    shapes = {k: tuple(v.shape) for k, v in Attention(2, 3, score="general").named_parameters()}
    assert shapes == {"weight_general": (2, 3)}


def test_extra_repr() -> None:
    assert "6, 3, value_size=2, hidden_size=7, score='additive', dropout=0.5" in repr(
        attention_case("additive", dropout=0.5)[0]
    )
    assert repr(Attention(4, 4, score="dot")) == "Attention(4, 4, score='dot')"
    text = repr(AttentionDecoder(2, 3, 4, attention="location", coverage=True, input_feeding=False))
    assert "2, 3, 4, cell='lstm', attention='location', coverage=True, input_feeding=False" in text
    assert "location_filters=32, location_kernel=31" in text


# The decoder.

B, T, S = 3, 4, 5


def decoder_case(
    cell: str = "lstm", attention: str = "additive", **options: Any
) -> tuple[AttentionDecoder, Named]:
    memory_size = 4 if attention in ("dot", "scaled_dot") else 6
    if attention in COVERED:
        options.setdefault("attention_size", 7)
    decoder = AttentionDecoder(
        3,
        4,
        memory_size,
        cell=cell,
        attention=attention,
        location_filters=2,
        location_kernel=3,
        dtype=torch.float64,
        **options,
    )
    redraw(decoder)
    layers = decoder.num_layers
    tensors = {"inputs": dyadic(B, T, 3), "memory": dyadic(B, S, memory_size)}
    tensors |= {"hx": dyadic(layers, B, 4)} | (
        {"cx": dyadic(layers, B, 4)} if cell == "lstm" else {}
    )
    return decoder, tensors


def state_of(hx: Tensor, cx: Tensor | None) -> Any:
    return hx if cx is None else (hx, cx)


def named_decoder(decoder: Any, lengths: Tensor | None) -> Callable[..., Named]:
    def call(inputs: Tensor, memory: Tensor, hx: Tensor, cx: Tensor | None = None) -> Named:
        *found, final = decoder(inputs, memory, state_of(hx, cx), lengths=lengths)
        names = ("outputs", "contexts", "weights", "h_n", "c_n")
        return dict(zip(names, (*found, *as_tuple(final)), strict=False))

    return call


def named_plain(decoder: AttentionDecoder, lengths: Tensor | None) -> Callable[..., Named]:
    def call(inputs: Tensor, memory: Tensor, hx: Tensor, cx: Tensor | None = None) -> Named:
        return plain_decoder(decoder, inputs, memory, state_of(hx, cx), lengths)

    return call


def by_steps(decoder: AttentionDecoder) -> Callable[..., Any]:
    """``decoder`` called as ``forward`` is, run by ``init_state`` and ``step``."""

    def call(inputs: Tensor, memory: Tensor, hx: Any = None, *, lengths: Any = None) -> Any:
        state = decoder.init_state(memory, hx, lengths=lengths)
        outputs, contexts, weights = [], [], []
        for input in inputs.unbind(1):
            output, state = decoder.step(input, state, memory)
            outputs.append(output)
            contexts.append(state.context)
            weights.append(state.weights)
        return *(torch.stack(s, 1) for s in (outputs, contexts, weights)), state.hx

    return call


LENGTHS = torch.tensor([S, 2, 0])
COMBINATIONS = [
    (cell, attention, coverage, feeding, layers)
    for cell, attention, coverage, feeding, layers in itertools.product(
        ("lstm", "gru"), ATTENTIONS, (False, True), (False, True), (1, 2)
    )
    if attention in COVERED or not coverage
]


@pytest.mark.parametrize(("cell", "attention", "coverage", "feeding", "layers"), COMBINATIONS)
def test_decoder_is_the_loop(
    cell: str, attention: str, coverage: bool, feeding: bool, layers: int
) -> None:
    decoder, tensors = decoder_case(
        cell, attention, coverage=coverage, input_feeding=feeding, num_layers=layers
    )
    expected = evaluate(named_plain(decoder, LENGTHS), decoder, tensors)
    # Every parameter matters, else its gradient proves nothing.
    assert all(t.abs().max() > 0 for name, t in expected.items()), expected.keys()
    ours = evaluate(named_decoder(decoder, LENGTHS), decoder, tensors)
    assert_near(ours, expected)
    assert ours["weights"][2].eq(0).all() and ours["contexts"][2].eq(0).all()
    assert ours["grad_memory"][2].eq(0).all() and ours["grad_memory"][1, 2:].eq(0).all()
    assert_near(evaluate(named_decoder(by_steps(decoder), LENGTHS), decoder, tensors), expected)


@pytest.mark.parametrize(
    ("attention", "coverage", "feeding"),
    sorted({(attention, coverage, feeding) for _, attention, coverage, feeding, _ in COMBINATIONS}),
)
def test_nothing_excluded_reaches_a_decoder(attention: str, coverage: bool, feeding: bool) -> None:
    """By ``forward``, by ``step``, and where ``step`` is the first to hear of the lengths."""
    decoder, tensors = decoder_case("gru", attention, coverage=coverage, input_feeding=feeding)
    dirty = planted(tensors, {"memory": torch.arange(S) < LENGTHS.unsqueeze(1)})

    def told_late(inputs: Tensor, memory: Tensor, hx: Tensor, *, lengths: Tensor) -> Any:
        state = decoder.init_state(memory, hx)
        outputs, contexts, weights = [], [], []
        for input in inputs.unbind(1):
            output, state = decoder.step(input, state, memory, lengths=lengths)
            outputs.append(output)
            contexts.append(state.context)
            weights.append(state.weights)
        return *(torch.stack(s, 1) for s in (outputs, contexts, weights)), state.hx

    for call in (decoder, by_steps(decoder), told_late):
        run = named_decoder(call, LENGTHS)
        assert_equal(evaluate(run, decoder, dirty), evaluate(run, decoder, tensors))
    with torch.no_grad():
        run = named_decoder(told_late, LENGTHS)
        assert_equal(run(**dirty), run(**tensors))


@pytest.mark.parametrize("attention", ("additive", "location", "dot"))
def test_a_transposed_memory_is_copied_once(attention: str) -> None:
    decoder, tensors = decoder_case("gru", attention)

    def copies(memory: Tensor, steps: int) -> int:
        memory = memory.detach().requires_grad_()
        inputs = tensors["inputs"][:, :1].expand(B, steps, 3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            outputs, *_ = decoder(inputs, memory)
            outputs.sum().backward()
        return sum(event.count for event in profile.key_averages() if event.key == "aten::copy_")

    def more(steps: int) -> int:
        turned = tensors["memory"].transpose(0, 1).contiguous().transpose(0, 1)
        return copies(turned, steps) - copies(tensors["memory"], steps)

    assert more(2) == more(7) > 0


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_decoder_without_lengths_or_state(attention: str) -> None:
    decoder, tensors = decoder_case("gru", attention, coverage=attention in COVERED)
    tensors["hx"].zero_()
    expected = named_plain(decoder, None)(**tensors)
    outputs, contexts, weights, h_n = decoder(tensors["inputs"], tensors["memory"])
    found = {"outputs": outputs, "contexts": contexts, "weights": weights, "h_n": h_n}
    assert_near(found, expected)


def test_location_sees_both_sides_of_the_last_weights() -> None:
    """An even simpler check of eq. 8: one filter that moves the weights by one key."""
    decoder, tensors = decoder_case("gru", "location")
    with torch.no_grad():
        for name in ("weight_query", "weight_key", "bias"):
            getattr(decoder.attention, name).zero_()
        decoder.attention.weight_score.fill_(1)
        decoder.location_weight.fill_(1)
        decoder.location_filter.zero_()
        decoder.location_filter[0, 0] = 1
    _, _, weights, _ = decoder(tensors["inputs"], tensors["memory"])
    torch.testing.assert_close(weights[:, 0], torch.full((B, S), 0.2).double())
    before = torch.tensor([0, 0.2, 0.2, 0.2, 0.2]).double()  # key j sees key j - 1, key 0 nothing
    expected = torch.softmax(7 * torch.tanh(before), 0).expand(B, S)
    torch.testing.assert_close(weights[:, 1], expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_decoder_with_an_empty_memory(attention: str) -> None:
    decoder, tensors = decoder_case("gru", attention)
    memory = tensors["memory"][:, :0]
    outputs, contexts, weights, _ = decoder(tensors["inputs"], memory)
    assert weights.shape == (B, T, 0) and contexts.eq(0).all() and outputs.isfinite().all()


def test_lengths_given_to_step() -> None:
    """They take the place of init_state's."""
    decoder, tensors = decoder_case()
    memory, input = tensors["memory"], tensors["inputs"][:, 0]
    known = decoder.init_state(memory, lengths=LENGTHS)
    expected, _ = decoder.step(input, known, memory)
    output, state = decoder.step(input, decoder.init_state(memory), memory, lengths=LENGTHS)
    assert torch.equal(output, expected)
    assert torch.equal(state.weights[1, 2:], torch.zeros(3).double())
    without, _ = decoder.step(input, decoder.init_state(memory), memory)
    assert not torch.equal(without, expected)


@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_states_of_chosen_rows(cell: str) -> None:
    decoder, tensors = decoder_case(cell, "location", coverage=True)
    rows = torch.tensor([2, 0, 0, 1])
    memory, (first, second) = tensors["memory"], tensors["inputs"].unbind(1)[:2]
    _, state = decoder.step(first, decoder.init_state(memory, lengths=LENGTHS), memory)
    output, after = decoder.step(second, state, memory)
    moved = state.select(rows)
    assert isinstance(moved, DecoderState)
    chosen, chosen_after = decoder.step(second[rows], moved, memory[rows])
    torch.testing.assert_close(chosen, output[rows], rtol=0, atol=1e-14)
    torch.testing.assert_close(chosen_after.coverage, after.coverage[rows], rtol=0, atol=1e-14)
    torch.testing.assert_close(
        as_tuple(chosen_after.hx)[-1], as_tuple(after.hx)[-1][:, rows], rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("feeding", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("attention", ("additive", "location", "general"))
def test_decoder_dtypes(attention: str, dtype: torch.dtype, feeding: bool) -> None:
    ours, baseline, exact = [], [], []
    for _ in range(20):  # errors of sums that nearly cancel have long tails
        decoder, tensors = decoder_case("lstm", attention, input_feeding=feeding)
        low, low_tensors = (
            copy.deepcopy(decoder).to(dtype),
            {k: t.to(dtype) for k, t in tensors.items()},
        )
        ours.append(evaluate(named_decoder(low, LENGTHS), low, low_tensors))
        baseline.append(evaluate(named_plain(low, LENGTHS), low, low_tensors))
        exact.append(evaluate(named_plain(decoder, LENGTHS), decoder, tensors))
    assert_close_like_torch(ours, baseline, exact)


@pytest.mark.parametrize("feeding", (False, True))
def test_decoder_dropout(feeding: bool) -> None:
    decoder, tensors = decoder_case("gru", dropout=0.5, input_feeding=feeding)
    inputs, memory = tensors["inputs"], tensors["memory"]
    decoder.eval()
    expected = decoder(inputs, memory)
    decoder.train()
    found = decoder(inputs, memory)
    kept = found[0] != 0
    assert 0.2 < kept.double().mean() < 0.8
    torch.testing.assert_close(found[0][kept], 2 * expected[0][kept])
    for a, b in zip(found[1:], expected[1:], strict=True):  # nothing else has dropout
        assert torch.equal(a, b)
    deep, _ = decoder_case("gru", dropout=0.5, input_feeding=feeding, num_layers=2)
    assert not torch.equal(deep(inputs, memory)[2], deep(inputs, memory)[2])
    deep.eval()
    assert torch.equal(deep(inputs, memory)[0], deep(inputs, memory)[0])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_decoder_copies(attention: str) -> None:
    decoder, tensors = decoder_case("lstm", attention, coverage=attention in COVERED)
    call = named_decoder(decoder, LENGTHS)
    expected = call(**tensors)
    buffer = io.BytesIO()
    torch.save(decoder.state_dict(), buffer)
    buffer.seek(0)
    fresh, _ = decoder_case("lstm", attention, coverage=attention in COVERED)
    assert not torch.equal(named_decoder(fresh, LENGTHS)(**tensors)["outputs"], expected["outputs"])
    fresh.load_state_dict(torch.load(buffer))
    twins = (fresh, copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder)))
    for twin in twins:
        assert_equal(named_decoder(twin, LENGTHS)(**tensors), expected)
    before = {k: t.clone() for k, t in decoder.state_dict().items()}
    decoder.reset_parameters()
    assert all(not torch.equal(t, before[k]) for k, t in decoder.state_dict().items())


@pytest.mark.parametrize("feeding", (False, True))
@pytest.mark.parametrize("attention", ("additive", "general", "location"))
def test_decoder_compiles(attention: str, feeding: bool) -> None:
    torch._dynamo.reset()
    decoder, tensors = decoder_case("gru", attention, input_feeding=feeding)
    tensors["inputs"] = tensors["inputs"][:, :2]
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    expected = evaluate(named_decoder(decoder, LENGTHS), decoder, tensors)
    assert_near(evaluate(named_decoder(compiled, LENGTHS), decoder, tensors), expected)


@pytest.mark.parametrize("attention", ("additive", "general", "location"))
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_decoder_under_autocast(cell: str, attention: str) -> None:
    """At most twice the error of the loop with its products in bfloat16, as autocast has them."""
    ours, baseline, exact = [], [], []
    for _ in range(3):
        decoder, tensors = decoder_case(cell, attention, coverage=attention == "location")
        low, low_tensors = double(decoder).float(), {k: t.float() for k, t in tensors.items()}
        with torch.autocast("cpu", torch.bfloat16):
            found = named_decoder(low, LENGTHS)(**low_tensors)
            stepped = named_decoder(by_steps(low), LENGTHS)(**low_tensors)
            loop = named_plain(low, LENGTHS)(**low_tensors)
        assert_equal(stepped, found)
        ours.append({k: t.detach().float() for k, t in found.items()})
        baseline.append({k: t.detach().bfloat16().float() for k, t in loop.items()})
        exact.append({k: t.detach() for k, t in named_plain(decoder, LENGTHS)(**tensors).items()})
    for name in ours[0]:
        worst = max((a[name] - c[name]).abs().max() for a, c in zip(ours, exact, strict=True))
        theirs = max((b[name] - c[name]).abs().max() for b, c in zip(baseline, exact, strict=True))
        scale = max(c[name].abs().max() for c in exact)
        assert worst <= 2 * theirs + 4 * torch.finfo(torch.bfloat16).eps * scale, name


# The coverage loss.


def test_coverage_loss() -> None:
    weights = torch.rand(3, 5, 4, dtype=torch.float64)
    lengths = torch.tensor([5, 2, 0])

    def plain(weights: Tensor, lengths: list[int]) -> Tensor:
        rows = []
        for row, length in zip(weights, lengths, strict=True):
            total = row.new_zeros(())
            for t in range(length):
                for i in range(4):
                    a, c = row[t, i], row[:t, i].sum()
                    total = total + (a if a < c else c)
            rows.append(total / max(length, 1))
        return torch.stack(rows).mean()

    for given in (None, lengths):
        weights = weights.detach().requires_grad_()
        ours = coverage_loss(weights, given)
        expected = plain(weights, [5, 5, 5] if given is None else given.tolist())
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
        (a,), (b,) = (torch.autograd.grad(loss, weights) for loss in (ours, expected))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    once = torch.eye(4).double().unsqueeze(0)
    assert coverage_loss(once) == 0  # every key once
    assert coverage_loss(once[:, :1].expand(1, 4, 4)) == 0.75  # one key four times


# Decoding. Tokens 0 .. V - 1, the last one ends a sequence, token 0 begins it.

VOCABULARY = 4
EOS = VOCABULARY - 1


class Language(nn.Module):
    """A decoder with its embedding and readout."""

    def __init__(self, cell: str = "lstm", **options: Any) -> None:
        super().__init__()
        options = {"attention": "location", "coverage": True, "num_layers": 2} | options
        self.decoder = AttentionDecoder(3, 4, 6, cell=cell, **options)
        self.embed = nn.Embedding(VOCABULARY, 3)
        self.readout = nn.Linear(4, VOCABULARY)
        self.double().eval()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn_like(parameter))
        self.requires_grad_(False)

    def search(self, search: Callable[..., Any], memory: Tensor, **options: Any) -> Any:
        return search(self.decoder, self.embed, self.readout, memory, bos=0, eos=EOS, **options)

    def score(self, tokens: list[int], memory: Tensor) -> tuple[list[Tensor], Tensor]:
        """The log probabilities of all that may follow each prefix, and the weights; one row."""
        inputs = self.embed(torch.tensor([[0, *tokens]]))
        outputs, _, weights, _ = self.decoder(inputs, memory.unsqueeze(0))
        return list(F.log_softmax(self.readout(outputs)[0], -1)), weights[0]


@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_greedy_is_the_likeliest_token_each_time(cell: str) -> None:
    language = Language(cell)
    memory, lengths = dyadic(8, S, 6), torch.tensor([5, 4, 3, 2, 1, 5, 5, 0])
    tokens, weights = language.search(greedy_decode, memory, max_length=6, lengths=lengths)
    assert weights.shape == (*tokens.shape, S)
    ends = set()
    for b in range(8):
        row: list[int] = []
        valid = memory[b, : lengths[b]]
        while len(row) < 6 and EOS not in row:
            row.append(int(language.score(row, valid)[0][-1].argmax()))
        L = len(row)
        ends.add(L)
        assert tokens[b].tolist() == (row + [EOS] * 6)[: tokens.shape[1]]
        expected = torch.zeros(tokens.shape[1], S).double()
        expected[:L, : lengths[b]] = language.score(row[:-1], valid)[1]
        torch.testing.assert_close(weights[b], expected, rtol=0, atol=1e-12)
    assert len(ends) > 1 and tokens.shape[1] == max(ends)


def test_greedy_starts_from_hx_and_stops_early() -> None:
    language = Language("gru")
    memory = dyadic(4, S, 6)
    with torch.no_grad():
        language.readout.bias[EOS] = 100
    tokens, weights = language.search(greedy_decode, memory, max_length=50)
    assert tokens.tolist() == [[EOS]] * 4 and weights.shape == (4, 1, S)
    hx = dyadic(2, 4, 4)
    _, started = language.search(greedy_decode, memory, max_length=50, hx=hx)
    expected = language.decoder(language.embed(torch.zeros(4, 1).long()), memory, hx)[2]
    torch.testing.assert_close(started, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", ({}, {"attention": "general", "coverage": False}), ids=str)
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_a_beam_of_one_is_greedy(cell: str, options: dict[str, Any]) -> None:
    language = Language(cell, **options)
    memory, lengths = dyadic(8, S, 6), torch.tensor([5, 4, 3, 2, 1, 5, 5, 0])
    tokens, weights = language.search(greedy_decode, memory, max_length=6, lengths=lengths)
    found = language.search(beam_search, memory, max_length=6, lengths=lengths, beam=1)
    assert len(found) == 8
    for b, (best,) in enumerate(found):
        L = len(best.tokens)
        assert best.tokens.tolist() == tokens[b, :L].tolist()
        assert tokens[b, L:].eq(EOS).all()
        assert tokens.shape[1] == L or best.tokens[-1] == EOS
        torch.testing.assert_close(best.weights, weights[b, :L], rtol=0, atol=1e-12)


Ranked = list[tuple[list[int], float]]


def penalised(score: float, length: int, exponent: float) -> float:
    return score / ((5 + length) / 6) ** exponent


def exhaustive(language: Language, memory: Tensor, longest: int, exponent: float) -> Ranked:
    """Every sequence that ends, or is as long as it may be, best first."""
    found = []
    for length in range(1, longest + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            if EOS in tokens[:-1] or (length < longest and tokens[-1] != EOS):
                continue
            steps, _ = language.score(list(tokens[:-1]), memory)
            score = math.fsum(float(s[t]) for s, t in zip(steps, tokens, strict=True))
            found.append((list(tokens), penalised(score, length, exponent)))
    return sorted(found, key=lambda each: -each[1])


def listed_beam(
    language: Language, memory: Tensor, longest: int, beam: int, exponent: float
) -> Ranked:
    """Beam search with lists, every hypothesis scored from its beginning."""
    places: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(longest):
        grown = []
        for tokens, score in places:
            if tokens[-1:] == [EOS]:
                grown.append((tokens, score))
                continue
            following = language.score(tokens, memory)[0][-1]
            grown += [([*tokens, v], score + float(following[v])) for v in range(VOCABULARY)]
        grown.sort(key=lambda each: -penalised(each[1], len(each[0]), exponent))
        places = grown[:beam]
    return [(tokens, penalised(score, len(tokens), exponent)) for tokens, score in places]


def assert_hypotheses(
    found: list[Hypothesis], expected: Ranked, language: Language, memory: Tensor
) -> None:
    assert [h.tokens.tolist() for h in found] == [tokens for tokens, _ in expected]
    for hypothesis, (tokens, score) in zip(found, expected, strict=True):
        assert hypothesis.score == pytest.approx(score, rel=1e-10)
        weights = language.score(tokens[:-1], memory)[1]
        torch.testing.assert_close(
            hypothesis.weights[:, : len(memory)], weights, rtol=0, atol=1e-12
        )
        assert hypothesis.weights[:, len(memory) :].eq(0).all()


@pytest.mark.parametrize("exponent", (0.0, 0.8))
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_a_wide_beam_is_exhaustive(cell: str, exponent: float) -> None:
    language = Language(cell)
    memory, lengths = dyadic(2, S, 6), torch.tensor([5, 3])
    options: dict[str, Any] = {"max_length": 3, "length_penalty": exponent}
    wide = language.search(beam_search, memory, lengths=lengths, beam=60, **options)
    for b in range(2):
        valid = memory[b, : lengths[b]]
        expected = exhaustive(language, valid, 3, exponent)
        assert len(expected) == 1 + 3 + 9 * 4
        assert_hypotheses(wide[b], expected, language, valid)


@pytest.mark.parametrize("exponent", (0.0, 2.0))
@pytest.mark.parametrize("beam", (2, 3))
def test_a_narrow_beam_is_the_search_with_lists(beam: int, exponent: float) -> None:
    language = Language("gru")
    language.readout.bias[EOS] += 1
    memory, lengths = dyadic(6, S, 6), torch.tensor([5, 4, 3, 2, 1, 0])
    options: dict[str, Any] = {"beam": beam, "length_penalty": exponent}
    found = language.search(beam_search, memory, lengths=lengths, max_length=5, **options)
    lasts = set()
    for b in range(6):
        valid = memory[b, : lengths[b]]
        expected = listed_beam(language, valid, 5, beam, exponent)
        assert_hypotheses(found[b], expected, language, valid)
        lasts |= {tokens[-1] == EOS for tokens, _ in expected}
    assert True in lasts


def test_beam_search_among_equals() -> None:
    """The place continued, then the token; an ended hypothesis keeps its score."""
    language = Language()
    language.readout.weight.zero_()
    language.readout.bias.zero_()
    (found,) = language.search(beam_search, dyadic(1, S, 6), beam=5, max_length=3)
    assert [h.tokens.tolist() for h in found] == [
        [EOS],
        [0, EOS],
        [0, 0, 0],
        [0, 0, 1],
        [0, 0, 2],
    ]


def test_beam_search_leaves_out_the_impossible() -> None:
    language = Language()
    language.readout.weight.zero_()
    language.readout.bias.copy_(torch.tensor([0, -torch.inf, -torch.inf, 0]))
    (found,) = language.search(beam_search, dyadic(1, S, 6), beam=20, max_length=2)
    assert [h.tokens.tolist() for h in found] == [[EOS], [0, 0], [0, EOS]]
    assert [h.score for h in found] == pytest.approx([-math.log(2), *[-2 * math.log(2)] * 2])


def test_decoding_records_no_gradient() -> None:
    language = Language().requires_grad_()
    tokens, weights = language.search(greedy_decode, dyadic(1, S, 6), max_length=2)
    assert not weights.requires_grad and not tokens.requires_grad
    ((best, *_),) = language.search(beam_search, dyadic(1, S, 6), max_length=2)
    assert not best.weights.requires_grad


# Errors.


@pytest.mark.parametrize(
    ("names", "args", "options"),
    [
        ("score 'cosine'.*additive", (2, 2), {"score": "cosine"}),
        ("dropout.*1.0", (2, 2), {"dropout": 1.0}),
        ("hidden_size.*'dot'", (2, 2), {"score": "dot", "hidden_size": 3}),
        ("query_size equal to key_size, got 2 and 3", (2, 3), {"score": "scaled_dot"}),
        ("key_size.*got 0", (2, 0), {}),
        ("value_size.*got -1", (2, 2, -1), {}),
        ("hidden_size.*got 0", (2, 2), {"hidden_size": 0}),
    ],
)
def test_attention_options_refused(names: str, args: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=names):
        Attention(*args, **options)


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ("cell 'rnn'.*lstm", {"cell": "rnn"}),
        ("attention 'cosine'.*location", {"attention": "cosine"}),
        ("coverage.*'dot'", {"attention": "dot", "coverage": True}),
        ("attention_size.*'general'", {"attention": "general", "attention_size": 4}),
        ("hidden_size equal to memory_size, got 3 and 4", {"attention": "dot"}),
        ("location_kernel.*odd.*got 4", {"attention": "location", "location_kernel": 4}),
        ("location_filters.*got 0", {"attention": "location", "location_filters": 0}),
        ("num_layers", {"num_layers": 0}),
        ("dropout.*-0.1", {"dropout": -0.1}),
    ],
)
def test_decoder_options_refused(names: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=names):
        AttentionDecoder(2, 3, 4, **options)


@pytest.mark.parametrize("score", ("additive", "dot"))
@pytest.mark.parametrize(
    ("error", "names", "replaced"),
    [
        (RuntimeError, r"query of .*B, Tq, 6\) or \(B, 6\), got \(3, 4, 5\)", {"query": (3, 4, 5)}),
        (RuntimeError, r"query .*got \(6,\)", {"query": (6,)}),
        (RuntimeError, r"memory of shape \(3, Tk, 6\), got \(3, 5, 4\)", {"memory": (3, 5, 4)}),
        (RuntimeError, r"memory of shape \(3, Tk, 6\), got \(2, 5, 6\)", {"memory": (2, 5, 6)}),
        (RuntimeError, r"value of shape \(3, 5, 2\), got \(3, 4, 2\)", {"value": (3, 4, 2)}),
        (RuntimeError, r"value of shape \(3, 5, 2\), got None", {"value": None}),
        (RuntimeError, r"key of shape \(3, 5, 6\), got \(3, 5, 1\)", {"key": (3, 5, 1)}),
        (RuntimeError, r"memory of dtype .*64, got .*32", {"memory": torch.zeros(3, 5, 6)}),
        (RuntimeError, r"value of dtype .*64, got .*32", {"value": torch.zeros(3, 5, 2)}),
        (RuntimeError, r"lengths of shape \(3,\), got \(2,\)", {"lengths": torch.tensor([1, 2])}),
        (RuntimeError, r"lengths of an integer dtype", {"lengths": torch.ones(3)}),
        (RuntimeError, r"lengths within 0\.\.5, got \[1, 6,", {"lengths": torch.tensor([1, 6, 0])}),
        (RuntimeError, r"lengths within 0\.\.5, got .*-1", {"lengths": torch.tensor([1, -1, 0])}),
        (TypeError, "lengths should be a tensor, got list", {"lengths": [1, 2, 3]}),
        (RuntimeError, r"mask of dtype torch.bool", {"mask": torch.ones(3, 5)}),
        (RuntimeError, r"mask of .*5\) or \(3, 4, 5\), got \(3, 4\)", {"mask": torch.ones(3, 4)}),
        (RuntimeError, r"mask of shape .* got \(3, 1, 5\)", {"mask": torch.ones(3, 1, 5).bool()}),
        (TypeError, "mask should be a tensor", {"mask": True}),
        (TypeError, "memory should be a tensor", {"memory": None}),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)  # fmt: skip
def test_attention_arguments_refused(
    score: str, error: type[Exception], names: str, replaced: dict[str, Any]
) -> None:
    attention = Attention(6, 6, 2, score=score, dtype=torch.float64)
    tensors: dict[str, Any] = {"query": (3, 4, 6), "memory": (3, 5, 6), "value": (3, 5, 2)}
    tensors |= replaced
    with pytest.raises(error, match=names):
        attention(**{k: dyadic(*t) if isinstance(t, tuple) else t for k, t in tensors.items()})


@pytest.mark.parametrize("feeding", (False, True))
@pytest.mark.parametrize(
    ("error", "names", "replaced"),
    [
        (RuntimeError, r"inputs of shape \(3, T, 3\), got \(3, 4, 2\)", {"inputs": (3, 4, 2)}),
        (RuntimeError, r"inputs of shape \(3, T, 3\), got \(2, 4, 3\)", {"inputs": (2, 4, 3)}),
        (RuntimeError, r"inputs of more than 0 timesteps", {"inputs": (3, 0, 3)}),
        (RuntimeError, r"inputs of dtype torch.float64", {"inputs": torch.zeros(3, 4, 3)}),
        (RuntimeError, r"memory of shape \(B, S, 6\), got \(3, 5, 5\)", {"memory": (3, 5, 5)}),
        (RuntimeError, r"memory of dtype torch.float64", {"memory": torch.zeros(3, 5, 6)}),
        (TypeError, r"memory should be a tensor", {"memory": None}),
        (RuntimeError, r"[hH]idden.*\(1, 3, 4\)", {"hx": (2, 3, 4)}),
        (RuntimeError, r"lengths within 0..5", {"lengths": torch.tensor([6, 0, 0])}),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)  # fmt: skip
def test_decoder_arguments_refused(
    feeding: bool, error: type[Exception], names: str, replaced: dict[str, Any]
) -> None:
    decoder, _ = decoder_case("gru", input_feeding=feeding)
    given: dict[str, Any] = {"inputs": (3, 4, 3), "memory": (3, 5, 6)} | replaced
    with pytest.raises(error, match=names):
        decoder(**{k: dyadic(*t) if isinstance(t, tuple) else t for k, t in given.items()})


def test_step_and_searches_refuse() -> None:
    decoder, tensors = decoder_case()
    memory, input = tensors["memory"], tensors["inputs"][:, 0]
    state = decoder.init_state(memory)
    with pytest.raises(RuntimeError, match=r"input of shape \(3, 3\), got \(3, 4, 3\)"):
        decoder.step(tensors["inputs"], state, memory)
    with pytest.raises(RuntimeError, match=r"memory of shape \(3, 5, 6\), got \(3, 4, 6\)"):
        decoder.step(input, state, memory[:, 1:])
    with pytest.raises(RuntimeError, match=r"input of dtype torch.float64"):
        decoder.step(input.float(), state, memory)
    with pytest.raises(RuntimeError, match=r"lengths within 0\.\.5"):
        decoder.step(input, state, memory, lengths=torch.tensor([0, 0, 6]))
    language = Language()
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        language.search(greedy_decode, memory, max_length=0)
    with pytest.raises(ValueError, match="beam must be at least 1, got 0"):
        language.search(beam_search, memory, max_length=1, beam=0)
    with pytest.raises(RuntimeError, match=r"weights of shape \(B, T, S\)"):
        coverage_loss(torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match=r"lengths within 0\.\.4"):
        coverage_loss(torch.zeros(3, 4, 2), torch.tensor([5, 0, 0]))
