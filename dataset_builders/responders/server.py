"""A responder for large sets: an LLM behind a server that speaks OpenAI's completions API (vLLM, SGLang, TGI).

The server is sent the very prompt that `LocalResponder` reads, already rendered, so its own chat template has no say.
"""

import asyncio
import json
import logging
import os
import random
import re
import time
from collections import Counter
from email.utils import parsedate_to_datetime
from pathlib import Path

from tqdm import tqdm
from transformers import GenerationConfig

from dataset_builders.responders.exchange import Reply
from dataset_builders.responders.local import MAX_NEW_TOKENS, Prompt, Responder
from language_models.extras import extra
from language_models.generation import changed_decoding, context_of, without_thought
from language_models.identity import load_identity
from processing_lsm import BREAK

with extra("server"):
    import openai

logger = logging.getLogger(__name__)
for _transport in ("httpx", "httpx2"):  # at INFO they log a line for every request
    logging.getLogger(_transport).setLevel(logging.WARNING)

TRANSIENT = {408, 409, 424, 425, 429}  # worth another try, as is 500 and above; TGI's 424 is a failed generation
MAX_WAIT = 120.0  # seconds, before a retry
_jitter = random.Random()  # its own, so that the draws of whoever calls stay what they are


class MalformedAnswerError(Exception):
    """An answer of status 200 that is no finished completion."""


class ServerResponder(Responder):
    """An LLM run by an OpenAI-compatible server, answering greedily from text alone.

    The server can't prove which weights it runs: that they are those of `llm` is for the caller to see to. A
    repetition penalty in the checkpoint's generation settings is asked for, since `LocalResponder` has it too.

    Args:
        llm: the LLM that the server runs, or an LSM with that LLM inside: folder or Hub id. Tokenizer, chat template
            and identity come from here; no weights are loaded.
        server: base URL, such as `http://localhost:8000/v1`.
        served_model: the server's name for the LLM; by default `llm`, or the only one that it serves.
        max_new_tokens, max_prompt_tokens: as in `Responder`. The server's own context length counts too, if it says.
        prompt_format: `"tokens"` sends token ids; `"text"` sends text, for servers that take no ids (TGI).
        concurrency: most requests at a time.
        max_retries: of one request, after which all is given up.
        timeout: seconds that the server has for one answer.
        api_key: by default that in the environment variable `OPENAI_API_KEY`, if any.
        backoff: seconds before the first retry, doubled for every further one. A server's `Retry-After` comes first.
        template_settings: as in `LocalResponder`.

    Raises:
        ValueError: arguments out of range, an LLM that the server doesn't serve, or a server that refuses to say.
        ConnectionError: a server that can't be reached, or isn't ready.
    """

    engine = "openai-compatible server"

    def __init__(
        self,
        llm: str | Path,
        server: str,
        served_model: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_prompt_tokens: int | None = None,
        prompt_format: str = "tokens",
        concurrency: int = 64,
        max_retries: int = 8,
        timeout: float = 300.0,
        api_key: str | None = None,
        backoff: float = 0.5,
        template_settings: dict | None = None,
    ):
        if prompt_format not in ("tokens", "text"):
            raise ValueError(f"{prompt_format=} must be 'tokens' or 'text'.")
        if concurrency < 1 or max_retries < 0 or timeout <= 0 or backoff < 0:
            raise ValueError(f"{concurrency=}, {max_retries=}, {timeout=} or {backoff=} is out of range.")
        self.server = server.rstrip("/")
        self.prompt_format = prompt_format
        self.concurrency, self.max_retries, self.timeout, self.backoff = concurrency, max_retries, timeout, backoff
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._access = {"base_url": self.server, "api_key": key, "max_retries": 0}  # `_ask` has the retries
        served = self._list_served()
        processor, identity, config = load_identity(llm, template_settings)
        self.served_model = self._choose(served, served_model, [str(llm), identity["model"]])
        contexts = [context_of(config), served[self.served_model].get("max_model_len")]
        context = min((context for context in contexts if context is not None), default=None)
        super().__init__(processor, identity, _decoding_of(llm), max_new_tokens, max_prompt_tokens, context)
        added = processor.tokenizer.added_tokens_decoder.values()
        self._special = re.compile("|".join(re.escape(token.content) for token in added if token.special))

    def _list_served(self) -> dict[str, dict]:
        """What the server says of each model that it serves, by id."""
        try:
            with openai.OpenAI(**self._access, timeout=min(self.timeout, 30.0)) as client:
                body = client.models.with_raw_response.list().http_response.text
        except openai.APIError as error:
            if not _is_transient(error):
                raise ValueError(f"{self.server}/models: {_describe(error)}; is the URL right?") from error
            raise ConnectionError(
                f"{self.server} is not ready: {_describe(error)}. Start a server (such as `vllm serve LLM`) and wait "
                "until it has loaded the LLM; or do without, then the LLM runs here."
            ) from error
        try:
            return {card["id"]: card for card in json.loads(body)["data"]}
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{self.server}/models lists no models: {body[:200]!r}; is the URL right?") from error

    def _choose(self, served: dict[str, dict], asked: str | None, names: list[str]) -> str:
        for name in names if asked is None else [asked]:
            if name in served:
                return name
        if asked is not None or len(served) != 1:
            wanted = asked or names[0]
            raise ValueError(f"{self.server} serves {sorted(served)} and no {wanted!r}; name one with --served-model.")
        (only,) = served
        logger.warning("%s serves %r and not %r; make sure that they are one LLM.", self.server, only, names[0])
        return only

    def _generate(self, prompts: list[Prompt]) -> list[Reply]:
        contents = self._as_text(prompts) if self.prompt_format == "text" else [prompt.tokens for prompt in prompts]
        retries: Counter[str] = Counter()
        with tqdm(total=len(prompts), desc="responses", unit="row", leave=False) as progress:
            try:
                return asyncio.run(self._ask_all(contents, retries, progress))
            finally:
                if retries:
                    counts = ", ".join(f"{kind} ({count})" for kind, count in retries.most_common())
                    logger.warning("%s failed %d times, and was asked again: %s", self.server, retries.total(), counts)

    def _refusal(self, prompt: Prompt) -> str | None:
        unsendable = self.prompt_format == "text" and BREAK in prompt.text
        return "special_token" if unsendable else super()._refusal(prompt)

    def _as_text(self, prompts: list[Prompt]) -> list[str]:
        """Texts without the BOS that servers add. Raises ValueError if one would not be read as the same tokens."""
        tokenizer = self.processor.tokenizer
        adds_bos = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        texts = [prompt.text.removeprefix(tokenizer.bos_token) if adds_bos else prompt.text for prompt in prompts]
        if texts and tokenizer(texts).input_ids != [prompt.tokens for prompt in prompts]:
            raise ValueError("As text, the LLM's prompts would not be read as they are; use prompt_format='tokens'.")
        return texts

    async def _ask_all(self, contents: list, retries: Counter, progress: tqdm) -> list[Reply]:
        places = asyncio.Semaphore(self.concurrency)

        async def ask(content: str | list[int]) -> Reply:
            async with places:  # kept while waiting for a retry: a server in trouble gets less to do
                reply = await self._ask(client, content, retries)
            progress.update()
            return reply

        async with openai.AsyncOpenAI(**self._access, timeout=None) as client:  # `_ask` has the time-out
            try:
                async with asyncio.TaskGroup() as group:
                    replies = [group.create_task(ask(content)) for content in contents]
            except ExceptionGroup as failures:
                first = failures.exceptions[0]
                raise first from first.__cause__
        return [reply.result() for reply in replies]

    async def _ask(self, client: openai.AsyncOpenAI, content: str | list[int], retries: Counter) -> Reply:
        """One reply. What is tried again, how often and when, is decided here and nowhere else."""
        for attempt in range(self.max_retries + 1):
            try:
                async with asyncio.timeout(self.timeout):
                    answer = await client.completions.with_raw_response.create(
                        model=self.served_model,
                        prompt=content,
                        max_tokens=self.max_new_tokens,
                        temperature=0.0,
                        n=1,
                        extra_body=self.settings,
                    )
                return self._read(answer.http_response.text)
            except (openai.APIError, TimeoutError, MalformedAnswerError) as error:
                if not _is_transient(error):
                    hint = "; servers that take no token ids need prompt_format='text'" * isinstance(content, list)
                    raise ValueError(f"{self.server} refuses a request: {_describe(error)}{hint}") from error
                if attempt == self.max_retries:
                    raise ConnectionError(
                        f"{self.server} failed {attempt + 1} times for one request, at last with: {_describe(error)}. "
                        "What is written is kept: run the same command again to go on."
                    ) from error
                retries[_kind(error)] += 1
                wait = _retry_after(error) or self.backoff * 2 ** min(attempt, 10)
            await asyncio.sleep(min(wait, MAX_WAIT) * _jitter.uniform(1, 1.25))

    def _read(self, body: str) -> Reply:
        try:
            choice = json.loads(body)["choices"][0]
            text, finish = self._special.sub("", without_thought(choice["text"])).strip(), choice["finish_reason"]
        except (ValueError, LookupError, TypeError) as error:
            raise MalformedAnswerError(f"no completion but {body[:200]!r}") from error
        if finish not in ("stop", "length"):
            raise MalformedAnswerError(f"a completion of finish_reason {finish!r}")
        return Reply(text, finish)


def _decoding_of(llm: str | Path) -> dict:
    """The repetition penalty of a checkpoint's generation settings, if it has one.

    Raises:
        ValueError: other settings that change greedy decoding and that completions APIs do not have.
    """
    try:
        settings = changed_decoding(GenerationConfig.from_pretrained(str(llm)))
    except OSError:  # not every checkpoint has such a file
        return {}
    if unknown := sorted(set(settings) - {"repetition_penalty"}):
        raise ValueError(
            f"{llm} asks for {unknown[0]}={settings[unknown[0]]} in its generation settings; a server can't."
        )
    return settings


def _is_transient(error: Exception) -> bool:
    """Whether another try may mend it: not so if the server understood and refused."""
    status = getattr(error, "status_code", None)
    return status is None or status in TRANSIENT or status >= 500


def _kind(error: Exception) -> str:
    if isinstance(error, openai.APIStatusError):
        return f"HTTP {error.status_code}"
    if isinstance(error, (TimeoutError, openai.APITimeoutError)):
        return "no answer in time"
    return "no connection" if isinstance(error, openai.APIConnectionError) else "malformed answer"


def _describe(error: Exception) -> str:
    """Kind and details; servers put the latter in several places."""
    details = error
    if isinstance(error, openai.APIStatusError):
        details = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
    elif isinstance(error, openai.APIConnectionError):
        details = error.__cause__ or error
    return f"{_kind(error)} {str(details or '')[:500]}".strip()


def _retry_after(error: Exception) -> float:
    """Seconds that the server asks to wait, 0 if it doesn't."""
    value = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if seconds > 0 else 0.0
