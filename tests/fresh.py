"""Models as they load where hfft is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def fresh(script: str, folder: Path) -> Any:
    """Run a script in a process of its own, without hfft; return the JSON that it prints last."""
    guard = "\nassert not any(name.split('.')[0] == 'hfft' for name in __import__('sys').modules)"
    done = subprocess.run(
        [sys.executable, "-c", script + guard],
        cwd=folder,
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "code")},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
