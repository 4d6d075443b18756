"""Time a training step of ours, of the original code and of transformers' speech LLMs, side by side.

    python -m benchmarks.training --threads 1 --json training.json --plot training.png
    python -m benchmarks.training --threads 1 --only ours,original --workload librispeech   # under five minutes
    python -m benchmarks.training --threads 1 --levers                                      # gain of each optimisation
    python -m benchmarks.training --threads 1 --alignment --only ours,without_window_attention

A step is the forward and backward pass of a batch of 8 rows, in float32 on a CPU, without the optimizer's step, which
comes once in 48 of them with the paper's global batch of 384. The encoder is frozen, and everything else learns. All
contestants get the same 400 rows and form their own batches. A few batches are timed that represent all: the batches
are divided into classes of length, and the middle batch of each class is used.

For ours, another figure says how near each stage comes to the machine's limit on the middle batch: the rate of useful
FLOPs (unpadded encoder frames, unpadded tokens, labelled logits) over that of a large matrix product.
"""

import torch

from benchmarks.comparing import Results, Setup, arguments, name_of, take_turns
from benchmarks.contestants import Contestant, Ours
from benchmarks.workloads import WORKLOADS, Row
from recipes.training.alignment import OTHER_PIECES, AlignmentModel
from recipes.training.costs import Costs
from recipes.training.objectives import predicts, response_loss
from recipes.training.throughput import GIB, matmul_rate, seconds_of


def stages(ours: Ours, rows: list[Row], repeats: int) -> dict[str, tuple[float, float]]:
    """Return the FLOPs and the seconds (the best of `repeats`) of each stage of a step."""
    batch, model = ours.training_batch(rows), ours.model
    costs, stored = Costs.of(model, "full"), Costs.of(model, "full", stored=True)
    frames = torch.tensor([float(row.encoder_frames) for row in rows])
    speech = (batch["input_ids"] == ours.audio_token_id).sum(1).float().cpu()
    tokens, labels = batch["attention_mask"].sum(1).float().cpu(), batch["labels"]
    features, mask = batch["input_features"], batch["input_features_mask"]
    lengths = [(length + 1) // 2 for length in mask.sum(1).tolist()]
    audio_states = model.model.audio_tower(features, mask).last_hidden_state
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
        states = torch.randn_like(embeds)[predicts(labels)]
    responses = labels[:, 1:][labels[:, 1:] != -100]

    def llm():
        inputs = embeds.detach().requires_grad_(True)
        settings = {"attention_mask": batch["attention_mask"], "use_cache": False}
        model.model(inputs_embeds=inputs, **settings).last_hidden_state.sum().backward()

    def head():
        response_loss(model.lm_head(states.detach().requires_grad_(True)), responses).backward()

    work = {
        "tower": (
            (costs.row(frames, 0, 0, 0) - stored.row(frames, 0, 0, 0)).sum(),
            lambda: model.model.audio_tower(features, mask),
        ),
        "projector": (
            stored.row(frames, speech, 0, 0).sum(),
            lambda: model.model.projector(audio_states, lengths).sum().backward(),
        ),
        "LLM": (costs.row(0 * frames, 0, tokens, 0).sum(), llm),
        "head": (costs.row(0 * frames, 0, 0, (labels != -100).sum(1).cpu()).sum(), head),
        "step": (ours.flops(rows), lambda: ours.step(batch)),
    }
    measured = {}
    for name, (flops, run) in work.items():
        measured[name] = (float(flops), min(seconds_of(run, ours.device) for _ in range(repeats)))
        model.zero_grad()
    return measured


def limits(ours: Ours, workload: str, batch_size: int, repeats: int) -> dict[str, float]:
    """Return the rate of useful FLOPs of each stage, relative to that of a large matrix product."""
    rate = matmul_rate(ours.device, ours.dtype)
    [rows] = ours.some_batches(workload, batch_size, 1)
    return {name: flops / seconds / rate for name, (flops, seconds) in stages(ours, rows, repeats).items()}


def steps(contestant: Contestant, workload: str, batch_size: int, count: int) -> list:
    made = [contestant.training_batch(rows) for rows in contestant.some_batches(workload, batch_size, count)]
    return [lambda batch=batch: contestant.step(batch) for batch in made]


def alignment_steps(contestant: Ours, workload: str, batch_size: int, count: int) -> list:
    """Return steps of the alignment, with one word piece per second, and with the tower's output from a store."""
    aligning, jobs = AlignmentModel(contestant.model, torch.arange(0)), []
    for rows in contestant.some_batches(workload, batch_size, count):
        frames = torch.tensor([row.encoder_frames for row in rows])
        lengths = (frames // 50).clamp(min=1)
        batch = {
            "labels": torch.cat([torch.arange(1, length + 1) for length in lengths]),
            "label_lengths": lengths,
            "chunks": torch.ones_like(lengths),
            "pieces": torch.arange(min(OTHER_PIECES, contestant.vocabulary)),
            "audio_hidden_states": torch.randn(len(rows), frames.max(), contestant.whisper.d_model),
            "input_features_mask": (torch.arange(2 * frames.max()) < 2 * frames[:, None]).long(),
        }
        batch = {name: value.to(contestant.device) for name, value in batch.items()}

        def step(batch=batch):
            aligning(**batch)["loss"].backward()
            contestant.model.zero_grad()

        jobs.append(step)
    return jobs


def main() -> None:
    parser = arguments(__doc__, WORKLOADS)
    parser.add_argument(
        "--alignment",
        action="store_true",
        help="compare steps of the alignment, which only ours has, instead of training steps",
    )
    parser.add_argument("--batch", type=int, default=8, help="number of rows per step")
    parser.add_argument("--batches", type=int, default=2, help="number of batches that represent a workload")
    options = parser.parse_args()
    setup = Setup(options, WORKLOADS)
    if options.alignment and not set(options.only) <= {"ours", "without_window_attention"}:
        raise ValueError(f"--alignment --only {','.join(options.only)}: expected ours,without_window_attention.")
    kind, make = ("alignment", alignment_steps) if options.alignment else ("training", steps)
    results = Results(setup.describe(), f"{options.batches} {kind} steps of {options.batch} rows")
    memory, reached = {}, {}
    for group in setup.contestants():
        for workload in options.workload:
            jobs = {name_of(one): make(one, workload, options.batch, options.batches) for one in group}
            if setup.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for name, seconds in take_turns(jobs, options.rounds, setup.device).items():
                results.add(name, workload, seconds)
                if setup.device.type == "cuda":
                    memory.setdefault(name, {})[workload] = torch.cuda.max_memory_allocated() / GIB
        for one in group:
            if type(one) is Ours and not options.alignment:
                reached = {name: limits(one, name, options.batch, options.rounds) for name in options.workload}
    results.more |= {"limit": reached} | ({"peak_memory_gib": memory} if memory else {})
    results.notes += [
        f"Rate of ours relative to a matrix product, {workload}: "
        + ", ".join(f"{stage} {fraction:.0%}" for stage, fraction in parts.items())
        + "."
        for workload, parts in reached.items()
    ]
    results.notes += [f"Peak memory, {name}: {max(peaks.values()):.1f} GiB." for name, peaks in memory.items()]
    results.report(options)


if __name__ == "__main__":
    main()
