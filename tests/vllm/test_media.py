"""What the supervisor says of vLLM's media and of its uvicorn is so in the installed one. Nothing is started."""

from __future__ import annotations

import ast
import subprocess
from typing import Any

import pytest

from supervisor.around.modalities import ARCHITECTURES, AUDIO, TEXT_ARCHITECTURES, VISION, find_kinds
from supervisor.settings.names import DEFAULTS
from tests.vllm.conftest import VLLM

pytestmark = pytest.mark.vllm

(PACKAGES,) = VLLM.parent.parent.glob("lib/python3*/site-packages")
# A request as it comes over a unix socket: without an address.
REDIRECTED = """
import asyncio, uvicorn

async def app(scope, receive, send):
    print(scope["scheme"])

config = uvicorn.Config(app, uds="/nowhere", log_config=None, lifespan="off")
config.load()
scope = {"type": "http", "scheme": "http", "client": None, "headers": [(b"x-forwarded-proto", b"https")]}
asyncio.run(config.loaded_app(scope, None, None))
"""


def architectures(table: str) -> set[Any]:
    tree = ast.parse((PACKAGES / "vllm/model_executor/models/registry.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == table for to in node.targets):
            assert isinstance(node.value, ast.Dict)
            return {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
    raise AssertionError(f"no {table}")


def test_every_model_that_takes_media_is_known_by_its_name() -> None:
    found = architectures("_MULTIMODAL_MODELS")
    assert len(found) > 100
    assert {name for name in found if find_kinds({"architectures": [name]}) != VISION | AUDIO} == set()
    assert found >= ARCHITECTURES


def test_models_for_text_are_not_taken_for_such() -> None:
    others = architectures("_TEXT_GENERATION_MODELS") - architectures("_MULTIMODAL_MODELS")
    assert len(others) > 100
    wrong = {name for name in others if find_kinds({"architectures": [name]})}
    assert wrong <= {"InklingForConditionalGeneration"}
    assert not TEXT_ARCHITECTURES & architectures("_MULTIMODAL_MODELS")


@pytest.mark.parametrize(
    ("environ", "scheme"), [(DEFAULTS["vLLM's environment"], "https"), ({}, "http")], ids=["ours", "none"]
)
def test_the_scheme_that_the_gateway_tells_is_believed(environ: dict[str, str], scheme: str) -> None:
    done = subprocess.run(
        [VLLM.parent / "python", "-c", REDIRECTED], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{scheme}\n"


def test_vllm_reads_what_is_set_for_it() -> None:
    connector = (PACKAGES / "vllm/multimodal/media/connector.py").read_text()
    assert "allow_redirects=envs.VLLM_MEDIA_URL_ALLOW_REDIRECTS" in connector
    launcher = (PACKAGES / "vllm/entrypoints/launchers/launcher.py").read_text()
    assert "forwarded_allow_ips" not in launcher  # which would win over the variable
