"""`python -m benchmarks cpu [...]` and `python -m benchmarks gpu [...]`: the whole of one machine's table."""

from __future__ import annotations

import sys

from benchmarks import cpu, gpu

WHAT = {"cpu": cpu.main, "gpu": gpu.main}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in WHAT:
        print(f"usage: python -m benchmarks {'|'.join(WHAT)} [--help]", file=sys.stderr)
        return 2
    return WHAT[name](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
