import re

from common.run.provenance import code_version, command_line
from tests.conftest import ROOT


def test_the_command_is_the_one_that_was_typed(monkeypatch):
    program = str(ROOT / "recipes" / "__main__.py")
    assert command_line([program, "tiny"]) == "make finetune MODEL=tiny"
    typed = [program, "my-bot", "--data", "my chats.jsonl", "--out", "o", "--max-steps", "5", "--resume"]
    assert command_line(typed) == "make finetune MODEL=my-bot 'DATA=my chats.jsonl' OUT=o 'ARGS=--max-steps 5'"
    of_make = [program, "finetune", "my-bot", "--data=my chats.jsonl", "--out=o", "--max-steps", "5", "--resume"]
    assert command_line(of_make) == command_line(typed)
    assert command_line([program, "finetune", "tiny", "--out=v$HOME"]) == "make finetune MODEL=tiny 'OUT=v$HOME'"
    assert command_line([program, "finetune", "my-bot", "--out", "~/o/"]) == "make finetune MODEL=my-bot 'OUT=~/o/'"
    assert command_line([program, "dryrun", "tiny", "--layers", "2"]) == "make dryrun MODEL=tiny 'ARGS=--layers 2'"
    kernel = ["/usr/lib/ipykernel_launcher.py", "-f", "/home/me/.local/share/jupyter/kernel-1.json"]
    assert command_line(kernel) == "main(recipe), in a notebook"  # and no path of the machine
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line([program, "tiny"]) == "make finetune MODEL=tiny GPUS=2"
    assert command_line(["recipes/tiny.py", "--max-steps", "5"]) == "python recipes/tiny.py --max-steps 5"


def test_the_commit_is_named_where_there_is_one(monkeypatch, tmp_path):
    if (ROOT / ".git").exists():
        assert re.search(r"[0-9a-f]{7,}(-dirty)?$", code_version()["recipes"])
    monkeypatch.setattr("common.run.provenance.REPOSITORY", tmp_path)
    assert code_version() == {}
