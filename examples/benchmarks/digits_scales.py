"""Scales of least error beside those of the extremes, in training: scanned digits at W2A2.

The network and the data are those of `digits.py`. Both runs start from the same float weights and
see the data in the same order. The baseline chooses weights by `minmax` and inputs by
`moving_average`: ranges are averaged, as other training tools do, because a running maximum would
never fall.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
from digits import NARROW, Run, Session, parse_arguments

from statqat_lightning import TensorSpec
from statqat_lightning.recipes.rule import activation_spec


def minmax_run(fmt: str, formats: str) -> Run:
    """The baseline, with signs and zero points of inputs as the plain name of the format has."""
    inputs = activation_spec(fmt, "activations")
    assert inputs is not None
    weights = TensorSpec(fmt, quantizer="minmax")
    return Run("min-max QAT", formats, weights, replace(inputs, quantizer="moving_average"))


RUNS = (Run("StatQAT", "W2A2", "int2", "int2"), minmax_run("int2", "W2A2"))


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0], "outputs/digits_scales")
    common.start(args, "sklearn")
    session = Session(args)
    start = session.float_network("float", NARROW)
    for run in RUNS:
        session.quantize(start, run)
    session.print_table()
    print()
    common.print_paths(session.paths)


if __name__ == "__main__":
    main()
