"""Local ranks: exit codes pass through, one failure ends all."""

from __future__ import annotations

import sys
import time

import pytest

from dsplugins.launcher import run_local


@pytest.mark.parametrize("code", [0, 3, 4, 75])
def test_codes_pass_through(code):
    program = f"import os, sys; sys.exit({code} if os.environ['RANK'] == '1' else 0)"
    assert run_local(2, [], [sys.executable, "-c", program]) == code


def test_one_failure_ends_the_others():
    program = "import os, sys, time; time.sleep(60 if os.environ['RANK'] == '0' else 0); sys.exit(3)"
    began = time.monotonic()
    assert run_local(2, [], [sys.executable, "-c", program]) == 3
    assert time.monotonic() - began < 20


def test_ranks_know_each_other(tmp_path):
    program = (
        "import os, pathlib; e = os.environ; "
        f"pathlib.Path(r'{tmp_path}', e['RANK']).write_text(e['WORLD_SIZE'] + ' ' + e['MASTER_PORT'])"
    )
    assert run_local(3, [], [sys.executable, "-c", program]) == 0
    said = {(tmp_path / str(rank)).read_text() for rank in range(3)}
    assert len(said) == 1 and said.pop().startswith("3 ")
