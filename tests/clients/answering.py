"""What the programs of Python's clients have in common: a line of JSON for each request, and one for each piece of an
answer and for its end (tests/clients/programs.py)."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

Asked = dict[str, Any]
Pieces = Iterator[str]
Client = Callable[[Asked], Pieces]


def described(error: Exception) -> dict[str, Any]:
    response = getattr(error, "response", None)
    headers = {} if response is None else {name.lower(): value for name, value in response.headers.items()}
    names = [one.__name__ for one in type(error).__mro__ if issubclass(one, Exception)]
    return {
        "names": names,
        "status": getattr(error, "status_code", None),
        "message": str(error),
        "headers": headers,
    }


def answer(client: Client, asked: Asked) -> None:
    pieces: list[str] = []
    error = None
    try:
        for piece in client(asked):
            if piece:
                pieces.append(piece)
                tell({"id": asked["id"], "piece": piece})
    except Exception as caught:  # noqa: BLE001  # whatever it raises is what the test looks at
        error = described(caught)
    tell({"id": asked["id"], "pieces": pieces, "error": error})


telling = threading.Lock()


def tell(content: dict[str, Any]) -> None:
    with telling:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()


def serve(clients: dict[str, Client]) -> None:
    tell({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        threading.Thread(target=answer, args=(clients[asked["client"]], asked)).start()
