"""Finds which kinds of media a model takes beside text, by its config.json (params.json, as Mistral has it).

vLLM knows it by the model's class, whose import takes it ten seconds. The names of the fields and of the architectures
tell as much; a model of a new kind may be missed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

VISION, AUDIO = frozenset({"image", "video"}), frozenset({"audio"})
# A field's name tells by whole words of it: `vision_config`, `mm_vision_tower`, `image_token_id`.
FIELD_PATTERNS = (
    (re.compile(r"(?:^|_)(?:vision|visual|image|img|video)(?:_|$)"), VISION),
    (re.compile(r"(?:^|_)(?:audio|speech|sound|whisper)(?:_|$)"), AUDIO),
)
PART_PATTERN = re.compile(r"(?:^|_)(?:config|multimodal)$")  # such fields hold a model's parts
# Where the fields say nothing, the name does: here are vLLM 0.32's odd names of such models, and how all others end.
ARCHITECTURES = frozenset(
    {
        "DeepseekOCR2ForCausalLM", "DeepseekOCRForCausalLM", "DeepseekV41ForCausalLM", "DeepseekVLV2ForCausalLM",
        "DiffusionGemmaForBlockDiffusion", "Dots3NoteForCausalLM", "DotsOCRForCausalLM", "GLM4VForCausalLM",
        "H2OVLChatModel", "HfMoondream", "InternVLChatModel", "Llama_Nemotron_Nano_VL", "MiDashengLMModel",
        "MiMoV2OmniForCausalLM", "MiniCPMO", "MiniCPMV", "MolmoForCausalLM", "Moondream3ForCausalLM",
        "MoonshotKimiaForCausalLM", "MossAudioModel", "NVLM_D", "NemotronH_Nano_Omni_Reasoning_V3",
        "NemotronH_Nano_VL_V2", "NemotronH_Omni_Reasoning_V3", "NemotronH_Super_Omni_Reasoning_V3",
        "OpenVLAForActionPrediction", "Ovis", "Ovis2_5", "Ovis2_6ForCausalLM", "Ovis2_6_MoeForCausalLM",
        "Phi3VForCausalLM", "Phi4ForCausalLMV", "Phi4MMForCausalLM", "Qwen2_5OmniModel", "Qwen3ASRRealtimeGeneration",
        "SkyworkR1VChatModel", "UltravoxModel", "UnlimitedOCRForCausalLM", "VoxtralRealtimeGeneration",
    }
)  # fmt: skip
MEDIA_ENDING = "ForConditionalGeneration"
TEXT_ARCHITECTURES = frozenset(f"{name}{MEDIA_ENDING}" for name in ("Bart", "ChatGLM", "MBart", "T5"))
MAX_CONFIG_BYTES = 10_000_000


def read_kinds(folder: Path) -> frozenset[str] | None:
    """Reads one small file, and returns the kinds that a folder's model takes; None where no config can be read."""
    for name in ("config.json", "params.json"):
        try:
            with (folder / name).open("rb") as file:
                content = json.loads(file.read(MAX_CONFIG_BYTES))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and content:
            return find_kinds(content)
    return None


def find_kinds(config: Mapping[str, Any]) -> frozenset[str]:
    """Returns those of `image`, `video` and `audio` that a prompt may have."""
    kinds = frozenset[str]().union(
        *(media for name in _field_names(config) for pattern, media in FIELD_PATTERNS if pattern.search(name))
    )
    if kinds:
        return kinds
    architectures = config.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    if any(name in ARCHITECTURES or (name.endswith(MEDIA_ENDING) and name not in TEXT_ARCHITECTURES) for name in names):
        return VISION | AUDIO
    return frozenset()


def _field_names(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields the names of fields that say something, and of such fields of the model's parts."""
    for name, value in config.items():
        if value in (None, False):
            continue
        yield name
        if PART_PATTERN.search(name) and isinstance(value, dict):
            yield from (inner for inner, content in value.items() if content not in (None, False))
