"""A model's files: which of them vLLM reads, and whether a folder has all of those, whole.

The downloading program imports this, too, in vLLM's environment: so it uses the standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

# Patterns of names tell which files vLLM reads; the table has the reasons.
FILES: dict[str, Any] = json.loads(Path(__file__).with_name("files.json").read_bytes())
PATTERNS: dict[str, list[str]] = FILES["weights"]  # by --load-format
CONSOLIDATED = "consolidated*.safetensors"
LFS_POINTER = b"version https://git-lfs"
OUTSIDE = re.compile(r"(.*[/\\])?(\.\.)?([/\\].*)?", re.DOTALL)  # a path with a part that leads out, or none
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
PART_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
HEADER_LIMIT = 100_000_000  # bytes; a larger header of a safetensors file is none


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def is_read(name: str) -> bool:
    """Returns whether vLLM may read a file that holds no weights."""
    return matches_any(name, FILES["read"]) and not matches_any(name, FILES["not read"])


def weights(names: Iterable[str], load_format: str, locate: Callable[[str], str | Path] | None = None) -> list[str]:
    """Returns the files of weights that vLLM will read; none for a load format of which nothing is known.

    `locate(name)` returns the path of an index file. The list also has the parts that are missing from a row of parts.
    """
    patterns = PATTERNS.get(load_format, ())
    candidates = {name for name in names if not matches_any(name, FILES["not read"])}
    found = _model_weights({name for name in candidates if "/" not in name}, patterns, locate)
    if patterns and load_format != "lora":
        found |= {name for name in candidates if matches_any(name, FILES["beside" if found else "instead"])}
    return sorted(found)


def _model_weights(names: set[str], patterns: Iterable[str], locate: Callable[[str], str | Path] | None) -> set[str]:
    candidates = {name for name in names if not matches_any(name, FILES["not weights"])}
    for pattern in patterns:
        found = {name for name in candidates if fnmatch(name, pattern)}
        index = FILES["indexes"].get(pattern)
        if locate and index in candidates and (pattern != CONSOLIDATED or found):
            listed = _read_json(locate(index)).get("weight_map")
            if isinstance(listed, dict) and listed:
                return set(map(str, listed.values()))
        if pattern == "*.safetensors" and index not in candidates:
            found = {name for name in found if not fnmatch(name, CONSOLIDATED)} or found
        if found:
            return found | {part for name in found for part in _all_parts(name, found)}
    return set()


def _read_json(path: str | Path) -> dict[str, Any]:
    """Returns the object in a small file of JSON; an empty one where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(Path(path).read_bytes())
        return content if isinstance(content, dict) else {}
    return {}


def _all_parts(name: str, names: set[str]) -> list[str]:
    """Returns the names of all parts of a file that comes in parts, which are counted from 0 where `names` has that."""
    part = PART_NAME.fullmatch(name)
    if part is None:
        return []
    count = int(part["count"])
    parts = [f"{part['stem']}-{number:05}-of-{count:05}{part['suffix']}" for number in range(count + 1)]
    return parts[:-1] if parts[0] in names else parts[1:]


def find_fault(folder: Path, load_format: str = "auto") -> str | None:
    """Returns in a few words what keeps a folder from being served; None where nothing does."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        return f"it can't be read ({error.strerror})"
    configs = FILES["configs"].get(load_format, FILES["configs"]["model"])
    if not any(matches_any(name, configs) for name in names):
        return f"{configs[0] if load_format != 'tokenizer' else 'a tokenizer'} is missing"
    names |= {f"{path.parent.name}/{path.name}" for path in folder.glob("*/*")}
    needed = weights(names, load_format, folder.joinpath)
    if not needed and PATTERNS.get(load_format):
        return "there are no weights"
    faults = ((name, find_damage(folder / name)) for name in (*sorted(filter(is_read, names)), *needed))
    return next((f"{name} {fault}" for name, fault in faults if fault is not None), None)


def find_damage(path: Path) -> str | None:
    """Returns what is wrong with one file, as far as its beginning and its size tell."""
    least_size = int(path.name in FILES["never empty"] or not is_read(path.name))
    try:
        size = path.stat().st_size  # it is that of the file that a link leads to
        with path.open("rb") as file:
            prefix = file.read(8)
            if (prefix + file.peek(len(LFS_POINTER))).startswith(LFS_POINTER):
                return "is only a Git LFS pointer"
            expected_size = _expected_size(prefix, file) if path.suffix == ".safetensors" else least_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return "is damaged"
    return f"is not complete: {size} of {expected_size} bytes" if size < expected_size else None


def _expected_size(prefix: bytes, file: BinaryIO) -> int:
    """Returns how long a safetensors file is by its header. Raises ValueError and others where there is no header."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > HEADER_LIMIT:
        raise ValueError
    header = json.loads(file.read(length))
    return 8 + length + max((row["data_offsets"][1] for key, row in header.items() if key != "__metadata__"), default=0)


def is_self_contained(folder: Path) -> bool:
    """Returns whether its files name nothing of another repository, which only the hub could give: code, or a model."""
    rows = map(_read_json, folder.glob("*config.json"))
    return not any("--" in json.dumps(row.get("auto_map")) or any(map(row.get, FILES["elsewhere"])) for row in rows)
