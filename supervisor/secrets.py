"""The mask of what must not be shown: values of secret variables, and what looks like a token wherever it stands.

Whoever writes a text from outside (a path, a request's id, a model's name in vLLM's log) must not choose what it costs
to mask it: each pattern takes time in proportion to the text, whatever the text is (tests/unit/test_mask.py).
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

MASK = "****"
SHORTEST_SECRET = 6  # a shorter value (`KEY=1`) is no secret, and masking it would garble every text

SECRET_NAME = re.compile(
    r"TOKEN(?!IZ|S)|(API|AUTH|ACCESS|HF)_TOKENS|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(^|_)KEYS?($|_)|API_?KEY"
    r"|^OTEL_\w+_HEADERS$|\.AUTH$"
)
# The name of a field, or of a query's parameter, that holds a secret; `max_tokens` and `eos_token` do not.
_OWNER = r"(?:hf|hub|auth|access|api|session|refresh|security|bearer)[_-]?"
_NOUN = (
    r"(?:secret|passw(?:or)?d|passphrase|credential|(?:api|access|private|auth)[_-]?key|signature)"
    r"(?:[_-](?:id|key|value))?s?"
)
_FIELD = rf"(?:token|[\w.-]*(?:{_OWNER}token|{_NOUN}))"
# Every such name has one of these, in small letters; `sig`, `key` and `auth` are names themselves.
_HINT_WORDS = ("token", "secret", "passw", "passphrase", "credential", "key", "sig", "auth")

# These find a token's first letters. A pattern that begins with one certain character is found by memchr: one that
# begins with a choice takes four times as long, and `\b` ten times.
_find_underscore = re.compile(r"_(?<=[fapousrt]_)(?:(?<=hf_)|(?<=rpa_)|(?<=gh[pousr]_)|(?<=github_pat_))").search
_find_dash = re.compile(r"-(?:(?<=sk-)|(?<=xox[bp]-))").search
_find_capital = re.compile(r"A(?:KIA|Iza)").search
_find_quoted_colon = re.compile(r":(?<=[\"'\s]:)").search  # the colon behind a name in quotes


def _has_hint(lower: str) -> bool:
    for word in _HINT_WORDS:  # noqa: SIM110  # any() takes four times as long
        if word in lower:
            return True
    return False


class Shape(NamedTuple):
    """The look of a kind of secret, as a `pattern`: its group `keep` stays, and the rest of the match is masked.

    `may_match` is a quick look at a text, and at the same text in small letters. Where it finds nothing, neither does
    the pattern, which then need not run: this is so for nearly all lines of vLLM's log.
    """

    may_match: Callable[[str, str], object]
    pattern: re.Pattern[str]


SECRET_SHAPES = (
    # The hub's, OpenAI's, RunPod's, GitHub's, Amazon's and Google's tokens.
    Shape(
        lambda text, lower: _find_underscore(text) or _find_dash(text) or _find_capital(text),
        # vLLM's `hf_overrides` and its kin are words; tokens have digits and capitals.
        re.compile(
            r"\b(?:hf_(?!(?:[a-z]{8,15}|[a-z]{1,20}(?:_[a-z]{1,20}){1,6})\b)"
            r"|sk-|rpa_|gh[pousr]_|github_pat_|AKIA|AIza|xox[bp]-)[A-Za-z0-9_-]{8,}"
        ),
    ),
    # JSON web tokens. Of a run of such characters only the first `eyJ` counts, and the look ahead is made once.
    Shape(
        lambda text, lower: "eyJ" in text,
        re.compile(
            r"(?P<keep>(?<![A-Za-z0-9_-])(?=[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{8,}\.)[A-Za-z0-9_-]*?\b)"
            r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"
        ),
    ),
    Shape(
        lambda text, lower: "bearer " in lower,
        re.compile(r"(?i)(?P<keep>\bbearer +)[A-Za-z0-9._~+/=-]{6,}"),
    ),
    # A URL's user and password, which may have slashes where a generator made it; `host:8000/a@b` is a path.
    Shape(
        lambda text, lower: "@" in text and "://" in text,
        re.compile(r"(?P<keep>\w://)(?:[^/\s'\"]+|[^/\s'\":\[]*:(?!\d{2,5}/)(?:[^/\s'\"]|/(?!/))+)(?=@)"),
    ),
    # The parameters of a query.
    Shape(
        lambda text, lower: "=" in text and ("?" in text or "&" in text or ";" in text) and _has_hint(lower),
        re.compile(rf"(?i)(?P<keep>[?&;](?=[\w.-]+=)(?:{_FIELD}|sig|key|auth)=)[^&\s'\";]+"),
    ),
    # The fields of JSON, of Python's dictionaries, and of JSON in a string.
    Shape(
        lambda text, lower: _find_quoted_colon(text) and _has_hint(lower),
        re.compile(
            r"(?i)(?P<keep>[\"'](?=[\w.-]+\\?[\"']\s*:)"
            rf"(?:{_FIELD}|auth(?:orization)?)\\?[\"']\s*:\s*\\?[\"'])(?:\\.|[^\"'\\])+"
        ),
    ),
    # Options of a command. A name ends where its run of such characters does, so the first `--` in a run stands for all
    # of them: were each tried, dashes alone would cost their number squared.
    Shape(
        lambda text, lower: "--" in text and _has_hint(lower),
        re.compile(
            r"(?i)(?P<keep>(?<![\w.-])[\w.]*(?:-[\w.]+)*--(?=[\w.-]+[ =])"
            rf"[\w.-]*(?:(?:{_OWNER}|(?<=--))token|{_NOUN})[ =]'?)[^\s'\-(][^\s']*"
        ),
    ),
)


class Mask:
    """Replaces every secret value of the environment, and everything that looks like a token."""

    def __init__(self, environ: Mapping[str, str], extra_secrets: Iterable[str] = ()) -> None:
        values = {value for name, value in environ.items() if SECRET_NAME.search(name.upper())}
        # A list of keys, or a file's name: each key is a secret by itself, and is read without white space around it.
        values |= {part.strip() for value in values for part in (value, *value.split(","))}
        # OpenTelemetry's headers are `name=value`, as are others' lists.
        values |= {value.partition("=")[2].strip() for value in values}
        values.update(extra_secrets)
        self.values: set[str] = set()
        self.add(values)

    def add(self, values: Iterable[str]) -> None:
        """Masks these values too, from now on."""
        forms = {form for value in values for form in (value, json.dumps(value)[1:-1])}  # the latter for JSON
        # vLLM's log is masked byte by byte, as latin-1.
        self.values |= forms | {form.encode("utf-8", "surrogateescape").decode("latin-1") for form in forms}
        known = sorted((value for value in self.values if len(value) >= SHORTEST_SECRET), key=len, reverse=True)
        self._known_secrets = known, re.compile("|".join(map(re.escape, known)))

    def __call__(self, text: str) -> str:
        known, pattern = self._known_secrets
        for value in known:
            if value in text:
                text = pattern.sub(MASK, text)
                break
        lower = _lower(text)
        for may_match, pattern in SECRET_SHAPES:
            if may_match(text, lower):
                text = pattern.sub(_mask_match, text)
        return text

    def command(self, argv: Iterable[str]) -> str:
        """Returns a command line for people to see. It can be pasted but for what is masked, which is also what follows
        an option with a secret's name."""
        words = list(argv)
        pairs = zip(words, (False, *map(has_secret_name, words)), strict=False)
        return shlex.join(MASK if follows_secret and word[:1] != "-" else self(word) for word, follows_secret in pairs)


def has_secret_name(option: str) -> bool:
    """Returns whether an option, as it is written, such as `--x.s3_secret`, takes a secret."""
    return option[:2] == "--" and SECRET_NAME.search(option[2:].upper().replace("-", "_")) is not None


def complain(line: str, environ: Mapping[str, str]) -> None:
    """Prints a line on standard error. It is masked, for it may show what somebody typed, and stays one line."""
    text = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in Mask(environ)(line))
    print(f"supervisor: {text}", file=sys.stderr)


def _lower(text: str) -> str:
    """Returns the text with its letters as a pattern that ignores case takes them: for `re` these three are an i, an s
    and an i as well."""
    lower = text.lower()
    return lower if text.isascii() else lower.replace("ı", "i").replace("ſ", "s").replace("i\u0307", "i")


def _mask_match(match: re.Match[str]) -> str:
    return (match.groupdict().get("keep") or "") + MASK
