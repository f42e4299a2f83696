"""`make chat`: talks with what a recipe's run became, or answers one prompt."""

import argparse
import contextlib
import sys

from common.commands.flags import add_gpu_flag
from common.process_state import accept_any_bytes
from common.recipe import Recipe


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    add_gpu_flag(parser)
    parser.add_argument("--prompt", help="answer this and end; only the answer goes to standard output")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--base", action="store_true", help="begin with the adapter off")
    parser.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="ask for thoughts or not, where the template can"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the most likely token each time")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    parser.add_argument("--seed", type=int, help="draw the same answers each time")


def run_chat(recipe: Recipe, flags: argparse.Namespace) -> None:
    print(f"reading the adapter in {recipe.out}", file=sys.stderr, flush=True)
    from common.adapter.chat import Chat, Sampling, show, talk
    from common.adapter.find import find_adapter
    from common.adapter.load import load_trained, trained_tokenizer

    sampling = Sampling(flags.temperature, flags.top_p, flags.top_k, flags.max_new_tokens, flags.seed)
    adapter = find_adapter(recipe)
    with contextlib.redirect_stdout(sys.stderr):  # what loading says is no answer
        tokenizer = trained_tokenizer(adapter)
        model = load_trained(adapter, tokenizer)
        chat = Chat(model, tokenizer, sampling, flags.system, not flags.base, flags.thinking)
    if flags.prompt is None:
        print(f"{adapter.recipe.model.name} with the adapter in {adapter.folder}")
        accept_any_bytes()
        talk(chat)
        return
    chat.ask(flags.prompt, show)
    print()
