"""The rows of an evaluation: questions and answers."""

from dataclasses import dataclass, field


class NoReferenceError(ValueError):
    """A row has no right answer, or one that is not a label."""


@dataclass(frozen=True)
class Question:
    """A question about a clip, with its right answers if they are known."""

    id: str  # unique id, from corpus, utterance and task
    utterance: int  # number of the clip, which all questions about it share
    audio: dict  # the encoded file, `{"bytes", "path"}`
    transcript: str  # "" if it is unknown
    duration: float  # seconds
    source: str  # corpus and split
    task: str  # name of the task or, if its kind is `pool`, of the instruction pool's task
    kind: str  # how answers are scored, a name in `kinds.KINDS`
    instruction: str
    references: list[str] = field(default_factory=list)  # right answers, all keywords, or the letter of an option
    right: list[str] = field(default_factory=list)  # all right answers in full, from an oracle
    labels: list[str] = field(default_factory=list)  # possible labels, or the options of a choice in order
    answer: str = "{}"  # the sentence around a label in a constrained answer
    language: str | None = "en"  # language of the speech
    target_language: str | None = None  # language of a translation
    constraint: str | None = None  # name of the constraint on the answer's form, if the kind is `constraints`
    text_response: str = ""  # the text LLM's answer, with which those of the other systems are compared

    def as_row(self) -> dict:
        """Return the row that a `SpeechLLM` takes."""
        return dict(vars(self))


@dataclass(frozen=True)
class Answer:
    """The answer of a system to the question with this `id`."""

    id: str
    response: str
    constrained: str | None = None  # the answer when only the allowed answers are possible
    finished: bool = True  # whether the model ended the answer within the limit of tokens
    seconds: float | None = None  # the time of the batch divided by its rows; None if no model was run
    # The log-likelihood (natural logarithm) of the text LLM's answer under this system, summed over its tokens, and the
    # number of these tokens. None if the text LLM gave no answer.
    log_likelihood: float | None = None
    tokens: int | None = None
    judgement: str | None = None  # the judge's reply, as it is, if the question is of a judged kind
