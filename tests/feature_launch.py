"""As launch.py, but one process has trouble with its share of the features.

[accelerate launch ...] tests/feature_launch.py slow|full|ahead RANK CONFIG [key=value ...]

slow: it takes its time over every file. full: its disk is. ahead: when it looks first, another run
has just written all files, which a moment before, when the other processes looked, it had not.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from typing import Any

from hfft.cli import main
from hfft.features.store import Entry
from hfft.processes import leave_processes

trouble, rank = sys.argv[1], sys.argv[2]
write, missing = Entry.write, Entry.missing
looked = set[str]()


def troubled(self: Entry, *args: Any) -> None:
    if trouble == "slow":
        time.sleep(0.4)
    elif trouble == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(self, *args)


def ahead(self: Entry) -> list[int]:
    first = self.folder.name not in looked
    looked.add(self.folder.name)
    return [] if first else missing(self)


if os.environ.get("RANK", "0") == rank:
    Entry.write = troubled  # type: ignore[assignment,method-assign]
    if trouble == "ahead":
        Entry.missing = ahead  # type: ignore[method-assign]
status = main(["train", *sys.argv[3:]])
if status == 0:
    leave_processes()
sys.exit(status)
