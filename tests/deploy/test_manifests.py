"""The manifests in deploy/: each is what its platform takes, and what the supervisor does.

Validated by the platforms' own schemas: Kubernetes (kubernetes-validate), PodMonitor (models made of the operator's
CRD), compose (the Compose Specification's schema, of check-jsonschema), SageMaker (the service's model in botocore, by
which `--cli-input-json` is checked). By rules of our own, made from the reference pages: what Cloud Run has around its
pod (the pod is checked as Kubernetes'), Azure's two files, RunPod's requests, and the kustomization.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from supervisor import __version__
from supervisor.gateway.app import OWN_PATHS
from supervisor.serve import CLOSE_PATIENCE, TERMINATE_PATIENCE
from supervisor.settings.knobs import read_size
from supervisor.settings.names import SM_PREFIX
from supervisor.settings.settings import Arguments, Settings, gather
from supervisor.vllm import catalogue
from supervisor.vllm.installed import PINNED

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.33"
ENGINE = catalogue.parse((catalogue.FLAGS / f"{PINNED}.json").read_text())
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where it is there
# Read by neither the supervisor nor vLLM, and yet needed -> by whom.
OTHERS = {
    "HF_TOKEN": "the hub's client",
    "HF_HOME": "the hub's client",
    "HOME": "whoever writes to ~/.cache",
    "USER": "torch, where the user has no name",
    "RUNPOD_INIT_TIMEOUT": "RunPod",
}


def load(name: str) -> Any:
    text = (DEPLOY / name).read_text()
    return json.loads(text) if name.endswith(".json") else yaml.load(text, LOADER)


@dataclass(frozen=True)
class Probe:
    path: str
    port: object
    seconds: float  # until it has failed for good


@dataclass(frozen=True)
class Place:
    """What a manifest says, whatever its form. `given`: what the platform adds; `grace`: from SIGTERM to SIGKILL."""

    image: str
    environ: Mapping[str, str]
    port: int
    probes: Mapping[str, Probe] = field(default_factory=dict)
    grace: float | None = None
    startup: float | None = None  # how long the platform waits for the first success
    given: Mapping[str, str] = field(default_factory=dict)


def variables(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["name"]: str(row.get("value", "a-secret-value")) for row in rows}


def probe(content: dict[str, Any]) -> Probe:
    http = content["httpGet"]
    return Probe(http["path"], http["port"], content["periodSeconds"] * content["failureThreshold"])


def probes(container: dict[str, Any]) -> dict[str, Probe]:
    return {name[:-5].lower(): probe(container[name]) for name in container if name.endswith("Probe")}


def kubernetes() -> Place:
    pod = load("kubernetes/deployment.yaml")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    found = probes(container)
    grace = pod["terminationGracePeriodSeconds"] - int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    given = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    port = container["ports"][0]["containerPort"]
    return Place(container["image"], variables(container["env"]), port, found, grace, found["startup"].seconds, given)


def compose() -> Place:
    service = load("compose/compose.yaml")["services"]["llm"]
    lines = (DEPLOY / "compose" / service["env_file"]).read_text().splitlines()
    environ = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    environ |= {name: value for name, value in service["environment"].items() if "$" not in value}
    check = service["healthcheck"]
    assert check["test"] == ["CMD", "/opt/supervisor/bin/supervisor", "status"]  # ready is healthy, as at /health
    (port,) = {part for pair in service["ports"] for part in pair.split(":")}
    startup = float(check["start_period"].removesuffix("m")) * 60
    seconds = float(check["interval"].removesuffix("s")) * check["retries"]
    grace = float(service["stop_grace_period"].removesuffix("s"))
    return Place(service["image"], environ, int(port), {"health": Probe("/health", int(port), seconds)}, grace, startup)


def cloud_run() -> Place:
    (container,) = load("cloud-run/service.yaml")["spec"]["template"]["spec"]["containers"]
    port, found = container["ports"][0]["containerPort"], probes(container)
    given = {"PORT": str(port), "K_SERVICE": "llm", "K_REVISION": "llm-1", "K_CONFIGURATION": "llm"}
    environ = variables(container["env"])
    return Place(container["image"], environ, port, found, 10, found["startup"].seconds, given)


def sagemaker() -> Place:
    container = load("sagemaker/model.json")["PrimaryContainer"]
    (variant,) = load("sagemaker/endpoint-config.json")["ProductionVariants"]
    startup = variant["ContainerStartupHealthCheckTimeoutInSeconds"]
    # From its documentation: what it asks for, and how long it waits. entrypoint.sh makes a variable of `serve`.
    asked = {"ping": Probe("/ping", 8080, startup)}
    given = {"SAGEMAKER_BIND_TO_PORT": "8080", "MODEL": "m"}
    return Place(container["Image"], container["Environment"], 8080, asked, 30, startup, given)


def container_app() -> Place:
    properties = load("azure/container-app.yaml")["properties"]
    (container,) = properties["template"]["containers"]
    found = {content["type"].lower(): probe(content) for content in container["probes"]}
    port, grace = properties["configuration"]["ingress"]["targetPort"], properties["template"]
    return Place(container["image"], variables(container["env"]), port, found, grace["terminationGracePeriodSeconds"])


def container_instances() -> Place:
    (container,) = load("azure/container-instances.yaml")["properties"]["containers"]
    content = container["properties"]
    port = content["ports"][0]["port"]
    return Place(content["image"], variables(content["environmentVariables"]), port, probes(content))


def runpod(name: str) -> Place:
    content = load(f"runpod/{name}.json")
    given = {"RUNPOD_ENDPOINT_ID": "e", "RUNPOD_POD_ID": "p"}
    if content["type"] == "QUEUE":
        given |= {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1/"}
    environ = content["env"]
    asked = {"ping": Probe("/ping", int(environ.get("PORT_HEALTH", 8000)), 0)}
    return Place(
        content["image"], environ, int(environ.get("PORT", 8000)), asked,
        startup=float(environ["RUNPOD_INIT_TIMEOUT"]), given=given,
    )  # fmt: skip


PLACES = {
    "kubernetes": kubernetes(),
    "compose": compose(),
    "cloud-run": cloud_run(),
    "sagemaker": sagemaker(),
    "azure/container-app": container_app(),
    "azure/container-instances": container_instances(),
    "runpod/queue": runpod("queue"),
    "runpod/load-balancer": runpod("load-balancer"),
}
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


# What each platform takes


@pytest.mark.parametrize("name", ["deployment", "service", "volume", "disruption-budget", "network-policy"])
def test_kubernetes_takes_it(name: str) -> None:
    kubernetes_validate.validate(load(f"kubernetes/{name}.yaml"), KUBERNETES, strict=True)


def test_a_misspelt_field_is_found() -> None:
    content = load("kubernetes/deployment.yaml")
    content["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        kubernetes_validate.validate(content, KUBERNETES, strict=True)


@pytest.mark.slow
@pytest.mark.slow
def test_prometheus_operator_takes_it() -> None:
    """The models pass over fields that they don't know: those are missing from what comes out."""
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor  # noqa: PLC0415  # 1 s, for this test alone

    content = load("kubernetes/pod-monitor.yaml")
    assert PodMonitor.model_validate(content).model_dump(mode="json", by_alias=True, exclude_unset=True) == content


def test_kustomize_takes_it() -> None:
    content = load("kubernetes/kustomization.yaml")
    assert set(content) == {"apiVersion", "kind", "namespace", "resources", "images"}
    others = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(content["resources"]) == others
    (image,) = content["images"]
    assert f"{image['name']}:{image['newTag']}" == PLACES["kubernetes"].image


def test_the_parts_of_the_kubernetes_folder_name_each_other() -> None:
    labels = {"app.kubernetes.io/name": "llm"}
    deployment, service = load("kubernetes/deployment.yaml"), load("kubernetes/service.yaml")
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == labels
    assert service["spec"]["selector"] == labels
    for name in ("disruption-budget", "pod-monitor"):
        assert load(f"kubernetes/{name}.yaml")["spec"]["selector"]["matchLabels"] == labels
    (container,) = pod["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    (endpoint,) = load("kubernetes/pod-monitor.yaml")["spec"]["podMetricsEndpoints"]
    assert {service["spec"]["ports"][0]["targetPort"], endpoint["port"]} == ports
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"]["volumes"] if len(volume) == 2
              and "persistentVolumeClaim" in volume]  # fmt: skip
    assert claims == [load("kubernetes/volume.yaml")["metadata"]["name"]]
    assert service["metadata"]["name"] != "vllm" and pod["spec"]["enableServiceLinks"] is False
    secrets = re.findall(r"llm-keys\b.*", "\n".join((DEPLOY / "kubernetes" / "README.md").read_text().splitlines()))
    assert all(f"{key}=" in secrets[0] for key in ("api", "metrics", "hf-token"))
    progress = deployment["spec"]["progressDeadlineSeconds"]
    assert progress > PLACES["kubernetes"].probes["startup"].seconds


def lets_through(policy: dict[str, Any], address: str, port: int, protocol: str = "TCP") -> bool:
    """Whether a pod under this policy reaches an address outside of the cluster's own pods."""
    for rule in policy["spec"]["egress"]:
        ports = rule.get("ports", [{"port": port, "protocol": protocol}])
        if {"port": port, "protocol": protocol} not in ports:
            continue
        if "to" not in rule:
            return True
        for block in (peer["ipBlock"] for peer in rule["to"] if "ipBlock" in peer):
            target, inside = ipaddress.ip_address(address), ipaddress.ip_network(block["cidr"])
            excepted = any(target in ipaddress.ip_network(cidr) for cidr in block.get("except", ()))
            if target in inside and not excepted:
                return True
    return False


POLICIES = ("kubernetes/network-policy.yaml", "kubernetes-multinode/network-policy.yaml")
OF_OUR_OWN_NETWORK = (
    "169.254.169.254", "169.254.170.2", "fd00:ec2::254", "fe80::1",  # clouds' metadata, with credentials
    "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "100.64.0.1", "127.0.0.1", "0.0.0.0",
    "fc00::1", "fdff::1", "::1", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe",
)  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("address", OF_OUR_OWN_NETWORK)
def test_a_pod_that_fetches_what_clients_name_does_not_reach_its_own_network(name: str, address: str) -> None:
    for port in (80, 443, 8000):
        assert not lets_through(load(name), address, port)


@pytest.mark.parametrize("name", POLICIES)
def test_it_reaches_the_hub_and_names(name: str) -> None:
    policy = load(name)
    for address in ("8.8.8.8", "3.164.1.1", "172.15.0.1", "172.32.0.1", "2600:9000::1"):
        assert lets_through(policy, address, 443)
        assert lets_through(policy, address, 80)
    for address in ("10.96.0.10", "169.254.20.10", "fd00::a"):  # the cluster's DNS, a node's cache of it
        assert lets_through(policy, address, 53, "UDP")
        assert lets_through(policy, address, 53, "TCP")


@pytest.mark.parametrize("name", POLICIES)
def test_the_policy_is_for_the_pods_and_for_what_they_send_alone(name: str) -> None:
    spec = load(name)["spec"]
    labels = {"app.kubernetes.io/name": "llm"}
    assert spec["podSelector"]["matchLabels"] == labels
    assert spec["policyTypes"] == ["Egress"]  # what comes in is the service's, the probes' and Prometheus'
    peers = [peer["podSelector"]["matchLabels"] for rule in spec["egress"] for peer in rule.get("to", ())
             if "podSelector" in peer]  # fmt: skip
    assert peers == ([labels] if "multinode" in name else [])  # ranks talk to each other, on any port


def test_what_is_written_in_a_read_only_container_lies_on_a_volume() -> None:
    (pod,) = [load("kubernetes/deployment.yaml")["spec"]["template"]["spec"]]
    service = load("compose/compose.yaml")["services"]["llm"]
    mounted = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    composed = {volume.split(":")[1] for volume in service["volumes"]} | {"/tmp"}
    assert service["tmpfs"] == ["/tmp:exec"]  # compiled code is loaded from there, and Docker says noexec by itself
    for place, mounts in (("kubernetes", mounted), ("compose", composed)):
        assert "/tmp" in mounts
        for name in ("HOME", "SUPERVISOR_VOLUME"):
            assert any(Path(PLACES[place].environ[name]).is_relative_to(mount) for mount in mounts), name


def test_compose_takes_it() -> None:
    package = distribution("check-jsonschema")
    schema = json.loads(package.locate_file("check_jsonschema/builtin_schemas/vendor/compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    content = load("compose/compose.yaml")
    assert [error.message for error in validator.iter_errors(content)] == []
    content["services"]["llm"]["shm_siz"] = "8gb"
    assert len(list(validator.iter_errors(content))) == 1


def test_cloud_run_takes_it() -> None:
    content = load("cloud-run/service.yaml")
    assert (content["apiVersion"], content["kind"]) == ("serving.knative.dev/v1", "Service")
    template = content["spec"]["template"]
    known = {"minScale", "maxScale", "cpu-throttling", "startup-cpu-boost", "gpu-zonal-redundancy-disabled"}
    assert {name.split("/")[1] for name in template["metadata"]["annotations"]} <= known
    assert all(isinstance(value, str) for value in template["metadata"]["annotations"].values())
    pod = dict(template["spec"])
    assert 1 <= pod.pop("containerConcurrency") <= 1000
    assert pod.pop("timeoutSeconds") <= 3600
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "llm"}, "spec": pod}, KUBERNETES, strict=True
    )
    assert set(pod) == {"nodeSelector", "containers"} and set(pod["nodeSelector"]) == {"run.googleapis.com/accelerator"}
    place = PLACES["cloud-run"]
    assert not {"PORT", "K_SERVICE"} & set(place.environ)  # Cloud Run's own: it refuses them
    assert place.startup is not None and place.startup <= 1800


@pytest.mark.parametrize(
    ("name", "operation"),
    [("model", "CreateModel"), ("endpoint-config", "CreateEndpointConfig"), ("endpoint", "CreateEndpoint")],
)
def test_sagemaker_takes_it(name: str, operation: str) -> None:
    import botocore.session  # noqa: PLC0415 - slow to import, in every process that collects these tests
    from botocore.validate import ParamValidator  # noqa: PLC0415

    shape = botocore.session.Session().get_service_model("sagemaker").operation_model(operation).input_shape
    content = load(f"sagemaker/{name}.json")
    assert ParamValidator().validate(content, shape).generate_report() == ""
    assert ParamValidator().validate(content | {"Nmae": "x"}, shape).has_errors()


def test_the_parts_of_the_sagemaker_folder_name_each_other() -> None:
    (variant,) = load("sagemaker/endpoint-config.json")["ProductionVariants"]
    assert variant["ModelName"] == load("sagemaker/model.json")["ModelName"]
    assert (
        load("sagemaker/endpoint.json")["EndpointConfigName"]
        == (load("sagemaker/endpoint-config.json")["EndpointConfigName"])
    )


OBJECT = {"type": "object", "additionalProperties": False}
TEXT, NUMBER, WHOLE = {"type": "string", "minLength": 1}, {"type": "number"}, {"type": "integer", "minimum": 0}


def of(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """An object's schema: nothing but these fields."""
    return OBJECT | {"properties": required | optional, "required": list(required)}


def some(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


def probe_of(**more: Any) -> dict[str, Any]:
    http = of({"path": TEXT, "port": WHOLE}, scheme=TEXT)
    ten = {"type": "integer", "minimum": 1, "maximum": 10}
    seconds = {"type": "integer", "minimum": 1, "maximum": 240}
    return of(
        more | {"httpGet": http}, initialDelaySeconds=WHOLE, periodSeconds=seconds, timeoutSeconds=seconds,
        failureThreshold=ten,
    )  # fmt: skip


PORTS = some(of({"protocol": {"enum": ["TCP"]}, "port": WHOLE}))
CPU = {"cpu": NUMBER, "memoryInGB": NUMBER}
# From the reference pages: Azure's YAML of container groups (2021-10-01) and of container apps, RunPod's OpenAPI (v2).
INSTANCES = of(
    {
        "name": TEXT, "apiVersion": {"const": "2021-10-01"}, "location": TEXT,
        "properties": of({
            "osType": {"const": "Linux"}, "restartPolicy": {"enum": ["Always", "OnFailure", "Never"]},
            "ipAddress": of({"type": {"enum": ["Public", "Private"]}, "ports": PORTS}),
            "containers": some(of({"name": TEXT, "properties": of(
                {
                    "image": TEXT, "ports": PORTS,
                    "environmentVariables": some(of({"name": TEXT}, value=TEXT, secureValue=TEXT)),
                    "resources": of({"requests": of(CPU, gpu=of({"count": WHOLE, "sku": {"const": "V100"}}))}),
                },
                volumeMounts=some(of({"name": TEXT, "mountPath": TEXT}, readOnly={"type": "boolean"})),
                readinessProbe=probe_of(), livenessProbe=probe_of(),
            )})),
        }, volumes=some(of({"name": TEXT, "secret": {"type": "object"}}))),
    }
)  # fmt: skip
APP = of(
    {
        "type": {"const": "Microsoft.App/containerApps"},
        "identity": of({"type": {"enum": ["SystemAssigned", "UserAssigned"]}}),
        "properties": of({
            "managedEnvironmentId": {"pattern": "^/subscriptions/.*/managedEnvironments/"}, "workloadProfileName": TEXT,
            "configuration": of({
                "activeRevisionsMode": {"enum": ["Single", "Multiple"]},
                "secrets": some(of({"name": TEXT, "keyVaultUrl": {"pattern": "^https://"}, "identity": TEXT})),
                "ingress": of({"external": {"type": "boolean"}, "targetPort": WHOLE, "transport": {"enum": ["http"]}}),
            }),
            "template": of({
                "terminationGracePeriodSeconds": {"type": "integer", "maximum": 600},
                "containers": some(of({
                    "name": TEXT, "image": TEXT, "env": some(of({"name": TEXT}, value=TEXT, secretRef=TEXT)),
                    "resources": of({"cpu": NUMBER, "memory": {"pattern": r"^\d+Gi$"}}),
                    "probes": some(probe_of(type={"enum": ["Startup", "Readiness", "Liveness"]})),
                })),
                "scale": of({
                    "minReplicas": WHOLE, "maxReplicas": WHOLE,
                    "rules": some(of({"name": TEXT, "http": of({"metadata": of({"concurrentRequests": TEXT})})})),
                }),
            }),
        }),
    }
)  # fmt: skip
ENDPOINT = of(
    {
        "name": TEXT, "type": {"enum": ["QUEUE", "LOAD_BALANCER"]}, "image": TEXT,
        "gpu": of({"pools": some(TEXT)}, count=WHOLE, minCudaVersion={"pattern": r"^\d+\.\d+$"}),
        "scaling": of({"type": {"const": "REQUEST_COUNT"}, "requestCount": WHOLE}),
    },
    disk=WHOLE, ports=some({"pattern": r"^\d+/(http|tcp)$"}), workers=of({}, min=WHOLE, max=WHOLE, idleTimeout=WHOLE),
    env={"type": "object", "additionalProperties": TEXT}, timeout=WHOLE, networkVolumes=some(TEXT),
    flashboot={"enum": ["OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT"]}, dataCenterIds=some(TEXT), templateId=TEXT,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("azure/container-instances.yaml", INSTANCES), ("azure/container-app.yaml", APP),
        ("runpod/queue.json", ENDPOINT), ("runpod/load-balancer.json", ENDPOINT),
    ],
)  # fmt: skip
def test_it_has_the_form_that_the_reference_page_gives(name: str, schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    assert [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(load(name))] == []


def test_runpods_endpoints_are_of_the_two_kinds() -> None:
    queue, balancer = load("runpod/queue.json"), load("runpod/load-balancer.json")
    assert (queue["type"], balancer["type"]) == ("QUEUE", "LOAD_BALANCER")
    assert "idleTimeout" not in queue["workers"]  # refused beside REQUEST_COUNT
    assert "PORT" not in queue["env"]
    port = balancer["env"]["PORT"]
    assert (balancer["env"]["PORT_HEALTH"], balancer["ports"]) == (port, [f"{port}/http"])
    assert queue["scaling"]["requestCount"] == int(queue["env"]["SUPERVISOR_MAX_CONCURRENCY"])
    assert balancer["scaling"]["requestCount"] < int(balancer["env"]["SUPERVISOR_MAX_CONCURRENCY"])


# What the supervisor does


@pytest.fixture
def read(folder: Path) -> Any:
    def read(place: Place) -> Settings:
        """The settings as the supervisor would see them there. Its files of keys and its volume are not here."""
        (folder / "keys").write_text("the-first-key\nthe-second-key\n")
        environ = {name: f"@{folder / 'keys'}" if value[:1] == "@" else value for name, value in place.environ.items()}
        environ |= {"SUPERVISOR_VOLUME": str(folder)} if "SUPERVISOR_VOLUME" in environ else {}
        environ |= {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm"), "SUPERVISOR_HOST": "0.0.0.0"}
        return gather(Arguments(), {**environ, "SUPERVISOR_IMAGE": "1", **place.given})

    return read


@every_place
def test_every_variable_is_read(place: Place, read: Any) -> None:
    settings = read(place)
    told = [line for line in settings.warnings if "everybody who reaches" not in line]
    assert told == []
    used = [settings.model, *settings.knob_settings, *(setting for _, setting in settings.options)]
    sources = {setting.source.removeprefix("environment ") for setting in used}
    assert set(place.environ) - sources - set(ENGINE.environment) - set(OTHERS) == set()


def test_a_misspelt_variable_is_found(read: Any) -> None:
    place = Place("", {"MODEL": "m", "MAX_MODLE_LEN": "1", f"{SM_PREFIX}MAX_MODLE_LEN": "1"}, 8000)
    assert len(read(place).warnings) == 3  # and that there are no keys


@every_place
def test_it_listens_where_it_is_asked(place: Place, read: Any) -> None:
    knobs = read(place).knobs
    assert knobs.port == place.port
    for name, asked in place.probes.items():
        assert asked.path.encode() in OWN_PATHS, name
        assert asked.port in ("http", knobs.port, knobs.port_health), name


@every_place
def test_who_may_use_the_model_is_asked_for_a_key(place: Place, read: Any) -> None:
    """By the supervisor, or by the platform."""
    by_platform = "RUNPOD_ENDPOINT_ID", "SAGEMAKER_BIND_TO_PORT", "K_SERVICE"
    assert read(place).knobs.api_keys or set(by_platform) & set(place.given)


@every_place
def test_what_is_asked_fits_the_states(place: Place, read: Any) -> None:
    """204 is a success for everybody but RunPod: whoever must not get requests while it loads has to ask /health."""
    for name, asked in place.probes.items():
        assert asked.path == {"liveness": "/ping", "ping": "/ping"}.get(name, "/health") or name == "startup"
    knobs = read(place).knobs
    if "liveness" in place.probes:  # a second signal would cut what still runs
        assert place.probes["liveness"].seconds > knobs.drain_timeout
    startup = place.probes.get("startup")
    if startup and startup.path == "/ping":
        assert "readiness" in place.probes


@every_place
def test_it_is_waited_for(place: Place, read: Any) -> None:
    if place.startup is not None:
        assert place.startup >= read(place).knobs.startup_timeout


@every_place
def test_it_may_end_in_its_own_time(place: Place, read: Any) -> None:
    if place.grace is not None:
        drain = read(place).knobs.drain_timeout
        terminate = min(drain, TERMINATE_PATIENCE)
        slack = 0 if place.grace <= 30 else CLOSE_PATIENCE  # the platforms that give little leave nothing to spare
        assert place.grace >= drain + terminate + slack


@every_place
def test_the_image_is_the_projects(place: Place) -> None:
    """And where .github/workflows/image.yml puts it: `your-org` stands for the repository's owner, whom it asks."""
    registry, _, name = place.image.rpartition("/")
    assert name == f"vllm-supervisor:{__version__}"
    assert registry == "ghcr.io/your-org" or registry.endswith(".amazonaws.com")  # SageMaker takes its own alone


def test_keys_are_read_where_they_are_mounted() -> None:
    (pod,) = [load("kubernetes/deployment.yaml")["spec"]["template"]["spec"]]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    (secret,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert PLACES["kubernetes"].environ["SUPERVISOR_API_KEYS"] == f"@{mounts['keys']}/{secret['items'][0]['path']}"
    content = load("compose/compose.yaml")
    assert PLACES["compose"].environ["SUPERVISOR_API_KEYS"] == f"@/run/secrets/{next(iter(content['secrets']))}"
    properties = load("azure/container-instances.yaml")["properties"]
    (mount,) = properties["containers"][0]["properties"]["volumeMounts"]
    name = next(iter(properties["volumes"][0]["secret"]))
    assert PLACES["azure/container-instances"].environ["SUPERVISOR_API_KEYS"] == f"@{mount['mountPath']}/{name}"


def test_shared_memory_fits_into_the_containers(read: Any) -> None:
    deployment = load("kubernetes/deployment.yaml")["spec"]["template"]["spec"]
    (shm,) = [volume["emptyDir"]["sizeLimit"] for volume in deployment["volumes"] if volume["name"] == "shm"]
    assert read_size(shm) < read_size(deployment["containers"][0]["resources"]["limits"]["memory"])
    assert read_size(load("compose/compose.yaml")["services"]["llm"]["shm_size"]) >= 10**9


def test_serve_is_up_on_the_port_that_sagemaker_asks_for(tmp_path: Path) -> None:
    """`docker run IMAGE serve`, as SageMaker runs it."""
    (tmp_path / "bin").mkdir()
    supervisor, entrypoint = tmp_path / "bin/supervisor", tmp_path / "entrypoint.sh"
    supervisor.write_text('#!/bin/sh\necho "$@ $SAGEMAKER_BIND_TO_PORT"\n')
    supervisor.chmod(0o755)
    entrypoint.write_text((ROOT / "entrypoint.sh").read_text())
    for given, expected in (({}, "8080"), ({"SAGEMAKER_BIND_TO_PORT": "9001"}, "9001")):
        done = subprocess.run(["sh", str(entrypoint), "serve"], env=given, capture_output=True, text=True, check=True)
        assert done.stdout == f"up {expected}\n"


@pytest.mark.parametrize("flag", ["--version", "-V", "--help", "-h"])
def test_what_is_asked_of_the_supervisor_itself_reaches_it_as_it_is(tmp_path: Path, flag: str) -> None:
    """`docker run IMAGE --version`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/supervisor").symlink_to(Path(sys.executable).parent / "supervisor")
    (tmp_path / "entrypoint.sh").write_text((ROOT / "entrypoint.sh").read_text())
    done = subprocess.run(
        ["sh", str(tmp_path / "entrypoint.sh"), flag],
        env={"PATH": os.environ["PATH"]}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: supervisor " if "h" in flag else f"supervisor {__version__}\n")


# The pages

READMES = sorted(DEPLOY.glob("*/README.md"))


def commands(page: Path) -> Iterator[str]:
    yield from re.findall(r"^```\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def test_every_folder_has_its_page() -> None:
    assert [page.parent for page in READMES] == sorted(path for path in DEPLOY.iterdir() if path.is_dir())


@pytest.mark.parametrize(
    "page", [*READMES, ROOT / "docs/runpod.md"], ids=lambda page: f"{page.parent.name}/{page.name}"
)
def test_pages(page: Path) -> None:
    text = page.read_text()
    assert page.name != "README.md" or len(text.splitlines()) < 60
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"(?<!tests/)deploy/[\w./-]+\w", text.replace("$step", "model")):
        assert (ROOT / path).exists() or path.endswith("/api-keys"), path
    assert list(commands(page))
    for block in commands(page):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page", [*READMES, ROOT / "docs/runpod.md"], ids=lambda page: f"{page.parent.name}/{page.name}"
)
def test_variables_of_the_pages_are_read(page: Path) -> None:
    named = set(re.findall(r"`((?:SUPERVISOR|MODEL|MAX|HF|SM_VLLM)_[A-Z_]+)(?:=[^`]*)?`", page.read_text()))
    known = {name.removeprefix(SM_PREFIX) for name in named} - set(OTHERS)
    own = {knob for knob in (ROOT / "docs/settings.md").read_text().split("`") if re.fullmatch(r"[A-Z_]+", knob)}
    assert known - own - {"", "MODEL_NAME"} == set()
