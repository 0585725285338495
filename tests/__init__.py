import sys

sys.modules["httpx._main"] = None  # type: ignore[assignment]  # its command line: 0.25 s of each test process
