"""`dsplugins data`: what is typed, what is told, and the exit codes."""

import json
from concurrent.futures.process import BrokenProcessPool

import pytest
from click.testing import CliRunner

from dsplugins.cli.data import command
from dsplugins.contracts import EnvironmentUnfit
from dsplugins.corpora import build
from dsplugins.corpora.tokenizer import V3_MARKS

BAD = '{"text": "good"}\nnot json\n'


def run(*arguments, code=0):
    done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done


def test_build_and_show(bpe, core, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for i in range(20):
        (source / f"{i}.md").write_text(f"# Page {i}\n\nSome words.\n" * (i + 1))
    out = tmp_path / "made" / "pages"
    line = ("build", source, "--pattern", "*.md", "--tokenizer", bpe.path, "--out", out, "--workers", 1)
    done = run(*line, "--fim-rate", 0.5, "--seed", 3)
    made = json.loads(out.with_name("pages.json").read_text())
    tokens = f"{made['tokens']:,} tokens, {made['bytes']:,} bytes of text"
    assert done.stdout.startswith(f"{out}: 20 documents, {tokens}")
    assert f"fill-in-middle documents: {made['fim_documents']} (rate 0.5, seed 3)" in done.stdout
    found = json.loads(run("show", out, "--samples", 20, "--json").stdout)
    assert found["documents"] == 20 and found["tokens"] == made["tokens"] and found["sidecar"] == made
    assert sum(sample["fim"] for sample in found["samples"]) == made["fim_documents"] > 0
    shown = run("show", out, "--samples", 1).stdout
    assert f"tokens          {made['tokens']:,} (uint16)" in shown and "-- document 0: " in shown
    assert f"of the documents: {made['fim_documents']} (rate 0.5)" in shown


def test_bad_lines_are_told_by_place_and_end_in_code_2(bpe, core, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(BAD)
    line = ("build", source, "--tokenizer", bpe.path, "--out", tmp_path / "c", "--workers", 1)
    done = run(*line, code=2)
    assert f"{source}:2: not JSON" in done.stderr and "leave them out with --skip-bad" in done.stderr
    assert not list(tmp_path.glob("c.*"))
    done = run(*line, "--skip-bad")
    assert f"{source}:2: not JSON" in done.stderr and "left out: 1 (1 x not JSON)" in done.stdout
    assert "left out        1 x not JSON" in run("show", tmp_path / "c").stdout


def test_marks_are_named_by_options(bpe, core, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    line = ("build", tmp_path / "in.jsonl", "--tokenizer", bpe.path, "--out", tmp_path / "c", "--workers", 1)
    assert "has no token </s>" in run(*line, "--eos", "</s>", code=2).stderr
    run(*line, "--eos", V3_MARKS["fim_end"], "--fim-rate", 0)
    assert json.loads((tmp_path / "c.json").read_text())["mark_ids"]["eos"] == bpe.ids["fim_end"]


def test_show_says_what_it_lacks(corpus, bpe, tmp_path):
    assert "nowhere.bin is not there" in run("show", tmp_path / "nowhere", code=2).stderr
    prefix = corpus("c", ["one"])
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert "another tokenizer" in run("show", prefix, "--tokenizer", other, code=2).stderr
    prefix.with_name("c.json").unlink()
    assert "give its --tokenizer" in run("show", prefix).stderr
    assert "one<" in run("show", prefix, "--tokenizer", bpe.path).stdout


@pytest.mark.parametrize("broken", ["write", "read"])
def test_what_the_disk_refuses_is_the_machines_fault(bpe, core, tmp_path, broken):
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "file").write_text("no folder")
    out = tmp_path / "file" / "c" if broken == "write" else tmp_path / "c"
    tokenizer = bpe.path if broken == "write" else tmp_path / "in.jsonl"
    line = ("build", tmp_path / "in.jsonl", "--tokenizer", tokenizer, "--out", out, "--workers", 1)
    done = CliRunner().invoke(command, [str(argument) for argument in line])
    if broken == "write":
        assert isinstance(done.exception, EnvironmentUnfit)
        assert str(done.exception) == f"{out}.json: Not a directory"
    else:
        assert done.exit_code == 2 and "is not a tokenizer.json" in done.stderr


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (PermissionError(13, "Permission denied", "in.jsonl"), "in.jsonl: Permission denied"),
        (
            BrokenProcessPool("a process ended"),
            "one of the processes was killed (out of memory?), and nothing",
        ),
    ],
)
def test_what_a_build_ends_with_is_one_line(bpe, tmp_path, monkeypatch, fault, said):
    def fails(*_):
        raise fault

    monkeypatch.setattr(build, "build", fails)
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    line = ["build", tmp_path / "in.jsonl", "--tokenizer", bpe.path, "--out", tmp_path / "c"]
    done = CliRunner().invoke(command, list(map(str, line)))
    assert isinstance(done.exception, EnvironmentUnfit) and str(done.exception).startswith(said)


def test_verify_tells_what_has_changed(corpus, bpe):
    prefix = corpus("c", ["one two three"] * 9)
    assert f"{prefix}: every file is as it was built\n" == run("show", prefix, "--verify").stderr
    with prefix.with_name("c.bin").open("r+b") as file:
        file.seek(4)
        file.write(b"\0\0")
    assert "documents" in run("show", prefix).stdout  # the sizes are right
    done = CliRunner().invoke(command, ["show", str(prefix), "--verify"])
    assert isinstance(done.exception, EnvironmentUnfit)
    said = str(done.exception)
    assert said.startswith(f"{prefix}.bin has SHA-256 ") and said.endswith(
        "copy the corpus again, or build it again"
    )
    assert "idx" not in said
    prefix.with_name("c.json").unlink()
    assert "which has the digests, is not there" in run("show", prefix, "--verify", code=2).stderr


@pytest.mark.parametrize(
    ("end", "size", "said"),
    [
        ("idx", 20, "c is not in megatron-core's format: "),
        ("idx", 0, "c is not in megatron-core's format: "),
        ("bin", 4, "c.bin has 4 bytes, and {whole} by its index: copy both again"),
    ],
)
def test_files_that_are_cut_off_are_told(corpus, end, size, said):
    prefix = corpus("c", ["one two three"], fim_rate=0.0)
    said = said.format(whole=prefix.with_name("c.bin").stat().st_size)
    with prefix.with_name(f"c.{end}").open("r+b") as file:
        file.truncate(size)
    done = CliRunner().invoke(command, ["show", str(prefix)])
    assert isinstance(done.exception, EnvironmentUnfit) and said in str(done.exception)
