"""The pages as a whole: fresh where generated, complete, with links that lead somewhere, built by Sphinx."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys

import pytest
from pages import DOCS, PARSER, REFERENCE, ROOT, name, pages, tokens, written


def generator():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(some):
    return "\n".join(page.read_text() for page in some)


def test_generated_pages_are_fresh():
    # A process of its own: click keeps the help option that a command was first asked for.
    made = subprocess.run([sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_every_page_of_the_reference_is_generated():
    assert {page.name for page in REFERENCE.iterdir()} == set(generator().PAGES)


def test_every_hook_and_built_in_plugin_has_a_heading():
    from dsplugins import hookspecs
    from dsplugins.offers import offers

    headings = set(re.findall(r"^### (\w+)$", text(REFERENCE.glob("*.md")), flags=re.MULTILINE))
    wanted = {hook for hook in vars(hookspecs) if hook.startswith("ds_")}
    wanted |= {offer.name for offer in offers() if offer.distribution == "dsplugins"}
    assert not wanted - headings


def test_every_command_and_shipped_recipe_is_in_a_written_page():
    from dsplugins.cli import COMMANDS
    from dsplugins.recipe import recipe_folder

    told = text(written())
    wanted = {f"dsplugins {command}" for command in COMMANDS}
    wanted |= {file.relative_to(recipe_folder()).as_posix() for file in recipe_folder().rglob("*.yaml")}
    assert not {thing for thing in wanted if thing not in told}


@functools.cache
def anchors(page):
    """Anchors of its headings, as forges and MyST make them."""
    found = []
    parsed = PARSER.parse(page.read_text())
    for this, following in zip(parsed, parsed[1:], strict=False):
        if this.type == "heading_open":
            slug = re.sub(r"[^\w\- ]", "", following.content.lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


@pytest.mark.parametrize("page", pages(), ids=name)
def test_links_inside_the_repository_lead_somewhere(page):
    for token in tokens(page):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if not target or target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), f"{name(page)}: {target}"
        assert not anchor or anchor in anchors(file), f"{name(page)}: {target}"


def test_what_is_not_here_yet_is_not_here():
    from dsplugins.cli import COMMANDS

    missing = (DOCS / "design.md").read_text().partition("## Not yet here")[2]
    assert not set(re.findall(r"dsplugins (\w+)", missing)) & set(COMMANDS)


def test_pages_are_found_from_the_index():
    index = DOCS / "index.md"
    linked = {(DOCS / str(token.attrs["href"])).resolve() for token in tokens(index) if "href" in token.attrs}
    assert not set(DOCS.rglob("*.md")) - linked - {index}


def test_sphinx_builds_without_a_warning(tmp_path):
    line = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", DOCS, tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "hooks.html").exists()
