"""The page in a real Chromium, over the fake engine.

    SCREENSHOTS=1 pytest tests/browser -k pictures      makes those of docs/page.md afresh, of the real vLLM

Every test fails for a request that leaves the origin, an error on the console, and anything that the policy blocks.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import io
import itertools
import json
import os
import re
import signal
import socketserver
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api as playwright
from rich import terminal_theme
from rich.console import Console
from rich.text import Text

from tests.harness import ROOT, Supervisor, wait_until

expect = playwright.expect
expect.set_options(timeout=15_000)

pytestmark = pytest.mark.browser

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
IMAGES = ROOT / "docs" / "images"
PHONE = {"width": 360, "height": 740}
# A key that is asked for is a 401, which Chromium writes to the console whatever the page makes of it.
HARMLESS = re.compile(r"the server responded with a status of 401")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """With a profile of its own, which goes with it."""
    if not Path(CHROMIUM).exists():
        text = "Chromium is not here, and the page is seen by nobody: apt-get install chromium"
        if "CI" in os.environ and os.geteuid() == 0 and Path("/etc/debian_version").exists():
            pytest.fail(text)
        pytest.skip(text)
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


class Tabs:
    """`open(address)` gives a page; what it must not do is kept in `faults`."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.contexts: list[Any] = []
        self.faults: list[str] = []

    def open(self, address: str, prepare: Callable[[Any], object] = lambda page: None, **options: Any) -> Any:
        context = self.browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        origin = re.match(r"http://[^/]+/", address)[0]  # type: ignore[index]
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("console", self._console)
        page.on(
            "request",
            lambda request: (
                request.url.startswith((origin, "data:")) or self.faults.append(f"it asked for {request.url}")  # type: ignore[func-returns-value]
            ),
        )
        prepare(page)
        page.goto(address)
        return page

    def close(self) -> None:
        """While the server is still there: its end would be an error on the console."""
        while self.contexts:
            self.contexts.pop().close()

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning") and not HARMLESS.search(message.text):
            self.faults.append(f"console: {message.text}")


@pytest.fixture
def tabs(browser: Any) -> Iterator[Tabs]:
    tabs = Tabs(browser)
    yield tabs
    tabs.close()
    assert tabs.faults == []


def address(served: Supervisor) -> str:
    return f"http://127.0.0.1:{served.port}/"


@pytest.fixture(scope="module")
def slow() -> Iterator[Supervisor]:
    """Its model takes its time for each token."""
    with Supervisor("some/model", plan=[{"token_interval": 0.05}]) as served:
        yield served.ready()


def state(page: Any) -> Any:
    return page.locator("#state")


def ask(page: Any, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_role("button", name="Send").click()


# What it shows


def test_it_shows_the_start_and_that_it_is_ready_without_being_loaded_again(tabs: Tabs) -> None:
    with Supervisor("some/model", plan=[{"load_seconds": 4}]) as served:
        page = tabs.open(address(served))
        page.evaluate("window.same = true")
        expect(state(page)).to_have_text("starting")
        expect(page.locator("#reason")).to_contain_text("loading weights")
        expect(page.locator("#phases li.now")).to_contain_text("loading weights")
        expect(page.locator("#total")).to_contain_text("so far")
        expect(state(page)).to_have_text("ready")
        expect(page.locator("#phases li.now")).to_have_count(0)
        expect(page.locator("#total")).to_contain_text("in all")
        expect(page).to_have_title("ready · some/model")
        expect(page.locator("#log")).to_contain_text("Application startup complete")
        expect(page.locator("#settings")).to_contain_text("some/model")
        expect(page.locator("#command")).to_contain_text("--uds")
        assert page.evaluate("window.same") is True
        tabs.close()


def test_it_shows_a_crash_and_the_recovery_as_they_happen(tabs: Tabs, tmp_path: Path) -> None:
    environ = {"FAKE_VLLM_COUNT": str(tmp_path / "n")}
    with Supervisor("some/model", plan=[{}, {"load_seconds": 4}], environ=environ) as served:
        served.ready()
        page = tabs.open(address(served))
        expect(state(page)).to_have_text("ready")
        expect(page.locator("#failure")).to_contain_text("No failure")
        os.kill(served.engine(), signal.SIGKILL)
        expect(state(page)).to_have_text("starting")
        expect(page.locator("#failure")).to_contain_text("signal 9")
        expect(page.locator("#reason")).to_contain_text("Now: loading weights")
        page.get_by_text("vLLM’s last lines before it").click()
        expect(page.locator("#failure pre")).to_contain_text("Application startup complete")
        expect(state(page)).to_have_text("ready")
        expect(page.locator("#happened li b")).to_have_text(["ready", "starting", "restarting", "ready", "starting"])
        expect(page.locator("#numbers")).to_contain_text("restarts1")
        tabs.close()
        served.engine_pid = served.client.get("/status").json()["pid"]


def refused(tabs: Tabs) -> None:
    """That nobody answers, Chromium writes to the console whatever the page makes of it."""
    tabs.faults[:] = [fault for fault in tabs.faults if "ERR_CONNECTION_REFUSED" not in fault]


def test_it_says_when_the_server_is_gone(tabs: Tabs) -> None:
    with Supervisor("some/model") as served:
        served.ready().engine()
        page = tabs.open(address(served))
        expect(state(page)).to_have_text("ready")
        served.signal(signal.SIGTERM)
        expect(page.locator("#away")).to_have_text("The server can’t be reached. Trying again …")
        expect(state(page)).to_have_text("no answer")
        expect(page.locator("#since")).to_have_text(re.compile(r"^ready as of \d\d?:\d\d:\d\d"))
        expect(page).to_have_title("no answer · some/model")
        assert served.exit_code() == 0
    refused(tabs)


def test_it_says_that_a_server_has_ended_which_it_saw_drain(tabs: Tabs) -> None:
    with Supervisor("some/model", plan=[{"token_interval": 0.05}]) as served:
        served.ready().engine()
        page = tabs.open(address(served))
        page.get_by_label("Tokens, at most").fill("80")
        ask(page, "Take your time")
        expect(page.locator("#talk .answer")).to_contain_text("pieces")
        served.signal(signal.SIGTERM)
        expect(state(page)).to_have_text("draining")
        expect(page.locator("#talk .answer")).to_contain_text("80 pieces")  # its answer goes on
        expect(page.locator("#away")).to_have_text("The server has ended. Trying again …")
        assert served.exit_code() == 0
    refused(tabs)


def test_it_follows_the_next_supervisor_on_the_same_port_from_its_first_line_on(tabs: Tabs) -> None:
    with Supervisor("first/model") as first:
        page = tabs.open(address(first.ready()))
        expect(page).to_have_title("ready · first/model")
        first.engine()
        port = first.port
        first.signal(signal.SIGTERM)
        expect(page.locator("#away")).to_be_visible()
        assert first.exit_code() == 0
    with Supervisor("second/model", "--port", str(port)) as second:
        second.ready().engine()
        expect(page).to_have_title("ready · second/model")
        expect(page.locator("#away")).to_be_hidden()
        expect(page.locator("#log")).to_contain_text("model second/model")
        expect(page.locator("#log")).not_to_contain_text("first/model")
        tabs.close()
    refused(tabs)


def test_where_fewer_lines_are_told_than_before_the_log_begins_anew(tabs: Tabs, slow: Supervisor) -> None:
    """What a restart looks like that fell between two polls."""
    restarted: list[str] = []

    def answer(route: Any) -> None:
        status = route.fetch().json()
        after = int(route.request.url.partition("after=")[2])
        if restarted:
            restarted.append(str(after))
            lines = ["a new line", "and another"]
            status |= {"line": len(lines), "log": lines[after:]}
        route.fulfill(json=status)

    page = tabs.open(address(slow))
    page.route("**/status?after=*", answer)
    expect(page.locator("#log")).to_contain_text("Application startup complete")
    restarted.append("now")
    expect(page.locator("#log")).to_have_text("a new lineand another")
    wait_until(lambda: page.evaluate("line") == 2 and len(restarted) > 3, "the polls behind it")
    assert int(restarted[1]) > 2
    assert restarted[2:4] == ["0", "2"]
    page.unroute_all(behavior="wait")


# How often it asks


class Polls:
    """Those of a page whose clock stands still until `passes` moves it."""

    def __init__(self, tabs: Tabs, served: Supervisor) -> None:
        self.sent = self.answered = self.given_up = 0
        self.held = False  # the server takes its time
        self.page = tabs.open(address(served), self._prepare)
        expect(state(self.page)).to_have_text("ready")
        self.settle(1)

    def _prepare(self, page: Any) -> None:
        page.clock.install(time=0)
        page.clock.pause_at(1000)
        page.route("**/status?after=*", lambda route: None if self.held else route.continue_())
        for event, name in (("request", "sent"), ("requestfinished", "answered"), ("requestfailed", "given_up")):
            page.on(event, functools.partial(self._note, name))

    def _note(self, name: str, request: Any) -> None:
        if "/status?after=" in request.url:
            setattr(self, name, getattr(self, name) + 1)

    def settle(self, count: int) -> None:
        """Until so many in all were sent, and what was answered is drawn."""

        def settled() -> bool:
            drawn = self.page.evaluate("samples.length")
            over = self.answered + self.given_up == count and drawn == self.answered
            return self.sent == count and (self.held or over)

        wait_until(settled, f"poll {count}")

    def passes(self, seconds: float) -> int:
        """How many more are sent: where it is one too many, `settle` waits in vain."""
        before = self.sent
        self.page.clock.run_for(round(seconds * 1000))
        self.page.evaluate("fetch('health')")  # whatever was sent before this one is known when it is answered
        self.settle(self.sent)
        return self.sent - before

    def look(self, visible: bool) -> None:
        self.page.evaluate(
            """hidden => {
              Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
              document.dispatchEvent(new Event('visibilitychange'));
            }""",
            not visible,
        )


def test_it_asks_once_a_second_while_somebody_looks_and_every_ten_seconds_while_nobody_does(
    tabs: Tabs, slow: Supervisor
) -> None:
    polls = Polls(tabs, slow)
    for _ in range(3):
        assert (polls.passes(0.999), polls.passes(0.001)) == (0, 1)
    polls.look(visible=False)
    assert polls.passes(1) == 1
    for _ in range(2):
        assert (polls.passes(9.999), polls.passes(0.001)) == (0, 1)
    assert polls.passes(3) == 0
    before = polls.sent
    polls.look(visible=True)
    polls.settle(before + 1)  # at once
    assert (polls.passes(0.999), polls.passes(0.001)) == (0, 1)


def test_it_gives_up_a_poll_after_eight_seconds_and_never_has_two(tabs: Tabs, slow: Supervisor) -> None:
    polls = Polls(tabs, slow)
    polls.held = True
    away = polls.page.locator("#away")
    assert polls.passes(1) == 1
    assert polls.passes(7.999) == 0
    expect(away).to_be_hidden()
    for pause in (1, 1.5, 2.25):  # longer and longer
        assert polls.passes(0.001) == 0
        expect(away).to_have_text("The server can’t be reached. Trying again …")
        wait_until(lambda: polls.page.evaluate("1") and polls.given_up == polls.sent - polls.answered, "its end")
        assert (polls.passes(pause - 0.001), polls.passes(0.001)) == (0, 1)
        assert polls.passes(7.999) == 0
    polls.held = False
    assert (polls.passes(0.001), polls.passes(3.375)) == (0, 1)
    expect(away).to_be_hidden()
    expect(state(polls.page)).to_have_text("ready")


def test_it_plots_what_comes(tabs: Tabs, slow: Supervisor) -> None:
    page = tabs.open(address(slow))
    expect(state(page)).to_have_text("ready")
    with slow.client.stream("POST", "/v1/chat/completions", json=chat(max_tokens=60, stream=True)) as answer:
        expect(page.locator("#plots figure").nth(3).locator("output")).to_contain_text("1 in flight")
        answer.read()
    expect(page.locator("#plots figure").nth(3).locator("output")).to_contain_text("0 in flight")
    expect(page.locator("#plots figure").nth(2).locator("output")).to_contain_text(re.compile(r"\d ms p50"))
    for number in range(4):
        assert page.locator("#plots figure").nth(number).locator("path").first.get_attribute("d").startswith("M")
    expect(page.get_by_role("img", name=re.compile("^Pieces of answers per second"))).to_be_visible()


# Trying the model


def chat(**more: object) -> dict[str, object]:
    return {"model": "some/model", "messages": [{"role": "user", "content": "hi"}], **more}


def test_it_streams_a_chat(tabs: Tabs, slow: Supervisor) -> None:
    page = tabs.open(address(slow))
    page.get_by_label("Tokens, at most").fill("40")
    ask(page, "Tell me something")
    answer = page.locator("#talk .answer").first
    expect(answer).to_contain_text(re.compile(r"first after .* · [2-9] pieces"))  # as they come
    whole = slow.client.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Tell me something"}], "max_tokens": 40},
    ).json()["choices"][0]["message"]["content"]
    expect(answer.locator("span").nth(1)).to_have_text(whole)
    expect(answer).to_contain_text("40 pieces")
    ask(page, "And then?")
    expect(page.locator("#talk .answer").nth(1)).to_contain_text("40 pieces")
    assert len(page.evaluate("messages")) == 4


def test_a_chat_can_be_stopped(tabs: Tabs, slow: Supervisor) -> None:
    page = tabs.open(address(slow))
    page.get_by_label("Tokens, at most").fill("2000")
    ask(page, "Tell me everything")
    expect(page.locator("#talk .answer")).to_contain_text("pieces")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#talk .answer")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    expect(page.locator("#numbers")).to_contain_text("in flight")
    wait_until(lambda: page.evaluate("last.in_flight") == 0, "vLLM to know of it")
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#talk")).to_be_hidden()


def test_a_model_without_a_chat_template_continues_the_text(tabs: Tabs, slow: Supervisor) -> None:
    page = tabs.open(address(slow))
    message = (
        "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template "
        "if the tokenizer does not define one."
    )
    body = json.dumps({"error": {"message": message, "type": "BadRequestError", "code": 400}})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, body=body))
    page.get_by_label("Tokens, at most").fill("5")
    ask(page, "Once upon a time")
    expect(page.locator("#talk .answer")).to_contain_text("5 pieces")
    expect(page.locator("#talk")).to_contain_text("no chat template")
    tabs.faults[:] = [fault for fault in tabs.faults if "status of 400" not in fault]


def test_an_answer_that_is_an_error_is_told(tabs: Tabs, slow: Supervisor) -> None:
    page = tabs.open(address(slow))
    page.get_by_label("Tokens, at most").fill("999999")
    ask(page, "Too much")
    expect(page.locator("#talk .error")).to_contain_text("400: ")
    tabs.faults[:] = [fault for fault in tabs.faults if "status of 400" not in fault]


def test_a_servers_clock_that_steps_back_begins_the_curves_anew(tabs: Tabs, slow: Supervisor) -> None:
    """Samples of the future would stay until the clock is there again, and rates would be of no time."""
    page = tabs.open(address(slow))
    expect(state(page)).to_have_text("ready")
    page.evaluate("samples.forEach(one => { one.at += 3600; })")
    wait_until(lambda: page.evaluate("samples.every(one => one.at <= last.now)"), "samples of this time alone")
    expect(page.locator("#plots svg").first).to_have_attribute("aria-label", re.compile("Requests per second"))


# Who may see it, and where from


def test_it_asks_for_the_key(tabs: Tabs) -> None:
    with Supervisor("some/model", environ={"SUPERVISOR_API_KEYS": "the-right-key"}) as served:
        served.ready()
        page = tabs.open(address(served))
        field = page.get_by_label("One of its API keys")
        expect(field).to_be_focused()
        assert "some/model" not in page.content()
        field.fill("the-wrong-key")
        page.keyboard.press("Enter")
        expect(page.get_by_text("This key is not valid.")).to_be_visible()
        for impossible in ("the-right-key\N{EURO SIGN}", "the right key"):  # a header can't have the first
            field.fill(impossible)
            page.keyboard.press("Enter")
            expect(page.get_by_text("A key has printable ASCII characters alone, and no blanks.")).to_be_visible()
            assert page.evaluate("sessionStorage.length") == 0
        field.fill("the-right-key")
        page.keyboard.press("Enter")
        expect(state(page)).to_have_text("ready")
        ask(page, "hi")
        expect(page.locator("#talk .answer")).to_contain_text("pieces")
        page.reload()  # the tab keeps it
        expect(state(page)).to_have_text("ready")
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.get_by_role("button", name="Forget the key").click()
        expect(page.get_by_label("One of its API keys")).to_be_visible()
        tabs.close()
        headers = {"X-API-Key": "the-right-key"}
        served.engine_pid = served.client.get("/status", headers=headers).json()["pid"]


WITHHELD = "The log and the settings are shown to an admin key."
UNSHOWN = "This key does not show them."


def withheld(page: Any) -> None:
    """What a key sees that is not an administrator's."""
    expect(state(page)).to_have_text("ready")
    expect(page.get_by_text(WITHHELD)).to_be_visible()
    for card in ("#log", "#settings", "#command"):
        expect(page.locator(card)).to_be_hidden()
    expect(page.locator("#phases")).to_contain_text("importing vLLM")
    expect(page.locator("#happened li b")).to_have_text(["ready", "starting"])
    assert "Application startup complete" not in page.content()
    assert "--uds" not in page.content()


def everything(page: Any) -> None:
    expect(page.locator("#log")).to_contain_text("Application startup complete")
    expect(page.locator("#settings")).to_contain_text("some/model")
    expect(page.locator("#command")).to_contain_text("--uds")
    expect(page.get_by_text(WITHHELD)).to_be_hidden()


def test_it_shows_the_log_and_the_settings_to_an_admin_key_alone(tabs: Tabs) -> None:
    keys = {"SUPERVISOR_API_KEYS": "a-plain-key", "SUPERVISOR_ADMIN_KEYS": "the-admin-key"}
    with Supervisor("some/model", environ=keys) as served:
        served.ready()
        page = tabs.open(address(served))
        field = page.get_by_label("One of its API keys")
        field.fill("a-plain-key")
        page.keyboard.press("Enter")
        withheld(page)
        expect(field).to_be_hidden()
        page.get_by_role("button", name="Enter a key").click()
        expect(field).to_be_focused()
        field.fill("the-admin-key")
        page.keyboard.press("Enter")
        everything(page)
        page.reload()
        everything(page)
        page.locator("#settings summary").click()  # what is open stays so
        seen = page.evaluate("last.now")
        wait_until(lambda: page.evaluate("last.now") > seen, "another poll")
        expect(page.locator("#settings details")).to_have_attribute("open", "")
        tabs.close()
        served.engine_pid = served.client.get("/status", headers={"X-API-Key": "a-plain-key"}).json()["pid"]


def test_with_admin_keys_alone_everybody_sees_the_rest(tabs: Tabs, tmp_path: Path) -> None:
    environ = {"SUPERVISOR_ADMIN_KEYS": "the-admin-key", "FAKE_VLLM_COUNT": str(tmp_path / "n")}
    with Supervisor("some/model", environ=environ) as served:
        served.ready()
        page = tabs.open(address(served))
        withheld(page)
        os.kill(served.engine(), signal.SIGKILL)
        expect(page.locator("#failure")).to_contain_text("signal 9")
        expect(page.locator("#failure details")).to_have_count(0)
        expect(state(page)).to_have_text("ready")
        assert UNSHOWN not in page.inner_text("#withheld")
        page.get_by_role("button", name="Enter a key").click()
        page.get_by_label("an admin key").fill("no-admin-key")
        page.keyboard.press("Enter")
        expect(page.locator("#withheld")).to_contain_text(UNSHOWN)
        page.get_by_role("button", name="Enter a key").click()
        page.get_by_label("an admin key").fill("the-admin-key")
        page.keyboard.press("Enter")
        everything(page)
        page.get_by_text("vLLM’s last lines before it").click()
        expect(page.locator("#failure pre")).to_contain_text("Application startup complete")
        tabs.close()
        served.engine_pid = served.client.get("/status").json()["pid"]


class Prefixed(http.server.BaseHTTPRequestHandler):
    """A reverse proxy that serves what is at `/` below `/some/prefix/`, and nothing elsewhere."""

    port = 0

    def _pass(self) -> None:
        path = "/" if self.path == "/some/prefix" else self.path.removeprefix("/some/prefix")
        if path == self.path:
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        upstream = http.client.HTTPConnection("127.0.0.1", self.port)
        upstream.request(self.command, path, body, dict(self.headers))
        answer = upstream.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # the browser left
            while data := answer.read1(65536):
                self.wfile.write(data)
        upstream.close()

    do_GET = do_POST = _pass

    def log_message(self, *_: object) -> None:
        pass


class Proxy(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


@pytest.mark.parametrize("path", ["some/prefix/", "some/prefix"])
def test_it_works_behind_a_prefix(tabs: Tabs, slow: Supervisor, path: str) -> None:
    handler = type("Handler", (Prefixed,), {"port": slow.port})
    with Proxy(("127.0.0.1", 0), handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        page = tabs.open(f"http://127.0.0.1:{proxy.server_address[1]}/{path}")
        expect(state(page)).to_have_text("ready")
        page.get_by_label("Tokens, at most").fill("5")
        ask(page, "hi")
        expect(page.locator("#talk .answer")).to_contain_text("5 pieces")
        tabs.close()
        proxy.shutdown()
        thread.join()


# How it looks, and for whom

CONTRAST = """() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => numbers(color).slice(0, 3).map(c => c / 255)
    .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, at) => sum + c * [.2126, .7152, .0722][at], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if ((numbers(color)[3] ?? 1) === 1) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = [];
  for (const node of document.querySelectorAll('body *')) {
    const told = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    if (!told || !node.checkVisibility() || node.matches(':disabled, script, style, noscript')) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) found.push(`${node.outerHTML.slice(0, 80)}: ${(a + .05) / (b + .05)}`);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_light_and_dark_and_can_be_read(tabs: Tabs, slow: Supervisor, scheme: str) -> None:
    page = tabs.open(address(slow), color_scheme=scheme)
    expect(state(page)).to_have_text("ready")
    red, *_ = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert (red > 200) is (scheme == "light")
    page.get_by_label("Tokens, at most").fill("60")
    ask(page, "What are you?")
    expect(page.locator("#talk .answer")).to_contain_text("60 pieces")
    assert page.evaluate(CONTRAST) == []


def test_it_fits_a_phone(tabs: Tabs, slow: Supervisor) -> None:
    page = tabs.open(address(slow), viewport=PHONE, device_scale_factor=2, is_mobile=True, has_touch=True)
    expect(state(page)).to_have_text("ready")
    page.get_by_label("Tokens, at most").fill("30")
    ask(page, "What are you?")
    expect(page.locator("#talk .answer")).to_contain_text("30 pieces")
    page.locator("#settings summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_it_can_be_used_by_keyboard_alone(tabs: Tabs, slow: Supervisor) -> None:
    page = tabs.open(address(slow))
    expect(state(page)).to_have_text("ready")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")  # to the message
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.press("Control+a")
    page.keyboard.type("Who are you?")
    page.keyboard.press("Enter")
    expect(page.locator("#talk .answer")).to_contain_text("pieces")
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"longest", "clear", "happened", "log", "SUMMARY", "command", "talk"} <= seen
    assert page.locator("[aria-live=polite] #state").count() == 1
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea, button')]"
        ".filter(one => !one.labels?.length && !one.textContent).map(one => one.outerHTML)"
    )
    assert unnamed == []


# Pictures


def without_paths(page: Any) -> Any:
    """Shows none of this machine's paths, of which the settings and the log have some."""

    def tell(route: Any) -> None:
        response = route.fetch()
        route.fulfill(response=response, body=response.text().replace(str(ROOT), "/app"))

    page.route("**/status*", tell)
    return page


def picture(page: Any, name: str) -> None:
    assert str(ROOT) not in page.content()
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / f"{name}.png"
    page.screenshot(path=path)
    assert path.stat().st_size < 200_000


@contextlib.contextmanager
def busy(served: Supervisor) -> Iterator[None]:
    """Some clients that come and go."""
    over = threading.Event()

    def ask_on(worker: int) -> None:
        for number in itertools.count(worker * 5):
            if over.wait(0.4 * (number % 5)):
                return
            body = {"messages": [{"role": "user", "content": "What are you?"}], "max_tokens": 5 + number * 7 % 60}
            served.client.post("/v1/chat/completions", json=body | {"stream": True, "temperature": 1.2})

    threads = [threading.Thread(target=ask_on, args=(worker,)) for worker in range(5)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="makes pictures, where SCREENSHOTS=1 asks for them")
@pytest.mark.timeout(600)
def test_pictures(tabs: Tabs) -> None:
    size = {"width": 1180, "height": 1080}
    with Supervisor(vllm=None, program=(ROOT / "scripts" / "up",)) as served:
        served.ready(300)
        pages = {scheme: tabs.open(address(served), color_scheme=scheme, viewport=size) for scheme in ("light", "dark")}
        phone: dict[str, Any] = {"viewport": PHONE, "device_scale_factor": 1.5, "is_mobile": True, "has_touch": True}
        pages["phone"] = tabs.open(address(served), color_scheme="light", **phone)
        for page in pages.values():
            without_paths(page).reload()
        with busy(served):
            wait_until(lambda: pages["light"].evaluate("samples.length") > 60, "plots that show something", 100)
            for page in pages.values():
                page.get_by_label("Tokens, at most").fill("60")
                ask(page, "What are you?")
                expect(page.get_by_role("button", name="Send")).to_be_enabled()
            for name, page in pages.items():
                page.evaluate("document.activeElement.blur()")
                page.evaluate("scrollTo(0, 0)")
                picture(page, name)
        os.kill(served.engine(), signal.SIGKILL)
        page = pages["light"]
        expect(page.locator("#reason")).to_contain_text("Now: ", timeout=120_000)  # a second or two
        page.get_by_text("vLLM’s last lines before it").click()
        page.evaluate("document.activeElement.blur()")
        picture(page, "crash")
        tabs.close()
        served.engine_pid = served.client.get("/status").json()["pid"]


def on_a_terminal(data: bytes) -> list[str]:
    """The lines that are left, colours and all: `supervisor.terminal` goes back by lines, and draws them anew."""
    lines: list[str] = []
    for part in re.split(r"\x1b\[\?7[lh]|(\x1b\[\d+F)\x1b\[J", data.decode().replace("\r\n", "\n")):
        if part is not None and (back := re.fullmatch(r"\x1b\[(\d+)F", part)):
            del lines[-int(back[1]) :]
        elif part:
            lines += part.splitlines()
    return lines


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="makes a picture, where SCREENSHOTS=1 asks for it")
@pytest.mark.timeout(300)
def test_picture_of_the_terminal(tabs: Tabs, tmp_path: Path) -> None:
    """`scripts/up` on 118 columns, from its first line until it is ready."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (46, 118))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SUPERVISOR_")}
    environ |= {"TERM": "xterm-256color"}
    started = subprocess.Popen([ROOT / "scripts" / "up"], stdin=theirs, stdout=theirs, stderr=theirs, env=environ)
    os.close(theirs)
    data = b""
    while b"curl " not in data or not data.endswith(b"\n"):  # its last line, and all of it
        data += os.read(ours, 65536)
    text = Text.from_ansi("\n".join(on_a_terminal(data)).replace(str(ROOT), "/app"))
    started.terminate()
    with contextlib.suppress(OSError):
        while os.read(ours, 65536):
            pass
    assert started.wait(60) == 0
    console = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
    console.print(text)
    drawn = console.export_html(theme=terminal_theme.MONOKAI, inline_styles=True)
    style = "<style>body { margin: 8px } pre { font-size: 13px !important; margin: 0 }</style>"
    (file := tmp_path / "terminal.html").write_text(drawn.replace("</head>", f"{style}</head>"))
    context = tabs.browser.new_context(viewport={"width": 960, "height": 560})
    page = context.new_page()
    page.goto(file.as_uri())
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    picture(page, "terminal")
    context.close()
