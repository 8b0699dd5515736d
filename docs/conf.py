"""The documentation site: `make docs`. Pages are the Markdown files beside this one; the references of Python and C++
come from docstrings and headers, the pictures of margins from the op itself.

Links in the pages lead through the tree, as they do for readers of the files; on the site they lead to the page of that
file, or to the repository.
"""

import importlib
import inspect
import operator
import os
import re
from pathlib import Path

from sphinx.application import Sphinx

import torchmargin
from torchmargin.demo import curves

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
REPOSITORY = "https://github.com/torchmargin/torchmargin/blob/main"

project = "torchmargin"
author = "torchmargin developers"
copyright = "torchmargin developers"  # noqa: A001
release = torchmargin.__version__.split("+")[0]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "breathe",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"torchmargin {release}"
html_static_path: list[str] = []
pygments_style = "friendly"
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]
copybutton_prompt_text = "$ "

# Signatures as they are written: torch's own names need no module in front.
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # torch.nn.Module's own say nothing of ours
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

breathe_projects = {"torchmargin": os.environ.get("TORCHMARGIN_DOXYGEN_XML", str(ROOT / "out/cpp/xml"))}
breathe_default_project = "torchmargin"
breathe_default_members = ("members",)

# Pages that are files of the tree.
FILES = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md", "recipe": "recipes/face/README.md"}
PAGES = {ROOT / path: f"{page}.md" for page, path in FILES.items()}


def _target(link: str, folder: Path, page_folder: Path) -> str:
    """Where a link of a file in `folder` leads from a page in `page_folder`."""
    path, hash_mark, anchor = link.partition("#")
    if not path or re.match(r"[a-z]+:", link):
        return link
    file = (folder / path).resolve()
    if file in PAGES:
        file = DOCS / PAGES[file]
    if file.is_relative_to(DOCS):
        return os.path.relpath(file, page_folder) + hash_mark + anchor
    return f"{REPOSITORY}/{file.relative_to(ROOT)}{hash_mark}{anchor}"


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    folder, page_folder = (DOCS / page).parent, (DOCS / page).parent
    if page in FILES:
        folder = (ROOT / FILES[page]).parent
        source[0] = (ROOT / FILES[page]).read_text(encoding="utf-8")
    source[0] = re.sub(
        r"(\]\()([^)\s]+)(\))", lambda link: link[1] + _target(link[2], folder, page_folder) + link[3], source[0]
    )


def _draw(app: Sphinx) -> None:
    folder = DOCS / "_generated"
    folder.mkdir(exist_ok=True)
    curves.draw_margins(folder / "margins.png")
    curves.draw_negatives(folder / "negatives.png")
    curves.draw_boundaries(folder / "boundaries.png")


def _field_comment(name: str) -> str:
    """What a line `field: type  # comment` of a tuple's class says."""
    module, cls, field = name.rsplit(".", 2)
    source = inspect.getsource(operator.attrgetter(cls)(importlib.import_module(module)))
    found = re.search(rf"^    {field}: [^#\n]*# (.*)$", source, re.MULTILINE)
    return found[1] if found else ""


def _plain_docstring(app: Sphinx, what: str, name: str, of: object, options: object, lines: list[str]) -> None:
    """Docstrings are written to be read as they are: indented formulas are literal, and |x| is a length."""
    if lines and lines[0].startswith("Alias for field number"):
        lines[:] = [_field_comment(name)]
    literal = None  # how far a formula's introduction is indented
    for place, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal is not None:
            if not line.strip() or indent > literal:
                continue
            literal = None
        below = next((later for later in lines[place + 2 :] if later.strip()), "")
        is_followed = place + 1 < len(lines) and not lines[place + 1].strip()
        line = re.sub(r"(: )([A-Z])\.$", r"\1\2\\.", line.replace("|", "\\|"))  # "C." alone would begin a list
        if line.endswith("::"):
            literal = indent
        elif line.strip() and is_followed and len(below) - len(below.lstrip()) > indent:
            line, literal = line + (":" if line.endswith(":") else "\n\n::"), indent
        lines[place] = line
    lines[:] = "\n".join(lines).split("\n")


def _whole_sentence(app: Sphinx, what: str, name: str, of: object, options: object, lines: list[str]) -> None:
    """napoleon takes what stands before a colon for the type of an attribute: back to its place."""
    parts = re.fullmatch(r"(.*?)\n+:type: (.*?)\n*", "\n".join(lines), re.DOTALL)
    if parts:
        lines[:] = f"{parts[2]}: {parts[1]}".split("\n")


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", _draw)
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _plain_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _whole_sentence, priority=600)  # after it
