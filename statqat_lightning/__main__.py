"""`python -m statqat_lightning` is the command `statqat`."""

import sys

from statqat_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
