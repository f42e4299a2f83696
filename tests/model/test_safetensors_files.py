import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.model import safetensors_files as shards
from common.model.safetensors_files import Entry, Shard, Shards, in_16_bits, split, write_shards


def test_what_is_written_is_what_safetensors_writes(tmp_path):
    """Same header, same bytes: the layout of a merged model is that of its base."""
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7, dtype=torch.uint8), "c": torch.randn(2).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    original = (tmp_path / "model.safetensors").read_bytes()
    source = Shards(tmp_path)
    (tmp_path / "copy").mkdir()
    write_shards(tmp_path / "copy", source.shards, lambda entry: tensors[entry.name], say=lambda line: None)
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == original
    assert source.shards[0].size == len(original)


def test_tensors_and_rows_of_them_are_read(tmp_path, small_model):
    folder = small_model("llama", max_shard_size="100KB")
    whole = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    stored = Shards(folder)
    assert len(stored.shards) > 2
    assert stored.entries.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(stored.read(name), tensor)
    name = "model.embed_tokens.weight"
    assert torch.equal(stored.read(name, slice(3, 9)), whole[name][3:9])
    assert torch.equal(stored.read(name, [5, 1, 5]), whole[name][[5, 1, 5]])


def test_shards_are_cut_and_indexed_as_transformers_does(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 100)
    entries = [Entry(name, torch.float16, (10, 3)) for name in "abcd"]  # 60 bytes each
    cut = split(entries)
    assert [shard.file for shard in cut] == [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    write_shards(tmp_path, cut, lambda entry: torch.ones(entry.shape), say=lambda line: None)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 240
    assert set(index["weight_map"]) == set("abcd")
    assert Shards(tmp_path).read("d").dtype == torch.float16
    assert [shard.file for shard in split(entries[:1])] == ["model.safetensors"]


def test_wider_tensors_become_16_bit_and_others_stay():
    shard = Shard(
        "x", (Entry("a", torch.float32, (2,)), Entry("b", torch.float16, (2,)), Entry("c", torch.uint8, (2,)))
    )
    (narrow,) = in_16_bits([shard], torch.bfloat16)
    assert [entry.dtype for entry in narrow.entries] == [torch.bfloat16, torch.float16, torch.uint8]


def test_a_tensor_of_another_shape_is_not_written(tmp_path: Path):
    shard = Shard("x.safetensors", (Entry("a", torch.float32, (2, 3)),))
    with pytest.raises(RuntimeError, match="a is .3, 2., not .2, 3."):
        write_shards(tmp_path, [shard], lambda entry: torch.ones(3, 2))
