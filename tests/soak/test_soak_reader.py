"""Long campaign on the reader of foreign files, run by `make soak`: random bit flips in each accepted layout."""

import os

import pytest

from test_hostile import LAYOUTS, flip_bytes

FLIPS, SEED = int(os.environ.get("SOAK_FLIPS", 1000)), int(os.environ.get("SOAK_SEED", 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flipped_bytes_are_refused_or_read_as_what_they_say(layout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = flip_bytes(layout, tmp_path, FLIPS, SEED)
    print(f"{layout}: {refused} of {FLIPS} flips refused, the others changed a value and nothing else")
