"""Numbers of README and the first run are those of the record that a command made."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from pages import DOCS, PARSER, ROOT, Block, Command, blocks, name, prose, written

RECORDED = re.compile(r"<!-- record: (\w+) -->\n```text\n(.*?)```", re.DOTALL)
RECORDS = {file.stem: json.loads(file.read_text()) for file in sorted((DOCS / "records").glob("*.json"))}


def excerpts():
    """(page, record, lines) of every block that is said to have been printed."""
    return [(page, *found) for page in written() for found in RECORDED.findall(page.read_text())]


def test_the_quick_start_is_quoted():
    assert {page for page, record, _ in excerpts() if record == "tiny_cpu"} == {
        ROOT / "README.md",
        DOCS / "first-run.md",
    }


@pytest.mark.parametrize(("page", "record", "lines"), excerpts())
def test_excerpts_are_what_was_printed(page, record, lines):
    quoted = Command(Block(page, 0, "text", lines), "", tuple(lines.splitlines()))
    assert quoted.matches("\n".join(RECORDS[record]["results"]["printed"])) is None


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "first-run.md"], ids=name)
def test_what_the_text_says_of_the_run_is_in_the_record(page):
    record = RECORDS["tiny_cpu"]
    said = prose(page)
    seconds = re.findall(r"(\d+) seconds", said)
    assert seconds and {int(number) for number in seconds} == {record["results"]["seconds"]}
    assert all(date == record["date"] for date in re.findall(r"\d{4}-\d\d-\d\d", said))


def test_the_recorded_quick_start_is_fast_and_learns():
    """Under four minutes on two cores, two processes that share the experts, both byte models beaten."""
    results = RECORDS["tiny_cpu"]["results"]
    assert results["seconds"] < 240 and RECORDS["tiny_cpu"]["hardware"]["cores"] == 2
    assert re.search(r"2 processes.*expert 2", " ".join(results["printed"]))
    assert all(results["evaluation"]["loss"] < entropy for entropy in results["baselines"].values())
    assert RECORDS["tiny_cpu"]["command"] == "bash launch/quickstart.sh"


def test_recorded_speeds_are_those_that_are_claimed():
    """Beside a loop by hand at most a hundredth slower; beside Hugging Face not slower."""
    ratios = {name: record["results"].get("ratio_of_medians") for name, record in RECORDS.items()}
    assert ratios["bench_loop"] <= 1.01
    assert ratios["bench_huggingface_large"] <= 1.0
    assert ratios["bench_huggingface_small"] <= 1.0


def numbers(value):
    """Every number anywhere in a record."""
    if isinstance(value, dict | list):
        return [
            found
            for inner in (value.values() if isinstance(value, dict) else value)
            for found in numbers(inner)
        ]
    return [value] if isinstance(value, int | float) else []


def parts(value):
    """Every part of a record that may be a row of a table: what has few numbers, and belongs together."""
    if isinstance(value, dict):
        inner = list(value.values())
        yield [one for one in inner if not isinstance(one, dict | list)]
    elif isinstance(value, list):
        inner = value
        named = [row for row in value if isinstance(row, dict) and "linear" in row]
        for linear in {row["linear"] for row in named}:
            yield [row for row in named if row["linear"] == linear]
    else:
        return
    yield value
    for one in inner:
        yield from parts(one)


def measured_rows(page):
    """Of each row of a page's tables the numbers with three decimals, which only measuring gives."""
    parsed, row = PARSER.parse(page.read_text()), set()
    for this, inside in pairwise(parsed):
        if this.type == "tr_open":
            row = set()
        elif this.type == "td_open" and re.fullmatch(r"-?\d+\.\d{3}", inside.content):
            row.add(inside.content)
        elif this.type == "tr_close" and row:
            yield row


MOST = 24
"""Numbers that a part of a record may have, so that a row can't be put together from all over it."""


def test_measured_numbers_in_tables_are_in_a_record():
    """A row's stand together, in one part of a record that the page links to."""
    for page in written():
        linked = re.findall(r"(\w+)\.json\)", page.read_text())
        found = [numbers(part) for each in linked for part in parts(RECORDS.get(each, {}).get("results"))]
        small = [{f"{number:.3f}" for number in part} for part in found if len(set(part)) <= MOST]
        for row in measured_rows(page):
            assert any(row <= part for part in small), f"{name(page)}: together in no record: {row}"


def test_measured_numbers_in_the_text_are_in_a_record():
    """In one that the page links to; or they are a recipe's."""
    given = "".join(file.read_text() for file in (ROOT / "recipes").rglob("*.yaml"))
    for page in written():
        linked = re.findall(r"(\w+)\.json\)", page.read_text())
        found = numbers([RECORDS.get(each, {}).get("results") for each in linked])
        measured = {f"{number:.3f}" for number in found}
        said = set(re.findall(r"(?<![\d.,-])-?\d+\.\d{3}(?![\d.])", prose(page)))
        unknown = {number for number in said - measured if number not in given}
        assert not unknown, f"{name(page)}: in no record: {unknown}"


def test_blocks_of_numbers_say_where_they_come_from():
    """A text block with a loss in it has a record."""
    for page in written():
        unsaid = [str(block) for block in blocks(page, "text") if re.search(r"loss \d\.\d", block.text)]
        said = [lines for where, _, lines in excerpts() if where == page and re.search(r"loss \d\.\d", lines)]
        assert len(unsaid) == len(said), f"<!-- record: NAME --> is missing before one of {unsaid}"
