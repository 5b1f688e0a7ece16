"""Table of the published models and the embedded one: architecture, location of the weights, sampling settings.

`python -m titok_jax.zoo` prints it. Imports no JAX.
"""

import sys
from collections.abc import Sequence

from titok_jax.runtime.arguments import Parser
from titok_jax.runtime.command import command
from titok_jax.weights.published_models import table

_EPILOG = """examples:
  python -m titok_jax.zoo
      all models: parameters, published FID, sampling settings, where the weights are
  python -m titok_jax.sample --model titok_b64 --labels 207,360 --num 8
      uses one by its name
"""


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m titok_jax.zoo",
        description="Prints the known models and which are on this machine.",
        epilog=_EPILOG,
    )
    parser.parse_args(argv)
    print(table())


if __name__ == "__main__":
    sys.exit(main())
