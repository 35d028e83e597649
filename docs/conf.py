"""The site: `make docs` builds it into docs/_build/html, without a network.

Pages are files of this folder; index.md lists them. The tutorials are the
scripts of examples/, run and rendered with what they print and draw. Each name of
api.md has a page of its own, from its docstring.
"""

import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx import addnodes

import ivon_jax

project = "ivon_jax"
author = copyright = "ivon_jax developers"
version = release = ivon_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
# tutorials.rst has the order.
exclude_patterns = ["_build", "tutorials/index.rst", "tutorials/uses"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"ivon_jax {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sourcelink = False

html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# `name` in a docstring links to the page of that name, where there is one.
default_role = "py:obj"
autodoc_typehints = "none"
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "tutorials",
    "backreferences_dir": "tutorials/uses",
    "doc_module": ("ivon_jax",),  # the pages of its names link to the tutorials
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "capture_repr": (),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
}


def mathml(node, display):
    """TeX as MathML, which browsers draw by themselves."""
    tex = node.astext()
    if r"\\" in tex:
        tex = rf"\begin{{split}}{tex}\end{{split}}"
    return convert(tex, display=display)


def inline(self, node):
    """Write the MathML of a formula in a line."""
    self.body.append(mathml(node, "inline"))
    raise SkipNode


def block(self, node):
    """Write the MathML of a formula of its own."""
    self.body.append(f'<div class="math">{mathml(node, "block")}</div>')
    raise SkipNode


def without_links_to_files(_, doctree):
    """Leave the text of links to files that are in the repository alone."""
    for node in list(doctree.findall(addnodes.pending_xref)):
        if node["reftype"] == "myst" and re.search(
            r"(\.json|\.md|/)$", node["reftarget"]
        ):
            node.replace_self(node.children)


def setup(app):
    """Render formulas as MathML, and included pages without links to files."""
    app.connect("doctree-read", without_links_to_files)
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
