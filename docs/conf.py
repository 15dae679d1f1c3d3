"""Sphinx with MyST: `python -m sphinx -W docs build/docs`. The pages are plain Markdown for forges, too."""

project = "dsplugins"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
myst_heading_anchors = 4
