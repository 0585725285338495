#!/usr/bin/env python3
"""Stands for a vLLM that redirects a path with a slash too many, as FastAPI does: Starlette on uvicorn, on the socket
that the supervisor names.

    SUPERVISOR_VLLM="PYTHON tests/clients/redirecting_vllm.py" supervisor up m
"""

from __future__ import annotations

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


async def health(request: Request) -> Response:
    return Response()


async def models(request: Request) -> Response:
    return JSONResponse({"seen": str(request.url)})


app = Starlette(routes=[Route("/health", health), Route("/v1/models", models)])

if __name__ == "__main__":
    if "--version" in sys.argv:
        print("0.32.0")
    else:
        uvicorn.run(app, uds=sys.argv[sys.argv.index("--uds") + 1], log_level="warning")
