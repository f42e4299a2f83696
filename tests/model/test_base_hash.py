"""The hash of a base: the same wherever the same files lie, another when a byte changes, computed once."""

import os
import shutil
from pathlib import Path

import pytest

from common.machine.disk import sha256_of
from common.model import file_hash
from common.model.base_hash import base_hash, read_base_record
from common.model.file_hash import remembered_sha256

COMMIT = "c" * 40


@pytest.fixture
def local(small_model, tmp_path) -> Path:
    shutil.copytree(small_model("llama", max_shard_size="100KB"), tmp_path / "local")
    return tmp_path / "local"


def put_in_cache(folder: Path, cache: Path) -> Path:
    """The snapshot of a model's folder in the layout of the hub's cache: links to blobs that their content names."""
    snapshot, blobs = cache / "models--owner--model" / "snapshots" / COMMIT, cache / "models--owner--model" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        large = path.suffix == ".safetensors"  # git's own hash names the small ones
        blob = blobs / (sha256_of(path) if large else f"{abs(hash(path.name)):040x}"[:40])
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_it_names_the_weights_the_config_and_the_tokenizer(local):
    hashes = base_hash(local)
    assert hashes == {path.name: sha256_of(path) for path in local.iterdir() if path.name in hashes}
    assert {"config.json", "tokenizer.json"} < set(hashes)
    assert len(hashes) - 2 == len(list(local.glob("model-*.safetensors"))) > 2


def test_the_hubs_cache_gives_the_same_hash_and_its_commit_without_reading_the_weights(local, tmp_path, monkeypatch):
    expected, snapshot = base_hash(local), put_in_cache(local, tmp_path / "cache")
    for blob in snapshot.parent.parent.glob("blobs/" + "?" * 64):
        blob.write_bytes(b"")  # check_safetensors has compared them; here nothing is left to read
    record = read_base_record(snapshot)
    assert record.sha256 == expected and record.commit == COMMIT
    assert read_base_record(local).commit is None


@pytest.mark.parametrize("name", ["model-00002", "config.json", "tokenizer.json"])
def test_one_changed_byte_is_another_hash_even_with_the_old_time_stamp(local, name):
    before, path = base_hash(local), next(path for path in local.iterdir() if path.name.startswith(name))
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns and path.stat().st_size == status.st_size
    after = base_hash(local)
    assert {key for key in before if before[key] != after[key]} == {path.name}


def test_a_file_is_read_once_and_a_damaged_note_is_no_harm(local, tmp_path, monkeypatch):
    monkeypatch.setattr(file_hash, "NOTES", tmp_path / "notes")
    path = next(local.glob("model-*.safetensors"))
    right = remembered_sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("it was read again"))
        assert remembered_sha256(path) == right
    (note,) = (tmp_path / "notes").iterdir()
    note.write_text(right[:20])
    assert remembered_sha256(path) == right


def test_a_folder_that_cannot_be_written_only_costs_time(local, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(file_hash, "NOTES", tmp_path / "file" / "notes")
    path = next(local.glob("model-*.safetensors"))
    assert remembered_sha256(path) == remembered_sha256(path) == sha256_of(path)
