"""This room owns the vLLM child: its process, its states, its readiness."""
