"""Time and memory against timm's networks; the same as `timm-dgconv bench`."""

import sys

from timm_dgconv.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
