"""A page as one HTML file that needs nothing else: pictures inside, no script, nothing to load, text of models as text."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from llama_jax.evaluation.report import Folded, Section
from llama_jax.training.run_folder import write_whole

# Beside what is escaped: a browser that reads this loads nothing and runs nothing, whatever a page holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886; padding-bottom: .3rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; font-size: .9rem; }
th, td { border: 1px solid #8886; padding: .25rem .6rem; text-align: left; vertical-align: top; }
th { background: #8882; } td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; background: #fff; }
pre { background: #8881; padding: .7rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
td code { white-space: pre-wrap; }
summary { cursor: pointer; font-weight: 600; }
@media print {
  body { max-width: none; margin: 0; font-size: 10pt; } table { display: table; font-size: 8pt; }
  h2, h3 { break-after: avoid; } img, tr { break-inside: avoid; } details:not([open]) { display: none; }
}
"""


def write_html(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Writes sections of Markdown under a title as one HTML file, and gives the path.

    Args:
      path: the file; the PNGs that the sections show are looked for beside it and below.
      title: of the page.
      sections: as `write_page` takes them.
    """
    body = "\n".join(render(section, path.parent) for section in sections)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
    write_whole(path, page.encode())
    return path


def render(section: Section, folder: Path) -> str:
    """A section as HTML; HTML in it is shown, not obeyed."""
    if isinstance(section, Folded):
        return f"<details><summary>{escape(section.title)}</summary>\n{render(section.text, folder)}</details>"
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(section)
    for token in tokens:
        token.children = token.children and [_local(child, folder) for child in token.children]
    return markdown.renderer.render(tokens, markdown.options, {})


def _local(token: Token, folder: Path) -> Token:
    """The token with nothing outside the page in it: a PNG of the folder inside, other pictures and links as their text."""
    if token.type == "image":
        path = (folder / str(token.attrs["src"])).resolve()
        if path.suffix == ".png" and path.is_relative_to(folder.resolve()) and path.is_file():
            token.attrs["src"] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            return token
        return Token("text", "", 0, content=token.content)
    if token.type in ("link_open", "link_close"):
        return Token("text", "", 0, content="")
    return token
