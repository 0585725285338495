"""vLLM's own arguments as the user gave them: SUPERVISOR_EXTRA_ARGS, and what follows `--` on the command line.

They go to vLLM as they are, after everything else. They are read here all the same: what is wrong with them is told
now instead of ten seconds into vLLM's start, and what they override is not passed twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from supervisor.settings.catalogue import Catalogue, Option, key_of
from supervisor.settings.names import OWNED, REMOVED
from supervisor.settings.respelled import respelled
from supervisor.settings.typos import CLOSE, nearest
from supervisor.settings.values import BadValue

# Docker's own options, in the arguments of what it runs.
DOCKERS = frozenset({
    "-d", "-e", "-i", "-it", "-p", "-t", "-v", "--cap-add", "--cpus", "--detach", "--env", "--env-file", "--gpus",
    "--ipc", "--memory", "--mount", "--name", "--net", "--network", "--privileged", "--publish", "--restart", "--rm",
    "--runtime", "--shm-size", "--ulimit", "--volume",
})  # fmt: skip
NEGATIVE_NUMBER = re.compile(r"-\d+(\.\d+)?")


@dataclass(frozen=True, slots=True)
class Given:
    """One option among raw arguments. `name`: the variable that it stands for, or what was written (`--x.y`)."""

    option: Option
    name: str
    value: object


class RawArguments:
    """Reads `tokens`; `given`, `problems` and `warnings` are what came of it."""

    def __init__(self, tokens: Sequence[str], source: str, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.source = source
        self.given: list[Given] = []
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._rest = list(tokens)
        while self._rest:
            token = self._rest.pop(0)
            if token.startswith("-") and token != "-":  # noqa: S105  # no password
                self._option(token)
            else:
                self._problem(token, "there is no option before it that takes it")

    def _problem(self, what: str, why: str) -> None:
        self.problems.append(f"{what} ({self.source}): {why}")

    def _values(self, limit: int | None = None) -> list[str]:
        """Takes what follows, up to the next option."""
        taken: list[str] = []
        while self._rest and len(taken) != limit:
            if self._rest[0].startswith("-") and not NEGATIVE_NUMBER.fullmatch(self._rest[0]):
                break
            taken.append(self._rest.pop(0))
        return taken

    def _option(self, token: str) -> None:
        name, glued, value = token.partition("=")
        base, dotted, _ = name.partition(".")
        found = self._find(base)
        if found is None and base in DOCKERS:
            self._values()
            self._problem(base, "this is an option of docker's: it stands before the image's name, not in here")
            return
        if found is None:
            values = self._values()
            if base.startswith("--") or not self._is_short(base, values):
                self._unknown(base)
            return
        option, negated = found
        if option.key in OWNED:
            self._values()
            self._problem(base, f"can't be passed to vLLM: {OWNED[option.key]}")
        elif option.key == "model":
            self._values()
            self._problem(base, "can't be passed to vLLM: set MODEL, or name the model after `supervisor up`")
        elif option.kind in ("pair", "switch"):
            if glued:
                self._problem(token, f"{base} takes no value")
            self.given.append(Given(option, option.variable, not negated))
        elif dotted:
            values = [value] if glued else self._values(1)
            if not values:
                self._problem(name, "a value is missing")
            self.given.append(Given(option, name, "".join(values)))
        else:
            self._valued(base, option, [value] if glued else self._values(None if option.kind == "list" else 1))

    def _valued(self, name: str, option: Option, values: list[str]) -> None:
        if not values and option.kind != "optional":
            self._problem(name, "a value is missing")
            return
        today = respelled(option, values[0]) if len(values) == 1 else None
        try:
            if today is not None:
                self._problem(f"{name} {values[0]}", f"write {today!r}")
                return
            for value in values:
                option.check(value)
        except BadValue as error:
            self._problem(f"{name} {' '.join(values)}", f"expected {error}")
            return
        several = option.kind in ("list", "append")
        shown = name if option.kind == "append" else option.variable
        self.given.append(Given(option, shown, tuple(values) if several else "".join(values)))

    def _find(self, base: str) -> tuple[Option, bool] | None:
        """The option, and whether it is its `--no-` form. As argparse does, takes a beginning for the whole."""
        if not base.startswith("--"):
            short = [option for option in self.catalogue.by_key.values() if base in option.short]
            return (short[0], False) if short else None
        key = key_of(base)
        if option := self.catalogue.find(key):
            return option, False
        for option in self.catalogue.by_key.values():
            if f"--{key.replace('_', '-')}" in option.off:
                return option, True
        positive = self.catalogue.by_key.get(key.removeprefix("no_"))
        if key.startswith("no_") and positive is not None and positive.kind == "pair":
            return positive, True
        beginnings = [option for option in self.catalogue.by_key.values() if option.key.startswith(key)]
        return (beginnings[0], False) if len(beginnings) == 1 else None

    def _is_short(self, base: str, values: list[str]) -> bool:
        """`-O3` and the like, whose value is glued on."""
        shorts = [name for option in self.catalogue.by_key.values() for name in option.short]
        if not shorts:  # this catalogue does not have them
            return True
        return not values and base.startswith(("-O", *shorts))  # vLLM's parser knows -O3 beside its options

    def _unknown(self, base: str) -> None:
        """A misspelt option is a problem. One that is like no other may be one of a vLLM of the user's own."""
        key, version = key_of(base), self.catalogue.version
        if key in REMOVED:
            self._problem(base, f"vLLM {version} has no such option any more: {REMOVED[key]}")
        elif hint := nearest(key, self.catalogue.by_key, CLOSE):
            self._problem(base, f"vLLM {version} has no such option{hint.replace('_', '-')}")
        else:
            self.warnings.append(f"{base} ({self.source}): vLLM {version} has no such option; it is passed as it is")
