"""Sentiment of words and emoticons, read letter by letter: one model on torch.nn and on fused_rnn.

The data is the VADER lexicon (Hutto & Gilbert 2014), which comes with the PyPI package
vaderSentiment: some 7,500 English words, slang, acronyms and emoticons, each with the mean of ten
human ratings from -4 to 4. A bidirectional LSTM reads a token's characters, and its last states
decide whether the rating is above zero. One in five tokens is held out.

The model is built twice from one seed, with torch.nn.LSTM and then the same through
fused_rnn.convert, and both are trained on the same batches, epoch by epoch in turns::

    pip install --no-build-isolation ".[examples]"
    python examples/sentiment.py
"""

from __future__ import annotations

import argparse
import importlib.resources
import math
import random
import re
import statistics
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence

import fused_rnn

EMBEDDING = 32
HIDDEN = 128
BATCH = 64
LEARNING_RATE = 2e-3
HELD_OUT = 0.2


class Token(NamedTuple):
    text: str
    rating: float  # mean of ten people's, -4 to 4

    @property
    def positive(self) -> bool:
        return self.rating > 0

    @property
    def is_emoticon(self) -> bool:
        """Signs without two letters in a row; a few abbreviations such as j/k are among them."""
        return re.search(r"[^\W_]{2}", self.text) is None and not self.text.isalnum()


class Sentiment(nn.Module):
    """Characters to the logit of a positive rating."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.dropout = nn.Dropout(0.3)
        self.lstm = nn.LSTM(EMBEDDING, HIDDEN, bidirectional=True)
        self.readout = nn.Linear(2 * HIDDEN, 1)

    def forward(self, characters: Tensor, lengths: Tensor) -> Tensor:
        """characters (T, B), padded; lengths (B,) on the CPU. Returns (B,)."""
        embedded = self.dropout(self.embedding(characters))
        packed: PackedSequence = pack_padded_sequence(embedded, lengths, enforce_sorted=False)
        _, (h_n, _) = self.lstm(packed)
        # h_n holds the state after each token's own last character: forwards that of its end,
        # backwards that of its beginning.
        return self.readout(self.dropout(h_n.transpose(0, 1).flatten(1))).squeeze(-1)


class Batch(NamedTuple):
    characters: Tensor  # (T, B)
    lengths: Tensor  # (B,)
    positive: Tensor  # (B,) 0.0 or 1.0


@dataclass
class Trainee:
    name: str
    model: nn.Module  # a Sentiment, or what is wrapped around it
    losses: list[float] = field(default_factory=list)  # mean over each epoch
    seconds: list[float] = field(default_factory=list)  # of each epoch

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE)

    def epoch(self, batches: list[Batch], seed: int) -> None:
        self.model.train()
        torch.manual_seed(seed)  # of the dropout
        total = 0.0
        start = time.perf_counter()
        for batch in batches:
            logits = self.model(batch.characters, batch.lengths)
            loss = F.binary_cross_entropy_with_logits(logits, batch.positive)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += float(loss.detach()) * len(batch.lengths)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(total / sum(len(batch.lengths) for batch in batches))

    @torch.no_grad()
    def probabilities(self, batches: list[Batch]) -> Tensor:
        self.model.eval()
        return torch.cat([self.model(b.characters, b.lengths).sigmoid() for b in batches])


def read_lexicon() -> list[Token]:
    lexicon = importlib.resources.files("vaderSentiment") / "vader_lexicon.txt"
    tokens = []
    for line in lexicon.read_text(encoding="utf-8").splitlines():
        text, rating, *_ = line.split("\t")
        tokens.append(Token(text, float(rating)))
    return [token for token in tokens if token.rating != 0]


def split(tokens: list[Token], seed: int) -> tuple[list[Token], list[Token]]:
    """Training and held-out tokens, both with the lexicon's share of each sign and kind."""
    groups: dict[tuple[bool, bool], list[Token]] = {}
    for token in tokens:
        groups.setdefault((token.positive, token.is_emoticon), []).append(token)
    chance = random.Random(seed)
    train: list[Token] = []
    held_out: list[Token] = []
    for group in groups.values():
        chance.shuffle(group)
        cut = round(HELD_OUT * len(group))
        held_out += group[:cut]
        train += group[cut:]
    return train, held_out


def alphabet_of(tokens: list[Token]) -> dict[str, int]:
    """Numbers of the characters; 0 is padding, and characters that are not there."""
    letters = sorted({c for token in tokens for c in token.text})
    return {c: i + 1 for i, c in enumerate(letters)}


def encode(tokens: list[Token], alphabet: dict[str, int], size: int = BATCH) -> list[Batch]:
    """Batches of ``size`` tokens, the last one of what remains."""
    batches = []
    for at in range(0, len(tokens), size):
        some = tokens[at : at + size]
        rows = [torch.tensor([alphabet.get(c, 0) for c in token.text]) for token in some]
        batches.append(
            Batch(
                pad_sequence(rows),
                torch.tensor([len(row) for row in rows]),
                torch.tensor([float(token.positive) for token in some]),
            )
        )
    return batches


def majority_of(tokens: list[Token]) -> float:
    """The accuracy of always answering the more frequent sign."""
    positive = sum(token.positive for token in tokens) / len(tokens)
    return max(positive, 1 - positive)


def accuracy(probabilities: Tensor, tokens: list[Token]) -> float:
    right = [
        (p > 0.5) == token.positive for p, token in zip(probabilities.tolist(), tokens, strict=True)
    ]
    return sum(right) / len(right)


def train(
    console: Console, trainees: list[Trainee], tokens: list[Token], alphabet: dict[str, int],
    epochs: int, seed: int,
) -> None:  # fmt: skip
    """Trains all on the same batches, an epoch of each in turns."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=epochs * len(trainees))
        for epoch in range(epochs):
            shuffled = random.Random(seed + epoch).sample(tokens, len(tokens))
            batches = encode(shuffled, alphabet)
            # Whoever is first changes, so that neither always follows the other.
            for trainee in trainees if epoch % 2 else trainees[::-1]:
                progress.update(task, description=f"epoch {epoch + 1}, {trainee.name}")
                trainee.epoch(batches, seed + epoch)
                progress.advance(task)


def loss_table(ours: Trainee, peer: Trainee) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="training loss per epoch", title_justify="left")
    seconds = (f"{peer.name} s", f"{ours.name} s")
    for name in ("epoch", peer.name, ours.name, "difference", *seconds):
        table.add_column(name, justify="right")
    for epoch, (theirs, own) in enumerate(zip(peer.losses, ours.losses, strict=True)):
        table.add_row(
            str(epoch + 1),
            f"{theirs:.6f}",
            f"{own:.6f}",
            f"{abs(theirs - own):.1e}",
            f"{peer.seconds[epoch]:.2f}",
            f"{ours.seconds[epoch]:.2f}",
        )
    return table


def example_table(tokens: list[Token], probabilities: Tensor, seed: int) -> Table:
    """Held-out tokens drawn at random, six words and six emoticons."""
    table = Table(
        box=box.SIMPLE_HEAD, title="held-out tokens drawn at random", title_justify="left"
    )
    table.add_column("token")
    table.add_column("people, -4 to 4", justify="right")
    table.add_column("model, P(positive)", justify="right")
    table.add_column("")
    chance = random.Random(seed)
    rated = list(zip(tokens, probabilities.tolist(), strict=True))
    for emoticons in (False, True):
        for token, p in chance.sample([r for r in rated if r[0].is_emoticon == emoticons], 6):
            right = (p > 0.5) == token.positive
            # Text: in plain strings rich would take [: for markup and :) for the name of an emoji.
            table.add_row(
                Text(token.text), f"{token.rating:+.1f}", f"{p:.2f}", "" if right else "wrong"
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Character-level sentiment, torch.nn and fused.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(highlight=False)

    tokens = read_lexicon()
    train_tokens, held_out = split(tokens, options.seed)
    alphabet = alphabet_of(train_tokens)
    majority = majority_of(held_out)
    emoticons = sum(token.is_emoticon for token in held_out)
    console.print(
        f"{len(train_tokens)} tokens to learn from, {len(held_out)} held out, {emoticons} of them "
        f"emoticons\n{len(alphabet)} characters, {torch.get_num_threads()} threads"
    )

    def build() -> Sentiment:
        torch.manual_seed(options.seed)
        return Sentiment(len(alphabet) + 1)

    peer = Trainee("torch.nn", build())
    ours = Trainee("fused_rnn", fused_rnn.convert(build()))
    assert type(peer.model.lstm) is nn.LSTM and type(ours.model.lstm) is fused_rnn.LSTM
    train(console, [ours, peer], train_tokens, alphabet, options.epochs, options.seed)

    console.print(loss_table(ours, peer))
    batches = encode(held_out, alphabet)
    theirs, own = peer.probabilities(batches), ours.probabilities(batches)
    console.print(example_table(held_out, own, options.seed))

    difference = max(abs(a - b) for a, b in zip(ours.losses, peer.losses, strict=True))
    # The two round differently, and each step of the optimizer may add one rounding.
    steps = options.epochs * math.ceil(len(train_tokens) / BATCH)
    bound = steps * torch.finfo(torch.float32).eps
    ratio = statistics.median(b / a for a, b in zip(ours.seconds, peer.seconds, strict=True))
    right = accuracy(own, held_out)
    console.print("summary", style="bold")
    for line in (
        f"Losses differ by at most {difference:.1e}; {steps} float32 roundings: {bound:.1e}.",
        f"An epoch takes {statistics.median(peer.seconds):.2f} s with torch.nn and "
        f"{statistics.median(ours.seconds):.2f} s with fused_rnn (medians).",
        f"fused_rnn trains {ratio:.2f} times as fast (median of epochs, the whole step counted).",
        f"Held-out accuracy: {right:.1%} with fused_rnn, {accuracy(theirs, held_out):.1%} with "
        f"torch.nn.",
        f"Always answering the more frequent sign: {majority:.1%}.",
    ):
        console.print(f"- {line}", soft_wrap=True)
    assert difference <= bound, "the two models did not follow the same loss curve"
    assert right > majority, "the model learned nothing"


if __name__ == "__main__":
    main()
