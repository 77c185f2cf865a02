"""Sphinx's settings: `make docs` builds the pages of this folder into build/docs, with warnings as errors."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import reference  # noqa: E402

import clip_jax  # noqa: E402

project = "clip_jax"
release = clip_jax.__version__
copyright = "the authors of clip_jax, Apache-2.0"  # noqa: A001 (Sphinx's name)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = []
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # entries of "Attributes:" are no second description of the members
default_role = "literal"  # of single backquotes in docstrings

html_theme = "furo"
html_title = "clip_jax"
html_copy_source = False
html_show_sphinx = False

reference.write_pages(Path(__file__).parent / "generated")


def setup(app):
    """Lead links to files outside this folder to their generated pages."""
    app.connect("source-read", lambda app, name, text: text.__setitem__(0, linked(text[0])))


def linked(text: str) -> str:
    return text.replace("](../launch/README.md", "](generated/launch.md")
