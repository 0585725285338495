"""A newcomer's walk: from a clone to an answer on the page, timed.

    .venv/bin/python scripts/newcomer_walk.py

Clones this repository into a temporary folder, runs `scripts/up` there with nothing installed before, opens the page in
Chromium, and asks the demo model. What a person does are the lines with `you:`; the rest of the time the machine works.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = "/usr/bin/chromium"
QUESTION = "What are you?"


def main() -> None:
    started_at = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - started_at:6.1f} s  {what}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        say("you: git clone")
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        say("you: scripts/up")
        environ = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | {"PORT": "0"}
        with subprocess.Popen(
            ["scripts/up"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
        ) as supervisor:
            assert supervisor.stdout is not None
            url = ""
            try:
                for line in supervisor.stdout:
                    if re.match(r"  \.v(env|llm): |\d\d:\d\d:\d\d supervisor", line):
                        say(line.rstrip())
                    if found := re.search(r"supervisor: ready: (http://\S+)", line):
                        url = found[1]
                        break
                say("you: open the page, ask")
                with sync_playwright() as playwright:
                    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                    page = browser.new_page()
                    page.goto(url)
                    page.locator("textarea").fill(QUESTION)
                    page.get_by_role("button", name="Send").click()
                    expect(page.get_by_text("I am the demo model")).to_be_visible(timeout=30_000)
                    say("answered")
                    browser.close()
            finally:
                supervisor.terminate()
        say(f"stopped, exit code {supervisor.returncode}")


if __name__ == "__main__":
    main()
