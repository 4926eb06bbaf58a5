"""The Kubernetes examples parse, fit together, and rely only on what the server has."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from app.routes import ROUTES
from app.telemetry.metrics import exported_names
from config.load import FIELDS, PREFIX
from tests.meta.tree import ROOT

FOLDER = ROOT / "config/kubernetes"
FILES = sorted(path.name for path in FOLDER.iterdir())


def load(name: str) -> dict[str, dict[str, Any]]:
    """The objects of a file, by kind."""
    objects = list(yaml.safe_load_all((FOLDER / name).read_text()))
    assert all(o["apiVersion"] and o["metadata"]["name"] for o in objects)
    return {o["kind"]: o for o in objects}


@pytest.fixture
def pod() -> dict[str, Any]:
    template: dict[str, Any] = load("server.yaml")["Deployment"]["spec"]["template"]
    return template


@pytest.mark.parametrize("name", FILES)
def test_metrics_that_are_named_exist(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert set(re.findall(r"(?:vllm:|slipstream_)\w+", text)) <= set(exported_names())


def test_the_autoscaler_asks_for_something() -> None:
    triggers = load("autoscale.yaml")["ScaledObject"]["spec"]["triggers"]
    for trigger in triggers:
        assert re.search(r"\bslipstream_\w+", trigger["metadata"]["query"])
        assert float(trigger["metadata"]["threshold"]) > 0


def test_everything_selects_the_pods(pod: dict[str, Any]) -> None:
    labels = pod["metadata"]["labels"]
    selectors = [
        load("server.yaml")["Deployment"]["spec"]["selector"]["matchLabels"],
        load("server.yaml")["Service"]["spec"]["selector"],
        load("autoscale.yaml")["PodMonitor"]["spec"]["selector"]["matchLabels"],
        load("gateway.yaml")["InferencePool"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    names = {load("server.yaml")["Deployment"]["metadata"]["name"]}
    assert {load("autoscale.yaml")["ScaledObject"]["spec"]["scaleTargetRef"]["name"]} == names
    (rule,) = load("gateway.yaml")["HTTPRoute"]["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    pool = load("gateway.yaml")["InferencePool"]
    assert (backend["kind"], backend["name"]) == (pool["kind"], pool["metadata"]["name"])


def test_ports_are_the_containers(pod: dict[str, Any]) -> None:
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": FIELDS["port"].default}
    (target,) = load("gateway.yaml")["InferencePool"]["spec"]["targetPorts"]
    assert target["number"] in ports.values()
    (service,) = load("server.yaml")["Service"]["spec"]["ports"]
    (endpoint,) = load("autoscale.yaml")["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert {service["targetPort"], endpoint["port"]} <= set(ports)


def test_paths_are_served(pod: dict[str, Any]) -> None:
    (container,) = pod["spec"]["containers"]
    probes = [v for name, v in container.items() if name.endswith("Probe")]
    (endpoint,) = load("autoscale.yaml")["PodMonitor"]["spec"]["podMetricsEndpoints"]
    paths = {endpoint["path"], *(probe["httpGet"]["path"] for probe in probes)}
    assert len(probes) == 3
    assert paths <= {route.path for route in ROUTES if route.method == "GET"}
    assert all(probe["httpGet"]["port"] == "http" for probe in probes)


def test_settings_exist_and_draining_has_time(pod: dict[str, Any]) -> None:
    (container,) = pod["spec"]["containers"]
    names = [variable["name"] for variable in container["env"]]
    assert {name.removeprefix(PREFIX).lower() for name in names} <= set(FIELDS)
    assert pod["spec"]["terminationGracePeriodSeconds"] >= FIELDS["drain_seconds"].default + 10
    written = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert written == {"/cache", "/tmp"}, "all that the image writes to"
