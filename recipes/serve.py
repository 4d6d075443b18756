"""Serve an LSM to OpenAI's clients, on machines where vLLM does not run.

    python -m recipes.serve --model assets/nano/lsm --port 8000
    curl http://localhost:8000/v1/audio/transcriptions -F file=@assets/nano/example.wav

If the environment variable LSM_API_KEY is set, clients must send this key.
`/v1/chat/completions` takes `input_audio` and `audio_url` parts, streamed or not. Requests that arrive at the same time
are answered together. Answers are greedy unless a request has a temperature. Fields that have no effect here are
refused by name. `/v1/models`, `/health` and `/metrics` (for Prometheus) are there as well.
"""

import gc
import logging
import os

from language_models.command_line import parser_of
from language_models.extras import extra

with extra("serve"):
    import uvicorn

    from recipes.serving.api import Api
    from recipes.serving.clips import Limits
    from recipes.serving.engine import Engine

from recipes.listening.speech_llm import Lsm, load

INSTRUCTION = "Transcribe the speech."  # of the transcriptions
KEY = "LSM_API_KEY"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    default = Limits()
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of an LSM")
    parser.add_argument("--name", help="name of the model for clients; by default that of the folder, or the Hub id")
    parser.add_argument("--dtype", default="auto", help="data type of the weights; auto is that of the checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at")
    parser.add_argument("--instruction", default=INSTRUCTION, help="what the LSM is asked for a transcription")
    parser.add_argument("--max-batch", type=int, default=32, help="requests that are answered together, at most")
    parser.add_argument("--max-waiting", type=int, default=256, help="requests that wait, at most; more get status 429")
    parser.add_argument("--max-body", type=int, default=default.body, help="bytes of a request, at most")
    parser.add_argument("--max-seconds", type=float, default=default.seconds, help="seconds of a clip, at most")
    parser.add_argument("--max-clips", type=int, default=default.clips, help="clips of a prompt, at most")
    parser.add_argument("--max-tokens", type=int, default=default.tokens, help="tokens of an answer, at most")
    parser.add_argument(
        "--upload-seconds", type=float, default=default.upload_seconds, help="time in which a request must arrive"
    )
    parser.add_argument(
        "--answer-seconds", type=float, default=default.answer_seconds, help="time in which it must be answered"
    )
    parser.add_argument(
        "--allow-urls", action="store_true", help="read clips from http(s) URLs; those of private addresses are refused"
    )
    args = parser.parse_args()
    for name in ("max_batch", "max_waiting", "max_body", "max_seconds", "max_clips", "max_tokens"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}.")
    limits = Limits(
        body=args.max_body,
        seconds=args.max_seconds,
        clips=args.max_clips,
        tokens=args.max_tokens,
        upload_seconds=args.upload_seconds,
        answer_seconds=args.answer_seconds,
        urls=args.allow_urls,
    )
    try:
        llm = load(args.model, args.dtype)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not isinstance(llm, Lsm) or not llm.hears:
        parser.error(f"{args.model} is not an LSM; vLLM serves text LLMs and other speech LLMs.")
    engine = Engine(llm.model, llm.tokenizer, args.max_batch, args.max_waiting)
    engine.start()
    key = os.environ.get(KEY)
    api = Api(engine, llm.processor, args.name or llm.name, args.instruction, limits, key)
    logging.info("serving %s at http://%s:%s, %s", api.name, args.host, args.port, f"key of {KEY}" if key else "no key")
    gc.collect()
    gc.freeze()  # later collections look only at what requests leave behind, and take milliseconds
    uvicorn.run(api.app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=5)
    engine.stop()


if __name__ == "__main__":
    main()
