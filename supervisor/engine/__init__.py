"""The vllm child: its process, its states, its readiness."""
