"""Filters that drop bad responses."""

from collections.abc import Callable, Collection

import regex

from dataset_builders.instructions import TRANSCRIPTION, Task
from dataset_builders.responders.exchange import Reply, Request

# The reasons to drop a response, in the order of the checks. Each can be switched off by its name, except the first:
# the LLM cannot answer a prompt that is longer than its context.
FILTERS = {
    "prompt_too_long": "the prompt was longer than the limit, so it was not sent to the LLM",
    "special_token": "the prompt has the text of a special token, which a server that takes text would read as one",
    "truncated": "the response was cut at the token limit",
    "empty": "the response has no text",
    "unfinished": "the response does not end like a sentence (except for tasks that ask for labels or lists)",
    "copy": "the response is only the transcript (except for repetition)",
    "refusal": "the response begins with a refusal, or asks for the speech",
    "duplicate": "an earlier row of the shard has the same instruction, transcript and response",
    "judged": "the LLM gave its own response a low score, or none",
}

# A full stop or similar, perhaps within quotes or markup. Greek questions end with a semicolon; Thai and Lao have no
# full stops.
_END = regex.compile(r"""([\p{Sentence_Terminal}…]|\p{Greek}[;\u037E]|\p{Thai}|\p{Lao})[\p{Pe}\p{Pf}\p{Pi}"'*_`\s]*$""")
# Matched only at the beginning of a response, because a character in a story may say that they are sorry.
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
_SCALE = regex.compile(r"\b1\s*(to|-|–)\s*5\b")  # some LLMs repeat the scale before they answer


def check_names(names: Collection[str]) -> None:
    """Raise ValueError for an unknown filter, or for a filter that cannot be switched off."""
    if "prompt_too_long" in names:
        raise ValueError("the filter 'prompt_too_long' cannot be switched off; set a larger max_prompt_tokens instead")
    if unknown := sorted(set(names) - set(FILTERS)):
        raise ValueError(f"unknown filter {unknown[0]!r}; expected one of {list(FILTERS)}")


def reason_to_drop(task: Task, transcript: str, reply: Reply, off: Collection[str] = ()) -> str | None:
    """Return the first reason to drop a reply, a name in `FILTERS`, or None. The filters in `off` are skipped.
    `duplicate` and `judged` are not checked here, because they need more than one reply."""
    if task.name == TRANSCRIPTION:  # the LLM did not write it
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
    return next((reason for reason, applies in reasons.items() if applies and reason not in off), None)


def judge(
    respond: Callable[[list[Request]], list[Reply]], requests: list[Request], responses: list[str]
) -> list[int | None]:
    """Ask the LLM to score its own responses from 1 to 5; None if it gives no score. `respond` is a responder's."""
    questions = [
        Request(_JUDGE.format(instruction=request.instruction, response=response), request.transcript, "judge")
        for request, response in zip(requests, responses, strict=True)
    ]
    replies = [_SCALE.sub("", reply.text) for reply in respond(questions)]
    scores = [regex.search(r"(?<!\d)[1-5](?!\d)", reply) for reply in replies]
    return [int(score[0]) if score else None for score in scores]


def _fold(text: str) -> str:
    """Remove case and punctuation, so that only letters and digits are compared."""
    return regex.sub(r"[^\p{L}\p{M}\p{N}]+", " ", text).strip().casefold()
