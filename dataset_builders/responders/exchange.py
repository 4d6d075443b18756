"""What goes to a responder, and what comes back."""

from typing import Literal, NamedTuple


class Request(NamedTuple):
    """What is asked. Requests of one `task` have answers of similar length, so they share batches."""

    instruction: str
    transcript: str
    task: str = ""


class Reply(NamedTuple):
    """What was answered, and why it ended: the model's own end of turn, the token limit, or a prompt that cannot be
    asked (then `text` is empty)."""

    text: str
    finish: Literal["stop", "length", "prompt_too_long", "special_token"] = "stop"
