"""Values: what people write, and what goes on vLLM's command line; what can't be meant, and what is said of it."""

from __future__ import annotations

import json

import pytest

from supervisor.secrets import Mask
from supervisor.settings.knobs import KNOBS
from supervisor.vllm.catalogue import FLAGS, Option, parse
from supervisor.vllm.values import READERS, BadValue

OPTIONS = parse((FLAGS / "0.32.0.json").read_text()).by_key


def option(kind: str, type_: str = "str", **more: object) -> Option:
    return Option("--x", kind, type_, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        # lists: JSON, commas, spaces; objects; what contains commas is not torn
        ("served_model_name", "a", ["--served-model-name", "a"]),
        # vLLM's formats, in other capitals and with other dashes; a plugin's parser may differ by these alone
        ("tool_call_parser", "qwen3-Coder", ["--tool-call-parser", "qwen3-Coder"]),
        ("reasoning_parser", "Qwen3", ["--reasoning-parser", "Qwen3"]),
        ("load_format", "SafeTensors", ["--load-format", "safetensors"]),
        ("quantization", "Compressed_Tensors", ["--quantization", "compressed-tensors"]),
        ("served_model_name", "a, b", ["--served-model-name", "a", "b"]),
        ("served_model_name", "a b", ["--served-model-name", "a", "b"]),
        ("served_model_name", '["a b", "c,d"]', ["--served-model-name", "a b", "c,d"]),
        ("served_model_name", "[1.10, 7]", ["--served-model-name", "1.10", "7"]),
        ("served_model_name", ["a", 7, True], ["--served-model-name", "a", "7", "true"]),
        ("lora_modules", "a=b c=d", ["--lora-modules", "a=b", "c=d"]),
        ("lora_modules", '{"name": "a", "path": "b"}', ["--lora-modules", '{"name": "a", "path": "b"}']),
        ("lora_modules", '{"name": "a"} {"name": "b"}', ["--lora-modules", '{"name": "a"}', '{"name": "b"}']),
        ("lora_modules", '{"name": "a"},{"name": "b"}', ["--lora-modules", '{"name": "a"}', '{"name": "b"}']),
        ("lora_modules", '[{"name": "a"}, "b=c"]', ["--lora-modules", '{"name": "a"}', "b=c"]),
        ("lora_modules", {"name": "a"}, ["--lora-modules", '{"name": "a"}']),
        ("cudagraph_capture_sizes", "1,2 ,4", ["--cudagraph-capture-sizes", "1", "2", "4"]),
        ("cudagraph_capture_sizes", [1, 2], ["--cudagraph-capture-sizes", "1", "2"]),
        ("device_ids", [0, 1], ["--device-ids", "0,1"]),
        ("device_ids", "0 1", ["--device-ids", "0,1"]),
        # a list that vLLM wants as JSON
        ("allowed_origins", "https://a,https://b", ["--allowed-origins", '["https://a", "https://b"]']),
        ("allowed_origins", "*", ["--allowed-origins", '["*"]']),
        ("allowed_origins", '["*"]', ["--allowed-origins", '["*"]']),
        ("allowed_origins", ["*"], ["--allowed-origins", '["*"]']),
        # numbers
        ("max_model_len", "32K", ["--max-model-len", "32K"]),
        ("max_model_len", "1.5k", ["--max-model-len", "1.5k"]),
        ("max_model_len", "AUTO", ["--max-model-len", "auto"]),
        ("max_model_len", -1, ["--max-model-len=-1"]),
        ("max_model_len", 8_000, ["--max-model-len", "8000"]),
        ("max_num_seqs", " 8 ", ["--max-num-seqs", "8"]),
        ("gpu_memory_utilization", 1, ["--gpu-memory-utilization", "1"]),
        ("gpu_memory_utilization", ".5", ["--gpu-memory-utilization", ".5"]),
        # choices
        ("dtype", "BFloat16", ["--dtype", "bfloat16"]),
        ("log_level", "info", ["--log-level", "INFO"]),
        ("max_lora_rank", 16, ["--max-lora-rank", "16"]),
        ("moe_backend", "flashinfer-cutlass", ["--moe-backend", "flashinfer_cutlass"]),
        # JSON
        ("speculative_config", {"method": "ngram"}, ["--speculative-config", '{"method": "ngram"}']),
        ("compilation_config", '{"compile_sizes": [2k]}', ["--compilation-config", '{"compile_sizes": [2k]}']),
        ("hf_overrides", "a.b.c", ["--hf-overrides", "a.b.c"]),
        # texts
        ("chat_template", "-x", ["--chat-template=-x"]),
        ("chat_template", "{% if a %}\n--b\n{% endif %}", ["--chat-template", "{% if a %}\n--b\n{% endif %}"]),
        ("revision", 1234567, ["--revision", "1234567"]),
        ("served_model_name", "-x", ["--served-model-name=-x"]),
    ],
)  # fmt: skip
def test_values_become_argv(key: str, given: object, expected: list[str]) -> None:
    assert OPTIONS[key].argv(OPTIONS[key].read(given)) == expected


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("max_num_seqs", "8.5", "a whole number, such as 8"),
        ("max_num_seqs", "0", "at least 1, such as 8"),
        ("max_num_seqs", True, "a whole number, such as 8"),
        ("max_num_seqs", {"a": 1}, "a whole number, such as 8"),
        ("gpu_memory_utilization", "90", "more than 0 and at most 1, such as 0.92"),
        ("gpu_memory_utilization", "90%", "a number, such as 0.9"),
        ("gpu_memory_utilization", "nan", "a number, such as 0.9"),
        ("gpu_memory_utilization", "0,9", "a number, such as 0.9"),
        ("max_model_len", "1.5K", "auto, or a whole number, such as 4096, 32k (32000) or 32K (32768)"),
        ("max_model_len", "32 k", "auto, or a whole number, such as 4096"),
        ("max_model_len", "32kb", "auto, or a whole number, such as 4096"),
        ("max_num_batched_tokens", "0", "at least 1"),
        ("max_num_batched_tokens", "many", "a whole number, such as 4096"),
        ("enable_lora", "maybe", "true or false"),
        ("enable_lora", 2, "true or false"),
        ("dtype", "bf16", "did you mean bfloat16?"),
        ("spec_method", "eagle4", "one of 39 names, such as eagle, eagle3; did you mean eagle?"),
        ("max_lora_rank", "17", "one of 1, 8, 16"),
        ("speculative_config", "{method: ngram}", 'JSON, such as {"key": "value"}'),
        ("speculative_config", "5", 'a JSON object, such as {"key": "value"}'),
        ("speculative_config", '{"a": 1}}', "JSON, such as"),
        ("speculative_config", '{"a": 2k}', "JSON, such as"),  # vLLM takes 2k in its own classes' JSON alone
        ("hf_overrides", "{a}", "JSON, such as"),
        ("lora_modules", '{"name": "a"', "a list of JSON objects, such as"),
        ("served_model_name", "[a", "a list, such as a,b"),
        ("cudagraph_capture_sizes", "1,two", "a whole number, such as 8"),
        ("chat_template", {"a": 1}, "a text, such as abc"),
    ],
)
def test_bad_values_say_what_was_expected(key: str, given: object, expected: str) -> None:
    with pytest.raises(BadValue) as caught:
        OPTIONS[key].read(given)
    assert expected in str(caught.value)


@pytest.mark.parametrize("type_", sorted(READERS))
def test_each_kind_of_value_has_its_own_word_for_nonsense(type_: str) -> None:
    """No kind lets anything through, but those that are texts, and none answers with a traceback."""
    nonsense: tuple[object, ...] = ("", "\0", "\ud800", "{", "[", "²", "1e999", float("nan"), [], {}, object)
    for given in nonsense:
        try:
            READERS[type_](given)
        except BadValue as error:
            assert "such as" in str(error)


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.variable)
def test_each_setting_of_ours_says_what_it_expects(knob: object) -> None:
    for given in ("", " ", "\0", "nonsense '", "-1", "1e400", "²", "9" * 5000, "@/no/such/file", "@/bin/true", "a,b"):
        try:
            knob.read(given)  # type: ignore[attr-defined]
        except BadValue as error:
            assert any(words in str(error) for words in ("such as", "one of", "true or false"))


def test_none_in_words_is_unset_where_that_is_the_default() -> None:
    for text in ("None", "none", "null", ""):
        assert OPTIONS["quantization"].is_unset(text)
        assert not OPTIONS["convert"].is_unset("none")  # one of its choices
    assert not OPTIONS["gpu_memory_utilization"].is_unset("None")


def test_opposites() -> None:
    assert OPTIONS["enable_prefix_caching"].opposite == "disable_prefix_caching"
    assert OPTIONS["disable_sliding_window"].opposite == "enable_sliding_window"
    assert OPTIONS["enforce_eager"].opposite is None
    assert OPTIONS["disable_log_stats"].opposite is None  # a switch: it can't be said otherwise


# What is masked

KEPT = (
    "max_tokens=16 stop_token_ids=[1] Avg prompt throughput: 0.0 tokens/s",
    '{"eos_token": "</s>", "max_tokens": "16", "tokenizer": "a/b", "tool_choice": "auto", "key": "value"}',
    "--max-num-batched-tokens 8192 --tokenizer a/b --tokens-only",
    "http://127.0.0.1:8000/v1/chat/completions?key2=a&stream=true",
    "X-Request-Id: 0123456789abcdef0123456789abcdef",
    "/models/sk-learn/model.safetensors skip-tokenizer-init",
    "hf_overrides: 3; vLLM's hf_config_path, hf_text_config (supervisor.hf_transfer)",
    "--api-key (command line): can't be passed to vLLM",
)
HIDDEN = (
    "hf_abcdefghijklmnop", "hf_ABCDEFGHIJKL", "hf_abcdefgh12345678",
    "sk-proj-abcdefgh12345678", "rpa_ABCDEFGH12345678", "ghp_abcdefgh12345678",
    "AKIAABCDEFGH12345678", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
)  # fmt: skip


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_secret_stays(text: str) -> None:
    assert Mask({})(text) == text


@pytest.mark.parametrize("secret", HIDDEN)
@pytest.mark.parametrize("around", ["%s", "x %s y", '{"a": "%s"}', "--x=%s", "https://h/?a=%s&b=1", "'%s'"])
def test_what_looks_like_a_token_is_hidden_wherever_it_stands(secret: str, around: str) -> None:
    masked = Mask({})(around % secret)
    assert secret not in masked
    assert masked == around % "****"


@pytest.mark.parametrize(
    "text",
    [
        "https://user:%s@host/x", "redis://:%s@host", "https://%s@host/", "https://h/?token=%s",
        "https://h/a?b=1&sig=%s&c=2",
        "https://h/?api_key=%s", "https://h/?X-Amz-Signature=%s", '{"api_key": "%s"}', '{"a": {"hf_token": "%s"}}',
        "{'password': '%s'}", '{"aws_secret_access_key":"%s"}', r'{\"token\": \"%s\"}',
        '{"Authorization": "Bearer %s"}',
        "Authorization: Bearer %s", "--api-key %s", "--hf-token=%s", '{"client_secret" : "%s"}',
        '{"session-token": "%s"}',
    ],
)  # fmt: skip
def test_what_a_name_says_is_secret_is_hidden(text: str) -> None:
    secret = "Zx9-qW_7.plain"
    masked = Mask({})(text % secret)
    assert secret not in masked
    assert "****" in masked


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "MY_SECRET", "DB_PASSWORD", "SUPERVISOR_API_KEYS", "OPENAI_API_KEY", "API_TOKENS", "aws_secret_key"],
)  # fmt: skip
def test_variables_with_such_names_hold_secrets_in_any_form(name: str) -> None:
    secret = "pl'ain \"te\\xt"
    mask = Mask({name: secret})
    for text in (secret, json.dumps({"a": secret}), mask.command(["--x", secret])):
        assert "te" not in mask(text)


def test_the_headers_for_a_collector_hold_keys() -> None:
    for name in ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"):
        masked = Mask({name: "x-team=first-key,x-other = second-key"})("first-key; second-key; x-team")
        assert masked == "****; ****; x-team"


@pytest.mark.parametrize("name", ["MAX_NUM_BATCHED_TOKENS", "TOKENIZER", "KEYBOARD_LAYOUT", "MONKEY", "SPEC_TOKENS"])
def test_variables_that_only_sound_like_it_hold_none(name: str) -> None:
    assert Mask({name: "131072-abc"})("131072-abc") == "131072-abc"


@pytest.mark.parametrize("given", ["{'image': 4}", '{\\"image\\": 4}'])
def test_json_in_other_quotes_is_told_as_it_should_be_written(given: str) -> None:
    with pytest.raises(BadValue, match=r'JSON: write \{"image": 4\}'):
        OPTIONS["limit_mm_per_prompt"].read(given)


def test_numbers_stay_as_they_were_written_in_what_is_to_be_written() -> None:
    with pytest.raises(BadValue, match=r'JSON: write \{"max_capture": 1k\}'):
        OPTIONS["compilation_config"].read("{'max_capture': 1k}")
