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
from typing import Any, BinaryIO

CONSOLIDATED = "consolidated*.safetensors"
# Which files belong to a model, by these.
INDEXES = {CONSOLIDATED: "consolidated.safetensors.index.json", "*.safetensors": "model.safetensors.index.json"}
# Which weights vLLM takes, by --load-format: the first pattern that matches something (its default_loader.py). Formats
# that are not here are loaded by programs of their own, from wherever these have them.
PATTERNS: dict[str, tuple[str, ...]] = {
    "auto": (CONSOLIDATED, "*.safetensors", "*.bin", "*.pt"),  # Mistral's own format before the hub's
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "safetensors": ("*.safetensors",),
    "fastsafetensors": ("*.safetensors",),
    "instanttensor": ("*.safetensors",),
    "mistral": (CONSOLIDATED,),
    "pt": ("*.pt",),
    "npcache": ("*.bin",),
    "dummy": (),
    # What vLLM has beside the model: formats of ours.
    "lora": ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt"),
    "tokenizer": (),
}
# Without one of these it is none.
CONFIGS = {"lora": ("adapter_config.json",), "tokenizer": ("*token*", "tekken.json", "vocab*", "*.model", "*.spm")}
# Weights by name, and nobody's for inference.
NOT_WEIGHTS = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*")
# Weights that some models of vLLM read beside those.
BESIDE = (
    "[0-9]*_*/model.safetensors", "[0-9]*_*/pytorch_model.bin",  # sentence-transformers' layers: 2_Dense/
    "sparse_linear.pt", "colbert_linear.pt",  # BGE-M3
    "mask_embedding.pt", "joint_head.safetensors",  # DFlash, Clef
    "adapters/*/adapter_model.safetensors", "whisper-large-v3/*.safetensors",  # Jina, Kimi-Audio
)  # fmt: skip
# And where there are no others: Cosmos'.
INSTEAD = ("[tv]*er/*.safetensors",)
# All else that is read, by vLLM, its libraries and a model's own code: configurations, tokenizers, templates, code.
READ = re.compile(r".+\.(json|jinja|txt|model|tiktoken|spm|vocab|codes|py|ya?ml)")
# Folders that are not, whatever they hold: another format's, and what training left.
NOT_READ = re.compile(r"(original|onnx|runs|checkpoint-\d+)/.+")
LFS_POINTER = b"version https://git-lfs"
PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
# A safetensors file's header; a larger one is none.
HEADER_LIMIT = 100_000_000


def is_read(name: str) -> bool:
    """Whether vLLM may read a file that holds no weights."""
    return READ.fullmatch(name) is not None and NOT_READ.fullmatch(name) is None


def weights(names: Iterable[str], load_format: str, locate: Callable[[str], str | Path] | None = None) -> list[str]:
    """The files of weights that vLLM will read; none for a load format that nothing is known of.

    `locate(name)` gives the path of an index file. Parts of a row that are missing are in the list, too.
    """
    patterns = PATTERNS.get(load_format, ())
    everything = {name for name in names if not NOT_READ.fullmatch(name)}
    found = _of_the_model({name for name in everything if "/" not in name}, patterns, locate)
    if patterns and load_format != "lora":
        also = BESIDE if found else INSTEAD
        found |= {name for name in everything if any(fnmatch(name, pattern) for pattern in also)}
    return sorted(found)


def _of_the_model(names: set[str], patterns: Iterable[str], locate: Callable[[str], str | Path] | None) -> set[str]:
    present = {name for name in names if not any(fnmatch(name, pattern) for pattern in NOT_WEIGHTS)}
    for pattern in patterns:
        found = {name for name in present if fnmatch(name, pattern)}
        index = INDEXES.get(pattern)
        if locate and index in present and (pattern != CONSOLIDATED or found):
            listed = _content(locate(index)).get("weight_map")
            if isinstance(listed, dict) and listed:
                return set(map(str, listed.values()))
        if pattern == "*.safetensors" and index not in present:
            found -= {name for name in found if fnmatch(name, CONSOLIDATED)} if len(found) > 1 else set()
        if found:
            return found | {part for name in found for part in _row(name)}
    return set()


def _content(path: str | Path) -> dict[str, Any]:
    """Of a small file of JSON; nothing where it is none."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(Path(path).read_bytes())
        return content if isinstance(content, dict) else {}
    return {}


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
    configs = CONFIGS.get(load_format, ("config.json", "params.json"))
    if not any(fnmatch(name, config) for name in names for config in configs):
        return f"{configs[0] if load_format != 'tokenizer' else 'a tokenizer'} is missing"
    names |= {f"{path.parent.name}/{path.name}" for path in folder.glob("*/*")}
    needed = weights(names, load_format, folder.joinpath)
    if not needed and PATTERNS.get(load_format):
        return "there are no weights"
    faults = ((name, damage(folder / name)) for name in needed)
    return next((f"{name} {fault}" for name, fault in faults if fault is not None), None)


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
    return not any("--" in json.dumps(_content(path).get("auto_map")) for path in folder.glob("*config.json"))
