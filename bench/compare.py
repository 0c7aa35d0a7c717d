"""Whether one run of a benchmark is slower than another by more than noise.

The ratio to the peer decides: both sides took turns in one process, so what else the machine did,
its clock and its temperature fell on both. A time of its own moves with all of these, and between
two machines says nothing; its change is shown beside.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from .machine import UnusableError
from .records import File, Record

LEAST = 0.05  # between two processes alone, the ratio moves by some percent
UNKNOWN = 0.15  # the noise of a row whose file tells nothing of its rounds
FALSE_ALARM = 0.05  # the chance that noise alone makes any row of two files differ

SLOWER, FASTER, SAME = "slower", "faster", "same"
ONLY_A, ONLY_B, BROKEN, REPAIRED = "only in A", "only in B", "fails in B", "failed in A"
REGRESSIONS = (SLOWER, BROKEN)

# Of the machine's facts, those that change what is measured.
FACTS = (
    "processor", "cores", "threads", "platform", "python", "torch", "fused_rnn",
    "active_instruction_set", "cuda_devices",
)  # fmt: skip


class Compared(NamedTuple):
    """One row of both files, or of the one that has it."""

    before: Record | None
    after: Record | None
    change: float | None  # of the ratio, after over before: above 1 is faster
    noise: float | None  # changes up to this factor are noise
    verdict: str

    @property
    def record(self) -> Record:
        found = self.after or self.before
        assert found is not None
        return found

    @property
    def time_change(self) -> float | None:
        """Of our own time, after over before: above 1 is slower."""
        if self.before is None or self.after is None:
            return None
        if not self.before.us or not self.after.us:
            return None
        return self.after.us / self.before.us


def compare(before: File, after: File, least: float = LEAST) -> list[Compared]:
    """Every row of either file, in order.

    A row is slower or faster if its ratio's logarithm moved by more than ``least`` and by more than
    the noise of the two medians: the standard error that follows from the quartiles over the rounds
    (0.93 times their distance over the root of the rounds, as for normal noise), times the quantile
    of Student's t at which noise alone would give any row of the file another verdict once in
    twenty comparisons. It has 0.37 degrees of freedom for each round but the first, since that is
    how much quartiles tell of a spread beside its standard deviation.

    Raises:
        UnusableError: no row is in both files.
    """
    old = {record.key: record for record in before.records}
    new = {record.key: record for record in after.records}
    common = sum(key in new for key in old)
    if not common:
        raise UnusableError(f"{before.name} and {after.name} have no row in common")
    normal = statistics.NormalDist().inv_cdf(1 - FALSE_ALARM / 2 / common)
    return [_compared(old.get(key), new.get(key), least, normal) for key in old | new]


def _compared(old: Record | None, new: Record | None, least: float, normal: float) -> Compared:
    if old is None or new is None:
        return Compared(old, new, None, None, ONLY_A if new is None else ONLY_B)
    if old.ratio is None or new.ratio is None or old.failure or new.failure:
        verdict = SAME
        if (new.failure is None) != (old.failure is None):
            verdict = REPAIRED if new.failure is None else BROKEN
        return Compared(old, new, None, None, verdict)
    noise = math.log1p(least)
    errors = [_standard_error(record) for record in (old, new)]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        noise = max(noise, math.log1p(UNKNOWN))
    else:
        freedom = 0.37 * ((old.rounds or 0) + (new.rounds or 0) - 2)
        noise = max(noise, _student(normal, freedom) * math.hypot(*known))
    moved = math.log(new.ratio / old.ratio)
    verdict = SAME if abs(moved) <= noise else SLOWER if moved < 0 else FASTER
    return Compared(old, new, math.exp(moved), math.exp(noise), verdict)


def _standard_error(record: Record) -> float | None:
    """Of the logarithm of the median ratio; None where the file holds no spread."""
    if record.quartiles is None or record.rounds is None or record.rounds < 2:
        return None
    low, high = record.quartiles
    return 0.93 * math.log(high / low) / math.sqrt(record.rounds)


def _student(normal: float, freedom: float) -> float:
    """The quantile of Student's t where the normal distribution has ``normal``.

    The first terms of Cornish and Fisher's expansion: Abramowitz & Stegun 26.7.5.
    """
    z = normal
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def differences(before: File, after: File) -> list[str]:
    """What else than the code may have changed the figures; one line each."""
    lines = []
    if before.command != after.command:
        lines.append(f"command: {before.command} in A, {after.command} in B")
    for name in FACTS:
        old, new = before.machine.get(name), after.machine.get(name)
        if old != new:
            lines.append(f"{name.replace('_', ' ')}: {old} in A, {new} in B")
    for letter, file in (("A", before), ("B", after)):
        if file.unfinished:
            lines.append(f"{letter} was stopped at: {file.unfinished}")
        untold = sum(r.ratio is not None and _standard_error(r) is None for r in file.records)
        if untold:
            lines.append(
                f"no spread recorded in {letter} for {untold} rows: {UNKNOWN:.0%} counts as noise"
            )
    return lines


def failed(found: Sequence[Compared]) -> bool:
    return any(each.verdict in REGRESSIONS for each in found)
