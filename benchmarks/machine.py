"""Describe the machine and measure its peak rates."""

import platform
from datetime import date
from pathlib import Path

import psutil
import torch

from recipes.training.throughput import GIB, seconds_of


def cpu_name() -> str:
    """Return the name of the CPU; on Linux it comes from /proc/cpuinfo, because `platform` does not have it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({cpu_name()}, {torch.get_num_threads()} threads)"


def describe(device: torch.device) -> str:
    """Return the device, the version of torch, and the date."""
    return f"{device_name(device)}, torch {torch.__version__}, {date.today()}"


def free_memory(device: torch.device) -> float:
    """Return the free memory in GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GIB
    return psutil.virtual_memory().available / GIB


def bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the bytes per second at which a large matrix is read to be multiplied with a vector: the best of ten."""
    matrix = torch.ones(2**14, 2**14 if device.type == "cuda" else 2**12, device=device, dtype=dtype)
    vector = torch.ones(matrix.shape[1], device=device, dtype=dtype)
    best = min(seconds_of(lambda: matrix @ vector, device) for _ in range(10))
    return matrix.numel() * matrix.element_size() / best
