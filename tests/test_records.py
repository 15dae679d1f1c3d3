"""A record says what was measured, where and with what."""

from __future__ import annotations

import json

from dsplugins import records


def test_a_record_holds_what_its_numbers_depend_on(tmp_path):
    path = records.write(tmp_path / "records", "speed", ["dsplugins", "bench", "loop"], {"ratio": 1.0})
    written = json.loads(path.read_text())
    assert path.name == "speed.json"
    assert written["command"] == "dsplugins bench loop" and written["results"] == {"ratio": 1.0}
    assert {"processor", "cores", "memory_gib", "gpus"} == set(written["hardware"])
    assert {"torch", "megatron-core", "python"} <= set(written["versions"])
    assert written["commit"] is None or len(written["commit"].rstrip("+")) == 40


def test_a_newer_record_takes_the_place_of_the_older(tmp_path):
    for ratio in (1.0, 2.0):
        path = records.write(tmp_path, "speed", ["x"], {"ratio": ratio})
    assert json.loads(path.read_text())["results"]["ratio"] == 2.0
    assert [file.name for file in tmp_path.iterdir()] == ["speed.json"]
