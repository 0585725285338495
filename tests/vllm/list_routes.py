"""Runs in vLLM's environment: every route that vLLM's API server can have, whatever it is started with.

Prints a JSON list of `{"path": ..., "methods": [...]}`. No engine is started. The application is built twice, as it
comes and with all that adds routes: development mode, runtime LoRA, every option, every task. And the source is read
for what no installation has, such as routes that need an SDK that isn't there.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from parse_argv import make_parser

ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_ENABLE_COHERE_API": "1"}
OPTIONS = [
    "--enable-scale-out",
    "--enable-tokenizer-info-endpoint",
    "--enable-offline-docs",
    "--enable-fault-tolerance",
    "--enable-server-load-tracking",
    "--profiler-config",
    '{"profiler": "torch", "torch_profiler_dir": "/tmp"}',
]
# The decorators and functions of FastAPI and Starlette whose first argument is a path.
ADDS_ROUTES = {
    *("get", "post", "put", "delete", "patch", "head", "options", "trace", "websocket", "route", "websocket_route"),
    *("api_route", "add_api_route", "add_api_websocket_route", "add_route", "add_websocket_route", "mount"),
}
METHODS = {"get", "post", "put", "delete", "patch", "head", "options", "trace", "websocket"}
# They answer on ports of their own, which the gateway knows nothing of.
ELSEWHERE = {"launchers/dp_supervisor.py", "cli/preload.py"}


def of_the_application(arguments: list[str], tasks: tuple[str, ...]) -> Iterator[tuple[str, set[str]]]:
    from vllm.entrypoints.launchers.app import build_app  # noqa: PLC0415  # takes seconds, and reads the environment

    pooling: Any = SimpleNamespace(get_pooling_task=lambda _: "embed", hf_config=None)
    application = build_app(make_parser().parse_args(["serve", "model", *arguments]), tasks, pooling)
    yield from walk(application.routes)


def walk(routes: list[Any]) -> Iterator[tuple[str, set[str]]]:
    for route in routes:
        inner = getattr(route, "original_router", None)  # how newer versions of FastAPI keep a router's routes
        if inner is not None:
            yield from walk(inner.routes)
        elif "WebSocket" in type(route).__name__:
            yield route.path, {"WEBSOCKET"}
        else:
            yield route.path, set(getattr(route, "methods", None) or ())


def of_the_source(folder: Path) -> Iterator[tuple[str, set[str]]]:
    for path in sorted(folder.rglob("*.py")):
        if str(path.relative_to(folder)) in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=on, attr=name), args=[ast.Constant(value=str(route)), *_]) if (
                    name in ADDS_ROUTES and ast.unparse(on).endswith(("router", "app"))
                ):
                    yield route, {name.upper()} & {method.upper() for method in METHODS}


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):
        os.environ.update(ENVIRONMENT)
        import vllm.entrypoints  # noqa: PLC0415
        from vllm.tasks import SupportedTask  # noqa: PLC0415

        tasks = tuple(name for kind in get_args(SupportedTask) for name in (get_args(kind) or (kind,)))
        found: dict[str, set[str]] = {}
        for path, methods in (
            *of_the_application([], ("generate",)),
            *of_the_application(OPTIONS, tasks),
            *of_the_source(Path(vllm.entrypoints.__file__).parent),
        ):
            found.setdefault(path, set()).update(methods)
    print(json.dumps([{"path": path, "methods": sorted(found[path])} for path in sorted(found)]))


if __name__ == "__main__":
    main()
