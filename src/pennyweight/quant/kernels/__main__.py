"""`python -m pennyweight.quant.kernels`: compile the CPU kernels of this checkout, in place."""

import sys

from pennyweight.quant.kernels.build import CannotBuild, build, variants

try:
    print(f"{build()}: {', '.join(variants())}")
except CannotBuild as fault:
    sys.exit(f"CPU kernels: not built: {fault}; pure torch does their work")
