"""The repositories that vLLM's options name beside the model: where they are, and what stands for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from supervisor.repositories import fetch_command, find_companions, find_model, needs_hub
from supervisor.settings.settings import Arguments, Settings, gather
from tests.harness import FAKE

COMMIT = "a" * 40


def has(cache: Path, name: str, **files: str) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / COMMIT
    for path, content in {
        repository / "refs/main": COMMIT,
        **{folder / key: text for key, text in files.items()},
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def settings(*vllm_args: str, **environ: str) -> Settings:
    own = {
        "SUPERVISOR_VLLM": str(FAKE),
        "ENABLE_LORA": "true",
        "HF_HUB_OFFLINE": "1",
    }  # what is there is taken without a question
    return gather(Arguments(model="org/model", vllm_args=vllm_args), own | environ)


def words(settings: Settings) -> dict[str, str]:
    return {option.key: setting.shown for option, setting in find_companions(settings)[1].options}


TOKENIZER = {"tokenizer.json": "{}"}
ADAPTER = {"adapter_config.json": "{}", "adapter_model.bin": "x"}
DRAFT = {"config.json": "{}", "pytorch_model.bin": "x"}


def test_what_is_in_the_cache_stands_for_its_name(tmp_path: Path) -> None:
    tokenizer, adapter, draft = (
        has(tmp_path, f"org/{number}", **files) for number, files in enumerate((TOKENIZER, ADAPTER, DRAFT))
    )
    found = words(
        settings(
            HF_HUB_CACHE=str(tmp_path),
            TOKENIZER="org/0",
            LORA_MODULES=f'["sql=org/1", {{"name": "b", "path": "org/1"}}, "local={tmp_path}"]',
            SPECULATIVE_CONFIG='{"model": "org/2", "num_speculative_tokens": 3}',
            DEFAULT_MM_LORAS='{"image": "org/1", "audio": "/elsewhere"}',
        )
    )
    assert found["tokenizer"] == str(tokenizer)
    assert found["lora_modules"] == f"sql={adapter} {json.dumps({'name': 'b', 'path': str(adapter)})} local={tmp_path}"
    assert json.loads(found["speculative_config"]) == {"model": str(draft), "num_speculative_tokens": 3}
    assert json.loads(found["default_mm_loras"]) == {"image": str(adapter), "audio": "/elsewhere"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer", "FOLDER"),
        ("spec_model", "FOLDER"),
        ("lora_modules", "a=FOLDER"),
        ("speculative_config", '{"method": "ngram", "num_speculative_tokens": 3}'),
        ("speculative_config", '{"model": "ngram", "num_speculative_tokens": 3}'),
        ("speculative_config", '{"model": "[ngram]", "num_speculative_tokens": 3}'),
        ("speculative_config", '{"method": "ngram", "model": "ngram", "num_speculative_tokens": 3}'),
        ("speculative_config", '{"method": "ngram", "model": "org/unused", "num_speculative_tokens": 3}'),
        ("speculative_config", '{"method": "ngram_gpu", "model": "ngram_gpu", "num_speculative_tokens": 3}'),
        ("speculative_config", '{"method": "suffix", "model": "suffix"}'),
        ("speculative_config", '{"method": "extract_hidden_states", "model": "extract_hidden_states"}'),
        ("speculative_config", '{"method": "custom_class", "model": "my.package.Proposer"}'),
        ("speculative_config", '{"model": "my.package.Proposer", "num_speculative_tokens": 3}'),
        ("spec_model", "ngram"),
        ("spec_model", "my.package.Proposer"),
        ("default_mm_loras", '{"image": "FOLDER"}'),
    ],
)
def test_what_names_no_repository_is_left_as_it_is(tmp_path: Path, key: str, value: str) -> None:
    value = value.replace("FOLDER", str(tmp_path))
    given = settings(**{key.upper(): value})
    assert words(given)[key] == value
    assert not any(each.weights.needs_download for each in find_companions(given)[0])


def test_the_model_itself_stands_for_its_name(tmp_path: Path) -> None:
    model = has(tmp_path, "org/model", **DRAFT)
    given = settings(HF_HUB_CACHE=str(tmp_path), TOKENIZER="org/model")
    assert words(given)["tokenizer"] == str(model)
    assert find_companions(given)[0] == []


def test_vllm_takes_a_load_format_in_any_capitals(tmp_path: Path) -> None:
    for raw, environ in (((), {"LOAD_FORMAT": "SafeTensors"}), (("--load-format", "SafeTensors"), {})):
        assert find_model(settings(*raw, **environ)).load_format == "safetensors"


def test_a_revision_is_that_of_its_own(tmp_path: Path) -> None:
    given = settings(
        TOKENIZER="org/t", TOKENIZER_REVISION="v1", REVISION="v2",
        SPECULATIVE_CONFIG='{"model": "org/d", "revision": "v3", "num_speculative_tokens": 1}',
    )  # fmt: skip
    found = {each.name: (each.revision, each.load_format, each.setting) for each in find_companions(given)[0]}
    assert found == {"org/t": ("v1", "tokenizer", "TOKENIZER"), "org/d": ("v3", "auto", "SPECULATIVE_CONFIG")}
    assert find_model(given).revision == "v2"


def test_a_draft_s_name_and_its_method_may_be_set_apart() -> None:
    """vLLM puts them together."""

    def draft(**environ: str) -> list[str]:
        return [each.name for each in find_companions(settings(**environ))[0]]

    assert draft(SPEC_METHOD="suffix", SPEC_MODEL="suffix") == []
    assert draft(SPEC_METHOD="custom_class", SPECULATIVE_CONFIG='{"model": "my.Proposer"}') == []
    assert draft(SPEC_MODEL="my.Proposer", SPECULATIVE_CONFIG='{"method": "custom_class"}') == []
    assert draft(SPEC_MODEL="org/my.draft", SPECULATIVE_CONFIG='{"method": "eagle"}') == ["org/my.draft"]
    assert draft(SPEC_METHOD="draft_model", SPEC_MODEL="my.draft") == ["my.draft"]


def test_a_tokenizer_without_a_revision_has_the_model_s() -> None:
    """As vLLM takes it, whichever repository it is."""
    given = settings(REVISION="v2", TOKENIZER="org/t")
    assert [(each.name, each.revision) for each in find_companions(given)[0]] == [("org/t", "v2")]
    assert find_companions(settings(REVISION="v2", TOKENIZER="org/model"))[0] == []


def test_whether_vllm_has_something_to_ask_the_hub(tmp_path: Path) -> None:
    has(tmp_path, "org/t", **TOKENIZER)
    has(tmp_path, "org/code", **TOKENIZER, **{"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": "org/x--t.T"}}'})

    def asks(*vllm_args: str, **environ: str) -> bool:
        given = settings(*vllm_args, HF_HUB_CACHE=str(tmp_path), **environ)
        return needs_hub(given, find_companions(given)[0])

    assert not asks()
    assert not asks(TOKENIZER="org/t")
    assert not asks(LORA_MODULES=f"a={tmp_path}")
    assert asks(TOKENIZER="org/code")
    assert asks("--tokenizer", "org/t")  # is passed as it is
    assert asks(HF_CONFIG_PATH="org/t")
    assert asks(VLLM_ALLOW_RUNTIME_LORA_UPDATING="1")
    assert asks("--default-mm-loras", '{"image": "org/t"}')
    assert asks(HF_OVERRIDES='{"text_model_id": "org/x"}')
    assert asks("--hf-overrides.audio_model_id", "org/x")
    assert not asks(HF_OVERRIDES='{"max_position_embeddings": 4096}')


def test_what_the_downloading_program_is_told(tmp_path: Path) -> None:
    given = settings(HF_HUB_OFFLINE="", TOKENIZER="org/t", DOWNLOAD_DIR=str(tmp_path), SUPERVISOR_STALL_TIMEOUT="20")
    command = fetch_command(given, [find_model(given), *find_companions(given)[0]])
    more: dict[str, object] = {"revision": None, "have": None, "gguf": False, "ignore": []}
    assert json.loads(command[-1]) == {
        "repositories": [
            {"repo": "org/model", "load_format": "auto", "place": "{weights}", "setting": "MODEL", **more},
            {"repo": "org/t", "load_format": "tokenizer", "place": "{weights:1}", "setting": "TOKENIZER", **more},
        ],
        "cache": str(tmp_path),
        "stall": 20.0,
        "offline": False,
    }
    ignoring = settings(IGNORE_PATTERNS="*.fp16.safetensors,x/")
    given_patterns = json.loads(fetch_command(ignoring, [find_model(ignoring)])[-1])["repositories"][0]["ignore"]
    assert given_patterns == ["*.fp16.safetensors", "x/*"]
    assert words(given)["tokenizer"] == "{weights:1}"


def test_a_tilde_in_the_folder_for_downloads_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for the hub's client."""
    monkeypatch.setenv("HOME", str(tmp_path))
    given = settings(DOWNLOAD_DIR="~/models")
    assert json.loads(fetch_command(given, [find_model(given)])[-1])["cache"] == str(tmp_path / "models")
    folder = has(tmp_path / "models", "org/model", **DRAFT)
    assert find_model(given).weights.folder == folder
