"""Puts recipes/ into the wheel as dsplugins/_recipes; everything else is in pyproject.toml.

In a checkout, also one that is installed with `pip install -e`, recipes are read where they are.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = Path("recipes")


class BuildWithRecipes(build_py):
    """setuptools' own step, and then the recipes."""

    def run(self) -> None:
        """Copy modules, and the recipes beside them unless the installation points to the checkout."""
        super().run()
        if not self.editable_mode:
            for source in recipes():
                target = Path(self.build_lib, "dsplugins", "_recipes", source.relative_to(RECIPES))
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_source_files(self) -> list[str]:
        """What a source distribution holds for this step, so that a wheel can be built from one."""
        return [*super().get_source_files(), *map(str, recipes())]


def recipes() -> list[Path]:
    """The recipes' files, relative to this one's folder, which is where a build runs."""
    found = sorted(RECIPES.rglob("*.yaml"))
    assert found, f"no recipes in {RECIPES.resolve()}"
    return found


setup(cmdclass={"build_py": BuildWithRecipes})
