"""The processes of a distributed training."""

import gc

from accelerate import PartialState


def leave_processes() -> None:
    """End the group of processes.

    DDP's buckets, which are part of reference cycles, keep the group alive. Its threads would then run while Python
    shuts down, which aborts the process ("terminate called without an active exception") every few runs.
    """
    gc.collect()
    PartialState().destroy_process_group()
