"""The monitoring files parse, fit together, and ask only for metrics that the server exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from app.telemetry.metrics import exported_families, exported_names
from tests.meta.tree import ROOT

PROMETHEUS = ROOT / "config/prometheus"
GRAFANA = ROOT / "config/grafana"
METRIC = re.compile(r"\b(?:vllm:|slipstream_)\w+")


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GRAFANA / "dashboards/slipstream.json").read_text())
    return content


def dashboard_queries() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (v["query"]["query"] for v in dashboard()["templating"]["list"])


def alert_queries() -> Iterator[str]:
    for group in load("config/prometheus/alerts.yml")["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.mark.parametrize("query", [*dashboard_queries(), *alert_queries()])
def test_queries_use_exported_metrics(query: str) -> None:
    names = set(METRIC.findall(query))
    assert names or query.startswith("up{")
    assert names - set(exported_names()) == set()
    assert query.count("(") == query.count(")")
    assert query.count("{") == query.count("}")


def test_the_table_of_metrics_is_what_is_exported() -> None:
    rows = re.findall(
        r"^\| `(\w[\w:]+)` \| (gauge|counter|histogram) \|(.*?) \|",
        (ROOT / "docs/operations.md").read_text(),
        re.M,
    )
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    common = {"model_name", "engine", "le"}
    exported = {}
    for family in exported_families():
        name = family.name + "_total" * (family.type == "counter")
        exported[name] = (family.type, set(family.samples[0].labels) - common)
    assert len(rows) == len(documented)
    assert documented == exported


def test_panels_have_their_own_place_and_id() -> None:
    panels = dashboard()["panels"]
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}
    assert len(places) == len({p["id"] for p in panels}) == len(panels)


def test_the_dashboard_uses_the_provisioned_source() -> None:
    (source,) = load("config/grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert {panel["datasource"]["uid"] for panel in dashboard()["panels"]} == {source["uid"]}


def test_compose_mounts_what_exists_and_links_the_services() -> None:
    services = load("compose.yaml")["services"]
    mounts = [v for service in services.values() for v in service["volumes"] if v.startswith("./")]
    assert mounts
    assert [m for m in mounts if not (ROOT / m.split(":")[0]).is_dir()] == []
    (source,) = load("config/grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (job,) = load("config/prometheus/prometheus.yml")["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["slipstream:8000"]
    (provider,) = load("config/grafana/provisioning/dashboards/slipstream.yaml")["providers"]
    mounted = [v.split(":")[1] for v in services["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounted


def test_rule_files_exist() -> None:
    names = load("config/prometheus/prometheus.yml")["rule_files"]
    assert names
    assert all((PROMETHEUS / name).is_file() for name in names)


def test_the_image_has_the_targets_that_compose_and_docs_name() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert stages[-1] == "cpu"
    assert "cuda" in stages
    copied = set(re.findall(r"COPY --from=(\S+)", (ROOT / "Dockerfile").read_text()))
    assert copied <= set(stages)
