"""A thin supervisor around `vllm serve`."""

__version__ = "0.1.0"
