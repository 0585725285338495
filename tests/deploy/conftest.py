"""Manifests are read as settings are: in a folder of the test's own, with a vLLM that is found and never started."""

from __future__ import annotations

from tests.unit.conftest import _no_access_log, folder

__all__ = ["_no_access_log", "folder"]
