"""A speech LLM behind an OpenAI-compatible server (`recipes.serve`, vLLM, ...), for evaluations."""

import asyncio
import base64
import os
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from dataset_builders.corpora.audio import encode
from dataset_builders.responders.exchange import Reply
from language_models.extras import extra
from language_models.generation import without_thought
from recipes.listening.features import load_clip

with extra("server"):
    import openai


class ServedLLM:
    """A model that is asked by chat completions with `input_audio` parts, greedily. Its interface is that of
    [`SpeechLLM`], without likelihoods and without a choice among given answers, which servers do not offer.

    Args:
        url: base URL of the server, such as `http://localhost:8000/v1`.
        name: name of the model on the server; None for the only one.
        instruction_first: whether the instruction precedes the clip in the prompt.
        concurrency: largest number of requests at the same time.
        timeout: seconds that the server has for an answer.
        option: option of the command that names the model, for errors.
        key: environment variable with the server's key.

    Raises:
        ValueError: the server does not have the model, or has several and none is named.
        ConnectionError: the server cannot be reached.
    """

    hears = True

    def __init__(
        self,
        url: str,
        name: str | None = None,
        instruction_first: bool = False,
        concurrency: int = 16,
        timeout: float = 300.0,
        option: str = "--endpoint-model",
        key: str = "OPENAI_API_KEY",
    ):
        self.url, self.instruction_first, self.concurrency = url, instruction_first, concurrency
        self._access = {"base_url": url, "api_key": os.environ.get(key) or "none", "timeout": timeout, "max_retries": 4}
        try:
            with openai.OpenAI(**self._access) as client:
                served = [model.id for model in client.models.list()]
        except openai.APIConnectionError as error:
            raise ConnectionError(f"{url} cannot be reached: {error}. Start the server first.") from error
        except openai.APIError as error:
            raise ValueError(f"{url} lists no models: {error}; is the URL right?") from error
        if (name or (served[0] if len(served) == 1 else None)) not in served:
            raise ValueError(f"{url} serves {served} and not {name!r}; name one of them with {option}.")
        self.name = name or served[0]

    def respond(
        self,
        rows: Sequence[dict],
        slot: str = "audio",
        store=None,
        batch_size: int = 16,
        max_new_tokens: int = 48,
        progress: bool = True,
    ) -> list[Reply]:
        """Return greedy answers, in order. Arguments are as in [`SpeechLLM.respond`]; `store` and `batch_size` have no
        effect.

        Raises:
            ValueError: the server refuses a request.
            ConnectionError: the server fails, also after some retries, or sends something else than a chat completion.
        """
        return asyncio.run(self._respond([self._content(row, slot) for row in rows], max_new_tokens, progress))

    def _content(self, row: dict, slot: str) -> list[dict]:
        instruction = {"type": "text", "text": row["instruction"]}
        if slot == "transcript":
            return [{"type": "text", "text": f"{row['instruction']}\n{row['transcript']}".strip()}]
        clip = load_clip(row)
        data = base64.b64encode(encode(np.zeros_like(clip) if slot == "silence" else clip)).decode()
        parts = [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]
        parts += [instruction] * bool(row["instruction"])  # many servers refuse a text without any characters
        return parts[::-1] if self.instruction_first else parts

    async def _respond(self, contents: list, max_new_tokens: int, progress: bool) -> list[Reply]:
        places = asyncio.Semaphore(self.concurrency)

        async def ask(content: list[dict]) -> Reply:
            async with places:
                completion = await client.chat.completions.create(
                    model=self.name,
                    messages=[{"role": "user", "content": content}],
                    max_tokens=max_new_tokens,
                    temperature=0.0,
                )
            bar.update()
            try:
                choice = completion.choices[0]
                return Reply(without_thought(choice.message.content or "").strip(), choice.finish_reason)
            except (AttributeError, IndexError, TypeError) as error:  # the client takes any JSON, and pages as text
                raise ConnectionError(f"{self.url} sends {str(completion)[:200]!r}, no chat completion.") from error

        with tqdm(total=len(contents), desc="answers", unit="row", disable=not progress) as bar:
            async with openai.AsyncOpenAI(**self._access) as client:
                tasks = [asyncio.create_task(ask(content)) for content in contents]
                try:
                    return await asyncio.gather(*tasks)
                except openai.APIStatusError as error:
                    if error.status_code >= 500 or error.status_code in (408, 429):
                        raise ConnectionError(f"{self.url} fails: {error}. Run the same command again.") from error
                    raise ValueError(f"{self.url} refuses a request: {error}") from error
                except openai.APIConnectionError as error:
                    raise ConnectionError(f"{self.url} fails: {error}. Run the same command again.") from error
                finally:
                    for task in tasks:
                        task.cancel()
