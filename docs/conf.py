"""The site: docs/ and the recorded results as pages (`make docs`).

Sphinx reads from the repository's root, so that the links between Markdown files are the same here
and where the repository is browsed.
"""

import re
import sys
from pathlib import Path

import click
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import dist_adv

sys.path.insert(0, str(Path(__file__).parent))

project = "dist_adv"
project_copyright = "the contributors of dist_adv"
version = release = dist_adv.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
    "keys",
]
root_doc = "docs/index"
pages = ["docs/*.md", "benchmarks/*.md", "benchmarks/results/**.md"]
include_patterns = [*pages, "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "site", "**/node_modules"]

smartquotes = False
html_theme = "furo"
html_title = "dist_adv"
html_theme_options = {"navigation_with_keys": True}
html_show_sourcelink = False
# The pages lie in docs/: whoever asks for the site's root is sent there.
templates_path = ["_templates"]
html_additional_pages = {"index": "root.html"}

myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]
copybutton_prompt_text = "$ "

# Docstrings have Markdown's backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
# No inventories of other projects are fetched: their names are shown and not linked. Nor are types
# that a reader needs no more of: a module, a type variable, sections of docs/configuration.md.
UNLINKED = "Classifier|OptionsT|ExtraOptions|RandAugment|Examples"
nitpick_ignore_regex = [("py:.*", r"(?!dist_adv\.).*"), ("py:.*", rf"dist_adv\..*\.({UNLINKED})")]


def link_by_public_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """Return the link of dist_adv.attacks.threat.Threat and its like, which is dist_adv.Threat."""
    public = f"dist_adv.{node.get('reftarget', '').split('.')[-1]}"
    domain = env.get_domain("py")
    if node.get("refdomain") != "py" or public not in domain.objects:
        return None
    found = domain.resolve_any_xref(env, node["refdoc"], app.builder, public, node, text)
    return found[0][1] if found else None


def warn_of_undocumented_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn, which is an error in `make docs`, of a public name without a page or a docstring."""
    shown = env.get_domain("py").objects
    for name in dist_adv.__all__:
        thing = getattr(dist_adv, name)
        described = name == "Objective" or thing.__doc__  # getdoc would take a parent's
        if name != "__version__" and (f"dist_adv.{name}" not in shown or not described):
            logging.getLogger(__name__).warning("dist_adv.%s is not documented", name)


def show_examples_as_they_are(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    """Make literal what a command's help sets apart, which sphinx-click makes lines of prose."""
    text = re.sub(
        r"^(\| .*\n?)+", lambda found: f"::\n\n{found[0]}\n", "\n".join(lines), flags=re.M
    )
    lines[:] = re.sub(r"^\| ", "   ", text, flags=re.M).splitlines()


def show_paths_as_typed(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    lines[:] = [re.sub(r"PosixPath\('(.*)'\)", r"\1", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("sphinx-click-process-description", show_examples_as_they_are)
    app.connect("sphinx-click-process-options", show_paths_as_typed)
    app.connect("missing-reference", link_by_public_name)
    app.connect("env-check-consistency", warn_of_undocumented_names)
