"""Requests as OpenAI's clients send them, checked: what the server does not do is refused by name, never ignored."""

import json
from dataclasses import dataclass, field
from reprlib import repr as shown  # a value of a client may be megabytes

from recipes.serving.clips import Limits, TooLargeError, from_base64, from_url

# Fields of a chat completion that have no effect on the answer.
IGNORED = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields with the only value that this server has, which clients may send.
ONLY = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TRANSCRIPTION_FIELDS = {"model", "file", "stream", "temperature", "response_format"}
MOST_STOPS = 4


class RequestError(ValueError):
    """A request that is refused because of its field `param`."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


@dataclass
class Question:
    """A request that can be answered."""

    messages: list[dict]  # as in transformers; audio parts have no clips, which are in `files`
    files: list[bytes | str] = field(default_factory=list)  # bytes or URLs, in the order of the audio parts
    settings: dict = field(default_factory=dict)  # `max_tokens`, `temperature`, `top_p`, `seed` and `stop`
    stream: bool = False  # whether the answer is sent in parts
    usage: bool = False  # whether a stream ends with the numbers of tokens


def read_json(body: bytes) -> dict:
    """Return the JSON object of a request's body. Raises RequestError if there is none."""
    try:
        content = json.loads(body.decode("utf-8"))
        if b"\\u" in body:  # it may escape half a character, which no tokenizer and no answer takes
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise RequestError(f"The body is not JSON in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise RequestError(f"The body must be a JSON object, got {type(content).__name__}.")
    return content


def read_chat(body: dict, limits: Limits) -> Question:
    """Check a chat completion.

    Raises:
        TooLargeError: it has too many or too large clips.
        RequestError: a field is invalid or not supported.
    """
    known = {"messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p"}
    known |= {"seed", "stop"} | IGNORED | ONLY.keys()
    values = {name: value for name, value in body.items() if value is not None}
    if unknown := sorted(values.keys() - known):
        raise RequestError(f"{shown(unknown[0])} is not supported.", shown(unknown[0])[1:-1])
    for name, allowed in ONLY.items():
        if name in values and values[name] not in allowed:
            raise RequestError(f"{name}={json.dumps(values[name])[:80]} is not supported; leave it out.", name)
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("'messages' must be a list with at least one message.", "messages")
    files: list[bytes | str] = []
    checked = [_message(message, files, limits, f"messages[{place}]") for place, message in enumerate(messages)]
    options = values.get("stream_options") or {}
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise RequestError("'stream_options' may have only 'include_usage'.", "stream_options")
    return Question(
        checked,
        files,
        _settings(values, limits),
        stream=_boolean(values, "stream"),
        usage=bool(options.get("include_usage")),
    )


def read_transcription(form: dict, file: bytes, instruction: str, limits: Limits) -> Question:
    """Check a request for a transcription, of which `form` has the text fields. Errors are as in `read_chat`."""
    values = {name: value for name, value in form.items() if value != ""}
    if unknown := sorted(values.keys() - TRANSCRIPTION_FIELDS):
        raise RequestError(f"{shown(unknown[0])} is not supported.", shown(unknown[0])[1:-1])
    if values.get("response_format", "json") not in ("json", "text"):
        raise RequestError("'response_format' must be json or text.", "response_format")
    try:
        numbers = {name: float(values[name]) for name in ("temperature",) if name in values}
    except ValueError as error:
        raise RequestError(
            f"'temperature' must be a number, got {shown(values['temperature'])}.", "temperature"
        ) from error
    if (stream := values.get("stream", "false").lower()) not in ("true", "false"):
        raise RequestError(f"'stream' must be true or false, got {shown(stream)}.", "stream")
    messages = [{"role": "user", "content": [{"type": "text", "text": instruction}, {"type": "audio"}]}]
    return Question(messages, [file], _settings(numbers, limits), stream=stream == "true")


def _message(message: object, files: list[bytes | str], limits: Limits, where: str) -> dict:
    if not isinstance(message, dict) or message.get("role") not in list(ROLES):  # it may have no hash
        raise RequestError(f"{where} must have a role among {', '.join(ROLES)}.", where)
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise RequestError(f"{where}.{name} is not supported.", f"{where}.{name}")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": ROLES[message["role"]], "content": content}
    if not isinstance(content, list) or not content:
        raise RequestError(f"{where}.content must be a text or a list of parts.", f"{where}.content")
    parts = [_part(part, files, limits, f"{where}.content[{place}]") for place, part in enumerate(content)]
    if message["role"] != "user" and any(part["type"] == "audio" for part in parts):
        raise RequestError(f"{where}: only users send audio.", where)
    return {"role": ROLES[message["role"]], "content": parts}


def _part(part: object, files: list[bytes | str], limits: Limits, where: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    value = part.get(kind) if isinstance(kind, str) else None
    if kind == "text" and isinstance(value, str):
        return {"type": "text", "text": value}
    if kind not in ("text", "input_audio", "audio_url"):
        raise RequestError(f"{where} has the type {shown(kind)}; expected text, input_audio or audio_url.", where)
    name = {"text": "text", "input_audio": "data", "audio_url": "url"}[kind]
    if kind == "text" or not isinstance(value, dict) or name not in value:
        raise RequestError(f"{where} needs its {name}.", f"{where}.{kind}")
    if len(files) >= limits.clips:
        raise TooLargeError(f"The prompt has more than {limits.clips} clips.")
    try:
        files.append(from_base64(value["data"]) if kind == "input_audio" else from_url(value["url"], limits))
    except TooLargeError:
        raise
    except ValueError as error:
        raise RequestError(f"{where}: {error}", f"{where}.{kind}") from error
    return {"type": "audio"}


def _settings(values: dict, limits: Limits) -> dict:
    tokens = values.get("max_completion_tokens", values.get("max_tokens", limits.tokens))
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= limits.tokens:
        raise RequestError(
            f"'max_tokens' must be an integer from 1 to {limits.tokens}, got {shown(tokens)}.", "max_tokens"
        )
    seed = values.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
        raise RequestError(f"'seed' must be an integer of 64 bits, got {shown(seed)}.", "seed")
    stop = values.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MOST_STOPS or not all(isinstance(text, str) and text for text in stop):
        raise RequestError(f"'stop' must be a text, or a list of up to {MOST_STOPS} texts.", "stop")
    return {
        "max_tokens": tokens,
        "temperature": _number(values, "temperature", 0.0, 0.0, 2.0),
        "top_p": _number(values, "top_p", 1.0, 1e-6, 1.0),
        "seed": seed,
        "stop": stop,
    }


def _number(values: dict, name: str, default: float, least: float, most: float) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise RequestError(f"{name!r} must be a number from {least:g} to {most:g}, got {shown(value)}.", name)
    return float(value)


def _boolean(values: dict, name: str) -> bool:
    if not isinstance(value := values.get(name, False), bool):
        raise RequestError(f"{name!r} must be true or false, got {shown(value)}.", name)
    return value
