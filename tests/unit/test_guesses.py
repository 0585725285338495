"""What is said from weak evidence says so: of a few words that stand for many things no part of vLLM is accused."""

from __future__ import annotations

import pytest

from supervisor.engine import topics, tracebacks
from supervisor.engine.diagnosis import diagnose, is_effect

FRAME = '  File "/venv/vllm/{}", line 99, in {}'


def raised(error: str, *places: str) -> list[str]:
    frames = (FRAME.format(*place.split(":")) for place in places)
    return ["Traceback (most recent call last):", *frames, error]


# vLLM's own messages (0.28 to 0.32), each with a word of a part that it is not about; the place is not in the log.
@pytest.mark.parametrize(
    ("error", "accused"),
    [
        ("TypeError: Expected PleShortConvMetadata for layer 'weights', got dict", "weights"),
        ("RuntimeError: QSA cache head size must be positive", "attention"),
        ("ValueError: block_size has not been initialized.", "attention"),
        ("RuntimeError: a parameter has invalid dtype name 'x'; expected the name of a torch.dtype", "number format"),
        ("ValueError: Persistent workspace 'x' has shape=(1,), dtype=int8; requested another", "number format"),
        ("RuntimeError: publishing rank needs 8 destination placements", "several GPUs"),
        ("AssertionError: Should not be called as prefix caching is disabled.", "prefix caching"),
        ("RuntimeError: You cannot tie weights between stages when only 1 exists", "weights"),
        ("ValueError: Unknown pooling mode: max3", "embedding"),
        ("RuntimeError: staging image of the buffer was not written", "pictures"),
        ("ValueError: expected 2D uint8 mxfp8 scales, got 1", "quantization"),
        ("ValueError: no more than 8 experts here", "layer of experts"),
        ("TypeError: No tokenization of an empty list", "tokenizer"),
    ],
)
def test_a_word_alone_accuses_no_part(error: str, accused: str) -> None:
    said = diagnose(1, [error])
    assert accused.lower() not in said.cause.replace(error.partition(": ")[2].rstrip("."), "").lower()
    assert "Where it is about" in said.remedy


# The same with the frame where it was raised, which says what it is about.
@pytest.mark.parametrize(
    ("error", "place", "part"),
    [
        ("ValueError: Image budget: dtype x", "v1/attention/backends/utils.py:fill", "The attention"),
        ("AssertionError: weight 1 must be uint8", "model_executor/layers/fused_moe/experts/x.py:run", "experts"),
        ("RuntimeError: The model tokenizer must be given", "tool_parsers/hermes_tool_parser.py:__init__", "parser"),
        ("ValueError: tokenized text of another length", "multimodal/processing/processor.py:apply", "pictures"),
        ("AssertionError: Weight matrix must be contiguous", "model_executor/layers/quantization/x.py:a", "quantiz"),
        ("RuntimeError: no image in the batch", "distributed/kv_transfer/kv_connector/v1/x.py:load", "KV connector"),
        ("ValueError: EC Mooncake control channel failed", "v1/engine/core.py:run", "encoders' output"),
        ("RuntimeError: nccl_m2n supports rank 1..8", "v1/engine/core.py:run", "weights from a training"),
        ("AssertionError: 2 heads", "models/minimax_m3/common/sparse_attention.py:forward", "The attention"),
    ],
)
def test_a_place_comes_before_a_word(error: str, place: str, part: str) -> None:
    failure = tracebacks.read(raised(error, place), is_effect)
    assert part in topics.placeholders(failure)["part"]


def test_a_place_that_everything_comes_through_does_not_come_before_a_word() -> None:
    """A model's own file: its pictures are prepared in it as well."""
    lines = raised("ValueError: Only image or video is supported", "model_executor/models/glm4_1v.py:get")
    assert "about the preparation of pictures" in diagnose(1, lines).remedy


def test_words_that_name_a_part_still_do() -> None:
    for error, part in (
        ("RuntimeError: the vision tower gave up", "The preparation of pictures"),
        ("RuntimeError: FlashAttention gave up", "The attention"),
        ("RuntimeError: GPTQ gave up", "The model's quantization"),
        ("RuntimeError: no LoRA here", "LoRA"),
    ):
        assert diagnose(1, [error]).cause.startswith(part)


# A text that vLLM's authors wrote tells of a check, and not of a slip in its code.
@pytest.mark.parametrize(
    "error",
    [
        "TypeError: Expected DotsOCRConfig, got Qwen2Config",
        "TypeError: module_name must be str, list[str], or None.",
        "TypeError: Warmup domains must be direct expressions",
        "KeyError: \"publisher 'zmq' already registered\"",
        "IndexError: routed-experts layer 8 exceeds capture buffer layer count 4",
        "AttributeError: To go on, get_x must be implemented",
        "TypeError: Cannot append to a constant list",
    ],
)
def test_a_check_is_no_slip_in_the_code(error: str) -> None:
    cause = diagnose(1, [error]).cause
    assert "in its own code" not in cause
    assert error.partition(": ")[2].rstrip(".") in cause


@pytest.mark.parametrize(
    "error",
    ["TypeError: 'NoneType' object is not subscriptable", "KeyError: 'odd'", "KeyError: 14", "KeyError: None",
     "IndexError: list index out of range", "AttributeError: 'X' object has no attribute 'y'",
     "TypeError: unsupported operand type(s) for +: 'Tensor' and 'Tensor'", "NameError: name 'x' is not defined",
     "TypeError: int() argument must be a string, a bytes-like object or a real number, not 'NoneType'"],
)  # fmt: skip
def test_a_slip_in_the_code_is_one(error: str) -> None:
    assert "fails in its own code" in diagnose(1, [error]).cause


def test_a_size_in_a_kernel_is_not_the_setting_that_its_name_begins_with() -> None:
    for error in (
        "ValueError: block_size_m must be one of (8, 16), got 4",
        "ValueError: page_block_size=32 is odd",
        "ValueError: block_size=8 is odd",  # mostly one of a kernel's or a format's own
        "ValueError: draft_tensor_parallel_size=4 is odd",
    ):
        assert topics.find_named(tracebacks.read([error], is_effect)) == []
    for error in (
        "ValueError: tensor_parallel_size=3 is odd",
        "ValueError: the tensor parallel size is odd; config.tensor_parallel_size",
    ):
        assert topics.find_named(tracebacks.read([error], is_effect)) == ["TENSOR_PARALLEL_SIZE"]


def test_what_is_not_of_layers_is_not_told_as_theirs() -> None:
    for error in (
        "ValueError: query, key and positions must have the same number of tokens",
        "AssertionError: source and target must have the same number of rows",
        "AssertionError: both must have the same number of requests",
    ):
        assert "layers" not in diagnose(1, [error]).cause
    assert "mostly" in diagnose(1, ["ValueError: EC source shape mismatch for mm_hash=1"]).cause


def test_a_number_that_may_not_be_zero_was_not_divided_by() -> None:
    assert "divided" not in diagnose(1, ["ValueError: logit_sigma cannot be 0 (division by zero)"]).cause
    assert "divided" in diagnose(1, ["ZeroDivisionError: integer division or modulo by zero"]).cause
    assert diagnose(-8, []).cause == diagnose(136, []).cause
    assert "SIGFPE" in diagnose(-8, []).cause


# pydantic's words


REFUSED = "pydantic_core._pydantic_core.ValidationError: 1 validation error for "


@pytest.mark.parametrize("space", ["", " "])
def test_what_pydantic_refuses_is_told_and_not_the_class_that_it_stands_in(space: str) -> None:
    """A space at the end of the line hid the next one, and an adapter was blamed for MAX_LORA_RANK."""
    lines = [f"{REFUSED}LoRAConfig{space}", f"  Value error, max_lora_rank (1) must be one of (8, 16). [type=x]{space}"]
    said = diagnose(1, lines)
    assert "max_lora_rank (1) must be one of (8, 16)" in said.cause
    assert "MAX_LORA_RANK" in said.remedy
    assert "adapter" not in said.text


def test_a_reason_that_is_not_in_the_log_is_not_made_up() -> None:
    said = diagnose(1, [f"{REFUSED}LoRAConfig"])
    assert "is not in this log" in said.cause
    assert "adapter" not in said.text
    assert (
        "greater than 0" in diagnose(1, [f"{REFUSED}LoRAConfig", "max_loras", "  Input should be greater than 0"]).cause
    )


# Code from outside, a worker of another kind, a processor that is none


def test_code_that_was_written_for_an_older_vllm_is_told_as_such() -> None:
    moved = "X._get_y has been moved to `Z.build_y` in v0.16. You should override `Z.build_y` instead."
    for line in (f"ValueError: {moved}", f"ERROR:app.engine:Failed to load the model: {moved}"):
        said = diagnose(1, [line])
        assert "older vLLM" in said.cause
        assert "LANGUAGE_MODEL_ONLY" not in said.remedy
        assert said.permanent


def test_a_processor_that_is_none_is_not_the_tokenizers_fault() -> None:
    for word in ("processor", "proceesor"):  # as vLLM wrote it up to 0.11
        error = f"TypeError: Invalid type of HuggingFace {word}. Expected type: <class 'a.b.ProcessorMixin'>, but "
        said = diagnose(1, [f"{error}found type: <class 'transformers.models.llama.LlamaTokenizerFast'>"])
        assert "LlamaTokenizerFast in its place" in said.cause
        assert "preprocessor_config.json" in said.remedy


def test_a_start_that_failed_with_words_is_told_with_them() -> None:
    said = diagnose(1, ["kserve ERROR [__main__.py:254] Failed to start model server: integer modulo by zero"])
    assert "integer modulo by zero" in said.cause
    assert diagnose(1, ["ERROR: Failed to start engine: NoneType: None"]).cause == "Its log does not say why."


# Noise: what stands in many a log, and stops nothing


KNOWN = "ValueError: Odd setting: x is not supported"


@pytest.mark.parametrize(
    "noise", ["/bin/sh: 1: nvcc: not found", "sh: 1: hipcc: not found", "/bin/sh: 1: gcc: not found"]
)
def test_a_compiler_that_is_looked_for_is_missing_only_where_something_is_built(noise: str) -> None:
    assert "Odd setting" in diagnose(1, [noise, *raised(KNOWN, "x/y.py:f")]).cause
    built = [f"FAILED: x.cuda.o {noise}", *raised("RuntimeError: Error building extension 'x'", "x/y.py:f")]
    assert "image has no" in diagnose(1, built).cause


@pytest.mark.parametrize("noise", ["free(): invalid pointer", "double free or corruption (!prev)"])
def test_what_glibc_says_at_the_end_of_a_process_that_failed_is_not_why(noise: str) -> None:
    assert "Odd setting" in diagnose(-6, [*raised(KNOWN, "x/y.py:f"), noise]).cause
    assert "damaged its own memory" in diagnose(-6, [noise]).cause


# Servers that are not the hub


@pytest.mark.parametrize(
    "error",
    [
        "requests.exceptions.HTTPError: 401 Client Error: Unauthorized for url: https://registry.example/v2/x",
        "requests.exceptions.HTTPError: 503 Server Error: Service Unavailable for url: http://otel:4318/v1/traces",
        "httpx.HTTPStatusError: Server error '502 Bad Gateway' for url 'http://localhost:8001/v1/models'",
        "httpx.HTTPStatusError: Client error '403 Forbidden' for url 'https://measure.example/x'",
        "requests.exceptions.ConnectionError: HTTPConnectionPool(host='localhost', port=9090): Max retries exceeded "
        "with url: /register (Caused by NewConnectionError: Connection refused)",
        "urllib3.exceptions.MaxRetryError: HTTPConnectionPool(host='169.254.169.254', port=80): Max retries exceeded "
        "with url: /latest/api/token",
    ],
)
def test_not_every_server_is_the_hub(error: str) -> None:
    said = diagnose(1, [error])
    assert "not the hub" in said.cause
    assert "HF_TOKEN" not in said.remedy


@pytest.mark.parametrize(
    "error",
    [
        "requests.exceptions.HTTPError: 503 Server Error: Service Unavailable for url: https://mirror.example/api/models/x",
        "httpx.HTTPStatusError: Server error '502 Bad Gateway' for url 'http://hub:8000/a/b/resolve/main/config.json'",
        "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='mirror.example', port=443): Max retries "
        "exceeded with url: /a/b/resolve/main/config.json (Caused by NewConnectionError: Connection refused)",
        "requests.exceptions.ReadTimeout: HTTPSConnectionPool(host='mirror.example', port=443): Read timed out.",
    ],
)
def test_the_hub_is_known_by_what_it_is_asked_for(error: str) -> None:
    said = diagnose(1, [error])
    assert said.cause.startswith("The hub")
    assert not said.permanent


# A key that is not there


def test_a_key_of_the_configuration_is_no_part_of_the_weights() -> None:
    for key in ("attention_bias", "mlp_bias", "logit_scale"):
        assert "config.json" in diagnose(1, [f"KeyError: '{key}'"]).cause
    assert "weights" not in diagnose(1, ["KeyError: 'weight_transfer_config'"]).cause.replace("of weights from", "")
    for key in ("layers.0.mlp.gate.weight", "q_proj_bias", "layers.0.k_scale", "w13_bias", "a.b.bias"):
        assert "model's weights have a part" in diagnose(1, [f"KeyError: '{key}'"]).cause


# Libraries' words


def test_what_safetensors_refuses_need_not_be_a_damaged_file() -> None:
    assert "damaged" not in diagnose(1, ["safetensors_rust.SafetensorError: device nvidia:0 is invalid"]).cause
    assert "damaged" in diagnose(1, ["safetensors_rust.SafetensorError: Error while deserializing header: x"]).cause


def test_a_yaml_file_that_cannot_be_read_is_no_conflict_of_settings() -> None:
    said = diagnose(1, ["yaml.scanner.ScannerError: mapping values are not allowed here"])
    assert "YAML file can't be read" in said.cause
    assert "CONFIG" in said.remedy


def test_a_tokenizer_that_two_threads_use_is_not_damaged() -> None:
    said = diagnose(1, ["RuntimeError: Already borrowed"])
    assert "whole" not in said.remedy
    assert not said.permanent


@pytest.mark.parametrize(
    ("error", "package"),
    [
        ("ImportError: Using `vptq` quantization requires VPTQ>=0.0.4: `pip install -U vptq`", "vptq"),
        ("ImportError: Loading a GPTQ quantized model requires optimum (`pip install optimum`)", "optimum"),
        ("ValueError: accelerate is required when loading a GGUF file `pip install accelerate`.", "accelerate"),
        ("ImportError: This function needs ray installed: `pip install ray[tune]`", "ray"),
        ("RuntimeError: LayerRepository requires `kernels` to be installed. Run `pip install kernels`.", "kernels"),
    ],
)
def test_a_package_that_is_missing_is_no_conflict_of_settings(error: str, package: str) -> None:
    said = diagnose(1, [error])
    assert package in said.cause
    assert "settings" not in said.cause
    assert "image" in said.remedy


def test_what_is_called_a_memory_error_need_not_be_the_machines() -> None:
    for error in (
        "MemoryError: Did not find any devices to dispatch model to",
        "SessionMemoryError: failed to download memory store 8",
    ):
        assert "machine's memory" not in diagnose(1, [error]).cause
    for error in ("MemoryError", "MemoryError: bad allocation", "numpy._ArrayMemoryError: Unable to allocate 2.0 GiB"):
        assert "machine's memory" in diagnose(1, [error]).cause


def test_what_an_error_asks_for_is_not_put_into_vllms_mouth() -> None:
    said = diagnose(1, ["ValueError: `streamer` goes with one beam. Make sure that `num_beams` is set to 1."])
    assert said.remedy.startswith("The error says: Make sure")


def test_what_a_models_own_code_lacks_is_not_put_down_to_vllm() -> None:
    frame = '  File "/root/modules/transformers_modules/acme/tiny/abc/modeling_tiny.py", line 33, in <module>'
    error = "ImportError: cannot import name 'is_x' from 'transformers.utils.import_utils' (/venv/x.py)"
    assert diagnose(1, ["Traceback (most recent call last):", frame, error]).cause.startswith("The model's own code")
    assert "installed transformers and this vLLM" in diagnose(1, [error]).cause


def test_shared_memory_is_no_disk() -> None:
    error = "RuntimeError: unable to open file </dev/shm/torch_1> in read-write mode: No space left on device (28)"
    assert "shared memory" in diagnose(1, [error]).cause


def test_a_name_that_other_things_have_is_not_the_part_of_that_name() -> None:
    for error, accused in (
        ("RuntimeError: Dynamo etcd lease lost", "torch.compile fails"),
        ("ValueError: TCPConnector is closed", "KV connector"),
        ("RuntimeError: MediaConnector is closed", "KV connector"),
        ("RuntimeError: connection pool is full", "embedding"),
    ):
        assert accused not in diagnose(1, [error]).text
    assert "The KV connector" in diagnose(1, ["ValueError: NixlConnector is closed"]).cause
    assert "torch.compile" in diagnose(1, ["RuntimeError: torch._dynamo gave up"]).cause


def test_a_check_within_that_names_a_setting_is_not_one_of_what_was_set() -> None:
    said = diagnose(1, ["AssertionError: tensor_parallel_size is None"])
    assert "does not take" not in said.cause
    assert "where it is set" in said.remedy
    assert "does not take" in diagnose(1, ["ValueError: max_model_len must be positive"]).cause
