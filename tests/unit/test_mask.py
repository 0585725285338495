"""The mask, and every other pattern that reads a text from outside: linear time, and the same masked as ever.

A client's request id, a path, a model's name in a line of vLLM's: whoever writes these must not choose what a line
costs. The mask was quadratic once: 16 kB of dashes held the interpreter for a minute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from supervisor import lines, logs, secrets
from supervisor.secrets import MASK, SECRET_SHAPES, Mask

Use = Callable[[str], object]

# What the patterns are made of: repeated, these make them begin often, or go back far.
PIECES = (
    "-", "--", ".", "_", "a", "a-", "a.", "1", "\\", " ", "'", '"', "=", "?", "&", ";", ":", "@", "://", "x://a", "\n",
    "aaaaaaaa", "eyJ", "eyJ.", "-eyJaaaaaaaa", "eyJaaaaaaaa.", "hf_", "sk-", "sk-hf_aaaaaaaa", "AKIA", "bearer ",
    "bearer", "token", "_token", "secret", "api-key", "auth", "key", "s", "hub", "--a", "--token", "--api-key=",
    "--token '", "?token=", "?a.token", '"token": "', '"token\\": \\"', '"secret" : ', "authorization", "a=b--token=",
    "(a) ", "(a) INFO", "Traceback", "é", "ſecret", "API_KEY", "sıg",
)  # fmt: skip
some = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)


# Linear time

SIZES = (1_000, 10_000, 64_000)  # the longest line that is read of vLLM is 64 kB
TOO_SHORT = 0.01  # seconds: what is over so soon is not compared
AT_MOST = 0.25 / 64_000  # seconds for a character
# A machine that does other things as well may be so many times slower, for so many tries.
SLOWER, TRIES = 5, 8
# Every sign of a secret (secrets.py), so that the mask leaves out no pattern for want of one.
SIGNS = " hf_ AKIA eyJ bearer x://@ ?= ': -- token"


def seconds(use: Use, text: str) -> float:
    began = time.thread_time()
    use(text)
    return time.thread_time() - began


def costs_too_much(use: Use, before: str, again: str, after: str) -> str:
    """How `before`, `again` many times, and `after` take longer than their length accounts for, if they do."""
    shorter = ""
    for size in SIZES:
        text = before + (again * (size // len(again) + 1))[:size] + after
        for _ in range(TRIES):
            taken = seconds(use, text)
            limit = AT_MOST * size
            if shorter and taken > TOO_SHORT:  # both are measured now: what slows one down does so to the other
                limit = min(limit, 1.5 * seconds(use, shorter) * len(text) / len(shorter))
            limit = max(TOO_SHORT, limit)
            if not limit < taken < SLOWER * limit:
                break
        if taken > limit:
            return f"{len(text)} characters took {taken:.4f} s, at most {limit:.4f} s were expected"
        shorter = text
    return ""


def uses() -> Iterator[tuple[str, Use]]:
    """All that is done to text from outside, by name."""
    yield "the mask", Mask({"HF_TOKEN": "a-a-a-a-secret", "API_KEY": "-" * 32 + "b", "MY_SECRET": "eyJ.eyJ.eyJ.x"})
    for number, (_, pattern) in enumerate(SECRET_SHAPES):
        yield f"SECRET_SHAPES[{number}]", partial(pattern.sub, secrets._mask_match)
    yield "logs.VARYING_WORD", lambda text: logs.VARYING_WORD.sub("#", text)
    yield "lines.VLLM_LEVEL", lines.VLLM_LEVEL.match
    yield "lines.TRACEBACK", lines.TRACEBACK.match


USES = dict(uses())


@pytest.mark.slow
@pytest.mark.parametrize("name", USES)
def test_a_repeated_piece_costs_what_its_length_does(name: str) -> None:
    found = {again: costs_too_much(USES[name], "", again, SIGNS) for again in PIECES}
    assert not {again: why for again, why in found.items() if why}


@pytest.mark.slow
@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(before=some, again=some.filter(bool), after=some)
def test_so_do_mixtures(before: str, again: str, after: str) -> None:
    for name, use in USES.items():
        why = costs_too_much(use, before, again, after + SIGNS)
        assert not why, f"{name}: {why}"


def test_64_kb_of_dashes_are_masked_at_once() -> None:
    """What the review found: 62 s for a quarter of it."""
    mask = Mask({})
    for text in ("-" * 64_000, "-" * 64_000 + " x", "GET /" + "-" * 64_000 + "token=x", "-" * 64_000 + "token plain"):
        assert min(seconds(mask, text) for _ in range(3)) < 0.25
    assert mask("-" * 64_000 + "token plain") == "-" * 64_000 + f"token {MASK}"


# The engine's patterns, which read vLLM's log: the names of its modules, of which the first that is there counts.
ENGINE = {
    "phases": ("supervisor.around.phases", "supervisor.engine.phases"),
    "diagnosis": ("supervisor.engine.diagnosis", "supervisor.around.diagnosis"),
}
ENGINE_PIECES = (
    "world_size=2 ", "Launching vLLM ", "Using cache directory", "Downloading weight", "(a pid=1", "(A pid=1) ",
    "weights: Downloading weights: a ", "INFO 11-26 03:16:45 [a", "ErrorError", "Error_a", "Exception_",
    "ConnectError: a\n", "ConnectError: a ", "Model architecture [", "error: argument --a: Value ",
    "Gloo connectFullMesh failed", "Gloo connectFullMesh failed remote=[", "DistNetworkError: ",
    "DistNetworkError: trying to connect to (", "max seq len (1) ", "Loading lora a failed: b",
    "chat template string (a", "file size is: 1 a. The target location a only has 1 a free",
    "validation error for A\n  Value error, a", "Available memory on node 1 (1/a",
)  # fmt: skip


def patterns_in(value: object) -> Iterator[re.Pattern[str]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from patterns_in(item)
    elif isinstance(value, ModuleType):
        yield from patterns_in(list(vars(value).values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from patterns_in([getattr(value, field.name) for field in dataclasses.fields(value)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINE)
def test_what_the_engine_looks_for_in_a_line_costs_what_its_length_does(name: str) -> None:
    for module in ENGINE[name]:
        with contextlib.suppress(ModuleNotFoundError):
            patterns = list(patterns_in(importlib.import_module(module)))
            break
    assert patterns
    for pattern in patterns:
        for again in ENGINE_PIECES:
            why = costs_too_much(pattern.search, "", again, "")
            assert not why, f"{pattern.pattern} on {again!r}: {why}"


# The same is masked. The patterns were these, quadratic and tried on every text, and are the measure still.

_FIELD = (
    r"(?:(?:[\w.-]*(?:hf|hub|auth|access|api|session|refresh|security|bearer)[_-]?)?token"
    r"|[\w.-]*(?:secret|passw(?:or)?d|passphrase|credential|api[_-]?key|access[_-]?key|private[_-]?key"
    r"|auth[_-]?key|signature)(?:[_-](?:id|key|value))?s?)"
)
WORD = r"(?!(?:[a-z]{8,15}|[a-z]{1,20}(?:_[a-z]{1,20}){1,6})\b)"  # `hf_overrides` is an option
PLAIN = (
    re.compile(rf"\b(?:hf_{WORD}|sk-|rpa_|gh[pousr]_|github_pat_|AKIA|AIza|xox[bp]-)[A-Za-z0-9_-]{{8,}}"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
    re.compile(r"(?i)(?P<keep>\bbearer +)[A-Za-z0-9._~+/=-]{6,}"),
    re.compile(r"(?P<keep>\w://)(?:[^/\s'\"]+|[^/\s'\":\[]*:(?!\d{2,5}/)(?:[^/\s'\"]|/(?!/))+)(?=@)"),
    re.compile(rf"(?i)(?P<keep>[?&;](?:{_FIELD}|sig|key|auth)=)[^&\s'\";]+"),
    re.compile(rf"(?i)(?P<keep>[\"'](?:{_FIELD}|auth(?:orization)?)\\?[\"']\s*:\s*\\?[\"'])(?:\\.|[^\"'\\])+"),
    re.compile(rf"(?i)(?P<keep>--(?:{_FIELD}|api-key|hf-token)[ =]'?)[^\s'\-(][^\s']*"),
)
KNOWN = ("aaaaaaaa", "aaaaaaaa=b", "token: a", 'a"token')
NAMES = (
    "HF", "access", "api_", "session-", "refresh", "security", "bearer_", "passwd", "password", "passphrase", "key",
    "credential", "access_key", "private-key", "signature", "-id", "_value", "s", "sig", "auth", "token", "max_tokens",
)  # fmt: skip
TOKENS = (
    "rpa_aaaaaaaa", "ghp_aaaaaaaa", "gho_aaaaaaaa", "ghu_aaaaaaaa", "ghs_aaaaaaaa", "ghr_aaaaaaaa",
    "github_pat_aaaaaaaa", "AIzaaaaaaaaa", "xoxb-aaaaaaaa", "xoxp-aaaaaaaa", "eyJaaaaaaaa.aaaaaaaa.a", "aaaaaa",
    "BEARER aaaaaa", "u:p@h", "to\N{KELVIN SIGN}en", "bearer  ", "sİgnature",
)  # fmt: skip


def masked_plainly(text: str, known: tuple[str, ...]) -> str:
    forms = sorted({form for value in known for form in (value, json.dumps(value)[1:-1])}, key=len, reverse=True)
    if forms:
        text = re.sub("|".join(map(re.escape, forms)), MASK, text)
    for pattern in PLAIN:
        text = pattern.sub(lambda found: (found.groupdict().get("keep") or "") + MASK, text)
    return text


# What the names of an option, of a field, and the parts of a JSON web token are made of.
OPTION = ("-", "--", "a", "_", ".", "token", "secret", "s", "=", "'", " ", "hub", "-id", "api", "key", "=x")
FIELD = (
    '"', "'", "\\", ":", " ", "token", "a", "hf_", "secret", "s", "auth", "authorization", "?", "&", "=", ";", "key",
    "sig", "\n", "x",
)  # fmt: skip
WEB_TOKEN = ("eyJ", "-", "a", "aaaaaaaa", ".", "é", "_", " ")
BEFORE = ("--", "---", "-", "?", "&", ";", '"', "'", '\\"', "a--", "--a--", "a")
BETWEEN = ("=", " ", " '", "='", '": "', "': '", '\\": \\"', '" :\n"', "-=", ":")
VALUES = ("plain", "-x", "a'b", 'a\\"b', "a&b", "é", "--token=x", "")


def fields(chance: random.Random) -> Iterator[str]:
    """One or two, of which some are whole and well-formed."""
    for _ in range(chance.randint(1, 2)):
        name = "".join(chance.choices((*NAMES, "secret", "-", "_", ".", "a"), k=chance.randint(1, 3)))
        yield chance.choice(BEFORE) + chance.choice((name, name.upper())) + chance.choice(BETWEEN)
        yield chance.choice(VALUES) + chance.choice(("", " ", "'", '"'))


def texts(count: int, seed: int) -> Iterator[str]:
    chance = random.Random(seed)
    for number in range(count):
        if number % 2:
            yield "".join(fields(chance))
        else:
            pieces = chance.choice((PIECES, PIECES + NAMES + TOKENS, OPTION, FIELD, WEB_TOKEN))
            yield "".join(chance.choices(pieces, k=chance.randint(1, 14)))


@pytest.mark.slow
@pytest.mark.parametrize("known", [(), KNOWN], ids=["no known secret", "known secrets"])
def test_the_same_is_masked_as_by_the_plain_patterns(known: tuple[str, ...]) -> None:
    mask, count = Mask({}, known), 0
    for text in texts(20_000, seed=len(known)):
        assert mask(text) == masked_plainly(text, known), text
        count += mask(text) != text
    assert count > 2_000  # secrets there were


def test_where_there_is_no_sign_there_is_no_secret() -> None:
    """Of each pattern by itself, for a text of one kind alone."""
    counts = [0] * len(SECRET_SHAPES)
    for text in texts(10_000, seed=7):
        for number, (sign, pattern) in enumerate(SECRET_SHAPES):
            if not sign(text, secrets._lower(text)):
                assert not pattern.search(text), (number, text)
            elif pattern.search(text):
                counts[number] += 1
    assert min(counts) > 10


def test_what_is_the_same_letter_for_a_pattern_is_the_same_for_a_sign() -> None:
    """`re` takes more than two characters for an i, a k and an s."""
    letters = re.findall(r"(?i)[a-z]", "".join(map(chr, range(0x80, sys.maxunicode + 1))))
    assert set(letters) == set("ıſİ\N{KELVIN SIGN}")
    for odd in letters:
        (plain,) = (letter for letter in "iks" if re.fullmatch(letter, odd, re.IGNORECASE))
        assert secrets._lower(f"A{odd}b") == f"a{plain}b"


def test_what_follows_an_option_with_a_secrets_name_is_one() -> None:
    words = [
        "vllm",
        "serve",
        "m",
        "--zz-password",
        "supersecret",
        "--aws-secret-access-key",
        "abc",
        "--max-num-seqs",
        "4",
    ]
    shown = Mask({}).command([*words, "--tokenizer", "org/name", "--max-num-batched-tokens", "99", "--hf-token", "--x"])
    assert shown == (
        "vllm serve m --zz-password '****' --aws-secret-access-key '****' --max-num-seqs 4 "
        "--tokenizer org/name --max-num-batched-tokens 99 --hf-token --x"
    )


def test_a_field_of_json_that_lets_in_is_masked() -> None:
    for name in ("auth", "auth_key", "authKey", "Authorization", "redis_auth_key"):
        assert (
            Mask({})(f'{{"{name}": "plain", "auth_type": "basic"}}') == f'{{"{name}": "{MASK}", "auth_type": "basic"}}'
        )
    assert Mask({})('{"author": "somebody", "auth": true}') == '{"author": "somebody", "auth": true}'


def test_a_secret_is_masked_without_the_white_space_around_it() -> None:
    assert Mask({"MY_SECRET": " plain-secret\n"})("a plain-secret b") == f"a {MASK} b"
