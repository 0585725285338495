#!/usr/bin/env python3
"""Stands for a vLLM with a WebSocket route: uvicorn and `websockets`, on the socket that the supervisor names.

    SUPERVISOR_VLLM="PYTHON tests/engine/websocket_vllm.py" supervisor up m

A WebSocket of any path, such as `/v1/realtime`, sends back what it gets, texts and bytes, under the first subprotocol
that was asked for. Some texts are commands: `close CODE REASON` ends it with that code; `headers` is answered with the
headers that came, in JSON; `flood N` sends N messages of 64 KiB; `half a frame` kills this program within a frame. A
handshake with the header `x-refuse` is answered with 403. Every other request is answered with an empty 200.

At the end of a WebSocket its code is printed, and so gets into vLLM's log.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import uvicorn


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})
    elif scope["type"] == "websocket":
        await receive()
        if any(name == b"x-refuse" for name, _ in scope["headers"]):
            await send({"type": "websocket.close", "code": 1008})
            return
        protocols = scope["subprotocols"]
        await send({"type": "websocket.accept", "subprotocol": protocols[0] if protocols else None})
        while (message := await receive())["type"] == "websocket.receive":
            text = message.get("text") or ""
            if text.startswith("close "):
                _, code, reason = text.split(" ", 2)
                await send({"type": "websocket.close", "code": int(code), "reason": reason})
                return
            if text == "headers":
                headers = [[part.decode("latin-1") for part in header] for header in scope["headers"]]
                await send({"type": "websocket.send", "text": json.dumps(headers)})
                continue
            if text == "half a frame":
                # Behind uvicorn's back: a frame of 100 bytes, of which 10 come.
                connection = send.__self__.transport.get_extra_info("socket")
                os.write(connection.fileno(), b"\x82\x64" + b"z" * 10)
                os.kill(os.getpid(), signal.SIGKILL)
            if text.startswith("flood "):
                for _ in range(int(text.split()[1])):
                    await send({"type": "websocket.send", "bytes": b"z" * 65536})
            else:
                await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})
        print(f"websocket ended with {message['code']}", flush=True)


if __name__ == "__main__":
    if "--version" in sys.argv:
        print("0.32.0")
    else:
        uvicorn.run(app, uds=sys.argv[sys.argv.index("--uds") + 1], log_level="warning")
