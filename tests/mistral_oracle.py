"""Asks mistral-common, with which Mistral's models are trained and served, for the token ids of conversations.

It demands an older numpy than this project's. So it is unpacked beside the installed packages, and another process
imports it. Run as a program, this file is that process: requests come in on stdin, ids go out on stdout.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MISTRAL_COMMON = "mistral-common==1.13.1"
# What mistral-common imports and the tests do not have anyway.
NEEDS = (
    *("tiktoken==0.14.0", "sentencepiece==0.2.3", "pydantic-extra-types==2.11.1", "pycountry==26.2.16"),
    *(
        "attrs==26.1.0",
        "jsonschema==4.26.0",
        "jsonschema-specifications==2025.9.1",
        "referencing==0.37.0",
        "rpds-py==2026.9.1",
    ),
)
# Which file of mistral-common has the vocabulary, by the name in tests/real_tokenizers.py.
FILES = {
    "mistral_v1": "tokenizer.model.v1",
    "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3",
    "tekken": "tekken_240718.json",
}


def mistral_ids(name: str, requests: list[dict[str, Any]]) -> list[list[int] | str]:
    """The token ids of conversations, with an end token after each answer, or why mistral-common refuses one.

    `name`: of the tokenizer, in FILES. A request holds messages and may hold tools, as OpenAI writes them. The test is
    skipped where the wheels cannot be had.
    """
    from tests.wheels import wheel  # the other process has no pytest to skip with

    python_path = os.pathsep.join(str(wheel(pin)) for pin in (MISTRAL_COMMON, *NEEDS))
    done = subprocess.run(
        [sys.executable, __file__, str(wheel(MISTRAL_COMMON) / "mistral_common" / "data" / FILES[name])],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": python_path},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main(vocabulary: Path) -> None:
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = MistralTokenizer.from_file(str(vocabulary), mode=ValidationMode.agnostic)  # who ends it is free
    answers: list[list[int] | str] = []
    for request in json.load(sys.stdin):
        try:
            answers.append(tokenizer.encode_chat_completion(ChatCompletionRequest.from_openai(**request)).tokens)
        except MistralCommonException as error:
            answers.append(str(error))
    print(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
