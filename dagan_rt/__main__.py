"""`python -m dagan_rt` is the same as `dagan-rt`."""

import sys

from dagan_rt.cli import main

if __name__ == "__main__":
    sys.exit(main())
