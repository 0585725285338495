"""What a supervisor leaves behind, as another one sees it."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from supervisor.engine.workspace import Workspace, clean_leftovers


def sweep(base: Path, over: Event) -> None:
    while not over.is_set():
        clean_leftovers(base)


@pytest.mark.slow
def test_a_workspace_that_is_just_made_is_nobodys_leftover(tmp_path: Path) -> None:
    """Supervisors that started at the same moment took each other's: one in a hundred, while two look all the time."""
    over = multiprocessing.Event()
    sweepers = [multiprocessing.Process(target=sweep, args=(tmp_path, over)) for _ in range(2)]
    for sweeper in sweepers:
        sweeper.start()
    try:
        for _ in range(600):
            workspace = Workspace.create(tmp_path)
            assert workspace.note.exists()
            assert workspace.temp_folder.is_dir()
            workspace.remove()
            os.close(workspace.lock)
    finally:
        over.set()
        for sweeper in sweepers:
            sweeper.join()
    assert list(tmp_path.iterdir()) == []
