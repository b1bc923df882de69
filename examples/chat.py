"""A chat in the terminal: answers stream, Ctrl-C ends the answer, an empty line or the end of input ends the chat.

    python examples/chat.py weights/smollm2

Each turn sends the whole conversation; what the last one ended with is in the caches still, so that only the new
message is processed (`stats.reused_tokens`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import pyramid_rt
from pyramid_rt import GenerationResult, InputError, Pyramid, PyramidError

Message = dict[str, str]
SYSTEM = "You are a helpful assistant. Answer briefly."


class Chat:
    """A conversation that grows.

    Args:
        rt: a pyramid whose tokenizer has a chat template.
        write: called with each piece of an answer.
        system: what the assistant is told first, or nothing.
        options: as of `generate`.
    """

    def __init__(
        self, rt: Pyramid, write: Callable[[str], object], system: str | None = SYSTEM, **options: object
    ) -> None:
        self._rt, self._write, self._options = rt, write, options
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def say(self, text: str) -> GenerationResult:
        """Answer a message; Ctrl-C keeps what had been written. Raises InputError: the context is full."""
        self.messages.append({"role": "user", "content": text})
        try:
            stream = self._rt.stream(self.messages, **self._options)  # type: ignore[arg-type]
        except InputError:
            self.messages.pop()
            raise
        with stream:
            try:
                for piece in stream:
                    self._write(piece)
            except KeyboardInterrupt:
                stream.close()
        self.messages.append({"role": "assistant", "content": stream.result.text})
        return stream.result

    def forget(self) -> bool:
        """Drop the oldest question and its answer, to make room; False where there is none."""
        first = 1 if self.messages and self.messages[0]["role"] == "system" else 0
        oldest = self.messages[first : first + 2]
        del self.messages[first : first + 2]
        return bool(oldest)


def converse(chat: Chat, lines: Iterable[str], write: Callable[[str], object]) -> None:
    """Answer line by line until an empty one."""
    for line in lines:
        if not line.strip():
            break
        while True:
            try:
                chat.say(line.strip())
                break
            except InputError as error:
                if "max_seq" not in str(error) or not chat.forget():
                    write(f"({error})")
                    break
        write("\n> ")


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python examples/chat.py WEIGHTS", file=sys.stderr)
        return 2

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        rt = pyramid_rt.load(sys.argv[1])
    except PyramidError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with rt:
        write("> ")
        converse(Chat(rt, write, temperature=0.7, max_new_tokens=300), sys.stdin, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
