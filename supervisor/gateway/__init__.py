"""The HTTP front: own routes, and the relay of everything else to vLLM."""
