"""deploy/prometheus, deploy/grafana, docs/operations.md and what a running supervisor tells at /metrics fit each other.

Prometheus' own promtool parses and tests the rules, and judges our names. The dashboard's form is checked by the models
that Grafana makes of its schema, where they are there, and by rules of our own: there is no Grafana to load it into.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from supervisor.gateway.counts import OUTCOMES
from supervisor.gateway.metrics import STATES
from supervisor.local_runpod.child import runpod_variables as simulated
from supervisor.settings.knobs import KNOBS
from supervisor.vllm import catalogue
from supervisor.vllm.installed import PINNED
from tests.harness import ROOT, Supervisor, wait_until

PROMETHEUS = ROOT / "deploy" / "prometheus"
# libyaml's, where it is there: every process that collects these tests reads the files.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
RULES = [
    rule for group in yaml.load((PROMETHEUS / "rules.yaml").read_text(), LOADER)["groups"] for rule in group["rules"]
]
TESTS = yaml.load((PROMETHEUS / "rules_test.yaml").read_text(), LOADER)["tests"]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
PAGE = (ROOT / "docs/operations.md").read_text()
# What vLLM tells, by its own names; tests/vllm/test_series.py compares the list with the real one.
VLLMS = frozenset((Path(__file__).parent / "vllm_series.txt").read_text().split())
# Of Prometheus itself.
ITS_OWN = {"up", "ALERTS"}
# What stands for Grafana's variables while a query is parsed.
VARIABLES = {"$job": "llm", "$instance": ".*", "$route": ".*", "$__rate_interval": "1m"}


@pytest.fixture(scope="session")
def promtool() -> str:
    """Its path. Without it, the tests that need it are skipped, loudly; with CI=true they fail."""
    found = shutil.which("promtool", path=f"{sys.prefix}/bin:{os.environ.get('PATH', '')}")
    if found is None:
        text = "promtool is not here, and nothing parses the alert rules: Debian has it in promtool or prometheus"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    return found


def run(*command: str | Path, cwd: Path = PROMETHEUS, given: str = "") -> str:
    """What it said; it must be content."""
    done = subprocess.run(
        command, cwd=cwd, input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def told() -> Iterator[str]:
    """/metrics of a supervisor to which most of what is counted has happened. It serves the queue too, of a RunPod that
    nobody reaches: the series of jobs are there from the beginning (tests/queue/test_worker.py counts some).
    """
    environ = {
        "SUPERVISOR_MODE": "queue",
        "SUPERVISOR_RESPONSE_CACHE": "1MB",
        **simulated("http://127.0.0.1:9/v2/local"),
    }
    with Supervisor("m", environ=environ) as supervisor:
        supervisor.ready()
        body = {"model": "m", "prompt": "hi", "max_tokens": 4, "stream": True}
        assert supervisor.client.post("/v1/completions", json=body).status_code == 200
        os.kill(supervisor.engine(), signal.SIGKILL)
        assert supervisor.client.post("/v1/completions", json=body).status_code == 200
        supervisor.engine_pid = supervisor.client.get("/status").json()["pid"]
        yield supervisor.client.get("/metrics").text


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def queries() -> Iterator[tuple[str, str]]:
    """Where it is asked -> PromQL, of the rules and of the dashboard."""
    yield from ((rule["alert"], rule["expr"]) for rule in RULES)
    asked = [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]
    asked += [(note["name"], note["expr"]) for note in DASHBOARD["annotations"]["list"]]
    for title, expr in asked:
        plain = expr
        for name, value in VARIABLES.items():
            plain = plain.replace(name, value)
        yield title, plain


# Prometheus' own judgement


def test_the_rules_are_rules(promtool: str) -> None:
    assert f"{len(RULES)} rules found" in run(promtool, "check", "rules", "--lint-fatal", "rules.yaml")


@pytest.mark.slow  # Prometheus' own program goes through hours of each
def test_each_alert_fires_when_it_should(promtool: str) -> None:
    run(promtool, "test", "rules", "rules_test.yaml")


def test_each_alert_is_tested_both_ways() -> None:
    checks = [(test, check) for test in TESTS for check in test["promql_expr_test"]]
    fires = {label for _, check in checks for sample in check["exp_samples"] for label in [sample["labels"]]}
    assert fires == {f'{{alertname="{rule["alert"]}"}}' for rule in RULES}
    assert {check["expr"] for _, check in checks} == {'count by (alertname) (ALERTS{alertstate="firing"})'}
    assert sum(not check["exp_samples"] for _, check in checks) > len(RULES)


def test_the_configuration_is_one(promtool: str, tmp_path: Path) -> None:
    folder = shutil.copytree(PROMETHEUS, tmp_path / "prometheus")
    (folder / "llm-key").write_text("key\n")
    said = run(promtool, "check", "config", "prometheus.yaml", cwd=folder)
    assert f"{len(RULES)} rules found" in said
    (job,) = yaml.safe_load((folder / "prometheus.yaml").read_text())["scrape_configs"]
    monitor = yaml.safe_load((ROOT / "deploy/kubernetes/pod-monitor.yaml").read_text())
    for name in (job["job_name"], f"namespace/{monitor['metadata']['name']}"):
        assert re.fullmatch("(.+/)?llm", name)
        assert all('job=~"(.+/)?llm"' in rule["expr"] for rule in RULES if "up{" in rule["expr"])


def test_our_series_are_named_as_prometheus_likes_it(promtool: str, told: str) -> None:
    ours = told[: told.index("# HELP vllm:")]
    assert run(promtool, "check", "metrics", given=ours) == ""


def test_every_query_is_promql(promtool: str, tmp_path: Path) -> None:
    rows = [{"record": f"query:{number}", "expr": expr} for number, (_, expr) in enumerate(queries())]
    assert len(rows) > 50
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rows}]}))
    run(promtool, "check", "rules", tmp_path / "all.yaml")


# What is asked for exists


def selectors(expr: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each series that is asked for, with what is asked of its labels."""
    for name, braces in re.findall(r"\b(up|ALERTS|(?:supervisor_|vllm:)[a-zA-Z_:]+)(?:\{([^}]*)\})?", expr):
        yield name, dict(re.findall(r'(\w+)=~?"([^"]*)"', braces))


def known(text: str) -> dict[str, set[str]]:
    """Every series that /metrics tells -> the labels of its samples; none where it has no sample yet."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}
        for end in ends.get(family.type, [""]):
            found.setdefault(family.name + end, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_series_that_is_asked_for_exists(told: str) -> None:
    ours = {name: labels for name, labels in known(told).items() if name.startswith("supervisor_")}
    assert len(ours) > 25
    for where, expr in queries():
        asked = list(selectors(expr))
        assert asked, where
        for name, labels in asked:
            assert name in ours or name in VLLMS or name in ITS_OWN, f"{where}: {name}"
            if ours.get(name):
                assert set(labels) - {"job", "instance"} <= ours[name], f"{where}: {name}{labels}"
            if name == "supervisor_engine_state" and "state" in labels:
                assert set(labels["state"].split("|")) <= set(STATES), where
            assert set(labels.get("outcome", OUTCOMES[0]).split("|")) <= set(OUTCOMES), where


def test_the_fake_tells_what_it_tells_by_vllms_names(told: str) -> None:
    theirs = {name for name in known(told) if name.startswith("vllm:")}
    assert theirs - VLLMS == set()


def test_every_series_of_ours_is_watched(told: str) -> None:
    """By the dashboard or the rules; sums and counts come with their buckets."""
    asked = {name for _, expr in queries() for name, _ in selectors(expr)}
    ours = {name for name in known(told) if name.startswith("supervisor_")}
    rest = {name for name in ours - asked if not name.endswith(("_sum", "_count"))}
    assert rest == {"supervisor_info", "supervisor_engine_transitions_total"}


# The dashboard's form


def test_panels_have_what_grafana_asks_for() -> None:
    assert {panel["type"] for panel in panels()} == {"bargauge", "stat", "state-timeline", "timeseries"}
    assert DASHBOARD["schemaVersion"] >= 39 and DASHBOARD["uid"] and DASHBOARD["title"]
    datasource = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels():
        title = panel["title"]
        assert {"id", "title", "description", "gridPos", "options", "fieldConfig"} <= set(panel), title
        assert set(panel["fieldConfig"]) == {"defaults", "overrides"}, title
        assert panel["fieldConfig"]["defaults"]["unit"], title
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(set(letters)) == len(letters), title
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == datasource, title
        assert all(target["expr"] and target["legendFormat"] is not None for target in panel["targets"]), title
    for panel in DASHBOARD["panels"]:
        assert panel["type"] != "row" or (panel["collapsed"], panel["panels"]) == (False, [])


def test_panels_lie_beside_each_other() -> None:
    places = {panel["id"]: panel["gridPos"] for panel in DASHBOARD["panels"]}
    assert len(places) == len(DASHBOARD["panels"])
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(set(titles)) == len(titles)
    for place in places.values():
        assert set(place) == set("hwxy") and min(place.values()) >= 0
        assert place["w"] > 0 and place["h"] > 0 and place["x"] + place["w"] <= 24
    for one, other in combinations(places.values(), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_variables_of_the_dashboard_are_defined_and_used() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    text = json.dumps([DASHBOARD["panels"], DASHBOARD["annotations"], *variables.values()])
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__all"}
    assert used == set(variables) == {"datasource", "job", "instance", "route"}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    for panel in panels():
        for target in panel["targets"]:
            for name, labels in selectors(target["expr"]):
                common = {"job": "$job", "instance": "$instance"}
                by_route = re.match("supervisor_(requests_total|request_seconds|first_byte)", name)
                assert labels.items() >= (common | {"route": "$route"} if by_route else common).items(), panel["title"]


def test_states_of_the_timeline_have_their_names() -> None:
    (panel,) = [panel for panel in panels() if panel["type"] == "state-timeline"]
    (target,), (mapping,) = panel["targets"], panel["fieldConfig"]["defaults"]["mappings"]
    numbers = dict(re.findall(r'(\d) \* supervisor_engine_state\{state="(\w+)"', target["expr"]))
    assert list(numbers.values()) == list(STATES)
    assert {number: option["text"] for number, option in mapping["options"].items()} == numbers


def dropped(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Where `kept` has not what `given` has."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            yield from dropped(value, kept.get(name), f"{path}/{name}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, pair in enumerate(zip(given, kept, strict=True)):
            yield from dropped(*pair, f"{path}/{number}")
    elif given != kept:
        yield path


def test_grafanas_own_models_take_it() -> None:
    """They are made of its schema, and pass over fields that they don't know: those are missing from what comes out."""
    from grafana_foundation_sdk.cog import plugins  # noqa: PLC0415  # half a second
    from grafana_foundation_sdk.cog.encoder import JSONEncoder  # noqa: PLC0415
    from grafana_foundation_sdk.models.dashboard import Dashboard  # noqa: PLC0415

    plugins.register_default_plugins()

    def missing(content: dict[str, Any]) -> set[str]:
        taken = Dashboard.from_json(json.loads(json.dumps(content)))
        return set(dropped(content, json.loads(JSONEncoder().encode(taken))))

    # How an alert is written beside a panel is the Prometheus plugin's, and not in the schema.
    theirs = {"/annotations/list/0/titleFormat", "/annotations/list/0/textFormat"}
    assert missing(DASHBOARD) == theirs
    content = json.loads(json.dumps(DASHBOARD))
    content["panels"][1]["optoins"] = content["panels"][1].pop("options")
    content["panels"][1]["targets"][0]["legend"] = "x"
    assert missing(content) == theirs | {"/panels/1/optoins", "/panels/1/targets/0/legend"}


# The page

KNOWN = {knob.variable for knob in KNOBS} | {
    option.variable for option in catalogue.parse((catalogue.FLAGS / f"{PINNED}.json").read_text()).by_key.values()
}
ROW = re.compile(r'^\| <a id="(\w+)"></a>`(\w+)`(, critical)? \| (\d+) min \|', re.M)


def test_the_page_has_every_alert() -> None:
    rows = [(name, bool(critical), f"{minutes}m") for _, name, critical, minutes in ROW.findall(PAGE)]
    assert rows == [(rule["alert"], rule["labels"]["severity"] == "critical", rule["for"]) for rule in RULES]
    assert all(anchor == name.lower() for anchor, name, *_ in ROW.findall(PAGE))
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_what_is_to_be_changed_exists() -> None:
    for text in (PAGE, *(rule["annotations"]["description"] for rule in RULES)):
        named = set(re.findall(r"\b(?:SUPERVISOR|MAX|GPU|ENFORCE)_[A-Z_]+\b", text))
        assert named - KNOWN == set()
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", PAGE, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= anchors


def test_timeouts_of_the_page_are_the_defaults() -> None:
    told = dict(re.findall(r"^\| `(SUPERVISOR_\w+_TIMEOUT)` \| (\d+) s \|", PAGE, re.M))
    assert told == {knob.variable: knob.default for knob in KNOBS if knob.variable.endswith("_TIMEOUT")}


@pytest.mark.slow
def test_prometheus_operator_takes_the_rules() -> None:
    """As the page's command makes an object of them."""
    from cloudcoil.models.prometheus_operator.v1 import PrometheusRule  # noqa: PLC0415  # 1 s, for this test alone

    (command,) = re.findall(r"^```\n(\{ printf .*?)^```$", (PROMETHEUS / "README.md").read_text(), re.M | re.S)
    content = yaml.safe_load(run("bash", "-ec", f"kubectl() {{ cat; }}; {command}", cwd=ROOT))
    assert PrometheusRule.model_validate(content).model_dump(mode="json", by_alias=True, exclude_unset=True) == content
    assert sum(len(group["rules"]) for group in content["spec"]["groups"]) == len(RULES)


@pytest.mark.slow
def test_keys_are_rotated_as_the_page_says(tmp_path: Path) -> None:
    section = PAGE[PAGE.index("## Key rotation") :]
    add, look, remove = re.findall(r"^   ```\n(.*?)^   ```$", section, re.M | re.S)
    keys = tmp_path / "keys"
    keys.write_text("the-old-key-1")  # without an end of the line, as some editors leave it
    inode = keys.stat().st_ino
    with Supervisor("m", environ={"SUPERVISOR_API_KEYS": f"@{keys}"}) as supervisor:
        supervisor.ready()
        given = f"KEYS='{keys}' PID={supervisor.process.pid} URL='{supervisor.client.base_url}' OLD=the-old-key-1\n"

        def ask(key: str) -> int:
            return supervisor.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        run("bash", "-euc", given + add)
        old, new = keys.read_text().split()
        supervisor.says("keys read again: 2 for clients")
        assert json.loads(run("bash", "-euc", f"{given}NEW={new}\n{look}", cwd=tmp_path).partition("\n")[0])["data"]
        assert (ask(old), ask(new)) == (200, 200)
        slow = {"Authorization": f"Bearer {old}", "X-Fake": json.dumps({"token_interval": 0.05})}
        body = {"model": "m", "prompt": "hi", "max_tokens": 20, "stream": True}
        with supervisor.client.stream("POST", "/v1/completions", json=body, headers=slow) as answer:
            lines = answer.iter_lines()
            next(lines)
            run("bash", "-euc", given + remove)
            supervisor.says("keys read again: 1 for clients")
            assert "data: [DONE]" in list(lines)  # what runs is not stopped
        wait_until(lambda: (ask(old), ask(new)) == (401, 200), "the new key alone")
        assert keys.read_text().split() == [new] and keys.stat().st_ino == inode
        said = supervisor.output
        assert old not in said and new not in said


def test_the_two_limits_are_told_apart_as_the_page_says() -> None:
    environ = {"SUPERVISOR_MAX_CONCURRENCY": "1", "SUPERVISOR_MAX_WAITING": "0", "SUPERVISOR_RATE_LIMIT": "3"}
    with Supervisor("m", environ=environ) as supervisor, supervisor.connect() as running:
        supervisor.ready()
        running.send(b"GET /fake/hang HTTP/1.1\r\nHost: h\r\n\r\n")
        wait_until(lambda: supervisor.client.get("/status").json()["in_flight"] == 1, "the running request")
        answers = [supervisor.client.get("/v1/models") for _ in range(3)]
        codes = [answer.json()["error"]["code"] for answer in answers]
        assert codes == ["too_many_requests", "too_many_requests", "rate_limit_exceeded"]
        assert all(answer.status_code == 429 and int(answer.headers["retry-after"]) > 0 for answer in answers)
        assert all(f"`{code}`" in PAGE for code in codes)
        for path in ("/ping", "/health", "/status", "/metrics"):
            assert supervisor.client.get(path).status_code == 200
