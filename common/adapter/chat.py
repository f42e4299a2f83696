"""Chats with a fine-tuned model in the terminal: the user types a line, the answer is printed as it is generated."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, TextStreamer

from common.conversations.conversation import Conversation, Message
from common.machine.device import GIB, this_machine
from common.machine.out_of_memory import out_of_memory, without_frames
from common.machine.slow_work import report_slow_work
from common.model.rope_scaling import usable_positions
from common.process_state import edit_lines
from common.recipe import UserError, require
from common.run.answer_config import GREEDY, fit_to_answers
from common.run.answer_memory import answer_bytes, read_in_parts
from common.sources.source_row import BadRow
from common.tokens.chat_format import ChatFormat

HELP = """\
/reset         forget the conversation
/base          take the adapter off, or put it on again
/system TEXT   begin again with this system message; without TEXT with none
/help          this list
/quit          leave (or Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. None leaves a value to the model's generation config.

    Raises UserError for a value that is out of range.
    """

    temperature: float | None = None  # 0 takes the most likely token each time
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int = 512  # of one answer
    seed: int | None = None  # gives the same answers each time

    def __post_init__(self) -> None:
        require(self.temperature is None or self.temperature >= 0, f"--temperature is {self.temperature}; 0 or more")
        require(self.top_p is None or 0 < self.top_p <= 1, f"--top-p is {self.top_p}; above 0, at most 1")
        require(self.top_k is None or self.top_k > 0, f"--top-k is {self.top_k}; at least 1")
        require(self.max_new_tokens > 0, f"--max-new-tokens is {self.max_new_tokens}; at least 1")

    def arguments(self) -> dict[str, Any]:
        """The arguments of transformers' generate for these values."""
        named = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in named.items() if value is not None}
        if self.temperature == 0:
            return GREEDY
        return {**given, "do_sample": True} if given else {}


class _Printer(TextStreamer):
    """Calls `show` with each piece of an answer as it is generated, and keeps the whole in `text`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.text = show, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if stream_end:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # tokens of a character that the answer's end cut
        self.text += text
        self.show(text)


@dataclass
class Chat:
    """A model and the conversation with it so far. Raises UserError for a model without a chat template."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerFast
    sampling: Sampling = Sampling()
    system: str = ""
    adapter_on: bool = True
    thinking: bool | None = None  # the template's enable_thinking; None leaves it to the template
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError("the model has no chat template: it is a base model, which does not take part in a chat")
        if self.thinking is not None and "enable_thinking" not in self.tokenizer.chat_template:
            raise UserError(
                "the model's chat template knows no enable_thinking: leave --thinking and --no-thinking out"
            )
        refuse_other_bytes(self.system)
        self.chat_format = ChatFormat(self.tokenizer)
        self.positions = usable_positions(self.model.config)
        self.arguments = fit_to_answers(self.model.generation_config, self.model.config, self.tokenizer)
        self.arguments |= self.sampling.arguments()
        self.model.set_attn_implementation("sdpa")  # common.model.attention has no key-value cache
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)

    @property
    def conversation(self) -> Conversation:
        system = [Message("system", self.system)] if self.system else []
        arguments = {} if self.thinking is None else {"enable_thinking": self.thinking}
        return Conversation((*system, *self.turns), template_arguments=arguments)

    def ask(self, text: str, show: Callable[[str], None]) -> str:
        """Asks the model, and adds question and answer to the conversation. Returns the answer.

        show: called with each piece of the answer. Ctrl-C ends the answer where it is. Raises UserError when the text
        is not text, when the template refuses the conversation, or when it is too long; the question is forgotten then.
        """
        refuse_other_bytes(text)
        self.turns.append(Message("user", text))
        try:
            prompt = self.chat_format.prompt_ids(self.conversation)
            if len(prompt) >= self.positions:
                raise UserError(
                    f"the conversation has {len(prompt):,} tokens, and the model {self.positions:,} positions: /reset"
                )
            self._refuse_without_room(len(prompt))
        except (UserError, BadRow) as error:
            self.turns.pop()
            raise UserError(str(error)) from error
        printer = _Printer(self.tokenizer, show)
        try:
            self._generate(prompt, printer)
        except KeyboardInterrupt:
            printer.end()  # shows the last word, which the streamer holds back until it is complete
        except Exception as error:
            if (memory := out_of_memory(error)) is None:
                raise
            self.turns.pop()
            without_frames(error)
            raise UserError(
                f"out of {memory} memory at a conversation of {len(prompt):,} tokens; the question is forgotten: /reset"
            ) from error
        self.turns.append(Message("assistant", printer.text))
        return printer.text

    def _refuse_without_room(self, prompt_tokens: int) -> None:
        """Raises UserError where keys and values of the conversation would not fit beside the weights."""
        tokens = min(prompt_tokens + self.sampling.max_new_tokens, self.positions)
        needed = answer_bytes(self.model.config, tokens, self.model.dtype.itemsize)
        there = this_machine().room_bytes()
        if there is not None and needed > there:
            raise UserError(
                f"the conversation has {prompt_tokens:,} tokens; with an answer of up to "
                f"{tokens - prompt_tokens:,} its keys and values, and what reading it takes, are {needed / GIB:.1f} "
                f"GiB, and {there / GIB:.1f} GiB are free: /reset, or a shorter text"
            )

    @torch.no_grad()
    def _generate(self, prompt: list[int], printer: _Printer) -> None:
        ids = torch.tensor([prompt], device=self.model.device)
        with contextlib.nullcontext() if self.adapter_on else self.model.disable_adapter():
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=printer,
                use_cache=True,
                pad_token_id=self.tokenizer.pad_token_id,
                max_length=min(len(prompt) + self.sampling.max_new_tokens, self.positions),
                **self.arguments | read_in_parts(len(prompt)),
                tokenizer=self.tokenizer,  # which stop_strings need
            )

    def run_slash_command(self, line: str) -> str:
        """Runs a line of HELP's, which begins with a slash. Returns what to print. Raises UserError as ask."""
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.turns.clear()
            return "the conversation is forgotten"
        if name == "/base":
            self.adapter_on = not self.adapter_on
            return "the adapter is on" if self.adapter_on else "the adapter is off: this is the base model"
        if name == "/system":
            refuse_other_bytes(rest)
            self.turns.clear()
            self.system = rest.strip()
            return f"from now on: {self.system}" if self.system else "no system message"
        return HELP if name == "/help" else f"there is no {name}\n{HELP}"


def refuse_other_bytes(text: str) -> None:
    """Raises UserError for what was typed as bytes that are not UTF-8. Python has a lone surrogate for each of them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"what was typed is not UTF-8 text, from character {error.start + 1} on: {text!r:.60}. Set the terminal to "
            "UTF-8, or convert: iconv -f LATIN1 -t UTF-8"
        ) from error


def talk(chat: Chat, read: Callable[[str], str] = input) -> None:
    """Reads lines, and prints answers, until /quit or the end of input. Lines that are pasted together are one turn."""
    edit_lines()
    print("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            line = read("> " if chat.adapter_on else "base> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # the user gives up the line
            print()
            continue
        except UnicodeDecodeError:
            print("error: what was typed is not UTF-8 text")
            continue
        if line in ("/quit", "/exit"):
            return
        if not line:
            continue
        try:
            if line.startswith("/") and ("\n" not in line or line.startswith("/system ")):  # not a pasted "// Go"
                print(chat.run_slash_command(line))
            else:
                ask_aloud(chat, line)
                print("\n")
        except UserError as error:
            print(f"error: {error}")


def ask_aloud(chat: Chat, text: str) -> None:
    """Shows the answer as it comes; and until its first word, which may take minutes, that it is under way."""
    with contextlib.ExitStack() as until_first_word:
        until_first_word.enter_context(report_slow_work("reading the conversation"))

        def show_first(piece: str) -> None:
            if piece:
                until_first_word.close()
            show(piece)

        chat.ask(text, show_first)


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
