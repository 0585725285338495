"""Halves of files: downloads go on with them, where the hub's client would throw them away.

The client deletes what came when the connection breaks off too often, the hub answers with an error in between, or the
process ends. Here that stays, and the next try asks for the rest. Where files come by Xet, which is not in order, only
whole files stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# The client writes to a file of this name (newer clients make one for each try); what came is kept in one of ours.
TEMPORARY_NAME = re.compile(r"(?P<blob>.*/[^./]+)(\.[0-9a-f]{8})?\.incomplete")
KEPT_SUFFIX = ".kept.incomplete"
# Bytes written at once; less is lost when a connection breaks off. Of the client's own 10 MB a bad line brings none.
CHUNK_BYTES = 1 << 16
# So long after its last byte a half-written file belongs to nobody; on some network volumes locks do not tell.
ABANDONED_SECONDS = 60.0


def keep(say: Callable[[str], None]) -> None:
    """Steps between the client and its files; says so where this client does not let it."""
    from huggingface_hub import __version__, constants, file_download  # noqa: PLC0415  # not every environment has it

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    original: Any = getattr(file_download, "http_get", None)
    warning = f"what breaks off begins anew: huggingface_hub {__version__} takes files in a way that is new to us"
    if not callable(original) or not {"resume_size", "expected_size"} <= inspect.signature(original).parameters.keys():
        return say(warning)

    def http_get(url: str, temp_file: Any, **options: Any) -> None:
        path = str(temp_file.name)
        match = TEMPORARY_NAME.fullmatch(path)
        if match is None:
            if not path.endswith(KEPT_SUFFIX):  # that is the client's own next try
                say(warning)
            original(url=url, temp_file=temp_file, **options)
            return
        half = Path(match["blob"] + KEPT_SUFFIX)
        half.touch()
        with half.open("r+b") as file:  # where locks hold nobody off, two write at positions, and so the same bytes
            if file.seek(0, 2) > (options.get("expected_size") or 0):
                file.truncate(file.seek(0))
            original(url=url, temp_file=file, **options | {"resume_size": file.tell()})
        half.replace(path)

    file_download.http_get = http_get


def sweep(repository: Path, missing: Mapping[Path, int]) -> dict[Path, int]:
    """Removes what killed processes left, but for halves of blobs with `missing` sizes. Returns what is to come."""
    missing_bytes = dict(missing)
    for path in (repository / "blobs").glob("*.incomplete"):
        blob = path.with_name(path.name.partition(".")[0])
        lock = repository.parent / ".locks" / repository.name / f"{blob.name}.lock"
        with contextlib.suppress(OSError):
            status, free = path.stat(), shutil.disk_usage(repository).free
            if path.name.endswith(KEPT_SUFFIX) and blob in missing:
                missing_bytes[blob] -= status.st_size
            elif time.time() - status.st_mtime > ABANDONED_SECONDS or sum(missing_bytes.values()) * 1.1 > free:
                with lock.open("ab") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
    return missing_bytes
