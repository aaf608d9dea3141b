"""Compiled training by the fused formulation: minutes of compiling, so not in `make test`. Run by `make soak`."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_fast import losses, toy_pairs, trained  # noqa: E402, F401  (the fixtures)


def test_compiled_fast_steps_have_the_losses_of_the_plain_ones(trained, toy_pairs, tmp_path):  # noqa: F811
    compiled = losses(toy_pairs, tmp_path / "compiled", fast=True, compile="default")
    assert np.abs(compiled / trained["plain"] - 1).max() < 1e-4
