"""Table 1 on the picture-book world, or with a configuration of yours on a real set: the benchmark, and its table.

    python -m experiments.table1 [--quick] [--config FILE] [KEY=VALUE ...]

The same as masafusion bench; the table that README and LOG.md quote is table.md in its folder. The paper reads:
MaSaFusion has the best average rank, NTI's a little before DI's; L1 and L2 of GLIDE and Blended are large; the others
are worse over several turns.
"""

from __future__ import annotations

import sys
from pathlib import Path

from masafusion_lab import cli

CONFIG = Path(__file__).parents[1] / "configs" / "table1_picturebook.yaml"


def main() -> None:
    """Run it."""
    words = sys.argv[1:]
    usual = [] if any(word.startswith("--config") for word in words) else ["--config", str(CONFIG)]
    sys.argv = ["masafusion", "bench", *usual, *words]
    cli.main()


if __name__ == "__main__":
    main()
