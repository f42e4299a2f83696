import http.server
import json
import shutil
import threading

import pytest

from common.model.files import check_safetensors, load_config, model_folder
from common.recipe import ModelSpec, UserError


@pytest.fixture
def sharded(small_model, tmp_path):
    """A fresh copy of a checkpoint in several shards."""
    folder = tmp_path / "model"
    shutil.copytree(small_model("llama", max_shard_size="100KB"), folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_a_complete_checkpoint_passes(small_llama, sharded):
    check_safetensors(small_llama)
    check_safetensors(sharded)


@pytest.mark.parametrize("keep", [0, 5, 30, -1])
def test_a_truncated_file_is_named(sharded, keep):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:keep])
    with pytest.raises(UserError) as error:
        check_safetensors(sharded)
    assert f"{shard} is cut short" in str(error.value)
    assert "download it again" in str(error.value)


def test_a_file_that_is_not_safetensors_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    shard.write_bytes((100).to_bytes(8, "little") + b"x" * 200)
    with pytest.raises(UserError, match="is not a safetensors file"):
        check_safetensors(sharded)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks 1 of .* weight files, first {shard.name}"):
        check_safetensors(sharded)


def test_a_folder_without_weights_says_so(tmp_path):
    with pytest.raises(UserError, match="has no weights"):
        check_safetensors(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="only pickled weights .pytorch_model.bin., which can run code"):
        check_safetensors(tmp_path)


def test_a_damaged_index_is_named(sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json is damaged"):
        check_safetensors(sharded)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "gpt2"}', "is of type 'gpt2'; the recipes fine-tune llama, mistral, qwen2, qwen3 models"),
        ("{", "is not a readable model config"),
        ("{}", "is not a readable model config"),
        (None, "has no config.json"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as error:
        load_config(ModelSpec(str(tmp_path)))
    assert message in str(error.value)


def test_code_in_a_model_folder_is_not_run(small_llama, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small_llama, folder)
    canary = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Config: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_config(ModelSpec(str(folder))).model_type == "llama"
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "vocabulary"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", 32, 4096, 128256),
        ("mistralai/Mistral-7B-Instruct-v0.3", 32, 4096, 32768),
        ("Qwen/Qwen3-14B", 40, 5120, 151936),
        ("Qwen/Qwen2.5-14B-Instruct", 48, 5120, 152064),
    ],
)
def test_the_configs_of_the_shipped_models_need_no_network(monkeypatch, name, layers, hidden, vocabulary):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = load_config(ModelSpec(name))
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (layers, hidden, vocabulary)
    assert config.head_dim == 128
    assert load_config(ModelSpec(name, weights="random", layers=2)).num_hidden_layers == 2


def test_the_config_that_came_with_the_weights_wins_over_the_shipped_one(small_llama):
    spec = ModelSpec("meta-llama/Meta-Llama-3-8B-Instruct")
    assert load_config(spec, small_llama).hidden_size == 64


def test_a_name_that_is_neither_folder_nor_hub_id_says_so():
    for name in ("./nowhere", "/nowhere/model", "just-a-name", "a/b/c"):
        with pytest.raises(UserError, match="there is no folder .*, and it is no hub id"):
            model_folder(ModelSpec(name), weights=False)


@pytest.fixture
def hub(monkeypatch):
    """hub(status, **headers): a server on this machine that plays the hub and refuses every request so."""
    servers = []

    def start(status: int, **headers: str) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "GatedRepo", "owner/none is gated. Ask for access on https://huggingface.co/owner/none, then log in"),
        (403, "GatedRepo", "owner/none is gated. Ask for access on https://huggingface.co/owner/none, then log in"),
        (404, "RepoNotFound", "the hub has no model owner/none that you may read"),
        (404, "RevisionNotFound", "owner/none has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_the_way_out(hub, tmp_path, monkeypatch, status, code, message):
    hub(status, X_Error_Code=code)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        model_folder(ModelSpec("owner/none", revision="v9"), weights=False)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_network_and_cache_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="is not in the local cache and the hub cannot be reached"):
        model_folder(ModelSpec("owner/none"), weights=False)
