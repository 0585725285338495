"""vLLM's start-up plan, kept for as long as the settings are the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from signal import SIGKILL
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.around.caches import CacheKeeper
from supervisor.around.startup_plan import NOTE, StartupPlan, make_startup_plan
from supervisor.engine.diagnosis import SIGNALS, Diagnosis
from supervisor.engine.lifecycle import State
from supervisor.engine.run import Change
from supervisor.settings.settings import Arguments, Settings, gather
from tests.harness import FAKE, wait_until

TAKEN = "(EngineCore pid=7) INFO 11-29 10:00:00 [startup_plan.py:152] Applying persisted startup plan (fingerprint 0f)"
NO_MEMORY = Diagnosis("The GPU's memory ran out.", "", permanent=True)
OTHER = Diagnosis("The engine core died.", "", permanent=False)


def settings(**environ: str) -> Settings:
    return gather(Arguments(model="org/m"), {"SUPERVISOR_VLLM": str(FAKE), "HOME": "/none", **environ})


def run(root: Path, *log: str, served: bool = False, code: int = 1, broken: str | None = None) -> Any:
    command = SimpleNamespace(environ={"VLLM_CACHE_ROOT": str(root)})
    child = SimpleNamespace(command=command)
    return SimpleNamespace(
        child=child, log=list(log), was_ready=served, has_suspect_start=False, code=code, end_reason=broken
    )


def written(root: Path) -> Path:
    path = root / "startup_plan" / "startup_plan_0f.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    return path


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    return written(tmp_path)


def kept_for(root: Path, **environ: str) -> None:
    plan = StartupPlan(settings(**environ))
    plan.discard_stale(run(root))
    written(root)
    plan.write_note()


def test_the_same_settings_keep_it(tmp_path: Path, plan_file: Path) -> None:
    kept_for(tmp_path, GPU_MEMORY_UTILIZATION="0.8")
    StartupPlan(settings(GPU_MEMORY_UTILIZATION="0.8")).discard_stale(run(tmp_path))
    assert plan_file.exists()


@pytest.mark.parametrize(
    "environ",
    [{"GPU_MEMORY_UTILIZATION": "0.9"}, {"MAX_NUM_SEQS": "8"}, {"SUPERVISOR_EXTRA_ARGS": "--seed 1"},
     {"VLLM_USE_DEEP_GEMM": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}],
)  # fmt: skip
def test_other_settings_forget_it(tmp_path: Path, plan_file: Path, environ: Mapping[str, str]) -> None:
    kept_for(tmp_path, GPU_MEMORY_UTILIZATION="0.8")
    StartupPlan(settings(**{"GPU_MEMORY_UTILIZATION": "0.8", **environ})).discard_stale(run(tmp_path))
    assert not plan_file.exists()


def test_one_of_which_nothing_is_noted_is_somebody_elses(tmp_path: Path, plan_file: Path) -> None:
    """Who wrote it may have set something else."""
    StartupPlan(settings()).discard_stale(run(tmp_path))
    assert not plan_file.exists()


def test_one_whose_note_can_not_be_read_is_not_trusted(tmp_path: Path, plan_file: Path) -> None:
    plan = StartupPlan(settings())
    kept_for(tmp_path)
    plan.discard_stale(run(tmp_path))
    assert plan_file.exists()
    plan_file.with_name(NOTE).write_bytes(b"\xff")
    plan.discard_stale(run(tmp_path))
    assert not plan_file.exists()


@pytest.mark.parametrize(
    ("log", "served", "diagnosis", "code", "forgotten"),
    [
        ([TAKEN], False, NO_MEMORY, 1, True),
        ([TAKEN], False, OTHER, 1, True),
        ([TAKEN], True, NO_MEMORY, 1, True),
        ([TAKEN], True, OTHER, 1, False),
        ([], False, NO_MEMORY, 1, False),
        # Killed, by the kernel maybe, for want of the machine's memory: that is not the GPU's.
        ([TAKEN], True, SIGNALS[SIGKILL], -9, False),
        ([TAKEN], False, SIGNALS[SIGKILL], -9, False),
    ],
)
def test_a_failure_with_it_forgets_it(
    tmp_path: Path, plan_file: Path, log: list[str], served: bool, diagnosis: Diagnosis, code: int, forgotten: bool
) -> None:
    """And the next start is another one, even where its cause would be final."""
    keeper = CacheKeeper(None, StartupPlan(settings()))
    failed = run(tmp_path, *log, served=served, code=code)
    kept_for(tmp_path)
    keeper.run_began(failed)
    assert keeper.plan is not None
    wait_until(lambda: keeper.plan is not None and keeper.plan.folder is not None, "the look at it")
    keeper.run_judged(failed, diagnosis)
    assert failed.has_suspect_start == forgotten
    if forgotten:
        wait_until(lambda: not plan_file.exists(), "its end")
    assert plan_file.exists() != forgotten


def test_a_full_disk_or_no_home_is_no_fault(tmp_path: Path) -> None:
    plan = StartupPlan(settings())
    plan.discard_stale(run(tmp_path / "none"))
    plan.write_note()
    plan.forget()
    nowhere = run(tmp_path)
    nowhere.child.command.environ = {}
    plan.discard_stale(nowhere)


def test_the_users_word_and_vllms_version_decide() -> None:
    assert make_startup_plan(settings()) is not None
    assert make_startup_plan(settings(VLLM_ENABLE_STARTUP_PLAN="0")) is None
    assert make_startup_plan(settings(SUPERVISOR_FAST_RESTART="false")) is None
    old = dataclasses.replace(settings(), vllm=dataclasses.replace(settings().vllm, version="0.1", python=None))
    assert make_startup_plan(old) is None


def test_a_start_that_we_ended_forgets_it(plan_file: Path) -> None:
    """It hung, maybe for that; and its code is the same as where somebody else kills it."""
    plan = StartupPlan(settings())
    assert plan.is_suspect(run(plan_file, TAKEN, code=-9, broken="vLLM was not ready after 4 s"), OTHER)
    assert not plan.is_suspect(run(plan_file, TAKEN, code=-9), OTHER)


def test_one_that_can_not_be_deleted_is_suspected_once(
    tmp_path: Path, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that is suspected does not count: with a cache that can't be written there was no end of them."""
    monkeypatch.setattr("supervisor.around.startup_plan.shutil.rmtree", lambda *_, **__: None)
    plan = StartupPlan(settings())
    keeper = CacheKeeper(None, plan)
    plan.discard_stale(run(tmp_path))
    assert plan.forget() == (
        f"what an earlier start measured of the GPU's memory can't be forgotten: delete {plan_file.parent}"
    )
    suspected = []
    for served in (False, False, True, False):
        failed = run(tmp_path, TAKEN)
        keeper.run_judged(failed, NO_MEMORY)
        suspected.append(failed.has_suspect_start)
        if served:
            keeper.state_changed(Change(State.STARTING, State.READY, ""))
    assert suspected == [True, False, False, True]
