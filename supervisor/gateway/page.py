"""The page at `/`.

It holds no data, so everybody may have it; what it shows it asks for once a second (`/status?after=N`, told.py), with
the key that its reader gives it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

HTML = Path(__file__).with_name("page.html")


def wanted(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Browsers name HTML; curl and clients that want JSON don't."""
    accepted = b",".join(value for name, value in headers if name == b"accept").lower()
    return any(kind.partition(b";")[0].strip() == b"text/html" for kind in accepted.split(b","))


@cache
def answer() -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Only what is written in the file may run, and it may ask this server alone."""
    text = HTML.read_bytes()

    def hashes(element: bytes) -> str:
        found = re.findall(b"<%b>(.*?)</%b>" % (element, element), text, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in found)

    policy = (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    fields = [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
        (b"vary", b"Accept"),
    ]
    return 200, fields, text
