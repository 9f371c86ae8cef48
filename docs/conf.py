"""Sphinx: `sphinx-build -W --keep-going docs build/site` builds this documentation, offline.

Notebooks are run while the site is built; `-D nb_execution_mode=off` leaves that out.
"""

import importlib.util
import os
import sys
from pathlib import Path

# What jupyter starts for the notebooks sees these as well.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

import lowrank_optax

project = "lowrank_optax"
author = "the contributors of lowrank_optax"
copyright = author
release = version = lowrank_optax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "api_tables",
]
exclude_patterns = ["_extensions", "**/.ipynb_checkpoints"]
suppress_warnings = ["mystnb.unknown_mime_type"]

# Pages ------------------------------------------------------------------------------------------
html_theme = "furo"
html_title = f"lowrank_optax {release}"
html_baseurl = os.environ.get("DOCS_BASE_URL", "")
# Formulas without a network. The package is no more than the files to us: as an extension it
# would not let pages be read in parallel.
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
assert _mathjax is not None and _mathjax.origin is not None
mathjax_path = "mathjax/tex-chtml.js"
html_static_path = ["_static", str(Path(_mathjax.origin).parent / "static")]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5fa5", "color-brand-content": "#0b5fa5"},
    "dark_css_variables": {"color-brand-primary": "#7ab8ee", "color-brand-content": "#7ab8ee"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Text -------------------------------------------------------------------------------------------
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
pygments_style = "tango"
pygments_dark_style = "github-dark"

# Notebooks --------------------------------------------------------------------------------------
nb_execution_mode = "force"
nb_execution_timeout = 900  # a cell takes a minute where other programs keep the cores busy
nb_execution_raise_on_error = True
nb_merge_streams = True

# Docstrings -------------------------------------------------------------------------------------
default_role = "py:obj"
autosummary_generate = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_use_admonition_for_examples = False
napoleon_custom_sections = [("Cost", "notes_style"), ("Source", "notes_style")]
python_use_unqualified_type_names = True
