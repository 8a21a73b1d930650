"""`python -m hfft` is `hfft`."""

import sys

from hfft.cli import main

sys.exit(main())
