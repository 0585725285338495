"""Answers with the page at `/`, which is page.html, and with the header fields that page.toml has.

It holds no data, so everybody may have it; what it shows it asks for once a second (`/status?after=N`), with the key
that its reader gives it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

HTML = Path(__file__).with_name("page.html")


def wants_html(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Tells whether a client names HTML: browsers do; curl and clients that want JSON don't."""
    accepted = b",".join(value for name, value in headers if name == b"accept").lower()
    return any(kind.partition(b";")[0].strip() == b"text/html" for kind in accepted.split(b","))


@cache
def answer() -> tuple[int, list[tuple[bytes, bytes]], bytes]:  # status, header fields, body
    text = HTML.read_bytes()
    hashes = {}
    for element in ("script", "style"):
        found = re.findall(f"<{element}>(.*?)</{element}>".encode(), text, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part).digest()).decode() for part in found)
        hashes[element] = " ".join(f"'sha256-{digest}'" for digest in digests)
    head = tomllib.loads(HTML.with_suffix(".toml").read_text(encoding="utf-8"))
    return 200, [(name.encode(), value.format(**hashes).encode()) for name, value in head.items()], text
