"""Fine-tune on the processes that a launcher starts.

`accelerate launch` and `torchrun` take a script; this one runs what `hfft train` runs, with the
same arguments:

    accelerate launch [its options] launch.py CONFIG [key=value ...]
    torchrun --nproc_per_node 4 launch.py CONFIG [key=value ...]

configs/accelerate/ has a file of options for each kind of hardware, for `--config_file`; each says
when to use it.
"""

import sys

from hfft.cli import main

if __name__ == "__main__":
    status = main(["train", *sys.argv[1:]])
    if status == 0:  # else another process may not get here
        from hfft.processes import leave_processes

        leave_processes()
    sys.exit(status)
