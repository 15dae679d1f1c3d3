"""A record of the tests that are marked `gpu`, where DSPLUGINS_RECORD names a folder for it.

What became of each, and why one was skipped. `launch/gpu.sh` asks for it.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

RECORD = "DSPLUGINS_RECORD"
OUTCOMES = pytest.StashKey[dict[str, str]]()


def pytest_configure(config):
    config.stash[OUTCOMES] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.get_closest_marker("gpu") and (report.when == "call" or report.outcome != "passed"):
        why = report.longrepr[2].replace("Skipped", "", 1) if isinstance(report.longrepr, tuple) else ""
        item.config.stash[OUTCOMES][item.nodeid] = report.outcome + why
    return report


def pytest_sessionfinish(session, exitstatus):
    from dsplugins import records

    outcomes = session.config.stash[OUTCOMES]
    if outcomes and (folder := os.environ.get(RECORD)):
        given = map(shlex.quote, session.config.invocation_params.args)
        command = [f"{RECORD}={folder} python -m pytest", *given]
        records.write(Path(folder), "gpu_tests", command, {"holds": int(exitstatus) == 0, "tests": outcomes})
