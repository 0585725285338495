"""What the queue worker is given, where RunPod's key goes, and how the worker is kept."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import aiohttp
import psutil
import pytest

from supervisor.around import fitness
from supervisor.kept import FIRST_BACKOFF, KeptProgram
from supervisor.queue.child import QueueWorker, worker_environment
from supervisor.queue.delivery import PostRefusal, RunPod

RUNPODS = {
    "RUNPOD_WEBHOOK_GET_JOB": "https://runpod/job-take/$ID?gpu=x",
    "RUNPOD_AI_API_KEY": "the-workers-key",
    "RUNPOD_POD_ID": "p",
}
SECRETS = {
    "HF_TOKEN": "hf_secret", "SUPERVISOR_API_KEYS": "client-secret", "SUPERVISOR_ADMIN_KEYS": "admin-secret",
    "AWS_SECRET_ACCESS_KEY": "aws-secret", "OPENAI_API_KEY": "openai-secret", "RUNPOD_API_KEY": "account-secret",
    "RUNPOD_SECRET_DATABASE": "database-secret", "DATABASE_URL": "postgres://u:pg-secret@h", "MODEL": "m",
    "VLLM_API_KEY": "vllm-secret",
}  # fmt: skip


def test_the_worker_has_no_secret_but_its_own() -> None:
    needed = {"PATH": "/bin", "HOME": "/root", "TZ": "UTC", "https_proxy": "http://proxy", "SSL_CERT_FILE": "/ca.pem"}
    found = worker_environment({**RUNPODS, **SECRETS, **needed}, socket="/gateway.sock", jobs=3)
    assert found.items() >= needed.items()
    assert found["RUNPOD_AI_API_KEY"] == "the-workers-key"
    assert not found.keys() & SECRETS.keys()
    assert "secret" not in str(found)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("RUNPOD_LOG_LEVEL", None, "WARN"), ("RUNPOD_LOG_LEVEL", "", "WARN"), ("RUNPOD_LOG_LEVEL", "warning", "WARN"),
        ("RUNPOD_LOG_LEVEL", "DEBUG\n", "WARN"), ("RUNPOD_LOG_LEVEL", "DEBUG", "DEBUG"),
        ("RUNPOD_PING_INTERVAL", None, "10000"), ("RUNPOD_PING_INTERVAL", "", "10000"),
        ("RUNPOD_PING_INTERVAL", "1e4", "10000"), ("RUNPOD_PING_INTERVAL", "²", "10000"),
        ("RUNPOD_PING_INTERVAL", "500", "1000"), ("RUNPOD_PING_INTERVAL", "0999", "1000"),
        ("RUNPOD_PING_INTERVAL", "1000", "1000"), ("RUNPOD_PING_INTERVAL", "04000", "04000"),
        ("RUNPOD_SKIP_GPU_CHECK", None, "true"), ("RUNPOD_SKIP_GPU_CHECK", "false", "false"),
        ("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", None, "true"), ("RUNPOD_ENDPOINT_ID", None, "none"),
        ("RUNPOD_ENDPOINT_ID", "e", "e"), ("RUNPOD_REALTIME_PORT", "80", None), ("PYTHONUNBUFFERED", "1", None),
        ("PYTHONPATH", "/x", "/x"), ("PYTHON_PRIVATE_TOKEN", "secret", None),
        ("RUNPOD_WEBHOOK_GET_JOB", "http://r/job-take/$RUNPOD_POD_ID", "http://r/job-take/p?"),
    ],
)  # fmt: skip
def test_the_sdk_is_given_what_it_can_bear(name: str, given: str | None, expected: str | None) -> None:
    """An interval of "" or "²" ended its import, and so the worker, again and again."""
    environ = RUNPODS | ({name: given} if given is not None else {})
    assert worker_environment(environ).get(name) == expected


class Elsewhere(HTTPServer):
    """Sends everybody on once; `asked` has each path, and the key that came with it."""

    def __init__(self, status: int) -> None:
        asked = self.asked = []  # type: ignore[var-annotated]
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # http.server's name
                asked.append((self.path.partition("?")[0], self.headers["Authorization"]))
                self.rfile.read(int(self.headers["Content-Length"] or 0))
                self.send_response(200 if self.path == "/elsewhere" else status)
                self.send_header("Location", f"http://localhost:{server.server_port}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_POST = do_GET

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Elsewhere:
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_result_follows_no_redirect(status: int) -> None:
    async def post(base: str) -> None:
        async with aiohttp.ClientSession(headers={"Authorization": "the-workers-key"}) as session:
            await RunPod(session, base, base).post(base, "j", b"{}", "k", stream=False)

    with Elsewhere(status) as server:
        with pytest.raises(PostRefusal, match=str(status)):
            asyncio.run(post(f"{server.url}/done/$ID"))
        assert server.asked == [("/done/j", "the-workers-key")]


def test_the_key_stays_where_an_unfit_machine_is_reported() -> None:
    with Elsewhere(302) as server:
        fitness.report({**RUNPODS, "RUNPOD_WEBHOOK_PING": f"{server.url}/ping"}, "gpu", "it fell off the bus")
        assert server.asked == [("/ping", "the-workers-key")]


def test_it_is_no_orphan_and_its_end_is_heard() -> None:
    """As process 1 the supervisor reaps what an engine left, by the session that it is in: a worker in one of its own
    was reaped behind the back of who waited for it, and the supervisor ended with a traceback."""
    ends = []

    async def run() -> None:
        over = asyncio.Event()

        def died(how: str, again: float) -> None:
            ends.append((how, again))
            over.set()

        kept = KeptProgram(["timeit", "-n1", "-r1", "-s", "import time", "time.sleep(60)"], {}, died)
        running = asyncio.create_task(kept.run())
        await asyncio.sleep(0)  # its first step starts the child
        assert kept.child is not None
        assert os.getsid(kept.child.pid) == os.getsid(0)  # engine/child.py leaves these alone
        assert os.getpgid(kept.child.pid) != os.getpgid(0)  # and Ctrl-C does, too
        kept.child.kill()
        await over.wait()
        kept.stop_requested.set()
        await running

    asyncio.run(asyncio.wait_for(run(), 30))
    assert ends == [("killed by SIGKILL", FIRST_BACKOFF)]


@pytest.mark.parametrize("missing", ["files", "threads"])
def test_one_that_can_not_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """It ended the supervisor, and a healthy engine with it."""
    ends = []

    async def run() -> None:
        over = asyncio.Event()

        def died(how: str, again: float) -> None:
            ends.append(how)
            kept.stop_requested.set()
            over.set()

        def refuse(*_: object, **__: object) -> None:
            raise OSError(24, "Too many open files") if missing == "files" else RuntimeError("can't start new thread")

        kept = KeptProgram(["timeit", "-n1", "-r1", "-s", "import time", "time.sleep(60)"], {}, died)
        place = "supervisor.kept.subprocess.Popen" if missing == "files" else "supervisor.kept.Call"
        monkeypatch.setattr(place, refuse)
        running = asyncio.create_task(kept.run())
        await over.wait()
        await running
        assert kept.child is None

    asyncio.run(asyncio.wait_for(run(), 30))
    reason = "[Errno 24] Too many open files" if missing == "files" else "can't start new thread"
    assert ends == [f"it can't be run: {reason}"]
    assert not [each for each in psutil.Process().children() if "timeit" in each.cmdline()]


def test_the_jobs_of_a_worker_that_had_to_be_killed_at_the_end_are_lost(caplog: pytest.LogCaptureFixture) -> None:
    lost = []

    async def run() -> None:
        worker = QueueWorker({**os.environ, "SUPERVISOR_QUEUE": "{}"}, print, lambda: lost.append(1))
        worker.command = [sys.executable, "-c", "import time; time.sleep(60)"]
        running = asyncio.create_task(worker.run())
        await asyncio.sleep(0)
        await worker.finish(0, 0)
        await running

    asyncio.run(asyncio.wait_for(run(), 30))
    assert lost == [1]
    assert "the queue worker did not end: killed, and the jobs it had are lost" in caplog.text
