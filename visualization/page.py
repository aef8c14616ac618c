"""Web pages of one file each: all that they show is within them, and the browser lets nothing out.

    make_page(title, body, styles=(css,), scripts=(js,), data={"case": as_json({})}) -> str

A Content-Security-Policy names each script and style by its hash and forbids the rest: no request leaves the page, and
nothing runs that a file's name or header might bring along.
"""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from core.inference.output_files import is_report_file
from core.system.files import read_text, rename_old, write_text

FOLDER = Path(__file__).resolve().parent
STYLE = FOLDER / "page.css"


def as_json(content: Any) -> str:
    """Return JSON that cannot end the element it stands in."""
    return json.dumps(content).replace("<", "\\u003c")


def as_base64(content: bytes) -> str:
    """Return bytes as text."""
    return base64.b64encode(content).decode()


def make_page(
    title: str, body: str, scripts: Sequence[str] = (), styles: Sequence[str] = (), data: dict[str, str] | None = None
) -> str:
    """Make a page.

    Args:
        title: plain text.
        body: HTML, in which everything that came from a file went through `escaped`.
        scripts: run in this order after the body is there.
        styles: CSS beside page.css.
        data: what scripts read, from `as_json` or `as_base64`, by the id of the element that holds it.

    Raises:
        ValueError: when a script would end its own element.
    """
    if any("</script" in script.lower() for script in scripts):
        raise ValueError("a script holds its element's end; write <\\/script in it")
    styles = [read_text(STYLE), *styles]
    return Template(read_text(FOLDER / "page.html")).substitute(
        script_hashes=hashes(scripts),
        style_hashes=hashes(styles),
        title=escaped(title),
        styles="\n".join(f"<style>{style}</style>" for style in styles),
        body=body,
        data="\n".join(f'<script id="{name}" type="text/plain">{text}</script>' for name, text in (data or {}).items()),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def hashes(texts: Sequence[str]) -> str:
    """Return the texts as a Content-Security-Policy names them."""
    digests = (as_base64(hashlib.sha256(text.encode()).digest()) for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


def escaped(text: object) -> str:
    """Escape any text for HTML; a file's name may hold tags, and bytes that are not UTF-8."""
    return html.escape(str(text).encode(errors="replace").decode())


def data_url(kind: str, content: bytes) -> str:
    """Return bytes, such as a picture's, as a data URL."""
    return f"data:{kind};base64,{as_base64(content)}"


def write_page(path: Path, page: str, kind: str = "page") -> None:
    """Write a page, or a report's numbers, whole; the folder is made when missing, and a foreign file becomes *.old."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_report_file(path):
        rename_old(path, f"{path} is no {kind} of this program")
    write_text(path, page)
