"""The first thing that a user asks the demo model, and many at once when it dies."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import DEMO, Supervisor, wait_until
from tests.vllm.conftest import START, VLLM
from tests.vllm.test_serving import CHAT, greedy

pytestmark = [pytest.mark.vllm, pytest.mark.breaks_vllm]  # it starts another
STREAMS = 24

# As a user's own code, which fails in the engine's process when the file is there. It is slow, too: on a busy machine
# the first streams were through before the last had begun.
FRAGILE = """
import time
from pathlib import Path

from vllm.v1.sample.logits_processor import LogitsProcessor


class Fragile(LogitsProcessor):
    def __init__(self, vllm_config, device, is_pin_memory):
        self.told = Path(__file__).with_name("now")

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        pass

    def apply(self, logits):
        if self.told.exists():
            self.told.unlink()
            raise ArithmeticError("no more of this")
        time.sleep(0.02)
        return logits
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("fragile")
    (found / "fragile.py").write_text(FRAGILE)
    return found


@pytest.fixture(scope="module")
def supervisor(folder: Path) -> Iterator[Supervisor]:
    environ = {"MAX_NUM_SEQS": str(STREAMS), "LOGITS_PROCESSORS": "fragile:Fragile", "PYTHONPATH": str(folder)}
    with Supervisor(DEMO, vllm=VLLM, environ=environ) as found:
        found.engine()
        yield found.ready(START)


def test_a_first_prompt_of_one_token_is_answered(supervisor: Supervisor) -> None:
    """On CPUs with AMX it killed vLLM, and the next vLLM as well, to which it was sent again."""
    answer = supervisor.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
    assert answer.status_code == 200
    assert supervisor.client.get("/status").json()["restarts"] == 0


def test_an_engine_that_dies_under_load_tells_why(supervisor: Supervisor, folder: Path) -> None:
    """vLLM's API server writes 4 lines for the square of the streams then: none of the last 500 told it."""
    body, said, begun = greedy(stream=True, max_tokens=1900, ignore_eos=True), len(supervisor.output), []

    def stream(number: int) -> bytes:
        with supervisor.client.stream("POST", CHAT, json=body, timeout=START) as answer:
            pieces = answer.iter_raw()
            first = next(pieces)
            begun.append(number)
            return first + b"".join(pieces)

    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        streams = pool.map(stream, range(STREAMS))
        wait_until(lambda: len(begun) == STREAMS, "streams", 60)
        (folder / "now").touch()
        assert [found[-300:] for found in streams if b'"error"' not in found] == []
    found = supervisor.says(r"supervisor ERROR: ([^\n]+)", START)
    assert "ArithmeticError: no more of this" in found[1]
    assert supervisor.output[said:].count("EngineDeadError: ") > STREAMS  # the log itself has all of it
    assert "no more of this" in supervisor.client.get("/status").json()["last_failure"]["cause"]
