"""Reads the weights into the page cache while vLLM is still importing: then loading them is a copy from memory.

vLLM needs 10 to 40 s before it opens the first file; in this time the disk or the network volume has nothing to do.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from supervisor.around.machine import Machine
from supervisor.bounded import Call
from supervisor.engine.run import Observer, Run
from supervisor.weights import snapshot
from supervisor.weights.find import Weights

# Network volumes are only fast where more than one file is read at a time.
READERS = 4
BUFFER_BYTES = 8 * 1024 * 1024
MIN_BYTES = 256_000_000  # less is read faster than threads are started


class Prefetch:
    """`Prefetch(files)` begins; `stop()` ends it early. It does nothing where the files would not fit into memory."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.pending_files = sorted(files, reverse=True)
        self.total_bytes = 0
        with contextlib.suppress(OSError):
            self.total_bytes = sum(path.stat().st_size for path in self.pending_files)
        self.stop_event = threading.Event()
        self.lock = threading.Lock()
        self.threads: list[threading.Thread] = []
        if 0 < self.total_bytes <= Machine().spare_memory():
            self.threads = [threading.Thread(target=self._read_files, daemon=True) for _ in range(READERS)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.stop_event.set()

    def _read_files(self) -> None:
        buffer = mmap.mmap(-1, BUFFER_BYTES)  # a thread's heap keeps what it once had: 34 MB for good
        while True:
            with self.lock:
                if not self.pending_files or self.stop_event.is_set():
                    return
                path = self.pending_files.pop()
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    while os.readv(descriptor, [buffer]) and not self.stop_event.is_set():
                        pass
                finally:
                    os.close(descriptor)


class ReadAhead(Observer):
    """Reads what each run of the engine is going to load."""

    def __init__(self, find_weights: Callable[[], Weights], load_format: str) -> None:
        self.find_weights = find_weights
        self.load_format = load_format
        self.prefetch: Prefetch | None = None

    def run_began(self, run: Run) -> None:
        Call(self._start_prefetch)  # it may hang; nobody waits for it

    def _start_prefetch(self) -> None:
        if self.prefetch is not None:
            self.prefetch.stop()
        weights = self.find_weights()
        if weights.folder is None or weights.needs_download:
            return
        with contextlib.suppress(OSError):  # what is missing, or no folder, is vLLM's to tell
            names = {path.name for path in weights.folder.iterdir()}
            weight_names = snapshot.weights(names, self.load_format)
            files = [weights.folder / name for name in weight_names if name in names]
            if sum(path.stat().st_size for path in files) >= MIN_BYTES:
                self.prefetch = Prefetch(files)
