"""The page's files: who may load what, and that they fit together."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from app.page import FILES
from tests.app.conftest import MakeServer, Server

ROOT = Path(__file__).parents[2]
TEXTS = {path: file.read_text(encoding="utf-8") for path, file in FILES.items()}
INDEX = TEXTS["/"]
SCRIPTS = {path: text for path, text in TEXTS.items() if path.endswith(".js")}
IDS = set(re.findall(r'\bid="([\w-]+)"', INDEX))


@pytest.mark.parametrize("path", FILES)
async def test_every_file_is_served_without_a_key_under_the_policy(
    make_server: MakeServer, path: str
) -> None:
    server = make_server(api_keys=("secret",))
    response = await server.http.get(path)
    assert (response.status_code, response.text) == (200, TEXTS[path])
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert set(re.findall(r"(?:script|style|img|connect)-src ([^;]+)", policy)) == {"'self'"}
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_nothing_else_is_open(make_server: MakeServer) -> None:
    server = make_server(api_keys=("secret",))
    for path in ("/page/", "/page/__init__.py", "/page/x.js", "/debug/live", "/x"):
        assert (await server.http.get(path)).status_code == 401


async def test_the_page_is_no_part_of_the_api(server: Server) -> None:
    paths = (await server.http.get("/openapi.json")).json()["paths"]
    assert not set(paths) & ({*FILES} | {"/debug/live"})
    assert (await server.http.post("/")).status_code == 405


def test_nothing_comes_from_elsewhere() -> None:
    for path, text in TEXTS.items():
        urls = set(re.findall(r"https?://[^\s\"')]+", text))
        assert urls <= {"http://www.w3.org/2000/svg"}, path


def test_nothing_is_inline() -> None:
    assert not re.search(r"<style|<script(?![^>]*\bsrc=)|\bstyle=|\son\w+=", INDEX)
    for text in SCRIPTS.values():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(", text)


def test_scripts_and_styles_refer_to_what_is_there() -> None:
    loaded = set(re.findall(r'(?:src|href)="(/page/[\w.]+)"', INDEX))
    loaded |= {
        f"/page/{name}" for text in SCRIPTS.values() for name in re.findall(r'"\./(\w+\.js)"', text)
    }
    assert loaded == set(FILES) - {"/"}
    for path, text in SCRIPTS.items():
        wanted = set(re.findall(r'(?:byId|say)\("([\w-]+)"', text))
        assert wanted <= IDS, path
    assert set(re.findall(r'aria-labelledby="([\w-]+)"', INDEX)) <= IDS


def test_every_field_has_a_label_and_every_section_a_name() -> None:
    for tag, name in re.findall(r"<(input|textarea)\b[^>]*\bid=\"([\w-]+)\"", INDEX):
        wrapped = re.search(rf"<label[^>]*>[^<]*<{tag}[^>]*\bid=\"{name}\"", INDEX)
        assert wrapped or f'<label for="{name}"' in INDEX, name
    assert all(
        "aria-labelledby=" in tag for tag in re.findall(r"<(?:section|dialog)\b[^>]*>", INDEX)
    )


def test_the_files_are_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["app.page"]
    assert {file.suffix for file in FILES.values()} == {p.removeprefix("*") for p in patterns}


def themes() -> list[dict[str, str]]:
    """The colours by name, as they are in light and in dark."""
    light, dark = re.findall(r":root \{(.*?)\}", TEXTS["/page/style.css"], re.DOTALL)
    found = dict(re.findall(r"--([\w-]+): (#\w{6});", light))
    return [found, found | dict(re.findall(r"--([\w-]+): (#\w{6});", dark))]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_contrast(theme: dict[str, str]) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for what is not text."""
    texts = [("ink", "panel"), ("ink", "ground"), ("ink", "soft"), ("muted", "panel")]
    texts += [("muted", "ground"), ("muted", "soft"), ("accent", "panel"), ("accent", "ground")]
    texts += [("on-accent", "accent"), ("bad", "panel")]
    texts += [("lane-ink", lane) for lane in ("queued", "prefill", "decode", "slowed", "paused")]
    assert {pair: c for pair in texts if (c := contrast(*(theme[n] for n in pair))) < 4.5} == {}
    shapes = [("decode", "soft"), ("prefill", "soft"), ("paused", "soft"), ("host", "soft")]
    shapes += [("focus", "panel"), ("good", "ground"), ("bad", "ground")]
    assert {pair: c for pair in shapes if (c := contrast(*(theme[n] for n in pair))) < 3} == {}
