"""What must not be shown: values of secret variables, and what looks like a token wherever it stands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping

MASK = "****"
SHORTEST_SECRET = 6  # a shorter value (`KEY=1`) is no secret, and masking it would garble every text

SECRET_NAME = re.compile(
    r"TOKEN(?!IZ|S)|(API|AUTH|ACCESS|HF)_TOKENS|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(^|_)KEYS?($|_)|API_?KEY"
    r"|^OTEL_\w+_HEADERS$"
)
# The name of a field, or of a query's parameter, that holds a secret; `max_tokens` and `eos_token` do not.
_FIELD = (
    r"(?:(?:[\w.-]*(?:hf|hub|auth|access|api|session|refresh|security|bearer)[_-]?)?token"
    r"|[\w.-]*(?:secret|passw(?:or)?d|passphrase|credential|api[_-]?key|access[_-]?key|private[_-]?key|signature)"
    r"(?:[_-](?:id|key|value))?s?)"
)
# Each group `keep` stays, what follows it is masked.
SECRET_TEXT = (
    # The hub's, OpenAI's, RunPod's, GitHub's, Amazon's and Google's tokens, JSON web tokens.
    re.compile(r"\b(?:hf_|sk-|rpa_|gh[pousr]_|github_pat_|AKIA|AIza|xox[bp]-)[A-Za-z0-9_-]{8,}"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
    re.compile(r"(?i)(?P<keep>\bbearer +)[A-Za-z0-9._~+/=-]{6,}"),
    re.compile(r"(?P<keep>\w://)[^/\s@'\"]+(?=@)"),  # a URL's user and password
    re.compile(rf"(?i)(?P<keep>[?&;](?:{_FIELD}|sig|key|auth)=)[^&\s'\";]+"),
    re.compile(rf"(?i)(?P<keep>[\"'](?:{_FIELD}|authorization)\\?[\"']\s*:\s*\\?[\"'])(?:\\.|[^\"'\\])+"),
    re.compile(rf"(?i)(?P<keep>--(?:{_FIELD}|api-key|hf-token)[ =]'?)[^\s'\-][^\s']*"),
)


class Mask:
    """Replaces every secret value of the environment, and everything that looks like a token."""

    def __init__(self, environ: Mapping[str, str], more: Iterable[str] = ()) -> None:
        values = {value for name, value in environ.items() if SECRET_NAME.search(name.upper())}
        # A list of keys, or a file's name: each key is a secret by itself.
        values |= {part.strip() for value in values if "," in value for part in value.split(",")}
        # OpenTelemetry's headers are `name=value`, as are others' lists.
        values |= {value.partition("=")[2].strip() for value in values}
        values.update(more)
        self.values: set[str] = set()
        self.known: re.Pattern[str] | None = None
        self.add(values)

    def add(self, values: Iterable[str]) -> None:
        """More secrets, from now on."""
        self.values |= {form for value in values for form in (value, json.dumps(value)[1:-1])}  # as in a line of JSON
        known = sorted((value for value in self.values if len(value) >= SHORTEST_SECRET), key=len, reverse=True)
        self.known = re.compile("|".join(map(re.escape, known))) if known else None

    def __call__(self, text: str) -> str:
        if self.known is not None:
            text = self.known.sub(MASK, text)
        for pattern in SECRET_TEXT:
            text = pattern.sub(_masked, text)
        return text

    def command(self, argv: Iterable[str]) -> str:
        """A command line as a person may see it, ready to paste but for what is masked."""
        return shlex.join(map(self, argv))


def _masked(found: re.Match[str]) -> str:
    return (found.groupdict().get("keep") or "") + MASK
