"""The text of a page as a reader sees it, with its links and the alternatives of its pictures."""

from html.parser import HTMLParser

_HIDDEN = ("script", "style", "template", "noscript", "head", "title")
_BLOCKS = (
    "p", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "table", "ul", "ol", "section", "article",
    "header", "footer", "pre", "blockquote", "form", "br",
)  # fmt: skip


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden = 0
        self._links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in _HIDDEN:
            self._hidden += 1
        elif tag in _BLOCKS:
            self.pieces.append("\n")
        elif tag in ("td", "th"):
            self.pieces.append(" | ")
        elif tag == "a":
            self._links.append(given.get("href") or "")
        elif tag == "img":
            self.pieces.append(f"[picture: {given.get('alt') or 'without a description'}]")
        elif tag == "input":
            self.pieces.append(f"[{given.get('type') or 'text'}: {given.get('value') or ''}]")

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN:
            self._hidden = max(0, self._hidden - 1)
        elif tag in _BLOCKS:
            self.pieces.append("\n")
        elif tag == "a" and self._links and (link := self._links.pop()):
            self.pieces.append(f" <{link}>")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(" ".join(data.split()) if data.strip() else " ")
            if data[-1:].isspace():
                self.pieces.append(" ")


def page_text(html: str) -> str:
    """Lines of text; a link is followed by its target in angle brackets."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    lines = (" ".join(line.split()) for line in "".join(reader.pieces).split("\n"))
    return "\n".join(line for line in lines if line) or "[the page is empty]"
