"""A responder for large sets: an LLM on a server with OpenAI's completions API (vLLM, SGLang, TGI, llama.cpp).

The server gets the same rendered prompt that `LocalResponder` reads, so the server's chat template is not used.
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
for _transport in ("httpx", "httpx2"):  # they log every request at INFO
    logging.getLogger(_transport).setLevel(logging.WARNING)

TAKE_TEXT = "; if the server takes no token ids, use prompt_format='text'"
TRANSIENT = {408, 409, 424, 425, 429}  # retried, like 500 and above; TGI's 424 is a failed generation
MAX_WAIT = 120.0  # seconds, before a retry
_jitter = random.Random()  # separate, so that it does not change the caller's random state


class MalformedAnswerError(Exception):
    """A response with status 200 that is not a finished completion."""


class ServerResponder(Responder):
    """An LLM on an OpenAI-compatible server. It reads text only, and decodes greedily.

    The server cannot prove which weights it runs, so the caller must make sure that they are those of `llm`. A
    repetition penalty in the checkpoint's generation settings is sent along, because `LocalResponder` applies it, too.

    Args:
        llm: folder or Hub id of the LLM that the server runs, or of an LSM with this LLM inside. Tokenizer, chat
            template and identity are loaded from here, but no weights.
        server: base URL, such as `http://localhost:8000/v1`.
        served_model: name of the LLM on the server; by default `llm`, or the only model that the server has.
        max_new_tokens, max_prompt_tokens: as in `Responder`. The server's context length also limits the prompts.
        prompt_format: `"tokens"` sends token ids; `"text"` sends text, for servers that take no token ids (TGI,
            llama-cpp-python).
        concurrency: most requests at the same time.
        max_retries: most retries of a request before the build stops with an error.
        timeout: seconds that the server has for an answer.
        api_key: key for the server; by default the environment variable `OPENAI_API_KEY`, if it is set.
        backoff: seconds before the first retry, doubled for each further one. `Retry-After` of the server has priority.
        template_settings: as in `LocalResponder`.

    Raises:
        ValueError: an argument is out of range, or the server does not have the LLM or refuses to list its models.
        ConnectionError: the server cannot be reached or is not ready.
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
            raise ValueError(
                f"{concurrency=} must be 1 or more, {max_retries=} and {backoff=} 0 or more, {timeout=} above 0."
            )
        self.server = server.rstrip("/")
        self.prompt_format = prompt_format
        self.concurrency, self.max_retries, self.timeout, self.backoff = concurrency, max_retries, timeout, backoff
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._access = {"base_url": self.server, "api_key": key, "max_retries": 0}  # `_ask` does the retries
        served = self._list_served()
        processor, identity, config = load_identity(llm, template_settings)
        self.served_model = self._choose(served, served_model, [str(llm), identity["model"]])
        contexts = [context_of(config), _context_served(served[self.served_model])]
        context = min((context for context in contexts if context is not None), default=None)
        super().__init__(processor, identity, _decoding_of(llm), max_new_tokens, max_prompt_tokens, context)
        added = processor.tokenizer.added_tokens_decoder.values()
        self._special = re.compile("|".join(re.escape(token.content) for token in added if token.special))

    def _list_served(self) -> dict[str, dict]:
        """Return the server's descriptions of its models, by id."""
        try:
            with openai.OpenAI(**self._access, timeout=min(self.timeout, 30.0)) as client:
                body = client.models.with_raw_response.list().http_response.text
        except openai.APIError as error:
            if not _is_transient(error):
                raise ValueError(f"{self.server}/models: {_describe(error)}; is the URL right?") from error
            raise ConnectionError(
                f"{self.server} is not ready: {_describe(error)}. Start a server (such as `vllm serve LLM`) and wait "
                "until it has loaded the LLM, or leave --server out to run the LLM here."
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
            raise ValueError(f"{self.server} serves {sorted(served)} and not {wanted!r}; name one with --served-model.")
        (only,) = served
        logger.warning("%s serves %r and not %r; make sure that they are the same LLM.", self.server, only, names[0])
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
                    logger.warning(
                        "%s failed %d times, and the requests were retried: %s", self.server, retries.total(), counts
                    )

    def _refusal(self, prompt: Prompt) -> str | None:
        unsendable = self.prompt_format == "text" and BREAK in prompt.text
        return "special_token" if unsendable else super()._refusal(prompt)

    def _as_text(self, prompts: list[Prompt]) -> list[str]:
        """Return the prompts without the BOS that servers add. Raises ValueError if a text gives other tokens."""
        tokenizer = self.processor.tokenizer
        adds_bos = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        texts = [prompt.text.removeprefix(tokenizer.bos_token) if adds_bos else prompt.text for prompt in prompts]
        if texts and tokenizer(texts).input_ids != [prompt.tokens for prompt in prompts]:
            raise ValueError("the prompts sent as text would give other tokens; use prompt_format='tokens'.")
        return texts

    def _settings_as_sent(self) -> dict:
        """Return the settings by the names of vLLM, SGLang and TGI, and by those of llama.cpp. Servers ignore the
        others' names."""
        if "repetition_penalty" not in self.settings:
            return self.settings
        sent = {**self.settings, "repeat_penalty": self.settings["repetition_penalty"]}
        if self.max_prompt_tokens is not None:  # all tokens are penalised; llama.cpp's default is the last 64
            sent["repeat_last_n"] = self.max_prompt_tokens + self.max_new_tokens
        return sent

    async def _ask_all(self, contents: list, retries: Counter, progress: tqdm) -> list[Reply]:
        places = asyncio.Semaphore(self.concurrency)

        async def ask(content: str | list[int]) -> Reply:
            async with places:  # held while waiting for a retry, so that a failing server gets fewer requests
                reply = await self._ask(client, content, retries)
            progress.update()
            return reply

        async with openai.AsyncOpenAI(**self._access, timeout=None) as client:  # `_ask` has the timeout
            try:
                async with asyncio.TaskGroup() as group:
                    replies = [group.create_task(ask(content)) for content in contents]
            except ExceptionGroup as failures:
                first = failures.exceptions[0]
                raise first from first.__cause__
        return [reply.result() for reply in replies]

    async def _ask(self, client: openai.AsyncOpenAI, content: str | list[int], retries: Counter) -> Reply:
        """Send one request, with all its retries, and return the reply."""
        for attempt in range(self.max_retries + 1):
            try:
                async with asyncio.timeout(self.timeout):
                    answer = await client.completions.with_raw_response.create(
                        model=self.served_model,
                        prompt=content,
                        max_tokens=self.max_new_tokens,
                        temperature=0.0,
                        n=1,
                        extra_body=self._settings_as_sent(),
                    )
                return self._read(answer.http_response.text)
            except (openai.APIError, TimeoutError, MalformedAnswerError) as error:
                hint = TAKE_TEXT if isinstance(content, list) else ""
                if not _is_transient(error):
                    raise ValueError(f"{self.server} refuses a request: {_describe(error)}{hint}") from error
                if attempt == self.max_retries:
                    if _kind(error) != "HTTP 500":  # with which llama-cpp-python answers token ids
                        hint = ""
                    raise ConnectionError(
                        f"{self.server} failed {attempt + 1} times for one request, at last with: {_describe(error)}"
                        f"{hint}. The finished shards are kept; run the same command again to continue."
                    ) from error
                retries[_kind(error)] += 1
                wait = _retry_after(error) or self.backoff * 2 ** min(attempt, 10)
            await asyncio.sleep(min(wait, MAX_WAIT) * _jitter.uniform(1, 1.25))

    def _read(self, body: str) -> Reply:
        try:
            choice = json.loads(body)["choices"][0]
            text, finish = self._special.sub("", without_thought(choice["text"])).strip(), choice["finish_reason"]
        except (ValueError, LookupError, TypeError) as error:
            raise MalformedAnswerError(f"{body[:200]!r} is not a completion") from error
        if finish not in ("stop", "length"):
            raise MalformedAnswerError(f"finish_reason is {finish!r}; expected 'stop' or 'length'")
        return Reply(text, finish)


def _context_served(card: dict) -> int | None:
    """Return the context length in a server's description of a model, None if it does not tell."""
    meta = card.get("meta")  # llama.cpp's, whose `n_ctx` is that of one request
    return card.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)


def _decoding_of(llm: str | Path) -> dict:
    """Return the repetition penalty in a checkpoint's generation settings, if there is one.

    Raises:
        ValueError: other settings change greedy decoding, and completions APIs do not have them.
    """
    try:
        settings = changed_decoding(GenerationConfig.from_pretrained(str(llm)))
    except OSError:  # not every checkpoint has such a file
        return {}
    if unknown := sorted(set(settings) - {"repetition_penalty"}):
        raise ValueError(
            f"{llm} has {unknown[0]}={settings[unknown[0]]} in its generation settings, which a server cannot apply; "
            "leave --server out."
        )
    return settings


def _is_transient(error: Exception) -> bool:
    """Whether a retry may help. It does not if the server understood the request and refused it."""
    status = getattr(error, "status_code", None)
    return status is None or status in TRANSIENT or status >= 500


def _kind(error: Exception) -> str:
    if isinstance(error, openai.APIStatusError):
        return f"HTTP {error.status_code}"
    if isinstance(error, (TimeoutError, openai.APITimeoutError)):
        return "no answer in time"
    return "no connection" if isinstance(error, openai.APIConnectionError) else "malformed answer"


def _describe(error: Exception) -> str:
    """Return the kind and the details of an error; servers put the details in different places."""
    details = error
    if isinstance(error, openai.APIStatusError):
        details = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
    elif isinstance(error, openai.APIConnectionError):
        details = error.__cause__ or error
    return f"{_kind(error)} {str(details or '')[:500]}".strip()


def _retry_after(error: Exception) -> float:
    """Return the seconds in the server's `Retry-After` header, 0 if there is none."""
    value = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if seconds > 0 else 0.0
