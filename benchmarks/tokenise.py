"""Times our tokenising beside TRL's preparation: from a file of conversations to token ids and labels, on all cores.

    python -m benchmarks.tokenise --tokenizer FOLDER --rows 100000

FOLDER has the tokenizer of Llama 3, as on the hub, or without its chat template. Each stack runs in processes of its
own, in turn, `--rounds` times; the seconds are those of the median round, without imports and the tokenizer's loading:

    ours      common.data: reads and checks every row, and names the bad ones
    batched   datasets.map(batched=True, num_proc=cores), with TRL's training template and assistant masks
    trl       TRL's own preparation, row by row, with as many processes

Memory is the peak of the proportional set size over all processes of a stack. Results go to benchmarks/results.
"""

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

from benchmarks.results_folder import installed_versions, result_path, write_result
from common import REPOSITORY
from common.control_group import available_cpus
from common.machine.device import GIB

STACKS = ("ours", "batched", "trl")
SEQ_LEN = 2048
POLL_SECONDS = 0.2  # between two looks at the memory


def write_chats(path: Path, rows: int) -> None:
    """Writes conversations of one to three rounds, with about 330 tokens, of sentences from Python's own manual."""
    text = re.sub(r"\s+", " ", " ".join(topics.values()))
    sentences = [sentence for sentence in re.split(r"(?<=[.:?]) ", text) if 20 < len(sentence) < 300]
    dice = random.Random(0)

    def say(role: str, at_most: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(dice.choices(sentences, k=dice.randint(1, at_most)))}

    with path.open("w") as file:
        for _ in range(rows):
            turns = [turn for _ in range(dice.randint(1, 3)) for turn in (say("user", 2), say("assistant", 9))]
            file.write(json.dumps({"messages": turns}) + "\n")


def run_here(stack: str, path: str, folder: str) -> dict[str, float]:
    """Runs a stack in this process. Returns its seconds, also of CPU time, and its tokens, all and trained."""
    import trl
    from transformers import AutoTokenizer

    from common.data.tokenise import tokenise_source
    from common.recipe import DataSpec
    from common.tokens.chat_format import ChatFormat

    templates = Path(trl.__file__).parent / "chat_templates"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (templates / "llama3.jinja").read_text()
    if stack == "ours":
        started, cpu_before = time.perf_counter(), cpu_seconds()
        _, report = tokenise_source(DataSpec(path), path, "train", ChatFormat(tokenizer), SEQ_LEN)
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_before
        tokens, trained = report.tokens, report.trained_tokens
    else:
        training_template = (templates / "llama3_training.jinja").read_text()
        prepare = prepare_in_batches if stack == "batched" else prepare_by_trl
        started, cpu_before = time.perf_counter(), cpu_seconds()
        prepared = prepare(path, tokenizer, training_template)
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_before
        tokens = sum(len(row) for row in prepared["input_ids"])
        trained = sum(label != -100 for row in prepared["labels"] for label in row)
    return {"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens, "trained_tokens": trained}


def cpu_seconds() -> float:
    """Of this process and those that it has started and that have ended: what a busy machine changes less."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def prepare_in_batches(path: str, tokenizer: Any, template: str) -> Any:
    import datasets

    rows = datasets.load_dataset("json", data_files=path, split="train")
    return rows.map(
        partial(tokenise_batch, tokenizer=tokenizer, template=template),
        batched=True,
        num_proc=available_cpus(),
        remove_columns=rows.column_names,
    )


def tokenise_batch(rows: Any, tokenizer: Any, template: str) -> dict[str, list[list[int]]]:
    """What TRL's tokenize_fn and build_labels do, for many rows at once."""
    encoded = tokenizer.apply_chat_template(
        rows["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    labels = [
        [token if is_trained else -100 for token, is_trained in zip(ids, mask, strict=True)]
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def prepare_by_trl(path: str, tokenizer: Any, template: str) -> Any:
    """Calls the method of TRL's trainer, without a trainer: that would need a model."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = datasets.load_dataset("json", data_files=path, split="train")
    arguments = SFTConfig(
        dataset_num_proc=available_cpus(),
        max_length=None,
        shuffle_dataset=False,
        assistant_only_loss=True,
        use_cpu=True,
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=False)
    return SFTTrainer._prepare_dataset(trainer, rows, tokenizer, arguments, False, None, "train")


def run_stack(stack: str, path: Path, tokenizer: str) -> dict[str, float]:
    """Runs a stack in a process of its own. Adds the peak of the memory of that process and of those it starts."""
    import psutil

    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.tokenise", "--tokenizer", tokenizer, "--stack", stack]
        environment = os.environ | {"HF_DATASETS_CACHE": cache, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        with subprocess.Popen(
            [*command, "--file", str(path)], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            parent, peak = psutil.Process(process.pid), 0
            while process.poll() is None:
                peak = max(peak, sum(map(proportional_bytes, [parent, *parent.children(recursive=True)])))
                time.sleep(POLL_SECONDS)
            assert process.stdout
            printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{stack} failed")
    result: dict[str, float] = json.loads(printed.splitlines()[-1])
    return result | {"peak_gib": peak / GIB}


def proportional_bytes(process: Any) -> int:
    import psutil

    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has just ended
        return 0


def compare(tokenizer: str, rows: int, rounds: int) -> dict[str, Any]:
    """Runs all stacks in turn. Returns for each the median of its rounds."""
    found: dict[str, list[dict[str, float]]] = {stack: [] for stack in STACKS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        write_chats(path, rows)
        for _ in range(rounds):
            for stack in STACKS:
                result = run_stack(stack, path, tokenizer)
                found[stack].append(result)
                rate, peak = rows / result["seconds"], result["peak_gib"]
                print(
                    f"{stack:8} {rate:7,.0f} rows/s  {result['cpu_seconds']:.0f} s of CPU  {peak:.2f} GiB  "
                    f"{result['tokens']:,.0f} tokens, {result['trained_tokens']:,.0f} trained",
                    flush=True,
                )
    medians = {
        stack: {name: statistics.median(result[name] for result in results) for name in results[0]}
        for stack, results in found.items()
    }
    return {"rows": rows, "rounds": rounds, "cpus": available_cpus(), "stacks": medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stack", choices=STACKS, help=argparse.SUPPRESS)  # of the processes that this one starts
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--no-result", action="store_true", help="write no file")
    args = parser.parse_args()
    if args.stack:
        print(json.dumps(run_here(args.stack, args.file, args.tokenizer)))
        return
    result = compare(args.tokenizer, args.rows, args.rounds)
    ours = result["stacks"]["ours"]
    for stack in STACKS[1:]:
        other = result["stacks"][stack]
        print(
            f"ours / {stack}: {other['seconds'] / ours['seconds']:.2f} times the rows per second, "
            f"{ours['peak_gib'] / other['peak_gib']:.2f} times the memory"
        )
    if not args.no_result:
        versions = installed_versions(("datasets", "tokenizers", "transformers", "trl"))
        write_result({"date": str(date.today()), "versions": versions, **result}, result_path("tokenise"))


if __name__ == "__main__":
    main()
