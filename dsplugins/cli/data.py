"""`dsplugins data build | show`: corpora in megatron-core's format, from text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsplugins.corpora.build import Progress
    from dsplugins.corpora.documents import Bad
    from dsplugins.corpora.sidecar import Sidecar
    from dsplugins.corpora.summary import Summary
    from dsplugins.corpora.tokenizer import TokenizerFile

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


SHOWN = 20
"""Bad lines that are told one by one; a corpus in another format has millions of them."""
KINDS = 8
"""Kinds of files that were left out, told one by one."""
MUCH = 0.2
"""Share of unknown tokens that nobody wants."""


class Prefix(click.ParamType):
    """Where a corpus goes: a folder and the beginning of its files' names."""

    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """The value, or a usage error for a folder or the name of one of the files."""
        path = Path(value)
        if str(value).endswith(os.sep) or path.name in ("", ".."):
            self.fail(f"{value} is a folder: name the files in it, such as {path / 'corpus'}", param, ctx)
        if path.suffix in (".bin", ".idx", ".npy", ".json"):
            said = f"{value} is one file's name: give {path.with_suffix('')}, the endings come by themselves"
            self.fail(said, param, ctx)
        return path


@click.group("data")
def command() -> None:
    """Make a corpus for the data plugin `indexed`, or look at one."""


@command.command("build")
@click.argument("inputs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--tokenizer", required=True, type=FILE, help="A tokenizer.json.")
@click.option("--out", required=True, type=Prefix(), help="Prefix of the files to write.")
@click.option("--key", default="text", show_default=True, help="Of the text in a JSON line.")
@click.option(
    "--pattern",
    "patterns",
    multiple=True,
    default=("*.jsonl", "*.txt"),
    show_default=True,
    help="Names of a folder's files that are read.",
)
@click.option("--workers", default=CORES, type=click.IntRange(min=1), help="Processes; all cores by default.")
@click.option(
    "--fim-rate",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0.0, 1.0),
    help="Share of documents in fill-in-middle form.",
)
@click.option("--seed", default=1234, show_default=True, help="Of fill-in-middle.")
@click.option("--eos", help="Token that ends a document; V3's name by default, as for the others.")
@click.option("--fim-begin", help="Token before the prefix.")
@click.option("--fim-hole", help="Token before the suffix.")
@click.option("--fim-end", help="Token before the middle.")
@click.option("--skip-bad", is_flag=True, help="Leave out what can't be taken.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
def build(
    inputs: tuple[Path, ...],
    tokenizer: Path,
    out: Path,
    key: str,
    patterns: tuple[str, ...],
    workers: int,
    fim_rate: float,
    seed: int,
    skip_bad: bool,
    overwrite: bool,
    **marks: str | None,
) -> None:
    """Write OUT.bin and OUT.idx, a sidecar OUT.json and OUT.bytes.npy from text.

    An input is a file or a folder. A line of a *.jsonl file is a document; any other file is one. What is
    no JSON, has no text or is not UTF-8 is told with file and line; then the command fails at the end and
    writes nothing, unless told to skip it. The result does not depend on the number of workers.
    """
    from dsplugins.contracts import EnvironmentUnfit
    from dsplugins.corpora.build import BuildRefused, Wanted
    from dsplugins.corpora.build import build as make
    from dsplugins.corpora.tokenizer import V3_MARKS, TokenizerFile
    from dsplugins.quiet import quiet
    from dsplugins.wishes import Interrupted, interruptible

    quiet()
    named = {mark: marks[mark] or name for mark, name in V3_MARKS.items()}
    file = TokenizerFile(tokenizer, named)
    wanted = Wanted(inputs, file, out, patterns, key, fim_rate, seed, skip_bad, overwrite)
    _tell_left_out(inputs, patterns)
    progress: list[Progress] = []

    def moved(now: Progress) -> None:
        progress[:] = [now]
        advance(now)
        end_if_asked()

    try:
        with interruptible() as end_if_asked, _bar() as (say, advance):
            made = make(wanted, workers, _first(say), moved, say)
    except Interrupted as asked:
        click.echo(f"stopped by {asked.name}: nothing was written to {out}", err=True)
        raise SystemExit(128 + asked.number) from None
    except BuildRefused as error:
        click.echo(str(error), err=True)
        raise SystemExit(2) from error
    except OSError as error:
        raise EnvironmentUnfit(f"{error.filename or out}: {error.strerror or error}") from error
    _tell_unknown(tokenizer, *progress)
    click.echo(_told(out, made))


def _tell_left_out(inputs: tuple[Path, ...], patterns: tuple[str, ...]) -> None:
    from dsplugins.corpora.sources import left_out

    kinds = left_out(inputs, patterns).most_common()
    told = [f"{count:,} x {kind}" for kind, count in kinds[:KINDS]]
    if rest := sum(count for _, count in kinds[KINDS:]):
        told.append(f"{rest:,} others")
    if told:
        click.echo(f"not read: {', '.join(told)} (--pattern says which files of a folder are)", err=True)


def _first(say: Callable[[str], None]) -> Callable[[Bad], None]:
    """Says the first bad lines, and that there are more."""
    told = 0

    def tell(bad: Bad) -> None:
        nonlocal told
        told += 1
        if told <= SHOWN:
            say(str(bad))
        elif told == SHOWN + 1:
            say("... and more: they are counted in the end")

    return tell


def _tell_unknown(tokenizer: Path, progress: Progress) -> None:
    """A tokenizer for another language, for example."""
    share = progress.unknown / progress.tokens if progress.tokens else 0.0
    if share > MUCH:
        click.echo(
            f"warning: {share:.0%} of the tokens stand for what {tokenizer} doesn't know: "
            "it may not be meant for this text",
            err=True,
        )


@contextmanager
def _bar() -> Iterator[tuple[Callable[[str], None], Callable[[Progress], None]]]:
    """What says a line on stderr, and what moves a progress bar there, if it is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    counted = TextColumn("{task.percentage:.0f} %  {task.fields[documents]:,} documents")
    bar = Bar(BarColumn(), counted, TimeRemainingColumn(), console=console, transient=True)
    task = bar.add_task("build", total=None, documents=0)

    def advance(progress: Progress) -> None:
        bar.update(
            task, total=progress.total, completed=progress.read, documents=progress.documents, refresh=False
        )

    with bar if console.is_terminal else nullcontext():
        yield lambda text: console.print(text, markup=False), advance


def _told(out: Path, made: Sidecar) -> str:
    lines = [
        f"{out}: {made.documents:,} documents, {made.tokens:,} tokens, {made.bytes:,} bytes of text "
        f"({made.bytes / made.tokens:.2f} a token)",
        f"fill-in-middle documents: {made.fim_documents:,} (rate {made.fim_rate:g}, seed {made.seed})",
    ]
    if made.skipped:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in made.skipped.items())
        lines.append(f"left out: {sum(made.skipped.values())} ({reasons})")
    return "\n".join(lines)


@command.command("show")
@click.argument("prefix", type=click.Path(path_type=Path))
@click.option(
    "--samples", default=3, show_default=True, type=click.IntRange(min=0), help="Documents to show."
)
@click.option("--tokenizer", type=FILE, help="Its tokenizer.json, where it has no sidecar or it has moved.")
@click.option("--verify", is_flag=True, help="Read all of it, and compare SHA-256 with its sidecar's.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def show(prefix: Path, samples: int, tokenizer: Path | None, verify: bool, as_json: bool) -> None:
    """Show counts, lengths and some documents of a corpus, and how it was made."""
    from dataclasses import asdict

    from dsplugins.cli.waiting import waiting
    from dsplugins.corpora.summary import look
    from dsplugins.quiet import quiet

    quiet()
    missing = [end for end in (".bin", ".idx") if not prefix.with_name(prefix.name + end).is_file()]
    if missing:
        raise click.UsageError(f"{prefix}{missing[0]} is not there: PREFIX is a corpus without its ending")
    described = _sidecar(prefix)
    if verify:
        _verify(prefix, described)
    file = _tokenizer(prefix, tokenizer) if samples else None
    with waiting(f"reading {prefix}"):
        summary = look(prefix, samples, file)
    click.echo(json.dumps(asdict(summary), indent=1, ensure_ascii=False) if as_json else _page(summary))
    if samples and file is None:
        click.echo("no documents shown: it has no sidecar, give its --tokenizer", err=True)


def _sidecar(prefix: Path) -> Sidecar | None:
    """What stands beside it. Raises EnvironmentUnfit for a sidecar that is damaged."""
    from dsplugins.contracts import EnvironmentUnfit
    from dsplugins.corpora import sidecar
    from dsplugins.corpora.reading import AGAIN

    try:
        return sidecar.read(prefix)
    except sidecar.SidecarFault as error:
        raise EnvironmentUnfit(f"{error}; {AGAIN}") from error


def _verify(prefix: Path, described: Sidecar | None) -> None:
    """Say that the files are as they were built. Raises EnvironmentUnfit where they are not."""
    from dsplugins.cli.waiting import waiting
    from dsplugins.contracts import EnvironmentUnfit
    from dsplugins.corpora import sidecar
    from dsplugins.corpora.reading import AGAIN, changed

    if described is None:
        raise click.UsageError(f"--verify: {sidecar.place(prefix)}, which has the digests, is not there")
    with waiting(f"reading all of {prefix}"):
        faults = changed(prefix, described)
    if faults:
        raise EnvironmentUnfit(f"{'; '.join(faults)}: {AGAIN}")
    click.echo(f"{prefix}: every file is as it was built", err=True)


def _tokenizer(prefix: Path, elsewhere: Path | None) -> TokenizerFile | None:
    from dsplugins.corpora import sidecar
    from dsplugins.corpora.tokenizer import V3_MARKS, TokenizerFile

    try:
        described = sidecar.read(prefix)
        if described is None:
            return TokenizerFile(elsewhere, V3_MARKS) if elsewhere else None
        return described.tokenizer_file(prefix, elsewhere)
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(f"{prefix}: {error}; --tokenizer names it, --samples 0 needs none") from error


def _page(summary: Summary) -> str:
    """For people."""
    from dsplugins.cli.columns import columns

    rows = [("documents", f"{summary.documents:,}"), ("tokens", f"{summary.tokens:,} ({summary.dtype})")]
    if summary.sidecar:
        rows += _described(summary.sidecar)
    rows.append(("lengths", "  ".join(f"{share} {value:,}" for share, value in summary.lengths.items())))
    lines = [columns(rows), "", _bars(summary.histogram)]
    for sample in summary.samples:
        form = ", fill-in-middle" if sample["fim"] else ""
        lines += ["", f"-- document {sample['document']}: {sample['tokens']:,} tokens{form}", sample["text"]]
    return "\n".join(lines)


def _described(made: Sidecar) -> list[tuple[str, str]]:
    share = made.fim_documents / made.documents
    return [
        ("bytes of text", f"{made.bytes:,} ({made.bytes / made.tokens:.2f} a token)"),
        ("fill-in-middle", f"{share:.1%} of the documents: {made.fim_documents:,} (rate {made.fim_rate:g})"),
        ("tokenizer", f"{made.tokenizer} ({made.vocab_size:,} ids, SHA-256 {made.tokenizer_sha256[:12]}...)"),
        ("left out", ", ".join(f"{n} x {reason}" for reason, n in made.skipped.items()) or "nothing"),
        *(
            ("from", f"{given['path']} ({given['files']} files, {given['bytes']:,} bytes)")
            for given in made.inputs
        ),
    ]


def _bars(histogram: tuple[tuple[int, int], ...]) -> str:
    """Documents by length, a row a power of two."""
    from dsplugins.cli.columns import columns

    most = max(count for _, count in histogram)
    rows: list[Any] = [
        (f"{low:,} to {2 * low - 1:,}", f"{count:,}", "#" * -(-40 * count // most))
        for low, count in histogram
    ]
    return columns([("tokens", "documents", ""), *rows])


__all__ = ["command"]
