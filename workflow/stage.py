"""Run one stage of a profile, and no other: what a job of workflow/Snakefile does. Jobs of different stages may run side by side."""

import argparse
import sys
from pathlib import Path

from get_nb.lab.core import ConfigError
from get_nb.lab.pipeline import StageError, run_stage, runs_folder
from get_nb.lab.stages import load_profile, select, stage_key, why_run


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("stage")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--runs", type=Path)
    args = parser.parse_args()
    stages = select(load_profile(args.root, args.profile), args.stage)
    stage, folder = stages[args.stage], runs_folder(args.root, args.profile, args.runs)
    for need in stage.needs:
        if why_run(stages[need], folder):
            raise ConfigError(
                f"stage {stage.name}: {need} does not hold ({why_run(stages[need], folder)}); run it first"
            )
    reason = why_run(stage, folder)
    if reason:
        print(f"{stage.name}: running ({reason})", flush=True)
        print(f"{stage.name}: done in {run_stage(stage, stage_key(stage, folder), args.root, folder)['seconds']:.0f} s")
    else:
        print(f"{stage.name}: holds")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, StageError) as e:
        print(f"stage.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(1 if isinstance(e, StageError) else 2)
