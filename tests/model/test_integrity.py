import shutil

import pytest

from common.model.integrity import check_safetensors
from common.recipe import UserError


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
