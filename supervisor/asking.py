"""An HTTP client for those who ask seldom: `supervisor job`, `status --url`, the doctor, a machine that is not fit."""

from __future__ import annotations

import re

import httpx

from supervisor.listen import is_loopback


def client(url: str, patience: float, *, authorization: str = "") -> httpx.Client:
    """Returns a client for `url`, which may lack `http://`. It uses no proxy of the environment for addresses of this
    machine; its key goes to no other host. Raises ValueError for no address, or a key that no header may have."""
    if not (authorization.isascii() and authorization.isprintable()):
        raise ValueError("a key has characters that it may not have")
    try:
        address = httpx.URL(url if "://" in url else f"http://{url}")
    except httpx.InvalidURL as error:
        raise ValueError(str(error)) from None
    if address.scheme not in ("http", "https") or not address.host or address.port not in (None, *range(1, 65536)):
        raise ValueError(f"{url} is no address")
    return httpx.Client(
        base_url=address.copy_with(query=None, fragment=None),
        headers={"Authorization": authorization} if authorization else {},
        timeout=patience,
        trust_env=address.host != "localhost" and not is_loopback(address.host),
    )


def reason(error: Exception) -> str:
    """Returns in a word or two why nobody answered: `Connection refused`."""
    return re.sub(r"^\[Errno -?\d+\] ", "", str(getattr(error, "strerror", None) or error)) or type(error).__name__
