"""How Sphinx builds these pages: `make docs`. The result needs no network, formulas included (MathML)."""

from __future__ import annotations

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from parablock import __version__

project = "ParaBlock"
copyright = "the ParaBlock developers. Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "code"  # docstrings write `names` as Markdown does
nitpicky = True
nitpick_ignore_regex = [  # what other projects document, and names inside this one that have no page
    ("py:.*", r"(torch|nn|transformers|pathlib|collections|typing)(\..*)?"),
    ("py:.*", r"(Path|Tensor|Callable|Sequence|Mapping|Any|PreTrainedModel|PreTrainedTokenizerBase|Summary)"),
    ("py:.*", r"parablock\..*"),
]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]

html_theme = "furo"
html_title = f"ParaBlock {__version__}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sphinx = False
html_copy_source = False


def write_inline(translator: HTML5Translator, node: nodes.math) -> None:
    """Write a formula in a line of text."""
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def write_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on lines of its own."""
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Let browsers set the formulas: no script, no pictures."""
    app.add_html_math_renderer("mathml", inline_renderers=(write_inline, None), block_renderers=(write_block, None))


html_math_renderer = "mathml"
