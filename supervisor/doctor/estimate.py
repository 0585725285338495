"""How much of a GPU's memory a model wants, estimated from its config.json. Pure; what counts is vLLM's profiling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Activations, CUDA's context and graphs: what is neither weights nor KV cache. From 1 GB (small models) to several.
OVERHEAD = 1_500_000_000
BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Layout:
    """What a token's keys and values take, in bytes over all GPUs: in layers that keep them all, and in those that keep
    a window of `window` tokens."""

    whole: int
    windowed: int = 0
    window: int = 0
    shared: bool = False  # one latent for all heads (MLA): tensor parallel ranks each keep all of it

    def bytes(self, tokens: int) -> int:
        return self.whole * tokens + self.windowed * min(tokens, self.window)

    def tokens(self, room: float) -> int:
        """The longest context whose keys and values fit into `room` bytes."""
        if room <= 0 or self.whole + self.windowed == 0:
            return 0
        short = int(room // (self.whole + self.windowed))
        if not self.windowed or short <= self.window:
            return short
        return int((room - self.windowed * self.window) // self.whole) if self.whole else 1 << 40


def layout(config: Mapping[str, Any], kv_dtype: str = "auto") -> Layout | None:
    """None for a model that has no such cache, or says not enough of it."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
    try:
        layers = int(config["num_hidden_layers"])
        width = 1 if kv_dtype.startswith("fp8") else _width(kv_dtype, config)
        if config.get("kv_lora_rank"):
            latent = int(config["kv_lora_rank"]) + int(config.get("qk_rope_head_dim") or 0)
            return Layout(layers * latent * width, shared=True)
        heads = int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    each = 2 * kv_heads * size * width
    window = config.get("sliding_window")
    window = int(window) if isinstance(window, int) and config.get("use_sliding_window", True) else 0
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        whole, sliding = kinds.count("full_attention"), kinds.count("sliding_attention")
        return Layout(each * whole, each * sliding, window) if window else Layout(each * (whole + sliding))
    return Layout(0, each * layers, window) if window else Layout(each * layers)


def _width(kv_dtype: str, config: Mapping[str, Any]) -> int:
    """Of the model's own type vLLM makes 16 bits where it is a float32."""
    return BYTES.get(kv_dtype, 2) if kv_dtype != "auto" else min(2, BYTES.get(str(config.get("torch_dtype")), 2))


def longest(config: Mapping[str, Any]) -> int | None:
    """The context that the model itself allows, which vLLM takes where nobody says another."""
    text = config.get("text_config")
    found = {**config, **(text if isinstance(text, Mapping) else {})}.get("max_position_embeddings")
    return found if isinstance(found, int) else None


@dataclass(frozen=True, slots=True)
class Share:
    """Of one GPU: bytes that vLLM may use, of weights, and the context that fits beside them."""

    usable: float
    weights: float
    tokens: int

    @property
    def fits(self) -> bool:
        return self.weights + OVERHEAD < self.usable


def share(layout: Layout, weights: int, gpu: int, utilization: float, *, tensor: int = 1, pipeline: int = 1) -> Share:
    """`tensor`, `pipeline`: over how many GPUs it is spread."""
    usable, mine = gpu * utilization, weights / (tensor * pipeline)
    spread = pipeline * (1 if layout.shared else tensor)
    return Share(usable, mine, layout.tokens((usable - mine - OVERHEAD) * spread))
