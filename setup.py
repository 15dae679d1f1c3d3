"""Puts recipes/ and the templates of launch/ into the wheel, as dsplugins/_recipes and dsplugins/_launch.

Everything else is in pyproject.toml. In a checkout, also one that is installed with `pip install -e`, both
are read where they are.
"""

from collections.abc import Iterator
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCES = {
    "recipes": ("_recipes", ("**/*.yaml",)),
    "launch": ("_launch", ("*.sbatch", "*.yaml", "*.txt")),
}
"""Folder of the checkout -> its name inside the package, and the files that belong there."""


class BuildWithData(build_py):
    """setuptools' own step, and then the data."""

    def run(self) -> None:
        """Copy modules, and the data beside them unless the installation points to the checkout."""
        super().run()
        if not self.editable_mode:
            for source, inside in data():
                target = Path(self.build_lib, "dsplugins", inside)
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_source_files(self) -> list[str]:
        """What a source distribution holds for this step, so that a wheel can be built from one."""
        return [*super().get_source_files(), *(str(source) for source, _ in data())]


def data() -> Iterator[tuple[Path, Path]]:
    """(file, where it goes in the package); files relative to this one's folder, where a build runs."""
    for folder, (name, patterns) in SOURCES.items():
        found = sorted(file for pattern in patterns for file in Path(folder).glob(pattern))
        assert found, f"nothing in {Path(folder).resolve()}"
        for file in found:
            yield file, Path(name) / file.relative_to(folder)


setup(cmdclass={"build_py": BuildWithData})
