"""Requests that nobody thought of, generated from vLLM's own OpenAPI document: the gateway adds no 5xx to them.

The requests are the same in each run. Those that vLLM answers with 5xx by itself are no fault of the gateway's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from tests.harness import Supervisor

pytestmark = pytest.mark.vllm

ROUTES = Path(__file__).with_name("routes.json")
FEW = 5  # optional fields in a body at most, less one
EXAMPLES = 12  # of each operation, as the document wants them; and as many as it doesn't
# What would let one request generate for minutes. Small models like to go on until the context is full.
BOUNDS = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4, "min_tokens": 0, "n": 1, "best_of": 1}
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
KEPT = ("accept", "content-type", "cookie")  # headers; the others tell of the client, or differ in each run


@dataclass(frozen=True, slots=True)
class Request:
    """As it goes over the wire, to the gateway and to vLLM alike."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes | None

    def send(self, client: httpx.Client) -> httpx.Response:
        return client.request(self.method, self.target, headers=list(self.headers), content=self.body)


def bounded(value: object) -> object:
    """The same JSON with few tokens to generate, the model that is there, and no address that vLLM could fetch."""
    if isinstance(value, dict):
        found = {key: bounded(inner) for key, inner in value.items()}
        for key, most in BOUNDS.items():
            if isinstance(found.get(key), int | float) and found[key] > most:  # type: ignore[operator]
                found[key] = most
        return found
    if isinstance(value, list):
        return [bounded(inner) for inner in value]
    return value.replace("://", ":") if isinstance(value, str) else value


def thinned(body: dict[str, Any], needed: Sequence[str], number: int) -> dict[str, Any]:
    """With all that is needed and a few others. As generated, most requests ask for dozens of things at once, two of
    which contradict each other, and vLLM looks no further."""
    others = sorted(body.keys() - set(needed))
    kept = {*needed, *Random(number).sample(others, min(number % FEW, len(others)))}
    return {key: value for key, value in body.items() if key in kept}


def request_of(case: Any, number: int, needed: Sequence[str]) -> Request:
    """The request of a generated case, within bounds."""
    import requests  # noqa: PLC0415  # what schemathesis makes requests with

    body = bounded(case.body)
    if isinstance(body, dict):
        body = thinned(body, needed, number)
        if isinstance(body.get("model", ""), str | None):
            body["model"] = "demo"
        # Where nothing is said, vLLM goes on until the context is full. Each route ignores the names of the others.
        for name in LENGTHS:
            if body.get(name) is None:
                body[name] = BOUNDS[name]
    case.body = body
    ready = requests.Request(**case.as_transport_kwargs(base_url="http://vllm")).prepare()
    kept = {name: value for name, value in ready.headers.items() if name.lower() in KEPT}
    content = ready.body.encode() if isinstance(ready.body, str) else ready.body
    return Request(ready.method or "", ready.path_url, tuple(kept.items()), content)


def operations(document: dict[str, Any]) -> list[Any]:
    """What the document offers to everybody; admin's routes would put vLLM to sleep."""
    import schemathesis  # noqa: PLC0415  # takes a second, which the other tests needn't wait for

    everybodys = {row["path"] for row in json.loads(ROUTES.read_text()) if row["kind"] != "admin"}
    found = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    return [operation for operation in found if operation.path in everybodys]


def required(operation: Any, document: dict[str, Any]) -> list[str]:
    """The fields that a body of this operation can't be without, by any of the schemas that it may have."""
    declared = document["paths"][operation.path][operation.method.lower()].get("requestBody", {}).get("content", {})
    schemas = [kind["schema"] for kind in declared.values()]
    names: list[str] = []
    while schemas:
        schema = schemas.pop()
        if "$ref" in schema:
            schemas.append(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        schemas += [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
        names += schema.get("required", ())
    return names


def generated(operation: Any, document: dict[str, Any]) -> list[Request]:
    """A few requests as the document wants them, then a few that break it, always the same ones."""
    from hypothesis import HealthCheck, Phase, given, settings  # noqa: PLC0415
    from hypothesis.errors import Unsatisfiable  # noqa: PLC0415
    from schemathesis import GenerationMode  # noqa: PLC0415

    found: list[Request] = []
    needed = required(operation, document)
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def collect(case: Any) -> None:
            found.append(request_of(case, len(found), needed))

        try:
            collect()
        except Unsatisfiable:  # nothing can be wrong with a request that has neither parameters nor a body
            assert mode is GenerationMode.NEGATIVE, operation.label
    return list(dict.fromkeys(found))


def test_the_gateway_adds_no_5xx(served: Supervisor, direct: httpx.Client, subtests: pytest.Subtests) -> None:
    """Whatever is answered with 5xx through the gateway, vLLM alone answers with the same status."""
    document = direct.get("/openapi.json").json()
    found = operations(document)
    assert len(found) >= 10
    for operation in found:
        with subtests.test(operation=operation.label):
            for request in generated(operation, document):
                through = request.send(served.client)
                if through.status_code >= 500:
                    alone = request.send(direct)
                    assert through.status_code == alone.status_code, (request, through.text, alone.text)
