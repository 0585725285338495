"""Each failure of the real vLLM gets its root cause and the variable to change; a log without one gets no rule's."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from supervisor.engine import topics, tracebacks
from supervisor.engine.child import describe_exit
from supervisor.engine.diagnosis import EFFECTS, GONE, RULES, Diagnosis, diagnose, is_effect
from supervisor.engine.topics import OPTIONS, REMEDIES, TOPICS
from supervisor.settings.knobs import KNOBS
from supervisor.vllm import catalogue

LOGS = Path(__file__).parent / "failures"
ROWS = (*RULES, *EFFECTS, *GONE)
KERNEL = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"
OF_TOPICS = {"part", "at", "governs", "named", "elsewhere", "otherwise", "in_use"}
OF_TOPICS |= {"by_name", "instead", "without", "ranks", "fit"}


class Row(NamedTuple):
    """A log file of `failures/`, and what has to be in its diagnosis."""

    log: str
    cause: str
    remedy: str
    permanent: bool = True


# fmt: off
PRODUCED = (
    # The command line
    Row("option-unknown", "does not know the option --max-modle-len", "SUPERVISOR_EXTRA_ARGS"),
    Row("option-value", "--max-num-seqs: invalid int value: 'many'", "MAX_NUM_SEQS"),
    Row("option-choice", "--dtype: invalid choice: 'float8'", "DTYPE"),
    Row("option-json", "--override-generation-config is no JSON: {temperature}", "OVERRIDE_GENERATION_CONFIG"),
    Row("option-range", "gpu_memory_utilization: Input should be less than or equal to 1", "GPU_MEMORY_UTILIZATION"),
    Row("option-combination", "MAX_NUM_BATCHED_TOKENS=16 does not give each of MAX_NUM_SEQS=64", "MAX_NUM_SEQS=16"),
    Row("block-size", "no blocks of 16 tokens (CPU_ATTN: [MultipleOf(32)])", "BLOCK_SIZE"),
    Row("length-above-model", "MAX_MODEL_LEN=8192 is more than the 2048", "MAX_MODEL_LEN=2048"),

    # The model's folder
    Row("model-folder-missing", "no folder /tmp/x/nowhere", "MODEL"),
    Row("config-missing", "no config.json in /tmp/x/no-config", "MODEL"),
    Row("config-damaged", "/tmp/x/bad-config/config.json", "MODEL"),
    Row("architecture-unknown", "architecture 'NoSuchForCausalLM'", "newer image"),
    Row("model-type-unknown", "model type nosuch", "newer image"),
    Row("architecture-and-type-unknown", "model type nosuch", "newer image"),
    Row("model-type-missing", "does not say what type of model it is", "MODEL"),
    Row("quantization-unknown", "quantization nosuch", "QUANTIZATION"),
    Row("weights-missing", "no weights in /tmp/x/no-weights", "LOAD_FORMAT"),
    Row("weights-truncated", "weights is damaged", "downloaded again"),
    Row("weights-header-truncated", "weights is damaged", "downloaded again"),
    Row("weights-empty", "weights is damaged", "downloaded again"),
    Row("weights-lfs-pointer", "Git LFS pointer", "git lfs pull"),  # all that vLLM says is MemoryError
    Row("weights-lfs-pointer-untied", "Git LFS pointer", "git lfs pull"),
    Row("weights-empty-untied", "weights is damaged", "downloaded again"),
    Row("weights-not-pickle", "weights is damaged", "downloaded again"),
    Row("weights-of-another-shape", "do not fit the model's config.json", "MODEL"),
    Row("weights-layers-missing", "do not fit the model's config.json", "MODEL"),
    Row("tokenizer-missing", "tokenizer is missing or damaged", "TOKENIZER"),
    Row("tokenizer-damaged", "tokenizer is missing or damaged", "TOKENIZER"),

    # Memory
    Row("memory-1500m", "no memory left for another thread", "--pids-limit"),  # exit code -6: ZeroMQ aborts
    Row("open-files", "may not open as many files", "--ulimit nofile"),
    Row("memory-12g-kv", "machine's memory was not enough", "VLLM_CPU_KVCACHE_SPACE"),
    Row("memory-3g", "machine's memory was not enough", "VLLM_CPU_KVCACHE_SPACE"),
    Row("kv-cache-too-small", "has room for 1048448 tokens", "MAX_MODEL_LEN=1048448"),
    Row("kv-cache-bytes-too-small", "has room for 3968 tokens", "MAX_MODEL_LEN=3968"),
    Row("kv-cache-none", "no memory left for the KV cache", "GPU_MEMORY_UTILIZATION"),
    Row("kv-cache-utilization", "no memory left for the KV cache", "GPU_MEMORY_UTILIZATION"),
    Row("kv-cache-500g", "500.0 GiB, and the machine has 15.56 GiB", "VLLM_CPU_KVCACHE_SPACE"),

    # The hub
    Row("hub-no-such-model", "no model acme/none on the hub, or it is private", "HF_TOKEN"),
    Row("hub-no-such-model-with-token", "no model acme/none on the hub, or it is private", "HF_TOKEN"),
    Row("hub-gated", "gated, and no token was given", "HF_TOKEN"),
    Row("hub-gated-with-token", "gated, and HF_TOKEN gives no access", "HF_TOKEN"),
    Row("hub-private", "no model acme/private on the hub, or it is private", "HF_TOKEN"),
    Row("hub-token-invalid", "does not know the token", "HF_TOKEN"),
    Row("hub-tokenizer-none", "no model acme/none on the hub", "TOKENIZER"),
    Row("hub-no-config", "no config.json in acme/no-config", "MODEL"),
    Row("hub-no-weights", "no weights in acme/no-weights", "LOAD_FORMAT"),
    Row("hub-offline", "downloads are switched off", "HF_HUB_OFFLINE"),
    Row("hub-down", "could not be reached: Connection refused", "HF_ENDPOINT", permanent=False),
    Row("hub-no-network", "could not be reached: Temporary failure in name resolution", "network", permanent=False),
    Row("hub-error-500", "answers 500 Internal Server Error", "HF_ENDPOINT", permanent=False),
    Row("hub-error-429", "too many requests", "HF_TOKEN", permanent=False),
    Row("hub-no-such-revision", "acme/tiny has no revision v9", "REVISION"),

    # Disks
    Row("disk-full-download", "0.96 MB are free at /tmp/x/hf/hub", "HF_HOME"),
    Row("disk-full-cache", "disk is full", "HF_HOME"),
    Row("disk-read-only", "may not write to /tmp/x/hf/hub", "HF_HOME"),
    Row("shm-64m", "needs 160 MiB of it, and 64 MiB are free", "--shm-size"),  # what Docker gives
    Row("shm-full", "needs 160 MiB of it, and 0 MiB are free", "--shm-size"),

    # The command line against the machine and the model
    Row("heads-fewer-than-ranks", "TENSOR_PARALLEL_SIZE=8 does not divide the model's 4", "divisor of 4"),
    Row("heads-not-divisible", "TENSOR_PARALLEL_SIZE=3 does not divide the model's 4", "divisor of 4"),
    Row("remote-code", "code of its own", "TRUST_REMOTE_CODE=true"),
    Row("load-format-unknown", "no load format nosuch", "LOAD_FORMAT"),
    Row("lora-missing", "adapter x can't be loaded: No adapter found for /tmp/x/no-lora", "LORA_MODULES"),
    Row("chat-template-missing", "no chat template /tmp/x/none.jinja", "CHAT_TEMPLATE"),
    Row("tool-parser-unknown", "no tool parser nosuch", "TOOL_CALL_PARSER"),
    Row("reasoning-parser-unknown", "no reasoning parser nosuch", "REASONING_PARSER"),
    Row("uds-folder-missing", "No such file or directory", "TMPDIR"),
    Row("uds-too-long", "AF_UNIX path too long", "TMPDIR"),
    Row("uds-in-use", "port or socket that vLLM needs is taken", "another vLLM", permanent=False),
    Row("port-in-use", "port or socket that vLLM needs is taken", "another vLLM", permanent=False),

    # Killed
    Row("killed-while-starting", "killed by SIGKILL", "memory", permanent=False),
    Row("killed-while-loading", "killed by SIGKILL", "memory", permanent=False),
    Row("engine-killed-while-loading", "engine process was killed by SIGKILL", "memory", permanent=False),
    Row("engine-killed-when-ready", "the last lines of its log", "memory", permanent=False),  # exit code 0
    Row("engine-segfault-while-loading", "crashed (segmentation fault)", "ENFORCE_EAGER", permanent=False),
    Row("segfault", "crashed (segmentation fault)", "ENFORCE_EAGER", permanent=False),
    Row("bus-error", "SIGBUS", "--shm-size", permanent=False),
    Row("worker-killed-when-ready", "the last lines of its log", "memory", permanent=False),

    # Several machines
    Row("ranks-others-absent", "Only 1/2 ranks came within 1801 s", "MASTER_ADDR and MASTER_PORT", permanent=False),
    Row("ranks-first-silent", "does not answer at 10.78.0.1, port 29599", "MASTER_ADDR", permanent=False),
    Row("ranks-first-absent", "does not answer at 10.78.0.99, port 29501", "MASTER_ADDR", permanent=False),
    Row("ranks-front-end-silent", "Rank 0 does not answer", "DATA_PARALLEL_RPC_PORT", permanent=False),  # exit code 0
    Row("ranks-loopback", "loopback address, 127.0.0.1", "GLOO_SOCKET_IFNAME"),
    Row("ranks-other-died-while-loading", "rank at 10.77.0.2 ended", "Its own log", permanent=False),
    Row("ranks-first-died-while-loading", "rank at 10.77.0.1 ended", "Its own log", permanent=False),
    Row("ranks-other-died", "rank at 10.77.0.2 ended", "Its own log", permanent=False),
    Row("ranks-other-unreachable", "did not answer in time (execute_model)", "network", permanent=False),
    Row("ranks-killed", "engine process was killed by SIGKILL", "memory", permanent=False),  # all that it says
    Row("data-parallel-engine-died", "EngineCore_DP1 died", "dmesg", permanent=False),
    Row("numa-nodes-fewer-than-workers", "fewer NUMA nodes than workers", "VLLM_CPU_OMP_THREADS_BIND=nobind"),
    Row("no-compiler", "there is no C++ compiler", "ENFORCE_EAGER=true"),
    # An H200 (0.32.0 with CUDA 13)
    Row("gpu-tensor-parallel", "more devices than there are", "TENSOR_PARALLEL_SIZE"),
    Row("gpu-data-parallel", "a GPU that is not here", "DATA_PARALLEL_SIZE"),
    Row("gpu-context-parallel", "tp_size=1 must be divisible by dcp_size=2", "DECODE_CONTEXT_PARALLEL_SIZE"),
    Row("gpu-visible-none", "a GPU that is not here", "CUDA_VISIBLE_DEVICES"),
    Row("gpu-visible-ordinal", "CUDA_VISIBLE_DEVICES names a GPU that is not here", "nvidia-smi -L"),
    Row("gpu-visible-words", "CUDA_VISIBLE_DEVICES=all names no GPU that is here", "nvidia-smi -L"),
    Row("gpu-visible-uuid", "CUDA_VISIBLE_DEVICES=GPU-00000000-", "nvidia-smi -L"),
    Row("gpu-utilization-taken", "less is free (70.31 of 139.8 GiB)", "below 70.31 / 139.8", permanent=False),
    Row("gpu-memory-given-back", "gave back GPU memory while", "other processes", permanent=False),
    Row("gpu-model-too-large", "not enough for the weights alone", "TENSOR_PARALLEL_SIZE"),
    Row("gpu-kv-bytes-nearly-all", "not enough for the KV cache", "KV_CACHE_MEMORY_BYTES"),
    Row("gpu-max-num-seqs", "no memory left for the KV cache", "MAX_NUM_SEQS"),
    Row("gpu-memory-goes-while-serving", "GPU's memory was not enough", "another process holds"),  # exit code 0
    Row("gpu-open-files", "it is busy, or in exclusive mode", "ulimit -n", permanent=False),  # a limit of 64
    Row("gpu-backend-mla", "ATTENTION_BACKEND=FLASHMLA can't be used here", "Unset ATTENTION_BACKEND"),
    Row("gpu-kv-fp8-e5m2", "FP8 KV cache requires FA3 on SM90", "Unset ATTENTION_BACKEND"),
    Row("gpu-kv-fp8-ds", "No attention backend can do", "Unset KV_CACHE_DTYPE"),
    Row("gpu-kv-nvfp4", "No attention backend can do", "Unset KV_CACHE_DTYPE"),
    Row("gpu-moe-deep-gemm", "MOE_BACKEND=deep_gemm is not to be had", "Unset MOE_BACKEND"),
    Row("gpu-moe-flashinfer-trtllm", "FlashInfer can't do", "MOE_BACKEND set: leave that out first"),
    Row("gpu-eplb", "enable_expert_parallel must be True", "ENABLE_EXPERT_PARALLEL=true"),
    Row("gpu-dbo", "Microbatching currently only supports", "ALL2ALL_BACKEND"),
    Row("gpu-fp8-block", "AssertionError), in /venv/vllm/model_executor/layers/quantization/compressed_tensors/"
        "triton_scaled_mm.py:201", "quantized otherwise"),
    Row("gpu-gptq-odd", "does not divide", "quantized otherwise"),
    Row("gpu-gptq-bits", "bits=5", "quantized otherwise"),
    Row("gpu-awq-odd", "does not divide", "quantized otherwise"),
    Row("gpu-quant-torchao", "QUANTIZATION is set to a method (TorchAO)", "Unset QUANTIZATION"),
    Row("gpu-head-size-odd", "size of tensor a (40) must match the size of tensor b (41)", "HF_OVERRIDES"),
    Row("gpu-vocab-small", "A check within a kernel failed", "TOKENIZER", permanent=False),  # exit code 0
    Row("gpu-speculative-missing", "which SPECULATIVE_CONFIG names as its draft", "Correct model in"),
    Row("gpu-speculative-eagle", "mat1 and mat2 shapes", "Leave SPECULATIVE_CONFIG out"),
    Row("gpu-speculative-vocab", "vocabulary (151936 tokens) than the model (1024)", "draft of the same family"),
    Row("gpu-no-nvcc-flashinfer", "this image has no nvcc", "ATTENTION_BACKEND"),
    Row("gpu-gloo", "Unable to find address for: nope0", "GLOO_SOCKET_IFNAME"),
    Row("gpu-triton-cache-unwritable", "folder for Triton's kernels can't be made: /proc/nope", "TRITON_CACHE_DIR"),
    Row("gpu-cache-full", "disk is full", "VLLM_CACHE_ROOT"),
    Row("gpu-target-device-cpu", "runs as on a CPU", "Unset VLLM_TARGET_DEVICE"),
    Row("gpu-attention-gptoss-flashinfer", "attention sinks not supported", "Unset ATTENTION_BACKEND"),
    Row("gpu-attention-heads-groups", "6 heads of attention", "num_key_value_heads"),
    Row("gpu-attention-mla-flash-attn", "MLA not supported", "Unset ATTENTION_BACKEND"),
    Row("gpu-compile-backend", "torch.compile fails", "COMPILATION_CONFIG set: leave that out first"),
    Row("gpu-compile-inductor-option", "max_autotune_everything", "COMPILATION_CONFIG set: leave that out first"),
    Row("gpu-env-alloc-conf", "a key that torch does not know: max_split_size", "max_split_size_mb"),
    Row("gpu-env-scheduler-cls", "A setting names a module", "SCHEDULER_CLS"),
    Row("gpu-kv-expandable", "expandable_segments:True does not go with", "Unset PYTORCH_CUDA_ALLOC_CONF"),
    Row("gpu-kv-module-path", "A setting names a module", "kv_connector_module_path"),
    Row("gpu-kv-multi-empty", "multi_connector.py", "KV_TRANSFER_CONFIG"),
    Row("gpu-kv-nixl-missing", "NIXL", "KV_TRANSFER_CONFIG"),
    Row("gpu-kv-unknown", "no KV connector SharedStorageConnector", "kv_connector in KV_TRANSFER_CONFIG"),
    Row("gpu-lora-modules", "parts that this vLLM can't adapt", "Merge the adapter"),
    Row("gpu-lora-nothing-matches", "No part of this model takes an adapter", "LORA_TARGET_MODULES"),
    Row("gpu-lora-other-base", "(256) must match the size of tensor b (512)", "LORA_MODULES"),
    Row("gpu-mm-llava-token", "no place for the image", "TOKENIZER"),
    Row("gpu-mm-mrope-section", "mrope_section", "rope_parameters"),
    Row("gpu-mm-qwenvl-processor", "processor for pictures", "preprocessor_config.json"),
    Row("gpu-mm-unchunked", "16384 tokens", "MAX_NUM_BATCHED_TOKENS=16384"),
    Row("gpu-mm-vision-heads", "128 is not divisible by 3 (vLLM's code for this model)", "MM_ENCODER_TP_MODE"),
    Row("gpu-moe-fp8-block-odd", "triton_scaled_mm.py", "quantized otherwise"),
    Row("gpu-moe-gptoss-backend", "can't run this model on this GPU", "Unset MOE_BACKEND"),
    Row("gpu-moe-more-experts", "do not fit the model's config.json", "another repository"),
    Row("gpu-pool-bert-relative", "code for this model fails: ValueError: Only 'abs", "MODEL_IMPL=transformers"),
    Row("gpu-pool-bert-too-long", "A check within a kernel failed", "VLLM_ALLOW_LONG_MAX_MODEL_LEN", permanent=False),
    Row("gpu-pool-reranker-tokens", "does not know one of the two words", "classifier_from_token"),
    Row("gpu-quant-ct-kv4", "num_bits=4", "kv_cache_scheme"),
    Row("gpu-quant-ct-w4afp8-group", "group quantization with group size 128", "quantized otherwise"),
    Row("gpu-quant-nvfp4-odd", "is not multiple of 16", "Where it is a number of heads"),  # and no KV_CACHE_DTYPE
    Row("gpu-spec-draft-no-weights", "no weights in /tmp/x/draft-no-weights", "a draft's that SPECULATIVE"),
    Row("gpu-spec-eagle3-mamba", "hands out no inner states", "another method in SPECULATIVE_CONFIG"),
    Row("gpu-spec-pard-mask", "not made for drafting several tokens at once", "parallel_drafting"),
    Row("gpu-state-bamba-gone", "transformers' own code", "newer image"),
    Row("gpu-state-connector-hybrid", "of several kinds", "KV_TRANSFER_CONFIG"),
    Row("gpu-state-flashinfer-ssu", "could not be built", "unset MAMBA_BACKEND"),
    Row("gpu-state-key-dim", "Triton can't compile a kernel", "newer image"),
    Row("gpu-state-key-heads", "is invalid for input of size", "HF_OVERRIDES"),
    Row("gpu-state-lora-mamba", "assert not is_lora_enabled", "unset ENABLE_LORA"),
    Row("gpu-state-max-num-seqs", "the states of 30 sequences", "MAX_NUM_SEQS=30"),
    Row("gpu-tok-reasoning-tokens", "A parser of the answers", "REASONING_PARSER"),
    Row("gpu-tok-sentencepiece", "git-lfs", "tokenizer files are whole"),
    Row("gpu-weights-index", "model-00002-of-00002.safetensors", "downloaded again"),
    Row("gpu-weights-lora-left", "no attribute `lora_A`", "merge the adapter"),
    Row("gpu-weights-prefix", "holds a LoRA adapter", "LORA_MODULES"),
    Row("gpu-weights-vocab", "do not fit the model's config.json", "another repository"),
    Row("gpu-args-removed", "--disable-log-requests --swap-space 4", "Instead of --swap-space: nothing to set"),
    Row("gpu-args-unchunked-batch", "less than the model's length of 2048", "ENABLE_CHUNKED_PREFILL=true"),
    Row("gpu-attention-cutlass-mla", "compute capability not supported", "Unset ATTENTION_BACKEND"),
    Row("gpu-attention-mla-float32", "computes in float32", "Set DTYPE=bfloat16"),
    Row("gpu-attention-xformers", "does not know: Unknown attention backend: 'XFORMERS'", "XFORMERS and those"),
    Row("gpu-code-old-import", "is_torch_fx_available", "unset TRUST_REMOTE_CODE"),
    Row("gpu-compile-level", "of another version: level use_inductor", '"mode": 3'),
    Row("gpu-driver-no-nvml", "sees no GPU", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"),
    Row("gpu-driver-symbol", "has no cuTensorMapEncodeTiled", "/usr/local/cuda/compat"),
    Row("gpu-env-port-uri", "a URI (tcp://10.43.7.19:8000)", "enableServiceLinks: false"),
    Row("gpu-files-no-home", "no home folder", "Set HOME"),
    Row("gpu-files-template-path", "no chat template ./template_llama3_tools.jinja", "whole path in the container"),
    Row("gpu-gguf-file", "model-Q4_K_M.gguf is a GGUF file", "safetensors repository"),
    Row("gpu-install-cubin-version", "flashinfer-cubin version (0.2.14)", "at the same version"),
    Row("gpu-install-shadow-logging", "Python's own module logging", "PYTHONPATH"),
    Row("gpu-install-source-folder", "imported from /tmp/x/vllm", "Take /tmp/x out of PYTHONPATH"),
    Row("gpu-limits-address-space", "may not map more addresses", "ulimit -v unlimited"),
    Row("gpu-limits-threads", "any more threads", "--pids-limit"),
    Row("gpu-lora-ia3", "self_attn.k_proj.ia3_l", "Merge the adapter"),
    Row("gpu-lora-modules-to-save", "Unsupported modules_to_save", "Merge the adapter"),
    Row("gpu-mem-context-too-long", "room for 108720 tokens", "MAX_MODEL_LEN=108720"),
    Row("gpu-mem-prompt-logprobs", "prompt_logprobs", "Lower GPU_MEMORY_UTILIZATION", permanent=False),  # exit code 0
    Row("gpu-mem-sampler-warmup", "tables of the sampler (256.00 GiB", "Lower MAX_NUM_SEQS"),
    Row("gpu-mm-mel", "expected input[1, 128, 3000] to have 80 channels", "num_mel_bins"),
    Row("gpu-mm-patch", "shape '[65536, -1, 2, 16, 16]'", "Mostly preprocessor_config.json"),
    Row("gpu-mm-processor-class", "processor for pictures", "preprocessor_config.json"),
    Row("gpu-package-runai", "lacks the Python package runai_model_streamer", "Leave LOAD_FORMAT"),
    Row("gpu-parsers-plugin-old", "no module vllm.entrypoints.openai.tool_parsers", "TOOL_PARSER_PLUGIN"),
    Row("gpu-pool-st-dense", "takes 768 numbers, and the model gives 256", "modules.json"),
    Row("gpu-quant-mismatch", "QUANTIZATION=awq is asked for", "Unset QUANTIZATION"),
    Row("gpu-request-logit-bias", "it had 1500 logit bias tokens", "VLLM_USE_V2_MODEL_RUNNER=0", permanent=False),
    Row("gpu-rope-yarn-overrides", "more than the 2048", "needs max_position_embeddings (8192)"),
    Row("gpu-saved-bnb-no-config", "quantized and packed", "in 16 bits"),
    Row("gpu-saved-fp8-no-config", "no quantization_config", "Take config.json with its quantization_config"),
    Row("gpu-sched-async-ngram", "ASYNC_SCHEDULING is asked for", "Unset ASYNC_SCHEDULING"),
    Row("gpu-spec-mtp-divisible", "3, is no multiple of it", "num_speculative_tokens"),
    Row("gpu-tok-newer", "in a format that this image can't read", "newer image"),
    Row("gpu-weights-shape-intermediate", "(768) exceeds dimension size (512)", "files of MODEL belong together"),
    Row("gpu-yaml-unknown-key", "--tensor-paralel-size 1", "the file that CONFIG or --config names"),
)

# A CPU can't produce these: lines from public issues of vLLM, or of the libraries below it.
QUOTED = (
    # vllm#16343
    Row("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 350.00 MiB. GPU 0 has a total capacity of "
        "23.68 GiB of which 212.81 MiB is free.", "GPU's memory was not enough", "MAX_MODEL_LEN"),
    # vllm#17939
    Row("RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy requests. Please try "
        "lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.", "256 sequences",
        "MAX_NUM_SEQS"),
    # vllm#20305
    Row("ValueError: Free memory on device (31.44/47.38 GiB) on startup is less than desired GPU memory utilization "
        "(0.95, 45.01 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "Something else holds", "GPU_MEMORY_UTILIZATION", permanent=False),
    # vllm#2418, as older versions said it
    Row("ValueError: The model's max seq len (4096) is larger than the maximum number of tokens that can be stored in "
        "KV cache (3664). Try increasing `gpu_memory_utilization` or decreasing `max_model_len`.",
        "one request of 4096 tokens", "MAX_MODEL_LEN"),
    # vllm#27508
    Row("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
        "initializing the engine.", "no memory left for the KV cache", "GPU_MEMORY_UTILIZATION"),
    # FunASR#2973
    Row("RuntimeError: The NVIDIA driver on your system is too old (found version 12080). Please update your GPU",
        "driver is too old", "newer driver"),
    # gpustack#1254, gpustack#2691
    Row("RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
        "NumCudaDevices() that might have already set an error? Error 804: forward compatibility was attempted on non "
        "supported HW", "driver is too old", "newer driver"),
    # huggingface_hub 2.4, without vLLM, against the stand-in hub with --cut
    Row("httpx2.RemoteProtocolError: peer closed connection without sending complete message body (received 700000 "
        "bytes, expected 1841368)", "broke off", "HF_ENDPOINT", permanent=False),
    # requests' own words, of older images
    Row("requests.exceptions.ReadTimeout: (ReadTimeoutError(\"HTTPSConnectionPool(host='hub.example', port=443): Read "
        "timed out. (read timeout=10)\"))", "could not be reached", "HF_ENDPOINT", permanent=False),
    # MiniMax-M2.5#9
    Row("RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
        "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized",
        "fabric manager", "another machine", permanent=False),
    # vllm#14452
    Row("RuntimeError: CUDA error: no kernel image is available for execution on the device", "no code for this GPU",
        "another image"),
    # vllm#12847, kinetic#269, OpenLLM#746
    Row("RuntimeError: Failed to infer device type", "sees no GPU", "--gpus all"),
    Row("RuntimeError: Device string must not be empty", "sees no GPU", "--gpus all"),
    Row("RuntimeError: Found no NVIDIA driver on your system.", "sees no GPU", "CUDA_VISIBLE_DEVICES"),
    # Seen on an H200, vLLM 0.24.0
    Row("vllm.third_party.pynvml.NVMLError_InvalidArgument: Invalid Argument", "names a GPU", "nvidia-smi -L"),
    # vllm#1157
    Row("ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has "
        "compute capability 7.5.", "bfloat16", "DTYPE=half"),
    # vllm#4327
    Row("ValueError: The quantization method fp8 is not supported for the current GPU. Minimum capability: 90. Current "
        "capability: 86.", "quantization, fp8", "MODEL"),
    # vllm's config/parallel.py, vllm#28873, Skills#1059, vllm#15217
    Row("  Value error, World size (8) is larger than the number of available GPUs (2) in this node.", "more devices",
        "TENSOR_PARALLEL_SIZE"),
    Row("AssertionError: local_world_size (16) must be less than or equal to the number of visible devices (8).",
        "more devices", "TENSOR_PARALLEL_SIZE"),
    Row("Value error, Tensor parallel size (16) cannot be larger than the number of available GPUs (8)", "more devices",
        "TENSOR_PARALLEL_SIZE"),
    Row("RuntimeError: please ensure that world_size (2) is less than than max local gpu count (1)", "more devices",
        "TENSOR_PARALLEL_SIZE"),
    # MiniMax-01#42, and the same without NCCL's own line
    Row("torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:268, unhandled system error\n"
        "NCCL WARN Error while creating shared memory segment /dev/shm/nccl-xxxxx (size 7340384)", "/dev/shm",
        "--shm-size"),
    Row("torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:268, unhandled system error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.21.5", "NCCL", "NCCL_DEBUG=INFO", permanent=False),
    # vllm#5645
    Row("terminate called after throwing an instance of 'std::system_error'\n  what():  Resource temporarily "
        "unavailable",
        "no memory left for another thread", "--pids-limit"),
    # what vLLM says of whatever signal it was
    Row("RuntimeError: Engine core initialization failed. Failed core proc(s): {'EngineCore': -4}",
        "processor lacks instructions", "built for this kind of processor"),
    Row("RuntimeError: Engine core initialization failed. Failed core proc(s): {'EngineCore': -11}",
        "crashed (signal 11)", "newer image", permanent=False),
    # ranks-loopback's own line, with an address that is not loopback
    Row("RuntimeError: Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:152] timed out connecting: "
        "SO_ERROR: Connection refused, remote=[10.77.0.1]:28081$1", "rank at 10.77.0.1 does not answer", "all ports",
        permanent=False),
    # torch.compile's own, on a tmpfs as Docker mounts one
    Row("torch._inductor.exc.InductorError: OSError: /tmp/x/inductor/5o/c5oi2d.main.so: failed to map segment from "
        "shared object.  The most common reason this may occur is if the /tmp/x folder is mounted with noexec (e.g., "
        "by default Docker mounts tmp file systems as noexec).", "/tmp/x/inductor/5o/c5oi2d.main.so can't be loaded",
        "--tmpfs /tmp:exec"),
    # glibc's, of a module that Triton made
    Row("ImportError: /tmp/x/triton/F4/cuda_utils.so: failed to map segment from shared object: Operation not "
        "permitted", "mounted noexec", "TMPDIR"),
    # torch's own, where the store or one of the ranks is gone while they gather
    Row("torch.distributed.DistNetworkError: failed to recv, got 0 bytes", "did not come together: failed to recv",
        "MASTER_ADDR", permanent=False),
    Row("torch.distributed.DistStoreError: wait timeout after 600000ms, keys: /default_pg/0//worker_count",
        "did not come together: wait timeout", "all ports", permanent=False),
    # vllm#28028
    Row("torch.AcceleratorError: CUDA error: an illegal memory access was encountered", "illegal memory access",
        "another machine", permanent=False),
)
# fmt: on


def read(log: str) -> tuple[int, list[str]]:
    """The exit code and the lines."""
    first, *lines = (LOGS / f"{log}.log").read_text().splitlines()
    return int(first.removeprefix("# exit ")), lines


@pytest.mark.parametrize("row", PRODUCED, ids=lambda row: row.log)
def test_a_failure_of_the_real_vllm(row: Row) -> None:
    diagnosis = diagnose(*read(row.log))
    assert row.cause in diagnosis.cause
    assert row.remedy in diagnosis.remedy
    assert diagnosis.permanent is row.permanent
    assert not is_effect(diagnosis.cause)


@pytest.mark.parametrize("row", QUOTED, ids=lambda row: row.log[:60])
def test_a_failure_that_others_reported(row: Row) -> None:
    follow_up = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
    diagnosis = diagnose(1, [*row.log.splitlines(), follow_up])
    assert row.cause in diagnosis.cause
    assert row.remedy in diagnosis.remedy
    assert diagnosis.permanent is row.permanent


def test_every_log_is_in_the_table() -> None:
    assert {row.log for row in PRODUCED} | set(CLEAN) == {path.stem for path in LOGS.glob("*.log")}


# What stands before a failure in a log: the last that a start says.
STARTED = read("clean-stop")[1][15:25]


class Tail(NamedTuple):
    """The lines that tell in a log that others reported: what its diagnosis has to say, by key words."""

    source: str
    exit_code: int
    lines: list[str]
    cause: list[str]
    remedy: list[str]
    permanent: bool
    first: str = ""  # what the table made of it when it was drawn: failures/README.md

    def faults(self) -> list[str]:
        """What it should say and does not."""
        said = diagnose(self.exit_code, [*STARTED, *self.lines])
        lost = [word for word in self.cause if word.lower() not in said.cause.lower()]
        lost += [word for word in self.remedy if word.lower() not in said.remedy.lower()]
        lost += [] if said.permanent is self.permanent else ["permanent"]
        return [f"{self.source}: {lost}: {said.text}"] if lost else []


@pytest.mark.parametrize("file", sorted(LOGS.glob("*.json")), ids=lambda file: file.stem)
def test_failures_whose_logs_others_published(file: Path) -> None:
    tails = [Tail(**row) for row in json.loads(file.read_text())]
    assert [fault for tail in tails for fault in tail.faults()] == []


# The table


def test_no_pattern_has_a_backslash_too_many() -> None:
    """TOML's literal strings take them as they are: `\\\\d` would be a backslash and a d, and match nothing."""
    assert [rule.pattern for rule in ROWS if re.search(r"(?<!\\)\\\\[bdsw]", rule.pattern)] == []


def test_a_module_that_vllms_own_code_lacks_is_named_by_no_setting() -> None:
    log = [
        "Traceback (most recent call last):",
        '  File "/venv/vllm/utils/import_utils.py", line 122, in resolve_obj_by_qualname',
        '  File "/usr/lib/python3.12/importlib/__init__.py", line 90, in import_module',
        '  File "/venv/vllm/v1/worker/tpu_worker.py", line 9, in <module>',
        "ModuleNotFoundError: No module named 'acme_chips'",
    ]
    assert diagnose(1, log).cause == "This image lacks the Python package acme_chips."
    assert diagnose(1, [*log[:3], *log[4:]]).cause.startswith("A setting names a module of Python's")


def test_every_row_is_the_one_for_its_example() -> None:
    """Or it would stand behind one that takes its lines away. What is said after it changes nothing."""
    after = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
    hidden = []
    for rule in ROWS:
        lines = rule.example.strip("\n").splitlines()
        for log in (lines, [*lines, after] if rule not in GONE else lines):
            failure = tracebacks.read(log, is_effect)
            first = next((row for row in ROWS if row.regex.search(getattr(failure, row.where) or "")), None)
            hidden += [f"{rule.cause}: {first and first.cause}"] if first is not rule else []
    assert hidden == []


def test_no_row_is_there_twice() -> None:
    assert len({row.pattern for row in ROWS}) == len(ROWS)


def test_a_row_names_only_groups_that_its_pattern_has() -> None:
    for row in ROWS:
        groups = set(row.regex.groupindex) | set(REMEDIES) | OF_TOPICS
        named = {name.lower() for name in re.findall(r"\{(\w+)\}", row.cause + row.remedy)}
        assert named <= groups, row.cause


def test_no_pattern_runs_over_a_whole_log() -> None:
    """What repeats is bounded, or a log of 250,000 characters costs minutes. `[^\\n]+` ends with its line."""
    for pattern in (*(row.pattern for row in ROWS), *(p for topic in TOPICS for p in (topic.words, topic.path))):
        assert not re.search(r"(?<![\\\w-])\.[*+](?![^\[]*\])", pattern), pattern


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.part)
def test_every_topic_is_the_one_for_its_example(topic: topics.Topic) -> None:
    """An error, or the frame where an error was raised that says nothing."""
    lines = [topic.example, "AssertionError"] if "File" in topic.example else [topic.example]
    failure = tracebacks.read([*("Traceback (most recent call last):",), *lines], is_effect)
    assert topics.find_topic(failure) is topic


def test_what_an_error_is_about_says_what_to_change() -> None:
    """The kind of error gives the words, its place the settings."""
    frame = '  File "/venv/vllm/v1/attention/backends/mla/common.py", line 99, in forward'
    lines = [f"{ROOT}{line}" for line in ("Traceback (most recent call last):", frame, "AssertionError: odd")]
    assert "The attention fails: AssertionError: odd" in diagnose(1, lines).cause
    assert "ATTENTION_BACKEND" in diagnose(1, lines).remedy
    assert "LORA_MODULES" in diagnose(1, [*lines[:-1], f"{ROOT}ValueError: no LoRA here"]).remedy
    assert "ATTENTION_BACKEND" in diagnose(1, [*lines[:-1], f"{ROOT}Odd: of no known class"]).remedy


def test_what_a_dying_engine_shows_of_its_settings_is_to_be_left_out_first() -> None:
    dump = (
        "Dumping input data for V1 LLM engine (v0.11.0) with config: model='m', speculative_config=SpeculativeConfig("
    )
    lines = [f"{ROOT}{dump}method='mtp'), kv_cache_dtype=auto, quantization=None,", f"{ROOT}{KERNEL}"]
    assert "The log shows SPECULATIVE_CONFIG set" in diagnose(1, lines).remedy
    assert "log shows" not in diagnose(1, lines[1:]).remedy


def test_what_vllm_says_of_its_settings_at_the_start_is_to_be_left_out_first() -> None:
    """Those alone that can be why: the attention's, where the attention fails."""
    said = (
        "(APIServer pid=1) INFO 11-28 19:00:00 [utils.py:1] non-default args: {'model': 'm', 'kv_cache_dtype': 'fp8', "
    )
    lines = [said + "'speculative_config': {'method': 'mtp'}, 'enable_lora': False, 'max_loras': None}"]
    assert (
        "The log shows KV_CACHE_DTYPE, SPECULATIVE_CONFIG set"
        in diagnose(1, [*lines, "RuntimeError: odd attention"]).remedy
    )
    assert "log shows" not in diagnose(1, [*lines, "RuntimeError: no LoRA"]).remedy
    assert "log shows" not in diagnose(1, ["RuntimeError: odd attention"]).remedy


def test_what_is_around_every_call_is_not_what_an_error_is_about() -> None:
    """vLLM 0.17 and later trace and compile whatever is called."""
    around = (
        "tracing/otel.py:sync_wrapper",
        "compilation/decorators.py:__init__",
        "model_executor/offloader/base.py:wrap_modules",
    )
    frames = [f'  File "/venv/vllm/{path}", line 9, in {name}' for path, name in (place.split(":") for place in around)]
    model = '  File "/venv/vllm/model_executor/models/qwen2.py", line 9, in __init__'
    lines = ["Traceback (most recent call last):", *frames, model, "RuntimeError: odd"]
    assert diagnose(1, lines).cause == "vLLM's code for this model fails: RuntimeError: odd."


def test_other_machines_are_asked_for_where_there_are_some() -> None:
    few = "torch.distributed.DistStoreError: Timed out after 601 seconds waiting for clients. 1/8 clients joined."
    said = "(APIServer pid=1) INFO 11-28 19:00:00 [utils.py:1] non-default args: {'model': 'm', "
    assert diagnose(1, [said + "'nnodes': 2}", few]).remedy.startswith("Start the other machines")
    here = "(EngineCore pid=1) INFO 11-28 19:00:00 [x.py:1] with config: x, distributed_init_method=tcp://127.0.0.1:5"
    assert diagnose(1, [here, few]).remedy.startswith("All of them are on this machine")
    assert diagnose(1, [few]).remedy.startswith("On one machine")


def test_a_traceback_whose_head_is_gone_says_where_it_was() -> None:
    frame = '  File "/venv/vllm/v1/attention/backends/mla/common.py", line 99, in forward'
    assert "The attention fails" in diagnose(1, [frame, "RuntimeError: odd"]).cause
    destructor = ["Exception ignored in: <function X.__del__>", "Traceback (most recent call last):"]
    assert diagnose(1, [*traceback("Odd: first", ""), *destructor, frame, "RuntimeError: x"]).cause == "Odd: first"


def test_what_docker_and_journald_put_before_a_line_is_not_looked_at() -> None:
    stamps = (
        "2026-03-11T17:57:10.976518836Z ",
        "2026-03-11T17:57:10+01:00 ",
        "2026-04-19 12:59:20.215 | ",
        "qwen3.5-4b  | ",
        "Aug 17 18:42:18 host vllm[8052]: ",
        "[pod/vllm-0/vllm] ",
    )
    for stamp in stamps:
        assert diagnose(1, [stamp + line for line in (*traceback("Odd: last"), FAILED + "{}")]).cause == "Odd: last"
        assert diagnose(1, [f"{stamp} INFO lib: RuntimeError: x"]).cause == "Its log does not say why."


def test_settings_that_an_error_names_are_named() -> None:
    error = "RuntimeError: chunked prefill, VLLM_USE_X=1, CUDA_ERROR_X, /a/mm_processor_kwargs.py, prefix-caching"
    named = topics.find_named(tracebacks.read([error], is_effect))
    assert named == ["VLLM_USE_X", "ENABLE_CHUNKED_PREFILL", "ENABLE_PREFIX_CACHING"]
    assert "Look at VLLM_USE_X, ENABLE_CHUNKED_PREFILL" in diagnose(1, [error]).remedy


CLEAN = ("clean-stop",)


@pytest.mark.parametrize("log", CLEAN)
def test_a_log_without_a_failure_is_blamed_on_nothing(log: str) -> None:
    code, lines = read(log)
    assert code == 0
    for end in range(len(lines) + 1):
        diagnosis = diagnose(0, lines[:end])
        assert diagnosis.cause in ("Its log does not say why.", "It was told to stop (SIGTERM), and not by us.")
        assert (diagnosis.remedy, diagnosis.permanent) == ("", False)
    assert "told to stop" in diagnosis.cause


def test_remedies_name_variables_that_exist() -> None:
    options = catalogue.parse((catalogue.FLAGS / "0.32.0.json").read_text())
    known = {knob.variable for knob in KNOBS} | {option.variable for option in options.by_key.values()}
    known |= options.environment  # vLLM's own VLLM_*
    known |= {
        "MODEL",
        "TMPDIR",
        "USER",
        "LOGNAME",
        "MAX_JOBS",
        "OMP_NUM_THREADS",
        "XDG_CACHE_HOME",
        "OUTLINES_CACHE_DIR",
    }
    known |= {"HF_TOKEN", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_HUB_DISABLE_XET"}
    known |= {
        "HF_HUB_ENABLE_HF_TRANSFER",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "NO_PROXY",
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
    }
    known |= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "GOOGLE_APPLICATION_CREDENTIALS"}
    known |= {"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "LIBRARY_PATH", "CUDA_HOME"}
    known |= {"NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_P2P_DISABLE", "NCCL_NVLS_ENABLE"}
    known |= {
        "FLASHINFER_DISABLE_VERSION_CHECK",
        "HF_MODULES_CACHE",
        "TRITON_CACHE_DIR",
        "FLASH_ATTN",
        "TRITON_ATTN",
    }  # the last two: values
    assert set(OPTIONS) <= known
    known |= {"VLLM_USE_V1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES", "HIP_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION"}
    known |= {"CCL_ATL_TRANSPORT", "CCL_LOG_LEVEL", "CCL_ZE_IPC_EXCHANGE"}
    known |= {"HCCL_IF_IP", "HCCL_SOCKET_IFNAME", "TRITON_LIBCUDA_PATH"}
    known |= {"FLEX_ATTENTION", "TORCH_SDPA", "IPC_LOCK", "SYS_PTRACE", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"}
    known |= {
        "LMCACHE_CONFIG_FILE",
        "LMCACHE_ENABLE_BLENDING",
        "NIXL_PLUGIN_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "VLLM_ATTENTION_BACKEND",
    }
    known |= {
        "LD_PRELOAD",
        "PYTHONPATH",
        "ASCEND_RT_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "TPU_WORKER_HOSTNAMES",
        "TPU_WORKER_ID",
        "ALL_PROXY",
        "AWS_REGION",
        "NUMBA_CACHE_DIR",
        "RUNAI_STREAMER_LOG_TO_STDERR",
    }
    known |= {"NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_CUMEM_ENABLE", "NCCL_CUMEM_HOST_ENABLE"}
    known |= {"TRITON_MLA", "TIKTOKEN_ENCODINGS_BASE", "TIKTOKEN_RS_CACHE_DIR"}
    known |= {"PYTORCH_CUDA_ALLOC_CONF", "TRITON_PTXAS_PATH", "RAY_ADDRESS", "UCX_TLS", "UCX_NET_DEVICES", "SYS_NICE"}
    known |= {"FLASHINFER_WORKSPACE_BASE", "FLASHINFER_CUBIN_DIR", "MOONCAKE_CONFIG_PATH"}
    known |= {"PYTHONHASHSEED", "EP_DISABLE_GIN", "TORCHDYNAMO_DISABLE", "RAYON_NUM_THREADS"}
    known |= {"NEURON_COMPILE_CACHE_URL", "NVIDIA_DRIVER_CAPABILITIES"}
    known |= {"NCCL_IB_GID_INDEX", "NCCL_IB_TIMEOUT", "NCCL_IB_RETRY_CNT", "NCCL_NET_GDR_LEVEL", "NET_BIND_SERVICE"}
    told = [*(row.remedy for row in ROWS), *(topic.remedy for topic in TOPICS)]
    named = {name for text in told for name in re.findall(r"(?<![{\w])[A-Z]+(?:_[A-Z\d]+)+(?![}\w*])", text)}
    named |= {name for topic in TOPICS for name in topic.suspects}
    assert named - known == set()
    assert {"MAX_MODEL_LEN", "HF_TOKEN"} < named


# What no row knows


ROOT = "(EngineCore pid=7) ERROR 11-28 19:00:00 [core.py:1] "
FAILED = (
    "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): "
)


def traceback(error: str, who: str = ROOT) -> list[str]:
    """As vLLM logs it, with the last frame in its own weight loader, and source that tells nothing."""
    frame = '  File "/usr/lib/python3.12/dist-packages/vllm/x/layer.py", line 99, in forward'
    return [f"{who}{line}" for line in ("Traceback (most recent call last):", frame, "    assert x", error)]


@pytest.mark.parametrize("code", ["{}", "{'EngineCore': 1}"])
@pytest.mark.parametrize(
    "error",
    ["torch._C.Unnamed: x", "lib.errors.NoSuchThing: a text", "subprocess.TimeoutExpired: Command '['x']' timed out",
     "CacheMissing: none", "Fault: of any name"],
)  # fmt: skip
def test_an_error_is_the_cause_whatever_it_is_called(error: str, code: str) -> None:
    """It used to be `SomethingError: text` or nothing; then memory was blamed, and it was tried five times again."""
    diagnosis = diagnose(1, [*traceback(error), FAILED + code])
    assert error.partition(":")[0] in diagnosis.cause
    assert "memory" not in diagnosis.cause
    assert (diagnosis.permanent, diagnosis.known) == (True, False)


@pytest.mark.parametrize("error", ["AssertionError", "NotImplementedError", "AssertionError: "])
def test_an_error_without_words_is_told_with_its_place(error: str) -> None:
    diagnosis = diagnose(1, [*traceback(error), FAILED + "{}"])
    assert diagnosis.cause == f"vLLM failed an internal check ({error.rstrip(': ')}) in vllm/x/layer.py:99."
    assert diagnosis.permanent


def test_the_last_error_of_a_chain_is_the_cause() -> None:
    chain = [f"{ROOT}The above exception was the direct cause of the following exception:", ROOT]
    lines = [*traceback("KeyError: 'inner'"), *chain, *traceback("Odd: outer"), FAILED + "{}"]
    assert diagnose(1, lines).cause == "Odd: outer"
    lines = [*traceback("torch.OutOfMemoryError: CUDA out of memory."), *chain, *traceback("Odd: outer")]
    assert diagnose(1, lines).cause == "The GPU's memory was not enough."


def test_an_earlier_error_that_was_dealt_with_is_not_the_cause() -> None:
    """Neither by its own row: what was tried again, and what another process went on after."""
    retried = ["requests.exceptions.ReadTimeout: (ReadTimeoutError) thrown while requesting HEAD, retrying in 1 s"]
    caught = traceback("OSError: [Errno 98] Address already in use")
    assert diagnose(1, [*retried, *caught, *traceback("Odd: last"), FAILED + "{}"]).cause == "Odd: last"


def test_what_a_client_did_wrong_is_not_why_the_engine_ended() -> None:
    who = "(APIServer pid=1) ERROR 11-28 19:00:00 [x.py:1] "
    lines = [
        *traceback("ValueError: MemoryError, No space left on device, says the prompt", who),
        '(APIServer pid=1) INFO:     127.0.0.1:4242 - "POST /v1/chat/completions HTTP/1.1" 500 Internal Server Error',
        "(APIServer pid=1) ERROR 11-28 19:00:00 [x.py:1] vllm.v1.engine.exceptions.EngineDeadError: EngineCore "
        "encountered an issue. See stack trace (above) for the root cause.",
    ]
    assert "do not say why" in diagnose(0, lines).cause


def test_what_the_engine_says_of_a_workers_error_is_the_cause_where_the_worker_is_not_heard() -> None:
    """Its own traceback may have left the lines that are kept. Where it is there, it has the place."""
    relayed = (
        "RuntimeError: Worker failed with error 'Odd thing in a kernel', please check the stack trace above for the"
    )
    assert diagnose(1, [*traceback(relayed), FAILED + "{}"]).cause == "vLLM fails: RuntimeError: Odd thing in a kernel."
    several = "RuntimeError: Worker failed with error 'CUDA error: invalid argument"
    assert "kernel" in diagnose(1, [*traceback(several), FAILED + "{}"]).cause
    worker = "(Worker_TP1 pid=9) ERROR 11-28 19:00:00 [multiproc_executor.py:1] "
    assert diagnose(1, [*traceback("Odd: of its own", worker), *traceback(several)]).cause == "Odd: of its own"


def test_a_destructor_that_fails_in_the_end_is_not_the_cause() -> None:
    lines = [*traceback("Odd: first"), f"{ROOT}Exception ignored in: <function X.__del__ at 0x7f>"]
    assert diagnose(1, [*lines, *traceback("AttributeError: 'NoneType' has no attribute 'x'")]).cause == "Odd: first"


def test_a_workers_error_is_the_cause_where_we_killed_the_rest() -> None:
    """It used to be "VLLM::Worker (pid 9) died.", and was tried again."""
    who = "(Worker_TP1 pid=9) ERROR 11-28 19:00:00 [multiproc_executor.py:1] "
    died = "VLLM::Worker (pid 9) died"
    assert diagnose(-9, traceback("Odd: of its own", who), died) == Diagnosis("Odd: of its own", "", permanent=True)
    assert diagnose(-9, traceback("torch.OutOfMemoryError: CUDA out of memory.", who), died).permanent
    assert diagnose(-9, ["(Worker pid=9) INFO 11-28 19:00:00 [x.py:1] loading"], died).cause == f"{died}."


def test_an_error_in_the_log_of_one_that_hung_need_not_be_why() -> None:
    why = "vLLM hangs: no progress in 120 s (SUPERVISOR_STALL_TIMEOUT) with 3 requests in flight"
    assert diagnose(-9, traceback("Odd: a request's"), why).cause == f"{why}."


def test_memory_is_blamed_on_evidence_alone() -> None:
    """Signal 9 that was not ours, or the container's count of such kills. `{}` is none: vLLM says so of
    engines that ended by any error of their own."""
    gone = ["(APIServer pid=1) vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."]
    silent = "vLLM's engine ended, or did not start, and the last lines of its log do not say why."
    assert diagnose(0, gone).cause == diagnose(1, [FAILED + "{}"]).cause == silent
    assert "do not say why." in diagnose(1, [FAILED + "{'EngineCore': 1}"]).cause
    assert "killed by SIGKILL" in diagnose(1, [FAILED + "{'EngineCore': -9}"]).cause
    assert "container's memory ran out" in diagnose(0, gone, oom_killed=True).cause
    assert "container's memory ran out" in diagnose(-9, [], "VLLM::Worker (pid 9) died", oom_killed=True).cause
    assert "memory" not in diagnose(-9, [], "VLLM::Worker (pid 9) died").cause
    assert diagnose(1, traceback("torch.OutOfMemoryError: CUDA out of memory."), oom_killed=True).permanent  # the GPU's


def test_without_a_line_that_tells_the_signal_does() -> None:
    assert "SIGKILL" in diagnose(-9, []).cause
    assert "/dev/shm" in diagnose(-7, []).cause
    assert not diagnose(-11, []).permanent
    assert (describe_exit(0), describe_exit(-9), describe_exit(-250)) == (
        "exit code 0", "killed by SIGKILL", "killed by signal 250")  # fmt: skip


def test_what_a_shell_says_of_a_signal_is_one() -> None:
    assert diagnose(137, []) == diagnose(-9, [])
    assert diagnose(139, []) == diagnose(-11, [])
    assert not diagnose(255, []).known


def test_what_we_did_to_it_comes_before_the_signal() -> None:
    assert diagnose(-9, [], end_reason="It made no progress for 120 s").cause == "It made no progress for 120 s."
    assert diagnose(-9, [], end_reason="Not ready within SUPERVISOR_STARTUP_TIMEOUT=1 s").permanent


def test_ranks_that_do_not_come_are_waited_for_again() -> None:
    """They come minutes apart, each with a disk and a network of its own: nothing has to be changed for that."""
    why = "vLLM was not ready after 1200 s (SUPERVISOR_STARTUP_TIMEOUT), it was at: "
    for phase in ("waiting for the other ranks", "waiting for the other engines"):
        diagnosis = diagnose(-9, [], end_reason=why + phase)
        assert diagnosis.cause == f"{why}{phase}."
        assert "MASTER_ADDR" in diagnosis.remedy
        assert "all ports" in diagnosis.remedy
        assert not diagnosis.permanent
    assert diagnose(-9, [], end_reason=f"{why}loading weights").permanent


def test_the_root_comes_before_what_the_other_workers_say() -> None:
    """One worker has no memory left, the one beside it loses a connection, here or on another machine."""
    lines = [
        "(Worker_TP1 pid=8) ERROR 11-26 00:06:31 [x.py:1] torch.OutOfMemoryError: CUDA out of memory.",
        "(Worker_TP0 pid=7) ERROR 11-26 00:06:31 [x.py:1] RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection "
        "closed by peer [127.0.0.1]:39592. This is typically caused by a remote worker crashing.",
        "(EngineCore pid=6) ERROR 11-26 00:06:31 [x.py:1] TimeoutError: RPC call to execute_model timed out.",
    ]
    assert diagnose(1, lines).cause == "The GPU's memory was not enough."
    assert "rank at 127.0.0.1 ended" in diagnose(1, lines[1:]).cause


@pytest.mark.parametrize(
    "harmless",
    ["(APIServer pid=1) WARNING 11-21 19:00:00 [x.py:1] ", "(APIServer pid=1) INFO 11-21 19:00:00 [x.py:1] Received: ",
     "(Worker pid=9) (Worker_TP0 pid=9) DEBUG 11-21 19:00:00 [x.py:1] ", "[2026-11-21 19:00:00] WARNING x.py:1: ",
     "2026-11-21 19:00:00,123 - INFO - ", "\x1b[0;36m(EngineCore pid=3)\x1b[0;0m INFO 11-21 19:00:00 [x.py:1] "],
)  # fmt: skip
def test_an_error_that_was_dealt_with_is_none(harmless: str) -> None:
    """A warning, or a prompt that is logged: no row's example is one's cause."""
    for row in ROWS:
        lines = [harmless + line for line in row.example.strip("\n").splitlines()]
        assert diagnose(0, lines).cause == "Its log does not say why."


def test_an_unknown_error_is_told_as_it_is_and_what_follows_from_it_is_not() -> None:
    lines = [
        "(EngineCore pid=7) ERROR 11-21 19:00:00 [core.py:1] OddError: 'layers.9'",
        "Exception: WorkerProc initialization failed due to an exception in a background process.",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    ]
    assert diagnose(1, lines) == Diagnosis("OddError: 'layers.9'", "", permanent=True)
    assert "do not say why" in diagnose(1, lines[2:]).cause


@pytest.mark.slow
def test_a_log_that_clients_helped_to_write_costs_little() -> None:
    """500 lines of 64 kB took 45 s. Now they are kept in part, and cost less than twice of what any words cost."""

    def seconds(lines: list[str]) -> float:
        began = time.process_time()
        assert diagnose(1, lines).cause
        return time.process_time() - began

    plain = [("what a log says on any day, in 12 words " * 100)[:4000]] * 480
    hostile = ["a" * 4000, "Gloo connectFullMesh failed remote=[" * 110, "Error_a" * 570] * 160
    seconds(plain[:1])  # compiles the patterns
    assert seconds(hostile) < 2 * seconds(plain)


def test_where_nothing_raises_the_line_that_comes_closest_is_shown() -> None:
    lines = [
        "INFO 11-30 10:00:00 [x.py:1] no such file, and that is well",
        "[libx] Unable to open the device",
        "goodbye",
    ]
    said = diagnose(1, lines)
    assert said.cause == "Its log does not say why; what comes closest to it there: [libx] Unable to open the device"
    assert (said.known, said.permanent) == (False, False)
    assert diagnose(0, lines).cause == diagnose(1, ["goodbye"]).cause == "Its log does not say why."
    for line in ("error " * 1_000, "Odd: " + "x" * 6_000):
        assert len(diagnose(1, [line]).cause) < 2500
        assert len(diagnose(1, traceback(line)).cause) < 2500


def test_an_assertion_whose_frame_has_left_the_log_is_an_error() -> None:
    lines = ["    assert self.blocks == other.blocks", "AssertionError"]
    assert (
        diagnose(1, lines).cause
        == "vLLM failed an internal check (AssertionError): assert self.blocks == other.blocks."
    )


def test_of_a_workers_error_over_several_lines_the_last_is_told() -> None:
    relayed = [
        "    x = tl.arange(0, N)",
        "an odd thing happened', please check the stack trace above for the root cause",
    ]
    assert "an odd thing happened" in diagnose(1, [*relayed, FAILED + "{}"]).cause


def test_where_tracebacks_only_follow_the_last_stray_error_is_told() -> None:
    """Of a library that raises nothing; an engine that was killed without a word has none."""
    end = (
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s):"
    )
    gloo = "[rank1]:[E528 08:52 ProcessGroupGloo.cpp:145] Gloo connectFullMesh failed with [tcp/pair.cc:144] no error"
    found = diagnose(1, [f"(Worker pid=9) {gloo}", "(APIServer pid=1) Traceback (most recent call last):", end])
    assert "connectFullMesh failed" in found.cause
    assert not found.permanent
    quiet = "(EngineCore pid=7) INFO 11-28 19:00:00 [core.py:10] one that failed with [x] is tried again"
    assert "do not say why" in diagnose(1, ["(APIServer pid=1) Traceback (most recent call last):", end]).cause
    assert "do not say why" in diagnose(1, [quiet, "(APIServer pid=1) Traceback (most recent call last):", end]).cause


def test_a_plugin_that_could_not_be_loaded_is_no_cause() -> None:
    """vLLM goes on without it; with a chain of errors, too. Where it was for this kind of device, its row says so."""
    words = [
        "Failed to load plugin another",
        "Traceback (most recent call last):",
        '  File "/venv/another/__init__.py", line 3, in <module>',
        "ModuleNotFoundError: No module named 'one'",
        "",
        "During handling of the above exception, another exception occurred:",
        "",
        "Traceback (most recent call last):",
        '  File "/venv/vllm/plugins/__init__.py", line 54, in load_plugins_by_group',
        "ModuleNotFoundError: No module named 'langchain.docstore'",
    ]
    plugin = [f"ERROR 03-10 10:47:27 [__init__.py:64] {line}".rstrip() for line in words]
    asked = "ValueError: Please pass the argument `trust_remote_code=True` to allow custom code to be run."
    assert diagnose(1, plugin + traceback(asked)).cause == "The model brings code of its own."
    said = diagnose(1, plugin + traceback("RuntimeError: Failed to infer device type"))
    assert "another: ModuleNotFoundError" in said.cause


def test_what_is_said_after_a_lost_device_only_follows() -> None:
    lost = traceback("RuntimeError: level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)")
    others = "2026:06:25-17:21:53:  105:[1] |CCL_ERROR| internal_kvs_server.hpp:70 put: read/write error: Broken pipe"
    assert "was lost" in diagnose(1, [*lost, others]).cause
    assert "oneCCL" in diagnose(1, [others]).cause


def test_settings_that_lack_something_are_the_quantizations_where_those_are_read() -> None:
    """Any class of settings can be called without an argument."""
    error = "TypeError: QwenVLConfig.__init__() missing 1 required positional argument: 'vision_config'"
    frame = '  File "/venv/transformers/configuration_utils.py", line 700, in from_dict'
    assert "QUANTIZATION is set" not in diagnose(1, ["Traceback (most recent call last):", frame, error]).text
