"""What every tracked file and every hook keeps to."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
from pathlib import Path

import pytest

from dsplugins import hookspecs
from dsplugins.contracts import CONTRACT, SLOTS

ROOT = Path(__file__).parents[1]
SIGNATURES = Path(__file__).with_name("hook_signatures.json")
MOST_LINES = 400
# Written in pieces, so that this file does not find itself.
UNWANTED = {
    "a path of somebody's machine": r"(?<![\w.])/" + r"(?:root|home|Users|work|mnt|opt)/\w",
    "the address of a package index": r"https?://[\w.:@-]+/"
    + r"(?:[\w./-]*/)?simple\b|--(?:extra-)?index"
    + "-url",
    "a loose end": "TO" + "DO|FIX" + "ME|XX" + "X",
}


def tracked():
    """Text files under version control, or all of a copy without one."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert len(files) > 50
    return [file for file in files if file.is_file() and b"\0" not in file.read_bytes()]


def hooks():
    """Hook name -> specification, in the order of the file."""
    return {name: spec for name, spec in vars(hookspecs).items() if name.startswith("ds_")}


def signatures():
    """What a plugin's author depends on: arguments, types, and whether one answer or all are taken."""
    return {
        name: {
            "signature": str(inspect.signature(spec)),
            "firstresult": bool(spec.dsplugins_spec["firstresult"]),
        }
        for name, spec in hooks().items()
    }


@pytest.mark.parametrize("what", UNWANTED)
def test_no_file_holds(what):
    pattern = re.compile(UNWANTED[what])
    hits = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in tracked()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not hits, f"{what}:\n" + "\n".join(hits)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a path of somebody's machine", 'data = "/' + 'home/ann/corpus"'),
        ("the address of a package index", "pip install --index" + "-url https://pypi.example/sim" + "ple x"),
        ("a loose end", "# TO" + "DO: later"),
    ],
)
def test_the_patterns_find_what_they_are_for(what, line):
    assert re.search(UNWANTED[what], line)


def test_files_of_the_package_are_small():
    lines = {file: len(file.read_text().splitlines()) for file in sorted((ROOT / "dsplugins").rglob("*.py"))}
    long = [f"{file.relative_to(ROOT)}: {count}" for file, count in lines.items() if count > MOST_LINES]
    assert not long, f"over {MOST_LINES} lines: {long}"


def test_every_hook_is_documented_and_typed():
    for name, spec in hooks().items():
        kind = (inspect.getdoc(spec) or "").split(".")[0].split(",")[0]
        assert kind in ("Slot", "Event"), f"{name}: its docstring starts with Slot or Event"
        assert spec.dsplugins_spec["firstresult"] == (kind == "Slot"), name
        annotations = {"return", *inspect.signature(spec).parameters}
        assert annotations == set(spec.__annotations__), f"{name}: every argument and the result have a type"


def test_every_slot_has_its_hook():
    assert {f"ds_{slot}" for slot in SLOTS} == {
        name for name, spec in hooks().items() if spec.dsplugins_spec["firstresult"]
    }


def test_hooks_change_only_with_the_contract():
    """After a wanted change: raise CONTRACT (major if plugins break), then record what is printed here."""
    recorded = json.loads(SIGNATURES.read_text())
    now = {"contract": list(CONTRACT), "hooks": signatures()}
    if now == recorded:
        return
    changed = sorted(
        name
        for name in {*recorded["hooks"], *now["hooks"]}
        if recorded["hooks"].get(name) != now["hooks"].get(name)
    )
    bumped = now["contract"] > recorded["contract"]
    advice = "record them" if bumped else "raise CONTRACT in contracts.py, then record them"
    text = json.dumps(now, indent=1)
    pytest.fail(f"hooks changed: {', '.join(changed)}; {advice} in {SIGNATURES.name}:\n{text}")
