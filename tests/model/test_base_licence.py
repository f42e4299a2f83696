"""The licence of a base is that of its README, on the disk or in the hub's cache, before what is known here."""

import huggingface_hub
import pytest

from common.model.base_licence import base_licence

COMMIT = "a" * 40
LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """cached(name, README): the hub's cache has it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def write(name: str, readme: str) -> None:
        snapshot = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (snapshot / "README.md").write_text(readme)

    return write


def test_a_readme_in_the_cache_comes_before_what_is_known(cached):
    assert base_licence(LLAMA, COMMIT) == {"license": "llama3"}
    cached(LLAMA, "---\nlicense: other\nlicense_name: a-new-one\nlicense_link: LICENSE\n---\n")
    link = f"https://huggingface.co/{LLAMA}/blob/main/LICENSE"
    assert base_licence(LLAMA, COMMIT) == {"license": "other", "license_name": "a-new-one", "license_link": link}


@pytest.mark.parametrize("readme", ["", "no head", "---\nlicense: [a, b]\n---\n", "---\n: [\n---\n", "---\n- a\n---\n"])
def test_a_readme_that_says_nothing_leaves_what_is_known(cached, readme):
    cached(LLAMA, readme)
    cached("owner/model", readme)
    assert base_licence(LLAMA, COMMIT) == {"license": "llama3"} and base_licence("owner/model", COMMIT) == {}


def test_a_local_folder_has_its_own_readme_and_no_link_into_it(tmp_path):
    assert base_licence(str(tmp_path), None) == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlicense_link: LICENSE\n---\n")
    assert base_licence(str(tmp_path), None) == {"license": "mit"}
