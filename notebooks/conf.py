"""Settings of the documentation: ``sphinx-build -W --keep-going notebooks build/docs``."""

import re
import sys
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE / "_extensions"), str(_HERE.parent)]

project = "resnet_paths"
author = "The resnet_paths authors"
version = re.search(r'^__version__ = "(.*)"', (_HERE.parent / "resnet_paths/__init__.py").read_text(), re.MULTILINE)[1]
release = version
copyright = "the resnet_paths authors"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_codeautolink",
    "sphinx_copybutton",
    "executed_notebooks",
    "made_files",
    "made_tables",
    "mathml",
    "public_names",
]
exclude_patterns = ["_extensions", "figures", ".ipynb_checkpoints", "**/.ipynb_checkpoints"]

html_theme = "furo"
html_title = "resnet_paths"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

# Notebooks are executed by `resnet-paths reproduce`, not here.
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # no script from another host
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]  # explorers, which need a kernel

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"  # `name` in a docstring links to the name if it is public
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# `rp.` in pages and notebooks links to the reference.
codeautolink_global_preface = "import resnet_paths as rp"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
trim_doctest_flags = False  # code with them is linked too
