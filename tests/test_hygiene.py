"""What every tracked file and every hook keeps to."""

from __future__ import annotations

import hashlib
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


def digest(signed):
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def unrecorded(recorded, contract, now):
    """What is wrong with the record: of signatures, and of each version's digest, which never changes."""
    version, was = ".".join(map(str, contract)), recorded["hooks"]
    changed = ", ".join(sorted(name for name in {*was, *now} if was.get(name) != now.get(name)))
    history = recorded["history"]
    if history.get(version, digest(now)) != digest(now):
        return (
            f"hooks are not those of contract {version} ({changed or 'its digest differs'}): raise CONTRACT"
        )
    versions = [[*map(int, each.split("."))] for each in history]
    if version not in history or changed or recorded["contract"] != list(contract):
        return f"record contract {version}, its hooks ({changed}) and in the history its digest {digest(now)}"
    if versions != sorted(versions) or versions[-1] != list(contract):
        return f"the history does not end with contract {version}, or is out of order"
    return ""


def test_hooks_change_only_with_the_contract():
    """After a wanted change: raise CONTRACT (major if plugins break), then record what is printed here."""
    fault = unrecorded(json.loads(SIGNATURES.read_text()), CONTRACT, signatures())
    assert not fault, f"{SIGNATURES.name}: {fault}\n" + json.dumps(signatures(), indent=1)


def test_a_change_can_not_be_recorded_under_the_same_contract():
    recorded = json.loads(SIGNATURES.read_text())
    changed = signatures() | {"ds_settings": {"signature": "()", "firstresult": False}}
    above = (CONTRACT[0], CONTRACT[1] + 1)
    same = f"hooks are not those of contract {'.'.join(map(str, CONTRACT))} "
    assert unrecorded(recorded, CONTRACT, changed).startswith(f"{same}(ds_settings): raise CONTRACT")
    assert unrecorded(recorded | {"hooks": changed}, CONTRACT, changed).startswith(same)  # recorded again
    assert unrecorded(recorded, above, changed).startswith("record contract ")
    history = recorded["history"] | {".".join(map(str, above)): digest(changed)}
    whole = {"contract": list(above), "hooks": changed, "history": history}
    assert unrecorded(whole, above, changed) == ""
    assert "does not end with" in unrecorded(recorded | {"history": history}, CONTRACT, signatures())
