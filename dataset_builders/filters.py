"""Which responses are kept, and the reasons why others are not."""

from collections.abc import Callable, Collection

import regex

from dataset_builders.instructions import TRANSCRIPTION, Task
from dataset_builders.responders.exchange import Reply, Request

# Every reason to drop a response, in the order of looking. Each can be turned off by its name but the first, which
# `max_prompt_tokens` sets: what an LLM has no room for cannot be asked.
FILTERS = {
    "prompt_too_long": "the prompt was longer than the limit, so it was not asked",
    "special_token": "the prompt names a special token, which a server that is sent text would take for one",
    "truncated": "the response was cut at the token limit",
    "empty": "the response has no text",
    "unfinished": "the response does not end like a sentence (tasks that ask for labels or lists excepted)",
    "copy": "the response is the bare transcript (repetition excepted)",
    "refusal": "the response begins with a refusal, or asks for the speech",
    "duplicate": "an earlier row of the shard has the same instruction, transcript and response",
    "judged": "the LLM gave its own response a low score, or none",
}

# A full stop or its like, perhaps within quotes or markup; Greek asks with a semicolon; Thai and Lao write none.
_END = regex.compile(r"""([\p{Sentence_Terminal}…]|\p{Greek}[;\u037E]|\p{Thai}|\p{Lao})[\p{Pe}\p{Pf}\p{Pi}"'*_`\s]*$""")
# Looked for at the beginning alone: a speaker in a story may well be sorry.
_REFUSAL = regex.compile(
    r"""\s*(
        (i(['’]?\s?m|\s+am)\s+((very|so|truly)\s+)?(sorry|afraid)|sorry|apologies|unfortunately|i\s+apologi[sz]e)\b
        .{0,30}\b(i|but|as)\b.{0,60}?(n['’]t|\b(not?|cannot|unable|ai|language\s+model|provide|share|need|more))\b
      | as\s+(an?\s+)?(ai|artificial\s+intelligence|language\s+model|text-based)\b
      | i\s?(['’]m|\s+am)\s+(just\s+|only\s+)?(an?\s+)?(ai|unable|not\s+able|language\s+model|large\s+language)\b
      | i\s+(can\s?not|can['’]t|could\s?n['’]t|do\s?n['’]t|do\s+not)\s+
        (hear|listen|process|access|have\s+(access|the\s+ability|any\s+(speech|audio|information|context))
          |assist|help(?!\s+(but|\w+ing)\b)|fulfil|comply|see\s+any|play)
      | (please|could\s+you(\s+please)?|can\s+you(\s+please)?)\s+(provide|share|upload|paste|send)\b
        .{0,40}\b(speech|audio|recording|file|clip|transcript|text|sentence|content|context|details|information)\b
      | (it\s+(seems|looks|appears)\s+((that|like|as\s+if)\s+)?)?you\s+
        (have\s?n['’]t|have\s+not|did\s?n['’]t|did\s+not|forgot\s+to)\s+(provide|share|include|attach|upload|paste)
      | (there\s+is\s+)?no\s+(speech|audio|transcript|text)\s+(was\s+|has\s+been\s+|is\s+)?(provided|given|attached)
    )""",
    regex.IGNORECASE | regex.VERBOSE,
)
_JUDGE = (
    "An instruction about the speech and an answer to it follow. Instruction: {instruction} Answer: {response} "
    "How well does the answer do what the instruction asks, and how true is it to the speech? "
    "Answer with one number only, from 1 (not at all) to 5 (perfectly)."
)
_SCALE = regex.compile(r"\b1\s*(to|-|–)\s*5\b")  # what some repeat before they answer


def check_names(names: Collection[str]) -> None:
    """Raises ValueError for a name that no filter has, or of one that cannot be off."""
    if "prompt_too_long" in names:
        raise ValueError("the filter 'prompt_too_long' cannot be off; raise max_prompt_tokens, or leave it out")
    if unknown := sorted(set(names) - set(FILTERS)):
        raise ValueError(f"unknown filter {unknown[0]!r}; there are {list(FILTERS)}")


def reason_to_drop(task: Task, transcript: str, reply: Reply, off: Collection[str] = ()) -> str | None:
    """The first reason, a name in `FILTERS`, why a reply to `task` is not kept, or None. `off`: reasons that do not
    count. Duplicates and scores are for those who see more than one reply."""
    if task.name == TRANSCRIPTION:  # written without the LLM
        return None
    reasons = {
        "prompt_too_long": reply.finish == "prompt_too_long",
        "special_token": reply.finish == "special_token",
        "truncated": reply.finish == "length",
        "empty": not reply.text.strip(),
        "unfinished": task.ends_like_a_sentence and not _END.search(reply.text),
        "copy": not task.may_copy_transcript and _fold(reply.text) == _fold(transcript),
        "refusal": bool(_REFUSAL.match(reply.text)),
    }
    return next((reason for reason, found in reasons.items() if found and reason not in off), None)


def judge(
    respond: Callable[[list[Request]], list[Reply]], requests: list[Request], responses: list[str]
) -> list[int | None]:
    """The LLM's scores, 1 to 5, for its own responses; None where it gave none. `respond` is a responder's."""
    questions = [
        Request(_JUDGE.format(instruction=request.instruction, response=response), request.transcript, "judge")
        for request, response in zip(requests, responses, strict=True)
    ]
    replies = [_SCALE.sub("", reply.text) for reply in respond(questions)]
    found = [regex.search(r"(?<!\d)[1-5](?!\d)", reply) for reply in replies]
    return [int(match[0]) if match else None for match in found]


def _fold(text: str) -> str:
    """Letters and digits alone: what is left when case and punctuation do not count."""
    return regex.sub(r"[^\p{L}\p{M}\p{N}]+", " ", text).strip().casefold()
