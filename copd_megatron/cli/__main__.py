"""``python -m copd_megatron.cli`` is the ``copd`` command."""

import sys

from copd_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
