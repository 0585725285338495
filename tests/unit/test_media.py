"""Which models take media, and when somebody has to be told that vLLM fetches them from anywhere."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supervisor.around.media import MediaNotice, unrestricted_kinds
from supervisor.around.modalities import find_kinds, read_kinds
from supervisor.engine.lifecycle import State
from supervisor.engine.run import Change, Run
from supervisor.settings.settings import Arguments, Settings, gather
from supervisor.weights.find import Weights

IMAGES = frozenset({"image", "video"})
AUDIO = frozenset({"audio"})
QWEN = {"architectures": ["Qwen2VLForConditionalGeneration"], "vision_config": {"depth": 32}, "image_token_id": 151655}


# What a model takes


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, frozenset()),
        ({"architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "use_sliding_window": False}, frozenset()),
        ({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}, frozenset()),
        ({"architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}, frozenset()),
        ({"architectures": ["LlamaForCausalLM"], "supervision": {"a": 1}, "vision_config": None}, frozenset()),
        (QWEN, IMAGES),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}, IMAGES),
        ({"architectures": ["Phi3VForCausalLM"], "img_processor": {"name": "clip_vision_model"}}, IMAGES),
        ({"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/clip"}, IMAGES),
        ({"architectures": ["QWenLMHeadModel"], "visual": {"heads": 16}}, IMAGES),
        ({"architectures": ["Qwen2AudioForConditionalGeneration"], "audio_config": {"d_model": 1280}}, AUDIO),
        ({"architectures": ["Omni"], "thinker_config": {"vision_config": {}, "audio_config": {}}}, IMAGES | AUDIO),
        ({"architectures": ["SomethingNewForConditionalGeneration"]}, IMAGES | AUDIO),
        ({"architectures": ["MolmoForCausalLM"]}, IMAGES | AUDIO),
        ({"architectures": "MiniCPMV"}, frozenset()),
        ({"architectures": [None, 1, {}], "text_config": [1]}, frozenset()),
        ({"dim": 5120, "vision_encoder": {"hidden_size": 1664}}, IMAGES),  # params.json of Mistral's
        ({"dim": 3072, "multimodal": {"whisper_model_args": {"encoder_args": {}}}}, AUDIO),
    ],
)  # fmt: skip
def test_a_config_tells_what_the_model_takes(config: dict[str, Any], expected: frozenset[str]) -> None:
    assert find_kinds(config) == expected


@pytest.mark.parametrize("name", ["config.json", "params.json"])
def test_a_folder_tells_by_its_config(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(QWEN))
    assert read_kinds(tmp_path) == IMAGES


@pytest.mark.parametrize("text", [None, "", "[]", "{", "3", "[" * 100_000, "\x00", "{}" + " " * 20_000_000])
def test_a_folder_whose_config_can_not_be_read_tells_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert read_kinds(tmp_path) is None
    assert read_kinds(tmp_path / "model.gguf") is None


# Whether it is told


def settings(folder: Path, *vllm_args: str, model: str = "m", **environ: str) -> Settings:
    vllm = str(folder.parent / "vllm/bin/vllm")
    return gather(Arguments(model=model, vllm_args=vllm_args), {"SUPERVISOR_VLLM": vllm} | environ)


@pytest.mark.parametrize(
    ("environ", "args", "expected"),
    [
        ({}, (), IMAGES | AUDIO),
        ({"ALLOWED_MEDIA_DOMAINS": "images.example.com"}, (), frozenset()),
        ({"ALLOWED_MEDIA_DOMAINS": ""}, (), IMAGES | AUDIO),
        ({}, ("--allowed-media-domains", "a.example", "b.example"), frozenset()),
        ({"LANGUAGE_MODEL_ONLY": "true"}, (), frozenset()),
        ({"LANGUAGE_MODEL_ONLY": "false"}, (), IMAGES | AUDIO),
        ({}, ("--language-model-only",), frozenset()),
        ({"LIMIT_MM_PER_PROMPT": '{"image": 0, "video": 0, "audio": 0}'}, (), frozenset()),
        ({"LIMIT_MM_PER_PROMPT": '{"image": 0, "video": {"count": 0}}'}, (), AUDIO),
        ({"LIMIT_MM_PER_PROMPT": '{"image": 4, "video": 0}'}, (), AUDIO | {"image"}),
        ({}, ("--limit-mm-per-prompt", '{"audio": 0}'), IMAGES),
        ({}, ("--limit-mm-per-prompt.video", "0", "--limit-mm-per-prompt.image.count=0"), AUDIO),
        ({}, ("--limit-mm-per-prompt.image", "3"), IMAGES | AUDIO),
    ],
)  # fmt: skip
def test_what_may_be_fetched_from_anywhere(
    folder: Path, environ: dict[str, str], args: tuple[str, ...], expected: frozenset[str]
) -> None:
    assert unrestricted_kinds(settings(folder, *args, **environ), IMAGES | AUDIO) == expected
    assert unrestricted_kinds(settings(folder, *args, **environ), frozenset()) == frozenset()


def test_what_vllms_own_file_says_counts(folder: Path) -> None:
    (folder / "vllm.yaml").write_text("allowed-media-domains: [a.example]\n")
    assert unrestricted_kinds(settings(folder, CONFIG="vllm.yaml"), IMAGES) == frozenset()
    (folder / "vllm.yaml").write_text("limit-mm-per-prompt: {image: 0}\n")
    assert unrestricted_kinds(settings(folder, CONFIG="vllm.yaml"), IMAGES) == {"video"}


def run() -> Run:
    return Run(1, 0.0, lambda *_: None)


READY = Change(State.STARTING, State.READY, "")


async def lives(told: MediaNotice, *, starts: int = 2) -> None:
    """The engine starts, and is ready, as often."""
    for _ in range(starts):
        events: tuple[Callable[[], None], ...] = (
            lambda: told.run_began(run()),
            lambda: told.state_changed(READY),
        )
        for happen in events:
            happen()
            if told.look_task is not None:
                await told.look_task


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def once(*found: Weights) -> Callable[[], Weights]:
    """What is found, look by look; the last one stays."""
    left = list(found)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_it_is_told_once_and_names_the_setting(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    told = MediaNotice(settings(folder), once(Weights("here", tmp_path)))
    asyncio.run(lives(told))
    (warning,) = warnings(caplog)
    assert "ALLOWED_MEDIA_DOMAINS" in warning
    assert "images and videos" in warning


def test_a_model_that_is_downloaded_first_is_looked_at_when_it_serves(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"], "audio_config": {"a": 1}}))
    told = MediaNotice(settings(folder), once(Weights("the hub", None, needs_download=True), Weights("here", tmp_path)))
    asyncio.run(lives(told))
    (warning,) = warnings(caplog)
    assert "audio" in warning


@pytest.mark.parametrize(
    ("config", "environ"),
    [({"architectures": ["Qwen3ForCausalLM"]}, {}), (QWEN, {"ALLOWED_MEDIA_DOMAINS": "a.example"}), (None, {})],
    ids=["text", "restricted", "unknown"],
)
def test_otherwise_nothing_is_told(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, config: object, environ: dict[str, str]
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    asyncio.run(lives(MediaNotice(settings(folder, **environ), once(Weights("here", tmp_path)))))
    assert warnings(caplog) == []


def test_a_disk_that_hangs_holds_up_nobody(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = threading.Event()

    def hangs() -> Weights:
        answers.wait(20)
        return Weights("nowhere")

    async def go() -> None:
        told = MediaNotice(settings(folder), hangs)
        told.run_began(run())
        told.state_changed(READY)  # no second thread beside one that hangs
        assert told.look_task is not None
        await asyncio.wait({told.look_task}, timeout=0)
        assert not told.look_task.done()

    asyncio.run(go())  # ends, though the call did not
    answers.set()
    assert warnings(caplog) == []
