"""Waiting for the GPU's memory: with readings that the test makes up (the real ones need a GPU)."""

from __future__ import annotations

import asyncio
import logging

import pytest

from supervisor.around import gpus as gpu

GB = 1_000_000_000


def readings(monkeypatch: pytest.MonkeyPatch, *values: list[int] | None) -> list[list[int] | None]:
    """`gpu.read_used_bytes` gives these one after the other, and the last for ever; returns those not yet read."""
    left = list(values)

    def used() -> list[int] | None:
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(gpu, "read_used_bytes", used)
    monkeypatch.setattr(gpu, "POLL_INTERVAL", 0.001)
    return left


def test_it_waits_until_no_gpu_holds_more_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    left = readings(monkeypatch, [60 * GB, 1 * GB], [1 * GB, 60 * GB], [1 * GB + 1, 1 * GB], [99 * GB, 99 * GB])
    asyncio.run(gpu.wait_until_freed([1 * GB, 1 * GB]))
    assert left == [[99 * GB, 99 * GB]]


def test_it_does_not_wait_for_ever_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    readings(monkeypatch, [60 * GB])
    with caplog.at_level(logging.WARNING):
        asyncio.run(gpu.wait_until_freed([0], patience=0.01))
    assert "60.0 GB of GPU memory are still held" in caplog.text


def test_without_a_gpu_there_is_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    readings(monkeypatch, None)
    asyncio.run(gpu.wait_until_freed(None))
    asyncio.run(gpu.wait_until_freed([GB]))  # the driver is gone meanwhile
