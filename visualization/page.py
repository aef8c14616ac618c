"""Web pages of one file each: all that they show is within them, and the browser lets nothing out.

    make_page(title, body, styles=(css,), scripts=(js,), data={"case": Data("application/json", "{}")}) -> str

A Content-Security-Policy names each script and style by its hash and forbids the rest: no request leaves the page, and
nothing runs that a file's name or header might bring along.
"""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.system.files import read_text, write_text

FOLDER = Path(__file__).resolve().parent
STYLE = FOLDER / "page.css"


@dataclass(frozen=True)
class Data:
    """Something that a page's script reads: its type, and its text, base64 where it is bytes."""

    kind: str
    text: str

    @classmethod
    def json(cls, content: Any) -> "Data":
        """JSON that cannot end the element it stands in."""
        return cls("application/json", json.dumps(content).replace("<", "\\u003c"))

    @classmethod
    def bytes(cls, content: bytes) -> "Data":
        """Bytes as base64."""
        return cls("application/octet-stream", base64.b64encode(content).decode())


def make_page(
    title: str,
    body: str,
    scripts: Sequence[str] = (),
    styles: Sequence[str] = (),
    data: dict[str, Data] | None = None,
) -> str:
    """Make a page.

    Args:
        title: plain text.
        body: HTML, in which everything that came from a file went through `escaped`.
        scripts: run in this order after the body is there.
        styles: CSS beside page.css.
        data: by the id of the element that holds it.

    Raises:
        ValueError: when a script would end its own element.
    """
    for script in scripts:
        if "</script" in script.lower():
            raise ValueError("a script holds its element's end; write <\\/script in it")
    styles = [read_text(STYLE), *styles]
    blocks = [f'<script id="{name}" type="{item.kind}">{item.text}</script>' for name, item in (data or {}).items()]
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy_of(scripts, styles)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escaped(title)}</title>",
            *(f"<style>{style}</style>" for style in styles),
            "</head>",
            f"<body>\n{body}",
            *blocks,
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        )
    )


def policy_of(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """Return a Content-Security-Policy that allows these scripts and styles and nothing from the network."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {hashes(scripts)}",
            f"style-src {hashes(styles)}",
            "img-src data: blob:",
            "media-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def hashes(texts: Sequence[str]) -> str:
    """Return the texts as a Content-Security-Policy names them."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


def escaped(text: object) -> str:
    """Any text as HTML that shows it; a name may hold what a browser would run, and bytes that are no letters."""
    return html.escape(str(text).encode(errors="replace").decode())


def data_url(kind: str, content: bytes) -> str:
    """Bytes as an address that a page can hold, say a picture's."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write_page(path: Path, page: str) -> None:
    """Write a page whole; the folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
