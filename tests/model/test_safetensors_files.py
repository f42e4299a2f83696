import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.model import safetensors_files
from common.model.safetensors_files import (
    Entry,
    SafetensorsFile,
    SafetensorsFolder,
    narrow_to_16_bits,
    split_into_files,
    write_files,
)


def test_what_is_written_is_what_safetensors_writes(tmp_path):
    """Same header, same bytes: the layout of a merged model is that of its base."""
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7, dtype=torch.uint8), "c": torch.randn(2).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    original = (tmp_path / "model.safetensors").read_bytes()
    source = SafetensorsFolder(tmp_path)
    (tmp_path / "copy").mkdir()
    write_files(tmp_path / "copy", source.files, lambda entry: tensors[entry.name], say=lambda line: None)
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == original
    assert source.files[0].size == len(original)


def test_tensors_and_rows_of_them_are_read(tmp_path, small_model):
    folder = small_model("llama", max_shard_size="100KB")
    whole = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    stored = SafetensorsFolder(folder)
    assert len(stored.files) > 2
    assert stored.entries.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(stored.read(name), tensor)
    name = "model.embed_tokens.weight"
    assert torch.equal(stored.read(name, slice(3, 9)), whole[name][3:9])
    assert torch.equal(stored.read(name, [5, 1, 5]), whole[name][[5, 1, 5]])


def test_files_are_split_and_indexed_as_transformers_does(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "MAX_FILE_BYTES", 100)
    entries = [Entry(name, torch.float16, (10, 3)) for name in "abcd"]  # 60 bytes each
    files = split_into_files(entries)
    assert [file.name for file in files] == [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    write_files(tmp_path, files, lambda entry: torch.ones(entry.shape), say=lambda line: None)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 240
    assert set(index["weight_map"]) == set("abcd")
    assert SafetensorsFolder(tmp_path).read("d").dtype == torch.float16
    assert [file.name for file in split_into_files(entries[:1])] == ["model.safetensors"]


def test_wider_tensors_become_16_bit_and_others_stay():
    layout = SafetensorsFile(
        "x", (Entry("a", torch.float32, (2,)), Entry("b", torch.float16, (2,)), Entry("c", torch.uint8, (2,)))
    )
    (narrow,) = narrow_to_16_bits([layout], torch.bfloat16)
    assert [entry.dtype for entry in narrow.entries] == [torch.bfloat16, torch.float16, torch.uint8]


def test_a_tensor_of_another_shape_is_not_written(tmp_path: Path):
    layout = SafetensorsFile("x.safetensors", (Entry("a", torch.float32, (2, 3)),))
    with pytest.raises(RuntimeError, match="a is .3, 2., not .2, 3."):
        write_files(tmp_path, [layout], lambda entry: torch.ones(3, 2))
