"""Where an installed package's code comes from, beyond its version: a checkout's commit, an address."""

from __future__ import annotations

import hashlib
import json
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse


@lru_cache
def source(distribution: str) -> str | None:
    """`editable, COMMIT`, `folder`, or an address with its commit; None for what came from an index.

    As pip wrote it down (PEP 610). A checkout's folder isn't told: it may be another one on each node.
    """
    try:
        said = metadata.distribution(distribution).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    if said is None:
        return None
    told = json.loads(said)
    if "vcs_info" in told:
        return f"{told['url']} {told['vcs_info']['commit_id']}"
    if not told.get("dir_info", {}).get("editable"):
        return "folder" if told["url"].startswith("file:") else str(told["url"])
    return f"editable, {commit(Path(unquote(urlparse(told['url']).path))) or 'not in git'}"


def commit(folder: Path) -> str | None:
    """Of the checkout that `folder` is in, with a plus where the folder has changed; None outside of git."""
    git = ["git", "-C", str(folder)]
    try:
        number = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return number.strip() + "+" * bool(changed)


def fingerprint(folder: Path) -> str:
    """Of all Python below `folder`: names and contents."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        found.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


__all__ = ["commit", "fingerprint", "source"]
