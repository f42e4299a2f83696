"""recipes/smollm2_135m.py: a small real model. .ci/run trains it for a few steps."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from common.run.prompts import load_prompts
from recipes.smollm2_135m import RECIPE
from tests.conftest import ROOT
from tests.hub_cache import REPOSITORY, write_hub_cache


def test_the_model_is_found_where_tests_lay_it_out(small_llama, tmp_path):
    snapshot = write_hub_cache(small_llama, tmp_path)
    assert RECIPE.model.name == REPOSITORY
    assert Path(snapshot_download(REPOSITORY, cache_dir=tmp_path / "hub", local_files_only=True)) == snapshot
    assert (snapshot / "model.safetensors").read_bytes() == (small_llama / "model.safetensors").read_bytes()
    assert write_hub_cache(small_llama, tmp_path) == snapshot  # again


def test_no_answer_that_is_wanted_is_longer_than_those_that_are_generated(real_tokenizer):
    """It would count as wrong, whatever the model says."""
    tokenizer = real_tokenizer("smollm2")
    limits = re.findall(r"max_new_tokens=(\d+)", (ROOT / "recipes" / "smollm2_135m.py").read_text())
    prompts = load_prompts(str(ROOT / RECIPE.data.eval_source), tokenizer)
    longest = max(len(tokenizer(prompt.reference)["input_ids"]) for prompt in prompts)
    assert len(set(limits)) == 1 and len(prompts) == 126
    assert longest + 1 == 31 < int(limits[0])  # with the end of the turn
