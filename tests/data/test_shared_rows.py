"""Of the processes of a run on one machine one tokenises, and the others have the same rows."""

import json
import subprocess
import sys

import pytest

from common.data.cache import CACHE
from common.data.rows import load_rows
from common.recipe import DataSpec
from common.run.resume import hash_rows
from tests.conftest import ROOT, TINY, TRAIN
from tests.machine.test_processes import CPU, launcher

SCRIPT = """
import json, sys
from transformers import AutoTokenizer
from common.data import cache, rows
from common.data.rows import load_rows
from common.machine.collectives import init_distributed, shut_down_distributed
from common.machine.processes import rank
from common.recipe import DataSpec
from common.run.resume import hash_rows

init_distributed()
cache.MIN_SOURCE_BYTES = int(sys.argv[3])
made, make = [], rows.tokenise_source
rows.tokenise_source = lambda *arguments: made.append(0) or make(*arguments)
found = load_rows(DataSpec(sys.argv[1], eval_rows=20), AutoTokenizer.from_pretrained(sys.argv[4]), 128)
told = [len(made), hash_rows(found.train), hash_rows(found.evaluation), [r.record() for r in found.reports]]
with open(f"{sys.argv[2]}/{rank()}.json", "w") as file:
    json.dump(told, file)
shut_down_distributed()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "min_source_bytes, kept, writable",
    [(1, 1, True), (1 << 30, 0, True), (1, 0, False)],
    ids=["large", "small", "full"],
)
def test_one_process_tokenises_for_all(tmp_path, tokenizer, min_source_bytes, kept, writable):
    script = tmp_path / "load.py"
    script.write_text(SCRIPT)
    if not writable:
        (tmp_path / ".cache").write_text("in the way")
    command = [sys.executable, *launcher(2), str(script), TRAIN, str(tmp_path), str(min_source_bytes), str(TINY)]
    environment = CPU | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first.pop(0), second.pop(0)) == (1, 0 if writable else 1)
    assert first == second
    alone = load_rows(DataSpec(TRAIN, eval_rows=20), tokenizer, 128)
    assert first[:2] == [hash_rows(alone.train), hash_rows(alone.evaluation)]
    assert done.stdout.count("rows read (messages)") == 1
    assert len(list((tmp_path / CACHE).glob("*"))) == kept
