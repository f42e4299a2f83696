"""A conversation with a fine-tuned model in the terminal: a line at a time, the answer as it comes."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, TextStreamer

from common.data.chat_format import ChatFormat
from common.data.conversations import Conversation, Message
from common.data.files import BadRow
from common.recipe import UserError, require
from common.run.generation import GREEDY

HELP = """\
/reset         forget the conversation
/base          take the adapter off, or put it on again
/system TEXT   begin again with this system message; without TEXT with none
/help          this list
/quit          leave (or Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. None takes what the model's own generation config says."""

    temperature: float | None = None  # 0 takes the most likely token each time
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        require(self.temperature is None or self.temperature >= 0, f"--temperature is {self.temperature}; 0 or more")
        require(self.top_p is None or 0 < self.top_p <= 1, f"--top-p is {self.top_p}; above 0, at most 1")
        require(self.top_k is None or self.top_k > 0, f"--top-k is {self.top_k}; at least 1")
        require(self.max_new_tokens > 0, f"--max-new-tokens is {self.max_new_tokens}; at least 1")

    def arguments(self) -> dict[str, Any]:
        """In the words of transformers' generate."""
        named = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in named.items() if value is not None}
        if self.temperature == 0:
            return GREEDY
        return {**given, "do_sample": True} if given else {}


class _Printer(TextStreamer):
    """Shows an answer as it comes, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.text = show, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.show(text)


@dataclass
class Chat:
    """A model, and a conversation with it so far. Raises UserError for a model without a chat template."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerFast
    sampling: Sampling = Sampling()
    system: str = ""
    adapter_on: bool = True
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError("the model has no chat template: it is a base model, which does not take part in a chat")
        self.chat_format = ChatFormat(self.tokenizer)
        self.positions = self.model.config.max_position_embeddings
        self.model.set_attn_implementation("sdpa")  # with a cache, which common.model.attention does not know
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)

    @property
    def conversation(self) -> Conversation:
        return (*([Message("system", self.system)] if self.system else []), *self.turns)

    def ask(self, text: str, show: Callable[[str], None]) -> str:
        """The answer, shown piece by piece, and remembered with the question; Ctrl-C ends it where it is.

        Raises UserError, and forgets the question, where the template refuses it or it is too long.
        """
        self.turns.append(Message("user", text))
        try:
            prompt = self.chat_format.prompt_ids(self.conversation)
            if len(prompt) >= self.positions:
                raise UserError(
                    f"the conversation has {len(prompt):,} tokens, and the model {self.positions:,} positions: /reset"
                )
        except (UserError, BadRow) as error:
            self.turns.pop()
            raise UserError(str(error)) from error
        printer = _Printer(self.tokenizer, show)
        try:
            self._generate(prompt, printer)
        except KeyboardInterrupt:
            printer.end()  # shows the word that it holds back
        self.turns.append(Message("assistant", printer.text))
        return printer.text

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
                max_new_tokens=min(self.sampling.max_new_tokens, self.positions - len(prompt)),
                **self.sampling.arguments(),
            )

    def command(self, line: str) -> str:
        """Does what a line that begins with a slash says; what to tell."""
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.turns.clear()
            return "the conversation is forgotten"
        if name == "/base":
            self.adapter_on = not self.adapter_on
            return "the adapter is on" if self.adapter_on else "the adapter is off: this is the base model"
        if name == "/system":
            self.turns.clear()
            self.system = rest.strip()
            return f"from now on: {self.system}" if self.system else "no system message"
        return HELP if name == "/help" else f"there is no {name}\n{HELP}"


def talk(chat: Chat, read: Callable[[str], str] = input) -> None:
    """Asks and answers until /quit or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then has history and the usual keys

    print("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            line = read("> " if chat.adapter_on else "base> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # a line that is given up
            print()
            continue
        if line in ("/quit", "/exit"):
            return
        if not line:
            continue
        if line.startswith("/"):
            print(chat.command(line))
            continue
        try:
            chat.ask(line, show)
            print("\n")
        except UserError as error:
            print(f"error: {error}")


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
