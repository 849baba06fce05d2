"""Sphinx configuration."""

import os
import re
import shutil
import sys
from datetime import datetime
from importlib.metadata import metadata
from pathlib import Path

from sphinx import addnodes

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))


def copy_tutorials() -> None:
    """Mirror ``/tutorials/*.ipynb`` into ``docs/tutorials``, because Sphinx reads nothing outside its source folder."""
    source, target = HERE.parent / "tutorials", HERE / "tutorials"
    target.mkdir(exist_ok=True)
    wanted = {path.name: path for path in source.glob("*.ipynb")}
    for stale in target.glob("*.ipynb"):
        if stale.name not in wanted:
            stale.unlink()
    for name, path in wanted.items():
        copy = target / name
        if not copy.exists() or copy.read_bytes() != path.read_bytes():
            shutil.copyfile(path, copy)


copy_tutorials()

# The installed metadata; reinstall an editable installation after changes in pyproject.toml.
info = metadata("scsae")
project = "sae"
author = info["Author"]
copyright = f"{datetime.now():%Y}, {author}"
version = release = info["Version"]
repository_url = dict(url.split(", ") for url in info.get_all("Project-URL"))["Source"]

extensions = [
    "gallery",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]

source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build", "_ext", "jupyter_execute", "**.ipynb_checkpoints"]
default_role = "literal"

templates_path = ["_templates"]
autosummary_generate = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# Names that docs/api.md explains under "Types".
TYPES = ("Asked", "Data", "Dictionary", "Features", "Net", "Prediction", "VarToGene")
autodoc_type_aliases = {name: name for name in TYPES}
maximum_signature_line_length = 80
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_custom_sections = ["Returns"]  # it is prose here; types stand in the signature

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks come with their outputs
nb_merge_streams = True

# A name without a target is an error. Names of other projects have theirs in inventories, which only the hosted build loads.
nitpicky = True
PROJECTS = (
    "anndata",
    "collections",
    "matplotlib",
    "mudata",
    "numpy",
    "os",
    "pandas",
    "pathlib",
    "scanpy",
    "scipy",
    "torch",
)
nitpick_ignore_regex = [("py:.*", rf"({'|'.join(PROJECTS)})\..*")]
# Where classes are documented, by the names that autodoc finds: of the defining module, or as imported for type checking.
DOCUMENTED = {
    "Axes": "matplotlib.axes.Axes",
    "Colormap": "matplotlib.colors.Colormap",
    "FigureBase": "matplotlib.figure.FigureBase",
    "Path": "pathlib.Path",
    "anndata._core.anndata.AnnData": "anndata.AnnData",
    "np.ndarray": "numpy.ndarray",
    "np.random.Generator": "numpy.random.Generator",
    "numpy.random._generator.Generator": "numpy.random.Generator",
    "pandas.core.frame.DataFrame": "pandas.DataFrame",
    "pd.DataFrame": "pandas.DataFrame",
    "pd.Index": "pandas.Index",
    "scipy.sparse._matrix.spmatrix": "scipy.sparse.spmatrix",
}

# Links into other projects need their inventories, and so a network: only the hosted build makes them.
if os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "decoupler": ("https://decoupler.readthedocs.io/en/latest/", None),
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "mudata": ("https://mudata.readthedocs.io/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
        "scipy": ("https://docs.scipy.org/doc/scipy/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_theme_options = {
    "repository_url": repository_url,
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "navigation_with_keys": False,
    "navbar_persistent": [],  # the search field is in the sidebar
    "show_toc_level": 2,
}


def plain_aliases(app, what, name, obj, options, signature, returned):
    """Write the alias `Data` in a union as it is written alone."""
    return re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature or ""), returned


def documented_names(app, doctree):
    """Point references at the names under which classes are documented."""
    for reference in doctree.findall(addnodes.pending_xref):
        reference["reftarget"] = DOCUMENTED.get(reference["reftarget"], reference["reftarget"])


def setup(app):
    app.connect("doctree-read", documented_names)
    app.connect("autodoc-process-signature", plain_aliases)
