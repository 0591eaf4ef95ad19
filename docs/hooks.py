"""Hooks of the site's build: files from outside docs/ become pages, and TeX becomes MathML.

MathML is drawn by the browser itself: no script, no download, neither while building nor while reading. It needs a
font with metrics for mathematics, which few Linux machines have: STIX Two Math, as the package ziamath brings it.
"""

import html
import importlib.util
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("examples/*/README.md"))),
)
PICTURES = tuple(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("examples/*/*.png")))


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures that live beside the code they speak of."""
    for path in (*PAGES, *PICTURES):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    package = importlib.util.find_spec("ziamath")
    font = Path(str(package.origin)).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    files.append(File.generated(config, "fonts/math.ttf", abs_src_path=str(font)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links that are right in the repository into links that are right in the site."""
    here = page.file.src_uri
    in_repository = here if here in PAGES else f"docs/{here}"

    def rewritten(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), target))
        path = path.removeprefix("docs/") if path.startswith("docs/") else path
        if files.get_file_from_path(path) is None:
            return match[0]  # mkdocs says that it is broken
        return f"]({posixpath.relpath(path, posixpath.dirname(here) or '.')}{anchor})"

    return re.sub(r"\]\(((?!\w+:|#|/)[^)#\s]+)(#[^)\s]*)?\)", rewritten, markdown)


def on_page_content(markup: str, **_: Any) -> str:
    """Replace what `pymdownx.arithmatex` marked as TeX by MathML."""
    for pattern, display in (
        (r'<span class="arithmatex">\\\((.*?)\\\)</span>', "inline"),
        (r'<div class="arithmatex">\\\[(.*?)\\\]</div>', "block"),
    ):
        markup = re.sub(pattern, lambda m, display=display: _mathml(m[1], display), markup, flags=re.DOTALL)
    return markup


def _mathml(tex: str, display: str) -> str:
    tex = html.unescape(tex).strip()
    mathml = convert(tex, display=display)
    mathml = re.sub(r"<mo(?=[^>]*>&#x0007C;<)", '<mo lspace="0" rspace="0"', mathml)  # bars are no relations here
    return mathml.replace("<math ", f'<math aria-label="{html.escape(tex, quote=True)}" ', 1)
