"""Every source of settings, their precedence, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config.load import SettingsError, load_settings
from config.settings import EngineSettings, ServerSettings


def test_defaults_need_nothing() -> None:
    assert load_settings({}, {}) == (EngineSettings(), ServerSettings())


def test_flags_win_over_variables_over_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("port: 1001\nhost: 0.0.0.0\nblock_size: 8\nprefix_caching: false\n")
    environment = {"SLIPSTREAM_PORT": "1002", "SLIPSTREAM_HOST": "::1", "OTHER": "x"}
    engine, server = load_settings({"port": "1003", "config": str(file)}, environment)
    assert (server.port, server.host) == (1003, "::1")
    assert (engine.block_size, engine.prefix_caching) == (8, False)
    assert engine.memory_fraction == EngineSettings().memory_fraction


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("api_keys: [a, b]\n")
    assert load_settings({}, {"SLIPSTREAM_CONFIG": str(file)})[1].api_keys == ("a", "b")


def test_text_becomes_the_field_type() -> None:
    environment = {
        "SLIPSTREAM_API_KEYS": "a, b",
        "SLIPSTREAM_TRUST_REMOTE_CODE": "true",
        "SLIPSTREAM_KV_CACHE_GIB": "1.5",
        "SLIPSTREAM_MODEL": "",
    }
    engine, server = load_settings({}, environment)
    assert server.api_keys == ("a", "b")
    assert engine.trust_remote_code is True
    assert engine.kv_cache_gib == 1.5
    assert engine.model == ""


def test_kubernetes_service_links_are_not_settings() -> None:
    environment = {
        "SLIPSTREAM_PORT": "tcp://10.0.0.1:8000",
        "SLIPSTREAM_PORT_8000_TCP_ADDR": "10.0.0.1",
        "SLIPSTREAM_SERVICE_HOST": "10.0.0.1",
        "SLIPSTREAM_SERVICE_PORT_HTTP": "8000",
    }
    assert load_settings({}, environment)[1].port == ServerSettings().port


@pytest.mark.parametrize(
    ("flags", "environment", "named"),
    [
        ({"port": "70000"}, {}, ["--port", "65535", "70000"]),
        ({"port": "abc"}, {}, ["--port", "integer"]),
        ({"dtype": "int3"}, {}, ["--dtype", "bfloat16", "int3"]),
        ({}, {"SLIPSTREAM_BLOCK_SIZE": "0"}, ["SLIPSTREAM_BLOCK_SIZE", "1"]),
        ({}, {"SLIPSTREAM_PROT": "1"}, ["SLIPSTREAM_PROT", "SLIPSTREAM_PORT?"]),
        ({"config": "no-such-file"}, {}, ["no-such-file"]),
    ],
)
def test_a_mistake_is_one_line_that_names_its_source(
    flags: dict[str, Any], environment: dict[str, str], named: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags, environment)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in named if part not in message] == []


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("prot: 1", ["prot", "port?"]),
        ("port: [1]", ["port", "integer"]),
        ("- port", ["map setting names"]),
        ("port: [1", ["not YAML"]),
        ("config: other.yaml", ["config is not a setting"]),
        ("1: 2", ["1 is not a setting"]),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, named: list[str]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError) as caught:
        load_settings({"config": str(file)}, {})
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    assert [part for part in named if part not in message] == []
