"""Publishers and users are fresh processes: the clients read `HF_ENDPOINT` when they are imported."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from local_hub import LocalHub

# The client asks once for a list of AI agents, to name one in its user agent, and goes on without an answer.
HARMLESS = {"GET /api/agent-harnesses"}


def start(code: str, hub: LocalHub, home: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    """Run code in an empty folder, as somebody whose downloads are kept in `home`."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy") and name != "PYTHONPATH"
    }
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_MODULES_CACHE": tempfile.mkdtemp(dir=home.parent),  # new each time: remote code comes from Hub or downloads
        "HF_TOKEN": "a-fake-token",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment | settings, cwd=tempfile.mkdtemp(dir=home.parent), capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip


def run(*arguments, **settings) -> dict:
    """What the code that [`start`] runs prints at the end, as JSON."""
    result = start(*arguments, **settings)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
