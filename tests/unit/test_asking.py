"""Addresses that a person gives by --url."""

from __future__ import annotations

import pytest

from supervisor import asking


@pytest.mark.parametrize("url", ["localhost:8000", "http://h", "https://[::1]:65535/v2/x", "127.0.0.1:1"])
def test_an_address(url: str) -> None:
    asking.client(url, 1).close()


@pytest.mark.parametrize("url", ["http://h:0", "h:65536", "http://127.0.0.1:99999", "ftp://h", "http://", "http://h:x"])
def test_what_is_none(url: str) -> None:
    """A port beyond the last one began again at 0, and somebody else was asked."""
    with pytest.raises(ValueError, match=r"."):
        asking.client(url, 1)
