"""`python -m obsdag`: the command `obsdag`."""

import sys

from obsdag.cli import main

if __name__ == "__main__":
    sys.exit(main())
