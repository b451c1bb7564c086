"""What a browser would see of a report."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET
from html.parser import HTMLParser


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text, and the tags left open."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    @property
    def images(self) -> list[tuple[str, bytes]]:
        """Alternative text and content of each picture."""
        found = []
        for tag, attrs in self.tags:
            if tag == "img":
                head, _, content = attrs["src"].partition(";base64,")
                assert head in ("data:image/png", "data:image/svg+xml")
                found.append((attrs["alt"], base64.b64decode(content, validate=True)))
        return found

    @property
    def brains(self) -> int:
        """Number of brains shown."""
        return sum(content.startswith(b"\x89PNG") for _, content in self.images)


def svg_text(content: bytes) -> str:
    """Return the words in an SVG file."""
    return " ".join("".join(ET.fromstring(content).itertext()).split())
