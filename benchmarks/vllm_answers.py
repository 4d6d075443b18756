"""Compare the greedy answers of vLLM's backend for transformers models with those of transformers, token for token.

    python -m benchmarks.vllm_answers --vllm ENVIRONMENT/bin/python --model assets/nano/lsm

vLLM has its own environment, because it requires its own versions of torch and transformers. The clips come from one
file: alone, two of the same and of different lengths, cut short, reversed, and repeated to 45 s and 60 s. vLLM answers
all prompts in one batch.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

RATE = 16_000
INSTRUCTIONS = ("Translate what you hear into Spanish.", "Continue the text.", "Transcribe the speech.")


def clips_of(wave: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Return the clips of each prompt, by name."""
    long = np.tile(wave, 62 * RATE // len(wave) + 1)
    return {
        "one clip": [wave],
        "two clips": [wave, wave[: len(wave) // 2]],
        "two of the same length": [wave, wave[::-1].copy()],
        "a short clip": [wave[: RATE // 2]],
        "45 s": [long[: 45 * RATE]],
        "60 s": [long[: 60 * RATE + 77]],
    }


def prompts(processor, wave: np.ndarray) -> list[tuple[str, str, list[np.ndarray]]]:
    """Return a name, the rendered prompt and the clips of each question."""
    questions = []
    for name, clips in clips_of(wave).items():
        for instruction in INSTRUCTIONS:
            content = [{"type": "text", "text": instruction}, *({"type": "audio", "audio": clip} for clip in clips)]
            conversation = [{"role": "user", "content": content}]
            prompt = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
            questions.append((name, prompt, clips))
    return questions


def ask_transformers(processor, model_id: str, questions: list, tokens: int) -> list[list[int]]:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(model_id, trust_remote_code=True, dtype=torch.float32).eval()
    answers = []
    for _, prompt, clips in questions:
        inputs = processor(text=prompt, audio=clips, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def ask_vllm(model_id: str, questions: list, tokens: int, positions: int) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model_id,
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=positions,
        limit_mm_per_prompt={"audio": 2},
    )
    requests = [
        {"prompt": prompt, "multi_modal_data": {"audio": [(clip, RATE) for clip in clips]}}
        for _, prompt, clips in questions
    ]
    outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=tokens))
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of an LSM")
    parser.add_argument("--vllm", help="Python interpreter of the environment with vLLM")
    parser.add_argument("--audio", default="assets/nano/example.wav", help="audio file of which the clips are made")
    parser.add_argument("--tokens", type=int, default=40, help="largest number of tokens of an answer")
    parser.add_argument(
        "--positions", type=int, default=1024, help="largest number of tokens of a prompt and its answer"
    )
    parser.add_argument("--answers", help=argparse.SUPPRESS)  # vLLM's own process writes them to this file
    args = parser.parse_args()
    import soundfile
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    wave, rate = soundfile.read(args.audio, dtype="float32")
    if rate != RATE or wave.ndim != 1:
        raise ValueError(f"{args.audio} has {rate} Hz and the shape {wave.shape}; expected {RATE} Hz and one channel.")
    questions = prompts(processor, wave)
    if args.answers:
        Path(args.answers).write_text(json.dumps(ask_vllm(args.model, questions, args.tokens, args.positions)))
        return
    expected = ask_transformers(processor, args.model, questions, args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        # A copy, because the script's folder comes first on the path, and vLLM must not find this checkout.
        script, answers = shutil.copy(__file__, folder), str(Path(folder) / "answers.json")
        command = [args.vllm, script, "--model", args.model, "--audio", args.audio, "--answers", answers]
        command += ["--tokens", str(args.tokens), "--positions", str(args.positions)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        actual = json.loads(Path(answers).read_text())
    same = [a == b for a, b in zip(actual, expected, strict=True)]
    for (name, _, _), answer, equal in zip(questions, actual, same, strict=True):
        print(f"{'same' if equal else 'OTHER':5}  {name}: {processor.decode(answer, skip_special_tokens=True)[:80]}")
    print(f"{sum(same)} of {len(same)} answers are the same.")
    sys.exit(0 if all(same) else 1)


if __name__ == "__main__":
    main()
