"""Finds variables that nothing reads and that were probably meant for us: near misses, removed ones, other workers'.

An environment is full of other programs' variables, so a near miss has to be near: `MAX_MODEL_LENGTH` is reported,
`MODEL_DIR` is not. A warning that is missing costs hours, and one that is wrong costs a line at each start.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property

from supervisor.settings.knobs import KNOBS
from supervisor.settings.names import BY_ALIAS, NEAR_MISSES, NO_EFFECT, OWNED, REMOVED, REMOVED_VARIABLES, SM_PREFIX
from supervisor.vllm.catalogue import Catalogue, key_of
from supervisor.vllm.values import FALSE_WORDS, read_bool

SERVICE_LINK = re.compile(NEAR_MISSES["service links"])
PREFIXES, FILLERS, LOOKALIKES = (tuple[str, ...](NEAR_MISSES[part]) for part in ("prefixes", "fillers", "others"))
MIN_LIKENESS = 0.8  # of a misspelt name to a known one, from 0 to 1
LMI_PREFIX = "OPTION_"  # LMI puts this before the names of vLLM's options


class KnownNames(frozenset[str]):
    """Finds known names by a word that they share with another: comparing with each of 400 would take 50 ms."""

    @cached_property
    def by_word_start(self) -> dict[str, set[str]]:
        names: dict[str, set[str]] = defaultdict(set)
        for name in self:
            for word in name.split("_"):
                names[word[:4]].add(name)
        return names

    @cached_property
    def by_letters(self) -> dict[str, str]:
        return {name.replace("_", ""): name for name in self if "_" in name}

    def guess(self, name: str) -> str | None:
        """Returns the known name that `name` is most probably meant to be, if any."""
        upper = name.upper().replace("-", "_")
        if found := upper if upper in self else self.by_letters.get(upper.replace("_", "")):  # MAXMODELLEN
            return found
        for prefix in PREFIXES:
            rest = upper.removeprefix(prefix)
            if rest != upper and rest in self and ("_" in rest or prefix in ("VLLM_", "SUPERVISOR_")):
                return rest
        if "_" in upper and f"SUPERVISOR_{upper}" in self:
            return f"SUPERVISOR_{upper}"
        words = upper.split("_")
        candidates = {name for word in words for name in self.by_word_start[word[:4]]}
        scores = [(score, name) for name in candidates if (score := _likeness(words, name.split("_"))) >= MIN_LIKENESS]
        return max(scores)[1] if scores else None


def _likeness(words: list[str], known_words: list[str]) -> float:
    """Returns the likeness of the least like pair of words, from 0 to 1."""
    if len(words) == len(known_words) == 1 and min(len(words[0]), len(known_words[0])) < 6:
        return 0.0
    if len(words) == len(known_words):
        return min(map(_word_likeness, words, known_words))
    shorter, longer = sorted((words, known_words), key=len)
    reductions = [longer[:index] + longer[index + 1 :] for index, word in enumerate(longer) if word in FILLERS]
    return 0.95 if len(shorter) > 1 and shorter in reductions else 0.0


def _word_likeness(word: str, known_word: str) -> float:
    if word[:1] != known_word[:1]:  # who mistypes the first letter? BATCH_SIZE is not UBATCH_SIZE
        return 0.0
    shorter, longer = sorted((word, known_word), key=len)
    if len(shorter) >= 3 and longer.startswith(shorter):  # LENGTH, CONF, MEM
        return 0.95 if word != known_word else 1.0
    return difflib.SequenceMatcher(None, word, known_word, autojunk=False).ratio()


def nearest_hint(word: str, choices: Collection[str], likeness: float = 0.6) -> str:
    """Returns '; did you mean X?' for a word that is wrong in any case, or an empty text."""
    matches = difflib.get_close_matches(word, choices, 1, likeness)
    return f"; did you mean {matches[0]}?" if matches else ""


def missing_hint(key: str, catalogue: Catalogue) -> str:
    """Returns what to say of an option that vLLM does not have, and an empty text where it is like no other."""
    return f" any more: {REMOVED[key]}" if key in REMOVED else nearest_hint(key, catalogue.by_key, MIN_LIKENESS)


def check_unread(environ: Mapping[str, str], read_names: Collection[str], catalogue: Catalogue) -> Iterator[str]:
    """Yields a line for each variable that is set, not among `read_names`, and not just another program's."""
    vllm_names, our_names = KnownNames(catalogue.environment), KnownNames(read_names)
    switches = {option.variable for option in catalogue.by_key.values() if option.is_switch}
    switches |= {knob.variable for knob in KNOBS if knob.read is read_bool}
    for name, value in environ.items():
        is_link = SERVICE_LINK.search(name) or (name.endswith("_PORT") and "://" in value)
        if not value or is_link or name in read_names or name in vllm_names or name in LOOKALIKES:
            continue
        if name in NO_EFFECT:
            yield f"{name} has no effect: {NO_EFFECT[name]}"
        elif name in REMOVED_VARIABLES and vllm_names:
            yield f"{name} has no effect in vLLM {catalogue.version}: {REMOVED_VARIABLES[name]}"
        elif name.startswith(LMI_PREFIX) and name.removeprefix(LMI_PREFIX) in our_names:
            yield f"{name} has no effect: it is LMI's; set {name.removeprefix(LMI_PREFIX)}"
        elif name[:3].upper() == "NO_" and BY_ALIAS.get(rest := name[3:].upper(), rest) in switches:  # --no-enable-lora
            opposite = "true" if value.strip().lower() in FALSE_WORDS else "false"
            yield f"{name} has no effect: nothing reads it; did you mean {rest}={opposite}?"
        elif guess := our_names.guess(name) or (vllm_names.guess(name) if name.startswith("VLLM_") else None):
            hint = OWNED.get(key_of(guess)) if guess != "PORT" else None
            yield f"{name} has no effect: {hint or f'nothing reads it; did you mean {guess}?'}"
        elif name.startswith(("SUPERVISOR_", SM_PREFIX, "VLLM_RUNPOD_")):
            yield f"{name} has no effect: there is no such setting (`supervisor explain` shows those there are)"
        elif name.startswith("VLLM_") and vllm_names:
            yield f"{name} has no effect: vLLM {catalogue.version} reads no such variable, unless a plugin does"
