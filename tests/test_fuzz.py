"""Arguments of all kinds, right and wrong (``fuzz.py``): errors or right results, never a crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# An hour of it: FUSED_RNN_FUZZ_SECONDS=3600. The numbers of cases begin where they did before.
SECONDS = float(os.environ.get("FUSED_RNN_FUZZ_SECONDS", "15"))


@pytest.mark.parametrize("first", [0, 10**9], ids=["low", "high"])
def test_fuzz(first: int) -> None:
    command = [sys.executable, "tests/fuzz.py", "--first", str(first), "--seconds", str(SECONDS)]
    root = Path(__file__).parent.parent
    result = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=SECONDS + 300
    )
    told = "\n".join(result.stdout.splitlines()[-2:])
    assert result.returncode == 0, f"{told}\n{result.stderr[-4000:]}"
    done, refused = (int(word) for word in told.splitlines()[-1].split() if word.isdigit())
    assert 0 < refused < done
