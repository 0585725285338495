"""Requests that nobody thought of, made from vLLM's own OpenAPI document: the gateway answers with vLLM's status.

The requests are the same in each run of the same code (hypothesis picks up constants from it). What vLLM answers with
5xx by itself is no fault of the gateway's: `/v1/systemone`, which the demo model can't do, is all that was found.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from tests.harness import Supervisor

pytestmark = pytest.mark.vllm

ROUTES = Path(__file__).with_name("routes.json")
EXAMPLES = 16  # of each operation, as the document wants them; and as many as it doesn't
OPTIONAL = 4  # fields of a body that it could be without, at most
# A small model likes to go on until its context is full. Each route ignores the names that the others use.
LENGTHS = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4}
BOUNDS = {**LENGTHS, "min_tokens": 0, "n": 1, "best_of": 1}
TOKEN = 1000  # lies in the vocabulary, as all below it
KEPT = {"accept", "content-type", "cookie"}  # headers: the others tell of the client, or differ in each run


# Seconds. A first score of ten labels was seen to take 30 on two cores: vLLM compiles for it, and answers nothing.
PATIENCE = 240.0


@dataclass(frozen=True, slots=True)
class Request:
    """As it goes over the wire, to the gateway and to vLLM alike."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes | None

    def send(self, client: httpx.Client) -> httpx.Response:
        return client.request(self.method, self.target, headers=list(self.headers), content=self.body, timeout=PATIENCE)


def bounded(value: object) -> object:
    """The same JSON with little to generate, and no address that vLLM could fetch."""
    if isinstance(value, dict):
        found = {key: bounded(inner) for key, inner in value.items()}
        for name, most in BOUNDS.items():
            given = found.get(name)
            if isinstance(given, int | float) and given > most:
                found[name] = most
        return found
    if isinstance(value, list):
        return [bounded(inner) for inner in value]
    return value.replace("://", ":") if isinstance(value, str) else value


def plausible(body: dict[str, Any], needed: set[str], chance: Random) -> dict[str, Any]:
    """What a client might send: few options, tokens that exist, a length of at least one.

    As generated, most requests ask for dozens of things at once, two of which contradict each other, and vLLM looks no
    further.
    """
    options = sorted(body.keys() - needed)
    left_out = set(chance.sample(options, max(0, len(options) - chance.randint(0, OPTIONAL))))
    found = {name: value for name, value in body.items() if name not in left_out}
    tokens = {name: with_real_tokens(value) for name, value in found.items() if isinstance(value, list)}
    return found | tokens | {name: most for name, most in LENGTHS.items() if name in found}


def with_real_tokens(value: object) -> object:
    if isinstance(value, list):
        return [with_real_tokens(inner) for inner in value]
    # In JSON 2.0 is an integer as well.
    return int(abs(value)) % TOKEN if type(value) is int or (type(value) is float and value.is_integer()) else value


def request_of(case: Any) -> Request:
    import requests  # noqa: PLC0415  # what schemathesis makes requests with

    ready: Any = requests.Request(**case.as_transport_kwargs(base_url="http://vllm")).prepare()
    headers = tuple((name, value) for name, value in ready.headers.items() if name.lower() in KEPT)
    body = ready.body.encode() if isinstance(ready.body, str) else ready.body
    return Request(ready.method or "", ready.path_url, headers, body)


def operations(document: dict[str, Any]) -> list[Any]:
    """What the document offers to everybody. An admin's routes would put vLLM to sleep, or worse."""
    import schemathesis  # noqa: PLC0415  # takes a second, which the other tests needn't wait for

    prompt = document["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    prompt["anyOf"].remove({"type": "null"})
    document["components"]["schemas"]["CompletionRequest"]["required"] = [
        "prompt"
    ]  # all else would be answered with 400
    everybodys = {row["path"] for row in json.loads(ROUTES.read_text()) if row["kind"] != "admin"}
    found = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]  # type: ignore[union-attr]
    return [operation for operation in found if operation.path in everybodys]


def required(operation: Any, document: dict[str, Any]) -> set[str]:
    """The fields that a body of this operation can't be without, by any of the schemas that it may have."""
    declared = document["paths"][operation.path][operation.method.lower()].get("requestBody", {}).get("content", {})
    schemas = [kind["schema"] for kind in declared.values()]
    names: set[str] = set()
    while schemas:
        schema = schemas.pop()
        if "$ref" in schema:
            schemas.append(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        schemas += [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
        names |= set(schema.get("required", ()))
    return names


def cases(operation: Any, mode: Any) -> list[Any]:
    from hypothesis import HealthCheck, Phase, given, settings  # noqa: PLC0415
    from hypothesis.errors import Unsatisfiable  # noqa: PLC0415

    found = []

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
        found.append(case)

    with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with what has neither parameters nor a body
        collect()
    return found


def generated(operation: Any, document: dict[str, Any]) -> list[Request]:
    """A few requests as the document wants them, then a few that break it; always the same ones."""
    from schemathesis import GenerationMode  # noqa: PLC0415

    chance, needed = Random(0), required(operation, document)
    found = []
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        for case in cases(operation, mode):
            body = bounded(case.body)
            if isinstance(body, dict):
                if mode is GenerationMode.POSITIVE:
                    body = plausible(body, needed, chance)
                if isinstance(body.get("model", ""), str | None):
                    body["model"] = "demo"
                body |= {name: most for name, most in LENGTHS.items() if body.get(name) is None}
            case.body = body
            found.append(request_of(case))
    assert found, operation.label
    return list(dict.fromkeys(found))


def test_the_gateway_answers_with_vllms_status(
    served: Supervisor, direct: httpx.Client, subtests: pytest.Subtests, tmp_path: Path
) -> None:
    """No 5xx that vLLM alone wouldn't give for the same request, nor any other status."""
    from hypothesis.configuration import set_hypothesis_home_dir  # noqa: PLC0415

    set_hypothesis_home_dir(tmp_path)  # instead of a folder in the checkout
    document = direct.get("/openapi.json").json()
    found = operations(document)
    assert len(found) >= 10
    for operation in found:
        with subtests.test(operation=operation.label):
            for request in generated(operation, document):
                # vLLM alone first: what it compiles for takes longer than the 15 s after which `served` is hung.
                alone, through = request.send(direct), request.send(served.client)
                assert through.status_code == alone.status_code, (request, through.text, alone.text)
