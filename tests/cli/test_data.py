"""`dsplugins data`: what is typed, what is told, and the exit codes."""

import functools
import json

import pytest
import rich.console
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


def test_a_refusal_is_one_sentence(bpe, core, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(BAD)
    line = ("build", source, "--tokenizer", bpe.path, "--out", tmp_path / "c", "--workers", 1)
    first, second = run(*line, code=2).stderr.splitlines()
    assert first.startswith(f"{source}:2: not JSON")
    assert second.startswith("1 of the inputs' documents can't be taken (1 x not JSON): nothing was written.")


def test_of_many_bad_lines_the_first_are_told_and_all_are_counted(bpe, core, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("no\n" * 15 + '{"text": ""}\n' * 15)
    line = ("build", source, "--tokenizer", bpe.path, "--out", tmp_path / "c", "--workers", 1)
    *told, more, last = run(*line, code=2).stderr.splitlines()
    assert len(told) == 20 and told[-1] == f"{source}:20: empty text"
    assert more == "... and more: they are counted in the end"
    assert last.startswith("30 of the inputs' documents can't be taken (15 x empty text, 15 x not JSON)")


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("corpora/", "corpora/ is a folder: name the files in it, such as corpora/corpus"),
        (".", ". is a folder"),
        ("..", ".. is a folder"),
        ("a/x.bin", "a/x.bin is one file's name: give a/x, the endings come by themselves"),
        ("x.idx", "x.idx is one file's name: give x,"),
    ],
)
def test_out_is_a_prefix(bpe, tmp_path, monkeypatch, out, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("x")
    assert said in run("build", "in.txt", "--tokenizer", bpe.path, "--out", out, code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_what_is_not_read_is_told(bpe, core, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.txt", "b.jsonl.gz", *(f"c.k{kind}" for kind in range(9))):
        (folder / name).write_text("some text")
    line = ("--tokenizer", bpe.path, "--out", tmp_path / "c", "--workers", 1)
    said = run("build", folder, *line).stderr
    assert said.startswith("not read: 1 x .") and ", 2 others (--pattern says which" in said
    assert run("build", folder / "a.txt", *line, "--overwrite").stderr == ""


def words(path, unknown=None):
    """A tokenizer that knows two words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"a": 0, "b": 1} | ({unknown: 2} if unknown else {})
    tokenizer = Tokenizer(models.WordLevel(vocabulary, **({"unk_token": unknown} if unknown else {})))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens(["</s>"])
    tokenizer.save(str(path))
    return ("--tokenizer", path, "--eos", "</s>", "--fim-rate", 0, "--out", path.with_name("c"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_that_fails_is_told_with_the_document(core, tmp_path, workers):
    (tmp_path / "in.jsonl").write_text('{"text": "a b"}\n{"text": "a c"}\n')
    given = words(tmp_path / "words.json")
    (said,) = run("build", tmp_path / "in.jsonl", *given, "--workers", workers, code=2).stderr.splitlines()
    assert said.startswith(f"in.jsonl:2: {tmp_path}/words.json can't encode it: ")
    assert said.endswith("; nothing was written") and not list(tmp_path.glob("c.*"))


@pytest.mark.parametrize(("text", "warned"), [("a b a c", False), ("a c c b", True)])
def test_many_unknown_tokens_are_told(core, tmp_path, text, warned):
    """One of five with the end of the document, and two."""
    (tmp_path / "in.txt").write_text(text)
    given = words(tmp_path / "words.json", "[UNK]")
    said = run("build", tmp_path / "in.txt", *given, "--workers", 1).stderr
    assert said == (
        f"warning: 40% of the tokens stand for what {tmp_path}/words.json doesn't know: "
        "it may not be meant for this text\n"
        if warned
        else ""
    )


def test_a_bar_on_a_terminal(bpe, core, tmp_path, monkeypatch):
    made = functools.partial(rich.console.Console, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(rich.console, "Console", made)
    (tmp_path / "in.jsonl").write_text(BAD * 3)
    line = ("build", tmp_path / "in.jsonl", "--tokenizer", bpe.path, "--out", tmp_path / "c")
    drawn = run(*line, "--workers", 1, "--skip-bad").stderr
    assert "100 %  3 documents" in drawn
    assert f"{tmp_path}/in.jsonl:6: not JSON" in drawn
    assert "\x1b[2K" in drawn[drawn.rindex("100 %") :], "the bar is taken away"


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


def test_what_a_build_ends_with_is_one_line(bpe, tmp_path, monkeypatch):
    def fails(*_):
        raise PermissionError(13, "Permission denied", "in.jsonl")

    monkeypatch.setattr(build, "build", fails)
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    line = ["build", tmp_path / "in.jsonl", "--tokenizer", bpe.path, "--out", tmp_path / "c"]
    done = CliRunner().invoke(command, list(map(str, line)))
    assert isinstance(done.exception, EnvironmentUnfit)
    assert str(done.exception) == "in.jsonl: Permission denied"


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
    prefix.with_name("c.json").write_text("{")
    done = CliRunner().invoke(command, ["show", str(prefix), "--samples", "0"])
    assert isinstance(done.exception, EnvironmentUnfit) and "c.json is not JSON" in str(done.exception)
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
