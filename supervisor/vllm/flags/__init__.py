"""This folder has the options of `vllm serve`, a file per version, and the program that reads them from its parser."""
