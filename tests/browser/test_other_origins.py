"""A page of another origin in a real Chromium: it gets its answer where it is allowed, and nothing elsewhere.

What a page that is allowed sees of refusals, and what preflights are answered: tests/clients/test_browser_like.py.
"""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.test_page import browser  # noqa: F401  # a fixture
from tests.harness import Supervisor

pytestmark = pytest.mark.browser

KEY = "the-right-key"
ASK = """async ([url, key, body]) => {
  const headers = {authorization: `Bearer ${key}`, ...(body && {'content-type': 'application/json'})};
  const answer = await fetch(url, {method: body ? 'POST' : 'GET', headers, ...(body && {body: JSON.stringify(body)})});
  return [answer.status, await answer.text()];
}"""
TRY = f"async given => {{ try {{ return await ({ASK})(given); }} catch (error) {{ return [0, `${{error}}`]; }} }}"
BODY = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 5}


class Empty(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>app</title>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server of pages. By its two names it is two origins."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="module")
def served(port: int) -> Iterator[Supervisor]:
    environ = {"SUPERVISOR_API_KEYS": KEY, "ALLOWED_ORIGINS": f'["http://127.0.0.1:{port}"]'}
    with Supervisor("some/model", environ=environ) as served:
        served.ready().client.headers["X-API-Key"] = KEY
        yield served
        served.engine()


def asked(browser: Any, page_at: str, served: Supervisor, path: str, key: str, body: object = None) -> list[Any]:  # noqa: F811
    """What a page there is given, status and text; 0 where it is given nothing."""
    page = browser.new_page()
    page.goto(page_at)
    found: list[Any] = page.evaluate(TRY, [f"http://127.0.0.1:{served.port}{path}", key, body])
    page.close()
    return found


def test_a_page_of_an_allowed_origin_asks_with_its_key(browser: Any, port: int, served: Supervisor) -> None:  # noqa: F811
    page = f"http://127.0.0.1:{port}/"
    status, text = asked(browser, page, served, "/v1/chat/completions", KEY, BODY)
    assert status == 200
    assert text.count("data: ") > 5
    assert text.endswith("data: [DONE]\n\n")
    assert asked(browser, page, served, "/status", KEY)[0] == 200
    for path, key, body, refusal in (
        ("/v1/chat/completions", "a-stale-one", BODY, 401),
        ("/v1/v1/models", KEY, None, 404),
        ("/metrics", "a-stale-one", None, 401),
    ):
        status, text = asked(browser, page, served, path, key, body)
        assert status == refusal
        assert "error" in text


def test_a_page_of_another_origin_is_given_nothing(browser: Any, port: int, served: Supervisor) -> None:  # noqa: F811
    page = f"http://localhost:{port}/"
    before = served.client.get("/fake/state").json()["finished"]
    for path, body in (("/v1/chat/completions", BODY), ("/status", None)):
        assert asked(browser, page, served, path, KEY, body) == [0, "TypeError: Failed to fetch"]
    assert served.client.get("/fake/state").json()["finished"] == before  # it was not even asked
