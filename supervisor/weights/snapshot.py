"""A model's files: which of them vLLM reads, and whether a folder has all of those, whole.

The downloading program imports this too, in vLLM's environment: the standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

INDEX = "model.safetensors.index.json"
CONSOLIDATED = "consolidated*.safetensors"
CONSOLIDATED_INDEX = "consolidated.safetensors.index.json"
# Which weights vLLM takes, by --load-format: the first pattern that matches something (its default_loader.py).
PATTERNS: dict[str, tuple[str, ...]] = {
    "auto": (CONSOLIDATED, "*.safetensors", "*.bin", "*.pt", "*.gguf"),  # Mistral's own format before the hub's
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "safetensors": ("*.safetensors",),
    "fastsafetensors": ("*.safetensors",),
    "instanttensor": ("*.safetensors",),
    "mistral": (CONSOLIDATED,),
    "pt": ("*.pt",),
    "npcache": ("*.bin",),
    "dummy": (),
}
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx*", "*.h5", "*.msgpack", "*.ot", "*.tflite")
# Weights by name, and nobody's for inference.
NOT_WEIGHTS = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*", "*/*")
# A layer that comes after the model, as sentence-transformers keeps it: `2_Dense/model.safetensors`.
LAYER = re.compile(r"\d+_\w+/(model\.safetensors|pytorch_model\.bin)")
LFS_POINTER = b"version https://git-lfs"
PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
# A safetensors file's header; a larger one is none.
HEADER_LIMIT = 100_000_000


def is_weights(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WEIGHTS) and not LAYER.fullmatch(name)


def weights(names: Iterable[str], load_format: str, index: Callable[[str], object]) -> list[str] | None:
    """The files of weights that vLLM will read; None for a load format that nothing is known of.

    `index(name)` gives the parsed JSON of an index file. Parts of a row that are missing are in the list, too.
    """
    patterns = PATTERNS.get(load_format)
    if patterns is None:
        return None
    present = {name for name in names if not any(fnmatch(name, pattern) for pattern in NOT_WEIGHTS)}
    for pattern in patterns:
        found = {name for name in present if fnmatch(name, pattern)}
        listed = {CONSOLIDATED: CONSOLIDATED_INDEX, "*.safetensors": INDEX}.get(pattern, "")
        if listed in present and (pattern != CONSOLIDATED or found):
            content = index(listed)
            files = content.get("weight_map") if isinstance(content, dict) else None
            if isinstance(files, dict) and files:
                return sorted(set(map(str, files.values())))
        if pattern == "*.safetensors" and INDEX not in present:
            found -= {name for name in found if fnmatch(name, CONSOLIDATED)} if len(found) > 1 else set()
        if found:
            return sorted(found | {part for name in found for part in _row(name)})
    return []


def _row(name: str) -> set[str]:
    """All parts of a file that comes in parts."""
    part = PART.fullmatch(name)
    if part is None:
        return set()
    count = int(part["count"])
    return {f"{part['stem']}-{number:05}-of-{count:05}{part['suffix']}" for number in range(1, count + 1)}


def lacking(folder: Path, load_format: str = "auto") -> str | None:
    """What keeps a folder from being served, in a few words; None where nothing does."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        return f"it can't be read ({error.strerror})"
    if not names & {"config.json", "params.json"} and not any(name.endswith(".gguf") for name in names):
        return "config.json is missing"

    def index(name: str) -> object:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((folder / name).read_bytes())
        return None

    needed = weights(names, load_format, index)
    if needed is None or load_format == "dummy":
        return None
    if not needed:
        return "there are no weights"
    for name in needed:
        if (fault := damage(folder / name)) is not None:
            return f"{name} {fault}"
    return None


def damage(path: Path) -> str | None:
    """What is wrong with one file of weights, as far as its beginning and its size tell."""
    try:
        size = path.stat().st_size  # of what a link leads to
        with path.open("rb") as file:
            first = file.read(8)
            if first == LFS_POINTER[:8]:
                return "is only a Git LFS pointer"
            whole = _length(first, file) if path.suffix == ".safetensors" else 1
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return "is damaged"
    return f"is not complete: {size} of {whole} bytes" if size < whole else None


def _length(first: bytes, file: BinaryIO) -> int:
    """How long a safetensors file is by its header. Raises ValueError and others where that is none."""
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > HEADER_LIMIT:
        raise ValueError
    header = json.loads(file.read(length))
    return 8 + length + max((row["data_offsets"][1] for key, row in header.items() if key != "__metadata__"), default=0)


def self_contained(folder: Path) -> bool:
    """Whether its files name no code of another repository, which only the hub could give."""
    for path in folder.glob("*config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if "--" in json.dumps(json.loads(path.read_bytes()).get("auto_map", "")):
                return False
    return True
