"""`make push`: adapter, tokenizer and card go to a small server here that plays the hub, and nothing else does."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file

from common.cli import run_command
from common.recipe import ModelSpec
from common.run.folder import hold_run_folder
from tests.adapter.conftest import finished  # noqa: F401 - a fixture
from tests.conftest import ROOT
from tests.upload_hub import TOKEN, upload_hub

# huggingface_hub hands files to its HTTP library in a way that this calls old
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
SHARED = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
SHARED |= {"chat_template.jinja"}


@pytest.fixture
def copy(finished, tmp_path):  # noqa: F811
    shutil.copytree(finished.out, tmp_path / "run")
    return replace(finished, out=str(tmp_path / "run"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with upload_hub() as server:
        for name, value in {"ENDPOINT": server.address, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def push(recipe, *flags: str) -> int:
    return run_command("push", "tiny", recipe, ["--out", recipe.out, *flags])


def sent(hub, name: str = "me/adapter") -> dict[str, bytes]:
    return {file: content for file, content in hub.repositories[name].items() if file != ".gitattributes"}


def test_adapter_tokenizer_and_card_are_uploaded_and_nothing_else(hub, copy, capsys):
    for name in ("eval.json", "loss.png"):
        assert (Path(copy.out) / name).exists() or (Path(copy.out) / name).write_text("{}")
    assert push(copy, "--repo", "me/adapter", "--yes") == 0
    out = capsys.readouterr().out
    assert set(sent(hub)) == SHARED and hub.private["me/adapter"]
    for name in SHARED - {"README.md", "adapter_config.json"}:
        assert sent(hub)[name] == (Path(copy.out) / name).read_bytes()
        assert f"  {name} " in out
    assert f"to {hub.address}/me/adapter, a new repository, private" in out
    assert out.rstrip().endswith(f"uploaded: {hub.address}/me/adapter") and TOKEN not in out
    paths = (str(Path(copy.model.name).parent), str(Path(copy.out).parent), str(Path.home()))
    for name, content in sent(hub).items():
        assert [secret for secret in (TOKEN, *paths) if secret.encode() in content] == [], name
    assert 'ADAPTER = "me/adapter"\n' in sent(hub)["README.md"].decode()


@pytest.mark.slow  # another process imports all again: 6 s on a quiet machine
def test_no_path_and_no_token_goes_out_and_the_token_is_nowhere_here(hub, copy, tmp_path):
    """In a process of its own, as make starts it; its home, temporary files and folder are searched as well."""
    base = ["--out", copy.out, "--repo", "me/adapter", "--yes"]
    script = (
        "import sys; from dataclasses import replace; from common.cli import run_command; from common.recipe import "
        "ModelSpec; from recipes.tiny import RECIPE; "
        f"recipe = replace(RECIPE, model=ModelSpec({copy.model.name!r})); "
        f"sys.exit(run_command('push', 'tiny', recipe, {base!r}))"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HOME": str(home)}
    environment |= {"HF_HOME": str(home / "hf"), "TMPDIR": str(home)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(sent(hub)) == SHARED and done.stderr == ""
    for name, content in sent(hub).items():
        for secret in (TOKEN, str(tmp_path), str(Path(copy.model.name).parent), str(Path.home())):
            assert secret.encode() not in content, f"{secret} in {name}"
    assert all(authorization == f"Bearer {TOKEN}" for _, path, authorization in hub.requests if "/large/" not in path)
    assert not any(authorization for _, path, authorization in hub.requests if "/large/" in path)
    written = [path for folder in (home, Path(copy.out)) for path in folder.rglob("*") if path.is_file()]
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in done.stdout + done.stderr


def test_what_was_uploaded_is_the_adapter(hub, copy, tmp_path):
    assert push(copy, "--repo", "me/adapter", "--yes") == 0
    for name, content in sent(hub).items():
        (tmp_path / name).write_bytes(content)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, Path(copy.out)))
    assert theirs.keys() == ours.keys() and all(theirs[name].equal(ours[name]) for name in ours)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.pop("base_model_name_or_path") == Path(copy.model.name).name
    kept = json.loads((Path(copy.out) / "adapter_config.json").read_text())
    assert kept.pop("base_model_name_or_path") == copy.model.name and kept == config


@pytest.mark.parametrize(
    ("answer", "uploads"), [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_it_asks_first(hub, copy, monkeypatch, capsys, answer, uploads):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert push(copy, "--repo", "me/adapter") == 0
    out = capsys.readouterr().out
    assert out.index("adapter_model.safetensors") < out.index("upload? [y/N]")
    assert ("me/adapter" in hub.repositories) == uploads
    assert ("nothing was uploaded" in out) != uploads


def test_without_a_terminal_and_without_yes_nothing_is_uploaded(hub, copy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert push(copy, "--repo", "me/adapter") == 2
    assert "there is no terminal to ask on. To upload without a question: ARGS=--yes" in capsys.readouterr().err
    assert hub.repositories == {}


def test_public_is_said_and_private_is_the_default(hub, copy, capsys):
    assert push(copy, "--repo", "me/adapter", "--yes", "--public") == 0
    assert "a new repository, public" in capsys.readouterr().out and not hub.private["me/adapter"]
    assert push(copy, "--repo", "me/adapter", "--yes") == 2
    assert "exists and is public: everybody would read what you upload" in capsys.readouterr().err
    assert push(copy, "--repo", "me/adapter", "--yes", "--public") == 0
    out = capsys.readouterr().out
    assert "which exists and is public" in out and "nothing has changed since the last time" in out


def test_a_repository_that_holds_something_else_is_said_before(hub, copy, monkeypatch, capsys):
    hub.repositories["me/adapter"] = {".gitattributes": b"", "README.md": b"mine", "model.safetensors": b"whole"}
    hub.private["me/adapter"] = True
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert push(copy, "--repo", "me/adapter", "--public") == 0
    out = capsys.readouterr().out
    assert "it has README.md, replaced there" in out and "it stays private" in out
    assert "it holds something else as well, which stays: model.safetensors\n" in out
    assert hub.repositories["me/adapter"]["README.md"] == b"mine"
    assert push(copy, "--repo", "me/adapter", "--yes") == 0
    assert set(sent(hub)) == SHARED | {"model.safetensors"}


def refusal(recipe, capsys, *flags: str) -> str:
    assert push(recipe, *(flags or ("--repo", "me/adapter", "--yes"))) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and TOKEN not in error
    return error


def test_a_name_that_is_none_is_one_line(hub, copy, capsys):
    assert "REPO=owner/name" in refusal(copy, capsys, "--yes")
    assert "REPO is 'adapter'; write it as owner/name" in refusal(copy, capsys, "--repo", "adapter")
    assert "me/a b is no id of the hub" in refusal(copy, capsys, "--repo", "me/a b")
    hub.moved["me/adapter"] = "me/other"
    hub.repositories["me/other"], hub.private["me/other"] = {}, True
    assert "me/adapter has moved on the hub: REPO=me/other" in refusal(copy, capsys)


def test_nobody_logged_in_is_one_line(hub, copy, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert "nobody is logged in at the hub: make a token" in refusal(copy, capsys)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (("models/me/adapter$", 401), "the hub does not let you write to me/adapter (401)"),
        (("repos/create", 403), "the hub does not let you write to me/adapter (403)"),
        (("repos/create", 409), "the hub has something else under the name me/adapter that you may not see"),
        (("preupload", 403), "the hub does not let you write to me/adapter (403)"),
        (("commit", 429), "too many requests from here (429)"),
        (("commit", 400), "the hub does not take me/adapter: it answers 400 (no)"),
        (("commit", 500), "the hub cannot be reached (it answers with its error 500), and nothing was changed there"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, copy, capsys, refused, words):
    hub.refused = refused
    assert words in refusal(copy, capsys)
    assert set(hub.repositories.get("me/adapter", {})) <= {".gitattributes"}


def test_the_name_of_another_owner_and_a_token_out_of_date_are_one_line(hub, copy, monkeypatch, capsys):
    assert "does not let you write to you/adapter (403)" in refusal(copy, capsys, "--repo", "you/adapter", "--yes")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "does not let you write to me/adapter (401)" in refusal(copy, capsys)


def test_a_hub_that_is_not_there_is_one_line(hub, copy, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached (" in refusal(copy, capsys)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached (HF_HUB_OFFLINE is set), and nothing was changed there" in refusal(copy, capsys)


def test_a_file_that_the_hub_leaves_out_is_said(hub, copy, capsys):
    hub.ignored = {"tokenizer.json"}
    assert "did not take tokenizer.json, perhaps for a .gitignore" in refusal(copy, capsys)


def test_a_card_that_was_edited_goes_as_it_is_and_a_bad_head_is_one_line(hub, copy, capsys):
    card = Path(copy.out) / "README.md"
    card.write_text("---\nlibrary_name: peft\n---\nMine.\n")
    assert push(copy, "--repo", "me/adapter", "--yes") == 0
    assert sent(hub)["README.md"] == card.read_bytes()
    card.write_text("---\nbase_model: /home/me/base\n---\n")
    capsys.readouterr()
    error = refusal(copy, capsys)
    assert 'the head of README.md, between its lines ---: - "base_model" with value "/home/me/base" is not' in error


def test_a_missing_card_is_made_and_an_adapter_without_a_run_needs_one(hub, copy, capsys):
    (Path(copy.out) / "README.md").unlink()
    assert push(copy, "--repo", "me/adapter", "--yes") == 0
    assert b"library_name: peft" in sent(hub)["README.md"] and (Path(copy.out) / "README.md").exists()
    (Path(copy.out) / "README.md").unlink()
    (Path(copy.out) / "run.json").unlink()
    capsys.readouterr()
    assert "has no run.json to make a model card of: write" in refusal(copy, capsys)


def test_what_was_damaged_or_is_under_way_is_not_uploaded(hub, copy, capsys):
    path = Path(copy.out) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert "is damaged: it is not what the run wrote" in refusal(copy, capsys)
    assert "the recipe says" in refusal(
        replace(copy, model=ModelSpec("owner/another")), capsys, "--repo", "me/adapter", "--yes"
    )
    with hold_run_folder(copy.out, "resume"):
        pass
    assert hub.requests == []
