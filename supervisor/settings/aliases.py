"""Names that other workers use, and options that are not the user's to set."""

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
    "SUPERVISOR_EXTRA_ARGS": ("VLLM_EXTRA_ARGS",),
    "SUPERVISOR_STARTUP_TIMEOUT": ("VLLM_STARTUP_TIMEOUT",),
    "SUPERVISOR_MAX_CONCURRENCY": ("MAX_CONCURRENCY",),
}

# Options of `vllm serve` that the supervisor sets itself -> what to do instead.
OWNED: dict[str, str] = {
    "host": "set SUPERVISOR_HOST; vLLM itself listens on a private unix socket",
    "port": "set PORT, which is the gateway's; vLLM itself listens on a private unix socket",
    "uds": "nothing to set: vLLM's socket is private to the supervisor",
    "api_key": "set SUPERVISOR_API_KEYS: the gateway checks the keys",
    "ssl_keyfile": "end TLS in front of the supervisor",
    "ssl_certfile": "end TLS in front of the supervisor",
    "ssl_ca_certs": "end TLS in front of the supervisor",
    "ssl_cert_reqs": "end TLS in front of the supervisor",
    "ssl_ciphers": "end TLS in front of the supervisor",
    "enable_ssl_refresh": "end TLS in front of the supervisor",
    "headless": "the supervisor serves HTTP, so vLLM must too",
    "grpc": "the supervisor relays HTTP, so vLLM must serve it",
    # A token on argv is seen by everybody who can run `ps`: vLLM reads the variable itself.
    "hf_token": "set HF_TOKEN in the environment: it reaches vLLM as it is",
}
