"""Run one stage of a profile, and no other: a job of workflow/Snakefile. Jobs of different stages may run side by side."""

import argparse
import sys
from pathlib import Path

from get_nb.lab.core import ConfigError, require
from get_nb.lab.pipeline import StageError, run_stage
from get_nb.lab.profiles import load_profile, select_stages
from get_nb.lab.stages import runs_folder, stage_key, why_run


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("stage")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--cores", type=int, help="threads at most")
    args = parser.parse_args()
    stages = select_stages(load_profile(args.root, args.profile), args.stage)
    stage, folder = stages[args.stage], runs_folder(args.root, args.profile, args.runs)
    for need in stage.needs:
        reason = why_run(stages[need], folder)
        require(not reason, f"stage {stage.name}: {need} is not up to date ({reason}); run it first")
    reason = why_run(stage, folder)
    if not reason:
        print(f"{stage.name}: up to date")
        return
    print(f"{stage.name}: running ({reason})", flush=True)
    stamp = run_stage(stage, stage_key(stage, folder), args.root, folder, cores=args.cores)
    print(f"{stage.name}: done in {stamp['seconds']:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, StageError) as e:
        print(f"stage.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(1 if isinstance(e, StageError) else 2)
