"""As launch.py, but several runs one after the other in the same processes.

accelerate launch ... tests/many_launch.py FILE, of JSON: [[CONFIG, key=value, ...], ...]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from hfft.cli import main
from hfft.processes import leave_processes

assert int(os.environ["WORLD_SIZE"]) > 1
for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    if status := main(["train", *run]):
        sys.exit(status)
leave_processes()
