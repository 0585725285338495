"""What the queue worker is given, and where RunPod's key goes."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import aiohttp
import pytest

from supervisor.queue.child import environment
from supervisor.queue.delivery import NotTaken, RunPod

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
    found = environment({**RUNPODS, **SECRETS, **needed}, "/gateway.sock", "m", 3, llm=False)
    assert found.items() >= needed.items()
    assert found["RUNPOD_AI_API_KEY"] == "the-workers-key"
    assert not found.keys() & SECRETS.keys()
    assert "secret" not in str(found)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_runpods_key_follows_no_redirect(status: int) -> None:
    asked: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # http.server's name
            asked.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Location", f"http://localhost:{server.server_port}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: object) -> None: ...

    async def post() -> None:
        base = f"http://127.0.0.1:{server.server_port}/done/$ID"
        async with aiohttp.ClientSession(headers={"Authorization": "the-workers-key"}) as session:
            await RunPod(session, base, base).post(base, "j", b"{}", "k", stream=False)

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with pytest.raises(NotTaken, match=str(status)) as caught:
            asyncio.run(post())
        server.shutdown()
        thread.join()
    assert not caught.value.transient
    assert asked == ["/done/j?isStream=false"]
