"""A tiny corpus in a folder, and plans that name it."""

import pytest
from small_bpe import bpe, core, corpus  # noqa: F401

from dsplugins.contracts import DataOptions, Evaluate, Layout, Plan, RunOptions, Save, Train


@pytest.fixture
def corpus_folder(tmp_path):
    """Sixty distinct files in three packages, and what must not be read."""
    root = tmp_path / "library"
    for i in range(60):
        body = "".join(f"def f{i}_{j}(self):\n    return {i * j}\n" for j in range(3 + i % 7))
        _write(root / f"pkg{i % 3}" / f"module{i}.py", body)
    _write(root / "pkg0" / "site-packages" / "installed.py", "installed = 1\n")
    _write(root / "pkg0" / "__pycache__" / "cached.py", "cached = 1\n")
    _write(root / "_sysconfigdata__linux.py", "build_time_vars = {}\n")
    _write(root / "pkg1" / "tests" / "test_it.py", "assert True\n")
    _write(root / "pkg1" / "empty.py", "")
    _write(root / "pkg1" / "notes.txt", "not a source\n")
    return root


@pytest.fixture
def plan():
    """`plan(seq_length=, seed=, sequences=)`: a plan as the host makes it, with no model."""

    def make(seq_length=32, seed=1, sequences=4):
        return Plan(
            name="test",
            model={},
            optimizer={},
            ddp={},
            layout=Layout(),
            data=DataOptions(seq_length=seq_length),
            train=Train(global_batch=None, learning_rate=None, seed=seed),
            evaluate=Evaluate(sequences=sequences),
            save=Save(),
            run=RunOptions(),
            plugins=("python_source",),
            slots={"data": "python_source"},
        )

    return make


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
