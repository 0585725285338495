"""A user's process that answers like a supervisor in queue mode, and says what it was asked.

    python impostor.py UID FOLDER      # started by root; FOLDER is made, and is that user's

It listens at FOLDER/gateway.sock, and on a port of its own, where it plays RunPod. Its first line is `listening`, each
further one a request.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from pathlib import Path

STATUS = {
    "state": "ready",
    "since": 0.0,
    "reason": "",
    "model": "impostor",
    "mode": "queue",
    "in_flight": 0,
    "waiting": 0,
    "restarts": 0,
    "phases": [],
    "warnings": [],
    "last_failure": None,
    "vllm_version": "0.32.0",
}
JOB = {"id": "job", "status": "COMPLETED", "output": "stolen"}


def say(text: str) -> None:
    print(text, flush=True)


def answer(connection: socket.socket, content: object) -> None:
    connection.settimeout(5)
    with connection:
        request = connection.recv(65536)
        while b"\r\n\r\n" in request and b"POST" in request[:4] and not request.endswith(b"}"):
            request += connection.recv(65536)
        say(repr(request))
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)


def serve(listener: socket.socket, content: object) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection, content), daemon=True).start()


def main(uid: int, folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, uid, uid)
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    runpod = socket.create_server(("127.0.0.1", 0))
    private = socket.socket(socket.AF_UNIX)
    private.bind(str(folder / "gateway.sock"))
    private.listen()
    say("listening")
    threading.Thread(target=serve, args=(runpod, JOB), daemon=True).start()
    serve(private, {**STATUS, "simulator": f"http://127.0.0.1:{runpod.getsockname()[1]}/v2/local"})


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
