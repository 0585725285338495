"""Names that other workers use, options that are not the user's to set, and variables that no longer mean anything."""

from __future__ import annotations

# Ours -> also read from: worker-vllm's names, and runpod-LLM's. Ours wins, then the order given here.
ALIASES: dict[str, tuple[str, ...]] = {
    "MODEL": ("MODEL_NAME", "LLM_MODEL"),
    "REVISION": ("MODEL_REVISION",),
    "TOKENIZER": ("TOKENIZER_NAME",),
    "SERVED_MODEL_NAME": ("OPENAI_SERVED_MODEL_NAME_OVERRIDE",),
    "CHAT_TEMPLATE": ("CUSTOM_CHAT_TEMPLATE",),
    "CONFIG": ("VLLM_CONFIG_FILE",),
    "DTYPE": ("LLM_DTYPE",),
    "TRUST_REMOTE_CODE": ("LLM_TRUST_REMOTE_CODE",),
    "RESPONSE_ROLE": ("OPENAI_RESPONSE_ROLE",),
    # worker-vllm's templates still offer these; vLLM has options for them again.
    "SPEC_METHOD": ("SPECULATIVE_METHOD",),
    "SPEC_MODEL": ("SPECULATIVE_MODEL",),
    "SPEC_TOKENS": ("NUM_SPECULATIVE_TOKENS",),
    "SUPERVISOR_EXTRA_ARGS": ("VLLM_EXTRA_ARGS",),
    "SUPERVISOR_STARTUP_TIMEOUT": ("VLLM_STARTUP_TIMEOUT",),
    "SUPERVISOR_REQUEST_TIMEOUT": ("REQUEST_TIMEOUT",),
    "SUPERVISOR_MAX_CONCURRENCY": ("MAX_CONCURRENCY",),
    "SUPERVISOR_JOB_BATCH_SIZE": ("DEFAULT_BATCH_SIZE",),
    "SUPERVISOR_JOB_MIN_BATCH_SIZE": ("DEFAULT_MIN_BATCH_SIZE", "MIN_BATCH_SIZE"),
    "SUPERVISOR_JOB_BATCH_GROWTH": ("DEFAULT_BATCH_SIZE_GROWTH_FACTOR", "BATCH_SIZE_GROWTH_FACTOR"),
    # vLLM would ask for it at its own socket as well, and refuse the queue's jobs.
    "SUPERVISOR_API_KEYS": ("VLLM_API_KEY",),
}

# Put before any of these names, and before vLLM's, by vLLM's and AWS's own images for SageMaker: SM_VLLM_MAX_MODEL_LEN.
SAGEMAKER = "SM_VLLM_"

_TLS = "set SUPERVISOR_TLS_CERT and SUPERVISOR_TLS_KEY, or end TLS in front of the supervisor"
# Options of `vllm serve` that the supervisor sets itself -> what to do instead.
OWNED: dict[str, str] = {
    "host": "set SUPERVISOR_HOST; vLLM itself listens on a private unix socket",
    "port": "set PORT, which is the gateway's; vLLM itself listens on a private unix socket",
    "uds": "nothing to set: vLLM's socket is private to the supervisor",
    "api_key": "set SUPERVISOR_API_KEYS: the gateway checks the keys",
    "ssl_keyfile": _TLS,
    "ssl_certfile": _TLS,
    "ssl_ca_certs": _TLS,
    "ssl_cert_reqs": _TLS,
    "ssl_ciphers": _TLS,
    "enable_ssl_refresh": _TLS,
    "headless": "the ranks above 0 of several machines are headless by themselves: set NNODES, NODE_RANK, MASTER_ADDR",
    "grpc": "the supervisor relays HTTP, so vLLM must serve it",
    # A token on argv is seen by everybody who can run `ps`: vLLM reads the variable itself.
    "hf_token": "set HF_TOKEN in the environment: it reaches vLLM as it is",
}
# Owned by name, and yet nothing to warn of: the gateway's own port, and a token that reaches vLLM as it is.
OWNED_AND_READ = frozenset({"PORT", "HF_TOKEN", f"{SAGEMAKER}PORT"})

_ZERO = "worker-vllm read 0 as 'not set', and vLLM can't run with it"
# A zero that means "not set", by variable -> the reason that is told.
ZERO_MEANS_UNSET: dict[str, str] = {
    "MAX_CPU_LORAS": _ZERO,
    "MAX_MODEL_LEN": _ZERO,
    "MAX_NUM_BATCHED_TOKENS": _ZERO,
    "MAX_PARALLEL_LOADING_WORKERS": _ZERO,
    "NUM_GPU_BLOCKS_OVERRIDE": _ZERO,
    "SPEC_TOKENS": _ZERO,
}

_FOLDERS = "set HF_HOME for the models, and SUPERVISOR_CACHE_DIR for caches"
_OPENAI = "OpenAI routes always give OpenAI's format"
_OWN_VLLM = "only the changed vLLM of worker-vllm 0.2 read it"
_TENSORIZER = 'set LOAD_FORMAT=tensorizer and MODEL_LOADER_EXTRA_CONFIG, such as {"tensorizer_uri": "..."}'
_PREEMPTION = "vLLM has no such option any more: it recomputes what it preempts"
# Variables that the templates and pages of worker-vllm and runpod-LLM name, and that do nothing here -> what to do.
FORMER: dict[str, str] = {
    "BASE_PATH": _FOLDERS,
    "MODEL_BASE_PATH": _FOLDERS,
    "MODEL_CACHE_ENABLE": _FOLDERS,
    "RAW_OPENAI_OUTPUT": _OPENAI,
    "ALLOW_OPENAI_FORMAT": _OPENAI,
    "SPECULATIVE_METHOD": 'set SPECULATIVE_CONFIG, such as {"method": "ngram", "num_speculative_tokens": 5}',
    "SPECULATIVE_MODEL": 'set SPECULATIVE_CONFIG, such as {"model": "...", "num_speculative_tokens": 5}',
    "NUM_SPECULATIVE_TOKENS": 'set SPECULATIVE_CONFIG, such as {"method": "ngram", "num_speculative_tokens": 5}',
    "NGRAM_PROMPT_LOOKUP_MIN": 'set SPECULATIVE_CONFIG, such as {"method": "ngram", "prompt_lookup_min": 2}',
    "NGRAM_PROMPT_LOOKUP_MAX": 'set SPECULATIVE_CONFIG, such as {"method": "ngram", "prompt_lookup_max": 4}',
    "SPECULATIVE_QUANTIZATION": 'set SPECULATIVE_CONFIG, such as {"method": "draft_model", "quantization": "awq"}',
    "SPECULATIVE_MODEL_REVISION": 'set SPECULATIVE_CONFIG, such as {"method": "draft_model", "revision": "main"}',
    "SPECULATIVE_ENFORCE_EAGER": 'set SPECULATIVE_CONFIG, such as {"method": "draft_model", "enforce_eager": true}',
    "PREEMPTION_CHECK_PERIOD": _PREEMPTION,
    "PREEMPTION_CPU_CAPACITY": _PREEMPTION,
    "TENSORIZE": _TENSORIZER,
    "TENSORIZE_MODEL": _TENSORIZER,
    "TENSORIZER_NUM_GPUS": _TENSORIZER,
    "TENSORIZER_URI": _TENSORIZER,
    "USE_TENSOR_PARALLEL": "set TENSOR_PARALLEL_SIZE to the number of GPUs, or to auto",
    "USE_QUANTIZATION": "set QUANTIZATION, where the model does not say how it is quantized",
    "USE_HF_CHAT_TEMPLATE": "a job's messages always go through the model's chat template",
    "USE_FULL_METRICS": "/metrics has them",
    "ENABLE_MULTIMODAL": "nothing to set: vLLM finds out what the model takes",
    "DOWNLOAD_7B_MODEL": "set MODEL to the model's name",
    "DOWNLOAD_13B_MODEL": "set MODEL to the model's name",
    "HF_TRANSFER": "nothing to set: nothing reads it",
    "VLLM_CPU_FRACTION": _OWN_VLLM,
    "VLLM_N_CPUS": _OWN_VLLM,
    "VLLM_NIGHTLY": "it is an argument of another image's build: build this one on the vLLM that you want",
    "WORKER_CUDA_VERSION": "the image has one CUDA: build it on another one",
    "TRANSFORMERS_VERSION": "vLLM's image brings its own transformers: build an image on another version",
    "VLLM_VERSION": "it is an argument of the image's build: docker build --build-arg VLLM_VERSION=...",
    "VLLM_BASE_URL": "nothing to set: vLLM is reached through a private unix socket",
    "LLM_ALLOW_ANY": "one model is served: set MODEL, and start another worker for another model",
    "TRT_LLM_ENGINE_DIR": "this runs vLLM",
}
