"""Options and variables of older vLLMs -> the last release that had them, and what stands for them now.

Asked only where the installed vLLM lacks the name. From 0.11.0 on they come from the parsers of 27 releases, dumped and
compared (tests/unit/vllm_history.json); older ones from the sources of twelve releases, so that `last` is the last
of those. The reasons are the releases' own: their deprecation warnings, and the code that took over.
"""

from __future__ import annotations

_NO_EFFECT = "nothing to set: it had no effect any more"
_V1 = "nothing to set: only vLLM's former engine had it"
_GONE = "the feature is gone"
_PROMPT_ADAPTERS = "the feature is gone; ENABLE_LORA has adapters"
_MULTI_STEP = "nothing to set: the scheduler works otherwise now"
_EPLB = 'set EPLB_CONFIG, such as {"%s": %s}'
_STRUCTURED = 'set STRUCTURED_OUTPUTS_CONFIG, such as {"%s": %s}'
_NO_PROPERTIES = "disable_additional_properties"
_SPECULATIVE = 'set SPECULATIVE_CONFIG, such as {"method": "%s", "%s": %s}'
_SPECULATIVE_GONE = "the feature is gone; SPECULATIVE_CONFIG has what is left"
_ROPE = (
    'set HF_OVERRIDES, such as {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, '
    '"original_max_position_embeddings": 32768}}; it has to be complete'
)

# By key: `swap_space` was --swap-space and SWAP_SPACE.
_OPTIONS: dict[str, tuple[str, str]] = {
    "calculate_kv_scales": ("0.27.1", "nothing to set: the scales come with the model, or are 1"),
    "cuda_graph_sizes": ("0.12.0", "set CUDAGRAPH_CAPTURE_SIZES"),
    "device": ("0.9.2", "nothing to set: vLLM takes the device that it was built for"),
    "disable_async_output_proc": ("0.10.2", _V1),
    "disable_frontend_multiprocessing": ("0.18.1", _NO_EFFECT),
    "disable_log_requests": ("0.16.0", "requests are logged only with ENABLE_LOG_REQUESTS=true"),
    "disable_logprobs_during_spec_decoding": ("0.7.3", _SPECULATIVE_GONE),
    "disable_mm_preprocessor_cache": ("0.12.0", "set MM_PROCESSOR_CACHE_GB=0"),
    "enable_bf16x3_router_gemm": ("0.29.0", "nothing to set: it is on where the GPU can do it"),
    "enable_lora_bias": ("0.11.0", "the feature is gone: adapters with a bias are refused"),
    "enable_mamba_fine_grained_prefix_cache": ("0.30.0", "set ENABLE_MAMBA_SHARED_PREFIX_CHECKPOINT"),
    "enable_multimodal_encoder_data_parallel": ("0.12.0", "set MM_ENCODER_TP_MODE=data"),
    "enable_prompt_adapter": ("0.10.1.1", _PROMPT_ADAPTERS),
    "enable_reasoning": ("0.9.2", "nothing to set: REASONING_PARSER alone switches it on"),
    "engine_use_ray": ("0.6.0", _GONE),
    "eplb_log_balancedness": ("0.11.2", _EPLB % ("log_balancedness", "true")),
    "eplb_step_interval": ("0.11.2", _EPLB % ("step_interval", "3000")),
    "eplb_window_size": ("0.11.2", _EPLB % ("window_size", "1000")),
    "expand_tools_even_if_tool_choice_none": ("0.9.2", "nothing to set: it is the default"),
    "guided_decoding_backend": ("0.11.2", _STRUCTURED % ("backend", '"xgrammar"')),
    "guided_decoding_disable_additional_properties": ("0.11.2", _STRUCTURED % (_NO_PROPERTIES, "true")),
    "guided_decoding_disable_any_whitespace": ("0.11.2", _STRUCTURED % ("disable_any_whitespace", "true")),
    "guided_decoding_disable_fallback": ("0.11.2", _GONE),
    "image_feature_size": ("0.4.3", "nothing to set: it is read from the model"),
    "image_input_shape": ("0.4.3", "nothing to set: it is read from the model"),
    "image_input_type": ("0.4.3", "nothing to set: it is read from the model"),
    "image_token_id": ("0.4.3", "nothing to set: it is read from the model"),
    "logits_processor_pattern": ("0.16.0", "the feature is gone; LOGITS_PROCESSORS names processors for all requests"),
    "long_lora_scaling_factors": ("0.9.2", _GONE),
    "lora_extra_vocab_size": ("0.11.2", "the feature is gone: adapters have no vocabulary of their own"),
    "max_context_len_to_capture": ("0.6.3.post1", "nothing to set: MAX_CUDAGRAPH_CAPTURE_SIZE counts otherwise"),
    "max_long_partial_prefills": ("0.26.0", _NO_EFFECT),
    "max_num_partial_prefills": ("0.26.0", _NO_EFFECT),
    "max_prompt_adapter_token": ("0.9.2", _PROMPT_ADAPTERS),
    "max_prompt_adapters": ("0.9.2", _PROMPT_ADAPTERS),
    "max_seq_len_to_capture": ("0.10.2", "nothing to set: MAX_CUDAGRAPH_CAPTURE_SIZE counts otherwise"),
    "multi_step_stream_outputs": ("0.10.0", _MULTI_STEP),
    "ngram_prompt_lookup_max": ("0.7.3", _SPECULATIVE % ("ngram", "prompt_lookup_max", 4)),
    "ngram_prompt_lookup_min": ("0.7.3", _SPECULATIVE % ("ngram", "prompt_lookup_min", 2)),
    "num_lookahead_slots": ("0.11.2", "nothing to set: it follows from SPECULATIVE_CONFIG"),
    "num_redundant_experts": ("0.11.2", _EPLB % ("num_redundant_experts", "8")),
    "num_scheduler_steps": ("0.10.0", _MULTI_STEP),
    "num_speculative_tokens": ("0.7.3", "set SPEC_TOKENS"),
    "override_attention_dtype": ("0.27.1", _NO_EFFECT),
    "override_neuron_config": ("0.10.1.1", _GONE),
    "override_pooler_config": ("0.11.2", "set POOLER_CONFIG"),
    "preemption_mode": ("0.10.2", _V1),
    "prompt_adapters": ("0.9.2", _PROMPT_ADAPTERS),
    "qlora_adapter_name_or_path": ("0.9.2", _NO_EFFECT),
    "quantization_param_path": ("0.6.6.post1", "nothing to set: the scales come with the model"),
    "rope_scaling": ("0.11.0", _ROPE),
    "rope_theta": ("0.11.0", _ROPE),
    "scheduler_delay_factor": ("0.10.2", _V1),
    "spec_decoding_acceptance_method": ("0.7.3", _SPECULATIVE_GONE),
    "speculative_disable_by_batch_size": ("0.7.3", _SPECULATIVE_GONE),
    "speculative_disable_mqa_scorer": ("0.7.3", _SPECULATIVE_GONE),
    "speculative_draft_tensor_parallel_size": ("0.7.3", _SPECULATIVE % ("eagle3", "draft_tensor_parallel_size", 1)),
    "speculative_max_model_len": ("0.7.3", _SPECULATIVE % ("draft_model", "max_model_len", 2048)),
    "speculative_model": ("0.7.3", "set SPEC_MODEL"),
    "speculative_model_quantization": ("0.7.3", _SPECULATIVE % ("draft_model", "quantization", '"awq"')),
    "swap_space": ("0.17.1", "nothing to set: requests are computed again instead of being swapped out"),
    "task": ("0.12.0", "set RUNNER=generate or RUNNER=pooling; CONVERT says what for, where that is not clear"),
    "tokenizer_pool_extra_config": ("0.9.2", _NO_EFFECT),
    "tokenizer_pool_size": ("0.9.2", _NO_EFFECT),
    "tokenizer_pool_type": ("0.9.2", _NO_EFFECT),
    "typical_acceptance_sampler_posterior_alpha": ("0.7.3", _SPECULATIVE_GONE),
    "typical_acceptance_sampler_posterior_threshold": ("0.7.3", _SPECULATIVE_GONE),
    "use_gpu_for_pooling_score": ("0.17.1", "set ENABLE_FLASH_LATE_INTERACTION"),
    "use_v2_block_manager": ("0.9.2", _NO_EFFECT),
    "worker_use_ray": ("0.6.6.post1", "set DISTRIBUTED_EXECUTOR_BACKEND=ray"),
}  # fmt: skip

_ATTENTION = 'set ATTENTION_CONFIG, such as {"%s": %s}'
_PROFILER = 'set PROFILER_CONFIG, such as {"%s": %s}'
_MORIIO = 'set KV_TRANSFER_CONFIG, such as {..., "kv_connector_extra_config": {"%s": ...}}'
_MOE = "set MOE_BACKEND, such as flashinfer_cutlass"
_LINEAR = "set LINEAR_BACKEND, such as %s"
_DROPPED = "nothing to set: nothing reads it any more"
_VARIABLES: dict[str, tuple[str, str]] = {
    "VLLM_ALL2ALL_BACKEND": ("0.15.1", "set ALL2ALL_BACKEND"),
    "VLLM_ATTENTION_BACKEND": ("0.14.1", "set ATTENTION_BACKEND"),
    "VLLM_CI_USE_S3": ("0.25.1", _DROPPED),
    "VLLM_CPU_MOE_PREPACK": ("0.11.2", _DROPPED),
    "VLLM_CPU_SGL_KERNEL": ("0.27.1", "nothing to set: it is used where it can be"),
    "VLLM_DISABLE_FLASHINFER_PREFILL": ("0.14.1", _ATTENTION % ("mla_prefill_backend", '"FLASH_ATTN"')),
    "VLLM_DISABLE_NCCL_FOR_DP_SYNCHRONIZATION": ("0.11.0", "set DISABLE_NCCL_FOR_DP_SYNCHRONIZATION"),
    "VLLM_DISABLE_PAD_FOR_CUDAGRAPH": ("0.11.0", _DROPPED),
    "VLLM_ENABLE_FUSED_MOE_ACTIVATION_CHUNKING": ("0.17.1", _DROPPED),
    "VLLM_ENABLE_MOE_DP_CHUNK": ("0.19.1", _DROPPED),
    "VLLM_ENGINE_ITERATION_TIMEOUT_S": ("0.31.0", _DROPPED),
    "VLLM_FLASHINFER_ALLREDUCE_FUSION_THRESHOLDS_MB": ("0.25.1", _DROPPED),
    "VLLM_FLASHINFER_DISABLE_Q_QUANTIZATION": ("0.14.1", _ATTENTION % ("disable_flashinfer_q_quantization", "true")),
    "VLLM_FLASHINFER_MOE_BACKEND": ("0.23.0", _MOE),
    "VLLM_FLASH_ATTN_MAX_NUM_SPLITS_FOR_CUDA_GRAPH": (
        "0.14.1", _ATTENTION % ("flash_attn_max_num_splits_for_cuda_graph", "32"),
    ),
    "VLLM_FLASH_ATTN_VERSION": ("0.14.1", _ATTENTION % ("flash_attn_version", "3")),
    "VLLM_FLAT_LOGPROBS": ("0.11.2", "ask for flat_logprobs in the request"),
    "VLLM_FUSED_MOE_CHUNK_SIZE": ("0.17.1", _DROPPED),
    "VLLM_KIMI_K3_GEMM_RS": ("0.30.0", _DROPPED),
    "VLLM_LOGITS_PROCESSOR_THREADS": ("0.11.0", _V1),
    "VLLM_MM_HASHER_ALGORITHM": ("0.29.0", "set MM_HASHER_ALGORITHM"),
    "VLLM_MM_INPUT_CACHE_GIB": ("0.12.0", "set MM_PROCESSOR_CACHE_GB"),
    "VLLM_MOE_DP_CHUNK_SIZE": ("0.19.1", _DROPPED),
    "VLLM_MORIIO_CONNECTOR_READ_MODE": ("0.22.1", _MORIIO % "read_mode"),
    "VLLM_MORIIO_NUM_WORKERS": ("0.22.1", _MORIIO % "num_workers"),
    "VLLM_MORIIO_POST_BATCH_SIZE": ("0.22.1", _MORIIO % "post_batch_size"),
    "VLLM_MORIIO_QP_PER_TRANSFER": ("0.22.1", _MORIIO % "qp_per_transfer"),
    "VLLM_MXFP4_USE_MARLIN": ("0.23.0", "set MOE_BACKEND=marlin or LINEAR_BACKEND=marlin"),
    "VLLM_NIXL_ABORT_REQUEST_TIMEOUT": ("0.21.0", _MORIIO % "kv_lease_duration"),
    "VLLM_NIXL_EP_MAX_NUM_RANKS": ("0.29.0", "nothing to set: vLLM works it out"),
    "VLLM_NVFP4_GEMM_BACKEND": ("0.23.0", _LINEAR % "cutlass"),
    "VLLM_PLE_CPU_OFFLOAD": ("0.30.0", 'set ENGRAM_CONFIG, such as {"cpu_offload": true}'),
    "VLLM_PREFIX_CACHE_RETENTION_INTERVAL": ("0.29.0", "set PREFIX_CACHE_RETENTION_INTERVAL"),
    "VLLM_PROFILER_DELAY_ITERS": ("0.15.1", _PROFILER % ("delay_iterations", "1")),
    "VLLM_PROFILER_MAX_ITERS": ("0.15.1", _PROFILER % ("max_iterations", "5")),
    "VLLM_ROCM_AITER_MEGA_MOE_FUSE_SHARED_EXPERTS": ("0.32.0", _DROPPED),
    "VLLM_ROCM_AITER_MLA_DCP_VERIFY": ("0.32.0", _DROPPED),
    "VLLM_ROCM_CUSTOM_PAGED_ATTN": ("0.18.1", _DROPPED),
    "VLLM_ROCM_MONO_DECODE": ("0.32.0", "set MONOKERNEL"),
    "VLLM_ROCM_USE_AITER_FP4_ASM_GEMM": ("0.32.0", _DROPPED),
    "VLLM_ROCM_USE_AITER_MOE_SITUV2_A8W4": ("0.30.0", "set VLLM_ROCM_USE_AITER_MOE_SITUV2=a8w4"),
    "VLLM_ROCM_USE_AITER_PAGED_ATTN": ("0.25.1", _DROPPED),
    "VLLM_ROCM_USE_TRITON_ROPE": ("0.11.0", "set VLLM_ROCM_USE_AITER_TRITON_ROPE"),
    "VLLM_RPC_TIMEOUT": ("0.22.1", _DROPPED),
    "VLLM_SKIP_DEEP_GEMM_WARMUP": ("0.11.0", "set VLLM_DEEP_GEMM_WARMUP=skip"),
    "VLLM_SLEEP_WHEN_IDLE": ("0.17.1", _DROPPED),
    "VLLM_TEST_FORCE_FP8_MARLIN": ("0.28.0", _LINEAR % "marlin"),
    "VLLM_TEST_USE_PRECOMPILED_NIGHTLY_WHEEL": ("0.12.0", "nothing to set: it is for building vLLM"),
    "VLLM_TORCH_CUDA_PROFILE": ("0.15.1", _PROFILER % ("profiler", '"cuda"')),
    "VLLM_TORCH_PROFILER_DIR": ("0.15.1", _PROFILER % ("profiler", '"torch", "torch_profiler_dir": "/x"')),
    "VLLM_TORCH_PROFILER_DISABLE_ASYNC_LLM": ("0.15.1", _PROFILER % ("ignore_frontend", "true")),
    "VLLM_TORCH_PROFILER_DUMP_CUDA_TIME_TOTAL": ("0.15.1", _PROFILER % ("torch_profiler_dump_cuda_time_total", "true")),
    "VLLM_TORCH_PROFILER_RECORD_SHAPES": ("0.15.1", _PROFILER % ("torch_profiler_record_shapes", "true")),
    "VLLM_TORCH_PROFILER_USE_GZIP": ("0.15.1", _PROFILER % ("torch_profiler_use_gzip", "true")),
    "VLLM_TORCH_PROFILER_WITH_FLOPS": ("0.15.1", _PROFILER % ("torch_profiler_with_flops", "true")),
    "VLLM_TORCH_PROFILER_WITH_PROFILE_MEMORY": ("0.15.1", _PROFILER % ("torch_profiler_with_memory", "true")),
    "VLLM_TORCH_PROFILER_WITH_STACK": ("0.15.1", _PROFILER % ("torch_profiler_with_stack", "true")),
    "VLLM_TPU_BUCKET_PADDING_GAP": ("0.25.1", _DROPPED),
    "VLLM_TPU_MOST_MODEL_LEN": ("0.25.1", _DROPPED),
    "VLLM_TRITON_ATTN_USE_TD": ("0.28.0", "set VLLM_TRITON_USE_TD"),
    "VLLM_USE_AITER_UNIFIED_ATTENTION": ("0.11.0", "set VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION"),
    "VLLM_USE_CUDNN_PREFILL": ("0.14.1", _ATTENTION % ("mla_prefill_backend", '"FLASH_ATTN"')),
    "VLLM_USE_DEEP_GEMM_E8M0_HOPPER": ("0.11.0", "set VLLM_USE_DEEP_GEMM_E8M0"),
    "VLLM_USE_FBGEMM": ("0.23.0", _LINEAR % "fbgemm"),
    "VLLM_USE_FLASHINFER_MOE_FP16": ("0.23.0", _MOE),
    "VLLM_USE_FLASHINFER_MOE_FP4": ("0.23.0", _MOE),
    "VLLM_USE_FLASHINFER_MOE_FP8": ("0.23.0", _MOE),
    "VLLM_USE_FLASHINFER_MOE_MXFP4_BF16": ("0.23.0", _MOE),
    "VLLM_USE_FLASHINFER_MOE_MXFP4_MXFP8": ("0.23.0", _MOE),
    "VLLM_USE_FLASHINFER_MOE_MXFP4_MXFP8_CUTLASS": ("0.23.0", _MOE),
    "VLLM_USE_NVFP4_CT_EMULATIONS": ("0.23.0", _LINEAR % "emulation"),
    "VLLM_USE_RAY_COMPILED_DAG": ("0.11.0", "nothing to set: it is always on"),
    "VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE": ("0.32.0", _DROPPED),
    "VLLM_USE_RAY_COMPILED_DAG_OVERLAP_COMM": ("0.32.0", _DROPPED),
    "VLLM_USE_RAY_SPMD_WORKER": ("0.11.0", "nothing to set: it is always on"),
    "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": ("0.32.0", "nothing to set: it is always on"),
    "VLLM_USE_RAY_WRAPPED_PP_COMM": ("0.32.0", _DROPPED),
    "VLLM_USE_TRITON_FLASH_ATTN": ("0.11.0", _V1),
    "VLLM_USE_TRTLLM_ATTENTION": ("0.14.1", _ATTENTION % ("use_trtllm_attention", "true")),
    "VLLM_USE_TRTLLM_FP4_GEMM": ("0.11.0", _LINEAR % "flashinfer_trtllm"),
    "VLLM_USE_TRTLLM_RAGGED_DEEPSEEK_PREFILL": ("0.14.1", _ATTENTION % ("mla_prefill_backend", '"TRTLLM_RAGGED"')),
    "VLLM_USE_V1": ("0.11.0", "nothing to set: there is no other engine any more"),
    "VLLM_V0_USE_OUTLINES_CACHE": ("0.11.0", _V1),
    "VLLM_V1_USE_PREFILL_DECODE_ATTENTION": ("0.14.1", _DROPPED),
    "VLLM_XPU_ENABLE_XPU_GRAPH": ("0.30.0", "nothing to set: it is on where torch can do it"),
}  # fmt: skip


def _told(table: dict[str, tuple[str, str]]) -> dict[str, str]:
    return {name: f"{advice} (vLLM had it until {last})" for name, (last, advice) in table.items()}


REMOVED = _told(_OPTIONS)
REMOVED_ENVIRONMENT = _told(_VARIABLES)
