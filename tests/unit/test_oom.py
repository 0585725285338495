"""The kernel's count of kills for want of memory, from the start of a run to its end."""

from __future__ import annotations

from pathlib import Path

from supervisor.around.machine import Machine
from supervisor.around.oom import OomKills
from supervisor.engine.run import Run


def count(root: Path, kills: int | None) -> None:
    folder = root / "sys/fs/cgroup"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.controllers").write_text("memory\n")
    (folder / "memory.events").write_text(f"oom 3\noom_kill {kills}\n" if kills is not None else "")


def lived(root: Path, before: int | None, after: int | None) -> bool:
    observer = OomKills(Machine(root))
    run = Run(1, 0.0, lambda *_: None)
    count(root, before)
    observer.run_began(run)
    count(root, after)
    observer.run_removed()
    return run.oom_killed


def test_a_count_that_rises_is_noted_at_the_run(tmp_path: Path) -> None:
    assert lived(tmp_path, 0, 1)
    assert lived(tmp_path, 4, 7)


def test_earlier_kills_are_not_this_runs(tmp_path: Path) -> None:
    assert not lived(tmp_path, 4, 4)
    assert not lived(tmp_path, None, None)


def test_without_a_run_nothing_is_noted() -> None:
    OomKills().run_removed()
