"""The rows of an evaluation: what is asked, and what was answered."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Question:
    """One question about one clip, and what is known of its right answers."""

    id: str  # corpus, utterance and task; unique
    utterance: int  # number of the clip; questions about one clip share it
    audio: dict  # the encoded file, `{"bytes", "path"}`
    transcript: str  # "" if nobody knows what is said
    duration: float  # seconds
    source: str  # corpus and split
    task: str  # the evaluation's or, of kind `pool`, the instruction pool's
    kind: str  # how answers are scored, a name of `kinds.KINDS`
    instruction: str
    references: list[str] = field(default_factory=list)  # all keywords, or the right option's letter
    right: list[str] = field(default_factory=list)  # all right answers in full, of an oracle
    labels: list[str] = field(default_factory=list)  # of a choice its options, in order
    answer: str = "{}"  # what an answer that is constrained to the labels looks like
    language: str | None = "en"  # spoken
    target_language: str | None = None  # of a translation
    constraint: str | None = None  # the name of the demand on the answer's form, of kind `constraints`
    text_response: str = ""  # what the text LLM answers, once it was asked; compared with what the others answer

    def as_row(self) -> dict:
        """As a `SpeechLLM` takes what it is asked."""
        return dict(vars(self))


@dataclass(frozen=True)
class Answer:
    """What a system answered to the question with this `id`."""

    id: str
    response: str
    constrained: str | None = None  # the answer among the only ones allowed
    finished: bool = True  # the model ended it, within its limit of tokens
    seconds: float | None = None  # the batch's time, shared evenly; None if no model was run
    # Of the text LLM's answer, given what this system was given: the sum of its tokens' log-likelihoods (natural
    # logarithms), and their number. None if the text LLM gave no answer.
    log_likelihood: float | None = None
    tokens: int | None = None
