"""The command line: help, errors, laziness, and what reaches the server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from app import cli
from app.model_source import BUILTIN_NAME, ModelSourceError, find_model, is_pooling
from config.flags import ServeParser
from config.load import FIELDS, SettingsError, flag_of, load_settings
from config.settings import EngineSettings


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_help_of_serve_fits_on_one_screen_and_names_every_flag() -> None:
    text = ServeParser().format_help()
    lines = text.splitlines()
    assert len(lines) <= 60
    assert [line for line in lines if len(line) > 100] == []
    flags = [flag_of(name).removeprefix("--") for name in FIELDS]
    assert [flag for flag in flags if flag not in text] == []


def test_every_flag_reaches_the_settings() -> None:
    typed = "m --port 1 --no-prefix-caching --trust-remote-code --api-keys a,b --threads 2".split()
    engine, server = load_settings(vars(ServeParser().parse_args(typed)), {})
    assert (engine.model, engine.prefix_caching, engine.trust_remote_code) == ("m", False, True)
    assert (server.port, server.api_keys, engine.threads) == (1, ("a", "b"), 2)


def test_help_imports_neither_torch_nor_the_server() -> None:
    code = (
        "import sys; from app.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--port" in done.stdout


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (["serve", "--port", "70000"], "--port"),
        (["serve", "--no-such-flag"], "--no-such-flag"),
        (["serve", "--port"], "--port"),
        (["serve", "./no/such/folder"], "./no/such/folder"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    typed: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = cli.main(typed)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err


def test_an_interruption_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("loadtest.cli.main", interrupted)
    assert cli.main(["bench"]) == 130
    assert capsys.readouterr().err == "slipstream: interrupted\n"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("slipstream 0.")
    assert cli.main([]) == 0
    assert "serve" in capsys.readouterr().out


def test_a_local_folder_is_served_under_its_name(model_folder: Path) -> None:
    engine, server = cli._with_model(*load_settings({"model": str(model_folder)}, {}))
    assert engine.model == str(model_folder)
    assert server.served_model_name == "my-model"


@pytest.mark.parametrize(
    ("config", "pools"),
    [
        ('{"architectures": ["BertModel"]}', True),
        ('{"architectures": ["RobertaForMaskedLM"]}', True),
        ('{"architectures": ["Qwen2ForSequenceClassification"]}', True),
        ('{"architectures": ["LlamaForCausalLM"]}', False),
        ('{"architectures": ["GPT2LMHeadModel"]}', False),
        ('{"architectures": null}', False),
        ("{}", False),
        ("{", False),
    ],
)
def test_what_a_model_does_is_seen_in_its_config(
    model_folder: Path, config: str, pools: bool
) -> None:
    (model_folder / "config.json").write_text(config)
    assert is_pooling(model_folder) is pools
    (model_folder / "modules.json").write_text("[]")
    assert is_pooling(model_folder)


def pooling_models(**flags: object) -> dict[str, EngineSettings]:
    return cli._pools(*cli._with_model(*load_settings(flags, {})))


def test_a_pooling_model_alone_is_its_own_engine(model_folder: Path) -> None:
    assert pooling_models(model=str(model_folder)) == {}
    (model_folder / "modules.json").write_text("[]")
    alone = pooling_models(model=str(model_folder), max_model_len=32, served_model_name="x")
    assert {name: engine.max_model_len for name, engine in alone.items()} == {"x": 32}
    assert pooling_models(model=str(model_folder), runner="generate") == {}
    (model_folder / "modules.json").unlink()
    assert set(pooling_models(model=str(model_folder), runner="pooling")) == {"my-model"}


def test_models_beside_have_names_and_settings(model_folder: Path) -> None:
    also = f"{model_folder},other={model_folder}"
    found = pooling_models(also=also, dtype="bfloat16", max_model_len=64, quantization="int8")
    assert list(found) == ["my-model", "other"]
    for engine in found.values():
        assert (engine.model, engine.dtype) == (str(model_folder), "bfloat16")
        assert (engine.max_model_len, engine.quantization) == (None, "none")


def test_two_models_of_one_name_are_refused(model_folder: Path) -> None:
    for flags in (
        {"also": f"{model_folder},{model_folder}"},
        {"model": str(model_folder), "also": str(model_folder)},
    ):
        with pytest.raises(SettingsError, match="two models are called 'my-model'"):
            pooling_models(**flags)
    with pytest.raises(ModelSourceError, match="there is no folder"):
        pooling_models(also="x=./no/such/folder")


def test_a_given_name_wins(model_folder: Path) -> None:
    flags = {"model": str(model_folder), "served_model_name": "other"}
    assert cli._with_model(*load_settings(flags, {}))[1].served_model_name == "other"


def test_the_built_in_model_is_found() -> None:
    source = find_model("")
    assert source.name == BUILTIN_NAME
    assert (source.folder / "tokenizer.json").is_file()


def test_what_is_no_model_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for model, message in {
        str(tmp_path): "config.json is missing",
        str(tmp_path / "file"): "is a file",
        str(tmp_path / "missing"): "there is no folder",
        "a/b/c": "there is no folder",
    }.items():
        with pytest.raises(ModelSourceError, match=message):
            find_model(model)


def test_a_hub_id_downloads_only_what_may_be_used(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def download(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(model_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_model("some/model", "v1") == (model_folder, "some/model")
    assert (asked["repository"], asked["revision"]) == ("some/model", "v1")
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert "*.safetensors" in patterns
    assert not {"*.bin", "*.py"} & set(patterns)
    find_model("some/model", trust_remote_code=True, allow_pickle=True)
    assert {"*.bin", "*.py"} <= set(asked["allow_patterns"])  # type: ignore[call-overload]
