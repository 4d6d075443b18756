"""Throughput, padding, MFU and peak memory, which the trainer logs besides the loss."""

import resource
import sys
import time
from collections.abc import Callable

import torch

from recipes.training.costs import Costs

GIB = 2**30


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a device with products of large matrices: the best of twenty, as the device may be busy."""
    size = 8192 if device.type == "cuda" else 1024
    own = torch.Generator(device)  # does not change the random state of the training
    left, right = torch.randn(2, size, size, generator=own, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds_of(lambda: left @ right, device) for _ in range(20))


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `run` takes until the device has finished."""
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in GiB: of tensors on a GPU, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class Throughput:
    """Measures throughput between two logs.

    The time runs from the request for a batch to the end of the step. It includes waiting for data, but not saving,
    logging and generating.

    Args:
        costs: costs of the model. MFU is the FLOPs of useful work over those that the devices could have done.
        audio_token_id: id of the speech placeholder.
        peak_tflops: peak rate of one device. If None, it is measured with a matrix product in the training's precision;
            on a GPU this is less than the manufacturer's figure, so MFU is higher.
    """

    COUNTED = ("tokens", "positions", "frames", "frame_positions", "flops")

    def __init__(self, costs: Costs, audio_token_id: int, peak_tflops: float | None = None):
        self.costs, self.audio_token_id = costs, audio_token_id
        self.peak = None if peak_tflops is None else peak_tflops * 1e12
        self.seconds, self.started, self.counted = 0.0, None, None

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> None:
        if self.started is not None:
            self.seconds += time.perf_counter() - self.started
            self.started = None

    def see(self, inputs: dict[str, torch.Tensor]) -> None:
        """Count a batch, without waiting for the device."""
        tokens, mask = inputs["attention_mask"].sum(-1), inputs.get("input_features_mask")
        frames = tokens.new_zeros(1) if mask is None else (mask.sum(-1) + 1) // 2
        speech = (inputs["input_ids"] == self.audio_token_id).sum(-1)
        labels = (inputs["labels"] != -100).sum(-1)
        # Clips and rows are counted separately, because a row may have several clips or none.
        flops = (
            self.costs.row(frames.float(), 0, 0, 0).sum()
            + self.costs.row(0.0 * tokens, speech, tokens.float(), labels).sum()
        )
        positions = torch.full_like(flops, inputs["attention_mask"].numel())
        frame_positions = torch.full_like(flops, 0 if mask is None else mask.shape[0] * ((mask.shape[1] + 1) // 2))
        counts = torch.stack([tokens.sum().float(), positions, frames.sum().float(), frame_positions, flops])
        self.counted = counts if self.counted is None else self.counted + counts

    def read(self, accelerator) -> dict[str, float]:
        """Return the figures to log, for all devices together, and reset the counts. Every process must call it."""
        if self.counted is None or not self.seconds:
            return {}
        totals = dict(zip(self.COUNTED, accelerator.reduce(self.counted, "sum").tolist(), strict=True))
        seconds, devices = self.seconds, accelerator.num_processes
        self.seconds, self.counted = 0.0, None
        if self.peak is None:
            half = {"bf16": torch.bfloat16, "fp16": torch.float16}
            self.peak = matmul_rate(accelerator.device, half.get(accelerator.mixed_precision, torch.float32))
        return {
            "tokens_per_second": round(totals["tokens"] / seconds, 1),
            "audio_seconds_per_second": round(totals["frames"] / 50 / seconds, 2),
            "padding_tokens": round(1 - totals["tokens"] / totals["positions"], 4),
            "padding_frames": round(1 - totals["frames"] / max(1, totals["frame_positions"]), 4),
            "mfu": round(totals["flops"] / seconds / devices / self.peak, 4),
            "peak_memory_gib": round(peak_memory(accelerator.device), 2),
        }
