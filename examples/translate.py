"""Names from English into another language, letter by letter, with attention and without.

The data is the Unicode CLDR's (https://cldr.unicode.org, under the Unicode License v3), as it comes
with the PyPI package babel: territories, languages, scripts, currencies, time zones and their
cities, named in English and in the language asked for, some 1,700 pairs. One name in seven is held
out, from all the kinds of things it names.

A bidirectional LSTM reads the English name, preceded by a sign for the kind of thing it names, and
fused_rnn.AttentionDecoder writes the other one. The same model without attention is trained beside
it: its decoder sees, at every step, the encoder's final state. What the first one looked at while
it wrote goes into a picture::

    pip install --no-build-isolation ".[examples]"
    python examples/translate.py --short
    python examples/translate.py --language nl --checkpoint translate.pt

Interrupted runs with a checkpoint go on after the last epoch they finished.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from babel import Locale, UnknownLocaleError
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fused_rnn
from fused_rnn.attention import greedy_decode

EMBEDDING = 48
LABEL_SMOOTHING = 0.1
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
WARMUP = 50  # steps until the full learning rate
HELD_OUT = 0.15
LONGEST = 32  # characters of a name; longer ones are left out
PADDING, BOS, EOS = 0, 1, 2  # tokens before the characters of the other language


class Pair(NamedTuple):
    kind: str  # what the name names
    source: str
    target: str


@dataclass(frozen=True)
class Settings:
    """All that a checkpoint has to agree on with the run that takes it up."""

    language: str
    seed: int
    epochs: int
    hidden: int
    batch: int
    dropout: float
    learning_rate: float


class Alphabet(NamedTuple):
    source: dict[str, int]  # kinds of things and characters; 0 for padding and what is not there
    target: dict[str, int]


class Batch(NamedTuple):
    source: Tensor  # (B, S), padded
    lengths: Tensor  # (B,) of source
    target: Tensor  # (B, T), from BOS to EOS, padded


class Translator(nn.Module):
    """Characters of a name to those of its translation.

    Without attention the decoder's memory is one place, the encoder's final state. Attention has
    nothing to choose there, so that this state is the context of every step; all else is equal.
    """

    def __init__(self, alphabet: Alphabet, settings: Settings, attention: bool) -> None:
        super().__init__()
        hidden = settings.hidden
        targets = len(alphabet.target) + 3
        self.attention = attention
        self.source_embedding = nn.Embedding(len(alphabet.source) + 1, EMBEDDING)
        self.target_embedding = nn.Embedding(targets, EMBEDDING)
        self.dropout = nn.Dropout(settings.dropout)
        self.encoder = fused_rnn.LSTM(EMBEDDING, hidden, bidirectional=True, batch_first=True)
        self.bridge_h = nn.Linear(2 * hidden, hidden)
        self.bridge_c = nn.Linear(2 * hidden, hidden)
        # Without input feeding a batch takes one call of the LSTM and one of the attention.
        self.decoder = fused_rnn.AttentionDecoder(
            EMBEDDING, hidden, 2 * hidden, input_feeding=False, dropout=settings.dropout
        )
        self.readout = nn.Linear(hidden, targets)

    def encode(
        self, source: Tensor, lengths: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Memory (B, S or 1, 2 * hidden), the decoder's first state, lengths of the memory."""
        embedded = self.dropout(self.source_embedding(source))
        memory, (h_n, c_n) = self.encoder(embedded, lengths=lengths)
        final_h, final_c = (state.transpose(0, 1).flatten(1) for state in (h_n, c_n))
        hx = torch.tanh(self.bridge_h(final_h)).unsqueeze(0), self.bridge_c(final_c).unsqueeze(0)
        if self.attention:
            return self.dropout(memory), hx, lengths
        return self.dropout(final_h).unsqueeze(1), hx, None

    def embed(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.target_embedding(tokens))

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, T - 1, characters) of what follows each but the last token of target."""
        memory, hx, lengths = self.encode(batch.source, batch.lengths)
        inputs = self.embed(batch.target[:, :-1])
        outputs, *_ = self.decoder(inputs, memory, hx, lengths=lengths)
        return self.readout(outputs)

    @torch.no_grad()
    def generate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and attention weights (B, L, S or 1)."""
        self.eval()
        memory, hx, lengths = self.encode(batch.source, batch.lengths)
        return greedy_decode(
            self.decoder, self.embed, self.readout, memory,
            bos=BOS, eos=EOS, max_length=LONGEST + 8, hx=hx, lengths=lengths,
        )  # fmt: skip


class Produced(NamedTuple):
    text: str
    weights: Tensor  # (characters and, where it came to an end, EOS; kind and characters read)


@dataclass
class Trainee:
    name: str
    model: Translator
    settings: Settings
    losses: list[float] = field(default_factory=list)  # mean over each epoch's batches
    seconds: list[float] = field(default_factory=list)  # of each epoch

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), self.settings.learning_rate, weight_decay=WEIGHT_DECAY
        )

    def epoch(self, batches: list[Batch]) -> None:
        self.model.train()
        losses = []
        start = time.perf_counter()
        for at, batch in enumerate(batches, start=len(self.losses) * len(batches)):
            self._set_learning_rate(at, self.settings.epochs * len(batches))
            logits = self.model(batch)
            loss = F.cross_entropy(
                logits.flatten(0, 1),
                batch.target[:, 1:].flatten(),
                ignore_index=PADDING,
                label_smoothing=LABEL_SMOOTHING,
            )
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
            losses.append(float(loss.detach()))
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(statistics.mean(losses))

    def _set_learning_rate(self, step: int, steps: int) -> None:
        """Up in a line, then down along a cosine; of the step alone, for runs that go on."""
        factor = min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * factor

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = state["losses"], state["seconds"]

    def translate(self, pairs: list[Pair], alphabet: Alphabet) -> list[Produced]:
        characters = {token: c for c, token in alphabet.target.items()}
        produced = []
        tokens, weights = self.model.generate(encode(pairs, alphabet))
        for pair, row, row_weights in zip(pairs, tokens.tolist(), weights, strict=True):
            written = row[: row.index(EOS)] if EOS in row else row
            text = "".join(characters.get(token, "") for token in written)
            produced.append(Produced(text, row_weights[: len(written) + 1, : len(pair.source) + 1]))
        return produced


def read_pairs(language: str) -> list[Pair]:
    """Every name that both languages have, sorted; the kind and two names occur once."""
    english, other = Locale("en"), Locale.parse(language)
    pairs = []
    for kind, table in (
        ("territory", "territories"),
        ("language", "languages"),
        ("script", "scripts"),
        ("currency", "currencies"),
    ):
        ours, theirs = getattr(english, table), getattr(other, table)
        pairs += [Pair(kind, ours[code], theirs[code]) for code in ours if code in theirs]
    for zone, names in other.time_zones.items():
        if "city" in names and not zone.startswith("Etc/"):
            # CLDR leaves a city out that the zone's identifier spells as the language does.
            default = zone.rpartition("/")[2].replace("_", " ")
            source = english.time_zones.get(zone, {}).get("city", default)
            pairs.append(Pair("city", source, names["city"]))
    for zone in english.meta_zones:
        ours = english.meta_zones[zone].get("long", {})
        theirs = other.meta_zones.get(zone, {}).get("long", {})
        for form in ("generic", "standard"):  # one of them: they differ in a word at most
            if form in ours and form in theirs:
                pairs.append(Pair("zone", ours[form], theirs[form]))
                break
    return sorted({p for p in pairs if max(len(p.source), len(p.target)) <= LONGEST})


def split(pairs: list[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; no name is in both, whatever it is the name of."""
    sources = sorted({pair.source for pair in pairs})
    random.Random(seed).shuffle(sources)
    held_out = set(sources[: round(HELD_OUT * len(sources))])
    return (
        [pair for pair in pairs if pair.source not in held_out],
        [pair for pair in pairs if pair.source in held_out],
    )


def alphabet_of(pairs: list[Pair]) -> Alphabet:
    kinds = sorted({f"<{pair.kind}>" for pair in pairs})
    read = sorted({c for pair in pairs for c in pair.source})
    written = sorted({c for pair in pairs for c in pair.target})
    return Alphabet(
        {c: i for i, c in enumerate([*kinds, *read], start=1)},
        {c: i for i, c in enumerate(written, start=EOS + 1)},
    )


def encode(pairs: list[Pair], alphabet: Alphabet) -> Batch:
    sources, targets = [], []
    for pair in pairs:
        read = [f"<{pair.kind}>", *pair.source]
        sources.append(torch.tensor([alphabet.source.get(c, 0) for c in read]))
        written = [alphabet.target.get(c, 0) for c in pair.target]
        targets.append(torch.tensor([BOS, *written, EOS]))
    return Batch(
        pad_sequence(sources, batch_first=True),
        torch.tensor([len(source) for source in sources]),
        pad_sequence(targets, batch_first=True, padding_value=PADDING),
    )


def bucketed(pairs: list[Pair], alphabet: Alphabet, size: int, seed: int) -> list[Batch]:
    """Batches of names about as long as each other, others every epoch, in random order."""
    chance = random.Random(seed)
    ordered = sorted(pairs, key=lambda p: len(p.source) + len(p.target) + chance.uniform(0, 5))
    batches = [encode(ordered[at : at + size], alphabet) for at in range(0, len(ordered), size)]
    chance.shuffle(batches)
    return batches


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions from one to the other (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (x != y)))
    return row[-1]


class Scores(NamedTuple):
    exact: float  # share of names all right
    character_error_rate: float  # edits, by the references' characters

    @classmethod
    def of(cls, texts: list[str], pairs: list[Pair]) -> Scores:
        edits = [edit_distance(text, p.target) for text, p in zip(texts, pairs, strict=True)]
        characters = sum(len(pair.target) for pair in pairs)
        return cls(edits.count(0) / len(pairs), sum(edits) / characters)


def diagonality(produced: list[Produced]) -> float:
    """Correlation of the step with the place in the name attended to, the median over the names.

    1 where attention goes through the name at a steady pace. The place is the mean under the
    weights of the name's characters, without the sign for the kind, which stands before the name
    but is looked at for its ending. Outputs below four characters are left out.
    """
    found = []
    for text, weights in produced:
        if len(text) >= 4:
            of_name = weights[: len(text), 1:]
            places = torch.arange(of_name.shape[1], dtype=of_name.dtype)
            mean = of_name @ places / of_name.sum(dim=1)
            steps = torch.arange(len(text), dtype=of_name.dtype)
            found.append(float(torch.corrcoef(torch.stack([steps, mean]))[0, 1]))
    return statistics.median(found)


def save_checkpoint(path: Path, settings: Settings, trainees: list[Trainee]) -> None:
    state = {
        "settings": asdict(settings),
        "trainees": {trainee.name: trainee.state_dict() for trainee in trainees},
        "random": torch.get_rng_state(),
    }
    # Under its name there is at any time a whole checkpoint, this one or the one before.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save(state, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_checkpoint(path: Path, settings: Settings, trainees: list[Trainee]) -> None:
    """Brings the trainees to where the checkpoint was taken.

    Raises:
        ValueError: the file is not a checkpoint of this example, or of a run with other settings.
    """
    try:
        state = torch.load(path, weights_only=True)
        saved = dict(state["settings"])
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint of this example") from error
    wanted = asdict(settings)
    if saved != wanted:
        other = [f"{k} {saved.get(k)}, not {v}" for k, v in wanted.items() if saved.get(k) != v]
        raise ValueError(f"{path} is of another run: {'; '.join(other)}")
    for trainee in trainees:
        trainee.load_state_dict(state["trainees"][trainee.name])
    torch.set_rng_state(state["random"])


def train(
    console: Console, trainees: list[Trainee], pairs: list[Pair], alphabet: Alphabet,
    settings: Settings, checkpoint: Path | None,
) -> None:  # fmt: skip
    """Trains all on the same batches, an epoch of each in turns, from where they are."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    done = len(trainees[0].losses)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=settings.epochs, completed=done)
        for epoch in range(done, settings.epochs):
            batches = bucketed(pairs, alphabet, settings.batch, settings.seed + epoch)
            for trainee in trainees:
                trainee.epoch(batches)
            if checkpoint is not None:
                save_checkpoint(checkpoint, settings, trainees)
            losses = ", ".join(f"{t.losses[-1]:.3f} {t.name}" for t in trainees)
            progress.update(task, advance=1, description=f"epoch {epoch + 1}, loss {losses}")


def loss_table(trainees: list[Trainee]) -> Table:
    """Some ten epochs, the last among them."""
    table = Table(box=box.SIMPLE_HEAD, title="training loss", title_justify="left")
    table.add_column("epoch", justify="right")
    for trainee in trainees:
        table.add_column(trainee.name, justify="right")
    epochs = len(trainees[0].losses)
    for epoch in reversed(range(epochs, 0, -max(1, epochs // 10))):
        table.add_row(str(epoch), *(f"{t.losses[epoch - 1]:.4f}" for t in trainees))
    return table


def example_table(pairs: list[Pair], outputs: dict[str, list[str]], seed: int) -> Table:
    """Held-out names drawn at random, two or more of each kind."""
    table = Table(box=box.SIMPLE_HEAD, title="held-out names drawn at random", title_justify="left")
    for name in ("", "English", "reference", *outputs):
        table.add_column(name, overflow="fold")
    chance = random.Random(seed)
    for kind in sorted({pair.kind for pair in pairs}):
        of_kind = [i for i, pair in enumerate(pairs) if pair.kind == kind]
        for i in chance.sample(of_kind, min(3, len(of_kind))):
            right = [texts[i] == pairs[i].target for texts in outputs.values()]
            cells = [
                Text(texts[i], "green" if good else "red")
                for texts, good in zip(outputs.values(), right, strict=True)
            ]
            table.add_row(kind, Text(pairs[i].source), Text(pairs[i].target), *cells)
    return table


def drawn_for_picture(pairs: list[Pair], seed: int, count: int = 6) -> Iterator[int]:
    """Names drawn at random of those that have to be changed and are 7 to 18 characters long."""
    fit = [i for i, p in enumerate(pairs) if p.source != p.target and 7 <= len(p.source) <= 18]
    yield from random.Random(seed).sample(fit, min(count, len(fit)))


def draw_alignments(path: Path, pairs: list[Pair], produced: list[Produced], seed: int) -> None:
    """A heat map for each name: English downwards, what was written to the right."""
    figure = Figure(figsize=(15, 10), layout="constrained")
    grid = figure.subplots(2, 3)
    for axes in grid.flat:
        axes.set_visible(False)
    images = []
    for axes, i in zip(grid.flat, drawn_for_picture(pairs, seed), strict=False):
        pair, (text, weights) = pairs[i], produced[i]
        axes.set_visible(True)
        read, written = [f"({pair.kind})", *pair.source], [*text, "end"][: len(weights)]
        fused_rnn.viz.alignment(weights, read, written, axes=axes)
        verdict = "right" if text == pair.target else f"should be {pair.target}"
        axes.set_title(f"{pair.source} → {text}\n{verdict}", fontsize=11)
        images += axes.images
    figure.supxlabel("character written")
    figure.supylabel("character read")
    if images:
        figure.colorbar(images[0], ax=grid, label="attention weight", shrink=0.6)
    figure.savefig(path, dpi=110)


def parse_arguments() -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description="Translates names character by character, with attention and without."
    )
    parser.add_argument("--language", default="de", help="CLDR's code, as es, nl or ru (de)")
    parser.add_argument("--short", action="store_true", help="a smaller model, for about a minute")
    parser.add_argument("--epochs", type=int, help="instead of the mode's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="saved after every epoch, resumed if there")
    parser.add_argument("--alignments", type=Path, default=Path("alignments.png"), metavar="PNG")
    options = parser.parse_args()
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")
    for path in (options.checkpoint, options.alignments):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"there is no folder {path.absolute().parent}")
    try:
        Locale.parse(options.language)
    except (UnknownLocaleError, ValueError) as error:
        parser.error(f"--language: {error}")
    epochs, hidden, batch, dropout, learning_rate = (
        (40, 128, 64, 0.3, 4e-3) if options.short else (100, 192, 32, 0.4, 2e-3)
    )
    settings = Settings(
        options.language, options.seed, options.epochs or epochs, hidden, batch, dropout,
        learning_rate,
    )  # fmt: skip
    return options, settings


def main() -> None:
    options, settings = parse_arguments()
    console = Console(highlight=False)
    start = time.perf_counter()

    pairs = read_pairs(settings.language)
    train_pairs, held_out = split(pairs, settings.seed)
    alphabet = alphabet_of(train_pairs)
    language = Locale.parse(settings.language).get_display_name("en")
    alike = sum(pair.source == pair.target for pair in held_out)
    console.print(
        f"{len(train_pairs)} names to learn from, {len(held_out)} held out, {alike} of them alike "
        f"in English and {language}\n{len(alphabet.source)} signs read, {len(alphabet.target)} "
        f"written, {torch.get_num_threads()} threads"
    )

    trainees = []
    for name in ("with attention", "without"):
        torch.manual_seed(settings.seed)
        model = Translator(alphabet, settings, attention=name == "with attention")
        trainees.append(Trainee(name, model, settings))
    if options.checkpoint is not None and options.checkpoint.exists():
        try:
            load_checkpoint(options.checkpoint, settings, trainees)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        console.print(f"going on after epoch {len(trainees[0].losses)} of {settings.epochs}")
    train(console, trainees, train_pairs, alphabet, settings, options.checkpoint)

    console.print(loss_table(trainees))
    produced = {t.name: t.translate(held_out, alphabet) for t in trainees}
    outputs = {name: [text for text, _ in some] for name, some in produced.items()}
    console.print(example_table(held_out, outputs, settings.seed))
    with_attention = produced["with attention"]
    draw_alignments(options.alignments, held_out, with_attention, settings.seed)

    different = [i for i, pair in enumerate(held_out) if pair.source != pair.target]
    changed = [held_out[i] for i in different]
    rows = outputs | {"copying the English": [pair.source for pair in held_out]}
    scores = {name: Scores.of(texts, held_out) for name, texts in rows.items()}
    table = Table(box=box.SIMPLE_HEAD, title="held-out names", title_justify="left")
    for name in ("", "all right", "of those that differ", "character error rate"):
        table.add_column(name, justify="right" if name else "left")
    for name, texts in rows.items():
        of_changed = Scores.of([texts[i] for i in different], changed)
        exact, error_rate = scores[name]
        table.add_row(name, f"{exact:.1%}", f"{of_changed.exact:.1%}", f"{error_rate:.1%}")
    console.print(table)

    console.print("summary", style="bold")
    seconds = [f"{statistics.median(t.seconds):.2f} s {t.name}" for t in trainees]
    better, worse = (scores[trainee.name].character_error_rate for trainee in trainees)
    for line in (
        f"Attention takes the character error rate from {worse:.1%} to {better:.1%}.",
        f"Its place and the step correlate with {diagonality(with_attention):.2f} (median of "
        f"names; 1 is a straight diagonal). See {options.alignments}.",
        f"An epoch takes {' and '.join(seconds)} (medians), this run "
        f"{time.perf_counter() - start:.0f} s.",
    ):
        console.print(f"- {line}", soft_wrap=True)
    if options.epochs is None:
        assert better < worse, "attention did not help"


if __name__ == "__main__":
    main()
