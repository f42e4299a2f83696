"""Every reader of a folder takes the same files for its weights, and a folder that holds two models is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.machine.layout import ONE_PROCESS, Layout
from common.model.integrity import check_safetensors
from common.model.loading import load_4bit
from common.model.safetensors_files import SafetensorsFolder
from common.model.tensor_source import TensorSource
from common.model.weight_files import INDEX, SINGLE, weight_files
from common.recipe import ModelSpec, UserError
from tests.conftest import FP32

TWO = Layout(2, sharded=True)
ONE_OF_TWO, TWO_OF_TWO = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


class ModelFolder:
    """A folder with model.safetensors, to which a test adds what it wants."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.right = load_file(path / SINGLE)
        self.wrong = {name: tensor + 1 for name, tensor in self.right.items()}  # an older model of the same shapes

    def save(self, file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, self.path / file, {"format": "pt"})

    def split(self, tensors: dict[str, torch.Tensor], first: str = ONE_OF_TWO, second: str = TWO_OF_TWO) -> None:
        """Writes two files and their index."""
        names = sorted(tensors)
        place_of = {name: first if name in names[: len(names) // 2] else second for name in names}
        for file in (first, second):
            self.save(file, {name: tensors[name] for name in names if place_of[name] == file})
        self.index(place_of)

    def index(self, place_of: dict[str, str], name: str = INDEX) -> None:
        (self.path / name).write_text(json.dumps({"metadata": {}, "weight_map": place_of}))

    def remove(self, *names: str) -> None:
        for name in names:
            (self.path / name).unlink()

    def link(self, name: str) -> None:
        """Moves a file elsewhere and leaves a link to it."""
        elsewhere = self.path.parent / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        shutil.move(self.path / name, elsewhere / name)
        (self.path / name).symlink_to(elsewhere / name)


@pytest.fixture
def folder(small_llama, tmp_path) -> ModelFolder:
    shutil.copytree(small_llama, tmp_path / "model")
    return ModelFolder(tmp_path / "model")


def index_alone(folder: ModelFolder) -> None:
    folder.split(folder.right)
    folder.remove(SINGLE)


def index_that_names_the_single_file(folder: ModelFolder) -> None:
    folder.index(dict.fromkeys(folder.right, SINGLE))


def index_that_names_the_single_file_and_another(folder: ModelFolder) -> None:
    folder.split(folder.right, SINGLE, "model-extra.safetensors")


def leftovers_of_an_index_of_three(folder: ModelFolder) -> None:
    index_alone(folder)
    folder.save("model-00003-of-00003.safetensors", folder.wrong)


def two_indices(folder: ModelFolder) -> None:
    index_alone(folder)
    folder.save("model.fp16-00001-of-00001.safetensors", folder.wrong)
    folder.index(
        dict.fromkeys(folder.wrong, "model.fp16-00001-of-00001.safetensors"), "model.fp16.safetensors.index.json"
    )


def consolidated_beside(folder: ModelFolder) -> None:
    folder.save("consolidated.safetensors", folder.wrong)
    folder.index(dict.fromkeys(folder.wrong, "consolidated.safetensors"), "consolidated.safetensors.index.json")


def links(folder: ModelFolder) -> None:
    index_alone(folder)
    for name in (INDEX, ONE_OF_TWO, TWO_OF_TWO):
        folder.link(name)


def a_dangling_single_file(folder: ModelFolder) -> None:
    index_alone(folder)
    (folder.path / SINGLE).symlink_to(folder.path / "gone")


SHAPES = {
    "a single file": lambda folder: None,
    "an index": index_alone,
    "an index that names the single file": index_that_names_the_single_file,
    "an index that names the single file and another": index_that_names_the_single_file_and_another,
    "an index, and a file of another one": leftovers_of_an_index_of_three,
    "two indices": two_indices,
    "consolidated beside": consolidated_beside,
    "a variant beside": lambda folder: folder.save("model.fp16.safetensors", folder.wrong),
    "pickled beside": lambda folder: (folder.path / "pytorch_model.bin").write_bytes(b"\x80\x04"),
    "links": links,
    "a dangling single file": a_dangling_single_file,
}


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_all_readers_take_the_same_files(folder, make):
    """transformers, which loads on one card; the reader of sharded layers; and that of merge and export."""
    make(folder)
    spec = ModelSpec(str(folder.path), bits=16)
    loaded = load_4bit(spec, FP32)
    hollow = load_4bit(spec, FP32, layout=TWO).layer_weights
    stored = SafetensorsFolder(folder.path)
    assert isinstance(hollow, TensorSource)
    for name, tensor in folder.right.items():
        assert torch.equal(loaded.get_parameter(name).bfloat16(), tensor), name
        assert torch.equal(hollow.read_16bit(name, tensor.shape)[0].bfloat16(), tensor), name
        assert torch.equal(stored.read(name), tensor), name
    assert set(loaded.base_record.sha256) == {*weight_files(folder.path), "config.json", "tokenizer.json"}


def both(folder: ModelFolder) -> None:
    folder.split(folder.wrong)


def both_with_a_part_of_the_index(folder: ModelFolder) -> None:
    folder.split(folder.wrong)
    folder.remove(ONE_OF_TWO)


def a_stale_index(folder: ModelFolder) -> None:
    folder.split(folder.wrong)
    folder.remove(ONE_OF_TWO, TWO_OF_TWO)


def both_as_links(folder: ModelFolder) -> None:
    folder.split(folder.wrong)
    for name in (SINGLE, INDEX, ONE_OF_TWO, TWO_OF_TWO):
        folder.link(name)


def shards_without_index(folder: ModelFolder) -> None:
    index_alone(folder)
    folder.remove(INDEX)


def single_and_shards_without_index(folder: ModelFolder) -> None:
    folder.split(folder.wrong)
    folder.remove(INDEX)


def a_part_of_an_index(folder: ModelFolder) -> None:
    index_alone(folder)
    folder.remove(ONE_OF_TWO)


def a_variant_alone(folder: ModelFolder) -> None:
    shutil.move(folder.path / SINGLE, folder.path / "model.fp16.safetensors")


def another_choice_in_the_config(folder: ModelFolder) -> None:
    folder.save("other.safetensors", folder.wrong)
    config = json.loads((folder.path / "config.json").read_text())
    (folder.path / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))


def a_tensor_twice(folder: ModelFolder) -> None:
    index_alone(folder)
    name = sorted(folder.right)[0]
    folder.save(TWO_OF_TWO, load_file(folder.path / TWO_OF_TWO) | {name: folder.wrong[name]})


def names_without_the_prefix(folder: ModelFolder) -> None:
    folder.save(SINGLE, {name.removeprefix("model."): tensor for name, tensor in folder.right.items()})


REFUSED = {
    "both": (both, rf"holds two models: {SINGLE}, and {ONE_OF_TWO} and 1 more that {INDEX} names\. Remove the one"),
    "both, in part": (both_with_a_part_of_the_index, rf"holds two models: {SINGLE}, and .* that {INDEX} names\. "),
    "a stale index": (
        a_stale_index,
        "holds two models: .* names, not one of which is there. Remove .* or .*index.json",
    ),
    "both as links": (both_as_links, "holds two models: "),
    "single and stray": (single_and_shards_without_index, f"holds two models: .* 1 more without a {INDEX}. Remove"),
    "stray files": (shards_without_index, f"has {ONE_OF_TWO} and no {INDEX}: download that file too"),
    "a part of an index": (a_part_of_an_index, f"lacks 1 of 2 weight files, first {ONE_OF_TWO}"),
    "a variant alone": (a_variant_alone, "has no weights: .*; model.fp16.safetensors is another format or variant"),
    "a path in the index": (
        lambda folder: folder.index({"a": "../other/model.safetensors"}),
        "is damaged: '../other/model.safetensors' is no safetensors file beside it",
    ),
    "pickled in the index": (lambda folder: folder.index({"a": "pytorch_model.bin"}), "'pytorch_model.bin' is no saf"),
    "an empty index": (lambda folder: folder.index({}), "is damaged: None is no safetensors file beside it"),
    "an adapter": (
        lambda folder: (folder.path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}'),
        "holds an adapter too, which transformers would load onto the model",
    ),
    "the config names another": (another_choice_in_the_config, r"names other.safetensors as the weights \(transform"),
    "a tensor twice": (a_tensor_twice, f"holds lm_head.weight twice, in {ONE_OF_TWO} and {TWO_OF_TWO}"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_readers_differ_about_is_refused_before_anything_is_loaded(folder, make, message):
    make(folder)
    for layout in (ONE_PROCESS, TWO):
        with pytest.raises(UserError, match=message) as error:
            load_4bit(ModelSpec(str(folder.path)), FP32, layout=layout)
        assert "\n" not in str(error.value) and str(folder.path) in str(error.value)
    with pytest.raises(UserError, match=message):
        check_safetensors(folder.path)


def test_names_that_only_transformers_understands_are_refused(folder):
    names_without_the_prefix(folder)
    with pytest.raises(UserError, match=r"has no tensor model\..*: load it with transformers and save it again"):
        load_4bit(ModelSpec(str(folder.path)), FP32)
