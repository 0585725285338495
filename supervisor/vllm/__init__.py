"""This room knows vLLM as it is installed: which one, and what options it takes. It is never imported."""
