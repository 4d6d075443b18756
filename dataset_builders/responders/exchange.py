"""The requests to a responder, and its replies."""

from typing import Literal, NamedTuple


class Request(NamedTuple):
    """An instruction about a transcript. Requests of the same `task` share batches, as their answers have similar
    lengths."""

    instruction: str
    transcript: str
    task: str = ""


class Reply(NamedTuple):
    """An answer and why it ended: the model ended its turn, it reached the token limit, or the prompt could not be sent
    (then `text` is empty)."""

    text: str
    finish: Literal["stop", "length", "prompt_too_long", "special_token"] = "stop"
