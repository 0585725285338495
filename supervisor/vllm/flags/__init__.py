"""The options of `vllm serve`, one file per vLLM version, and the program that reads them from vLLM's parser."""
