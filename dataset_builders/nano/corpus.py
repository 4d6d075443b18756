"""The nano corpus as an ASR corpus, whose clips are synthesised while it is read."""

import itertools
from collections.abc import Iterator

from dataset_builders.corpora.corpus import FEATURES, Corpus, RefusedRowError
from dataset_builders.nano import speech


class NanoCorpus(Corpus):
    """The nano corpus. It has no end; without a limit, 6,000 utterances are read."""

    default_limit = 6000

    def __init__(self, split: str, seed: int = 0):
        super().__init__("nano", split, columns={})
        self.seed = seed
        if split not in speech.SPLITS:
            raise ValueError(f"the nano corpus has no split {split!r}; expected one of {speech.SPLITS}.")
        self.speaker = speech.Speaker(seed, split)

    def lines(self, file: int) -> Iterator[tuple[str, dict | RefusedRowError]]:
        for index in itertools.count():
            yield speech.row_id(self.seed, self.split, index), {"index": index}

    def utterance(self, where: str, line: dict | RefusedRowError) -> dict:
        row = self.speaker.row(line["index"])
        return {key: row[key] for key in FEATURES if key in row} | {"source": self.source}
