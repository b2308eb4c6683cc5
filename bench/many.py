"""A launch of many tiny trials, as users launch them: how its time grows with their number.

    python bench/many.py [--trials 25 50 100]

Each number of trials is a launch of its own in a storage of its own: `ppc study launch FILE --tiny --max-concurrent 2`,
with Ray and MLflow. A trial trains for a few steps, makes seeds and scores them. What is printed a trial is from the
end of the first one to the end of the last: the start of the cluster, and the import of torch, stand apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import digits, head, row

from ppc.artifacts import Storage
from ppc.ledger import FINISHED, read_rows

FILE = Path(__file__).resolve().parent.parent / "experiments" / "scenes_seam_ppc.yaml"
NAME = "many-tiny"


def write_study(folder: Path, trials: int) -> Path:
    """A study of one variant and many seeds."""
    path = folder / "many.yaml"
    fields = {
        "name": NAME.removesuffix("-tiny"),
        "base": {"extends": str(FILE), "stages": ["train_cam", "make_seeds", "evaluate"]},
        "design": {"kind": "list", "variants": [{"name": "tiny"}]},
        "trial_seeds": list(range(trials)),
        "metric": "seed_miou_train",
    }
    path.write_text(json.dumps(fields))  # JSON is YAML
    return path


def launch(trials: int) -> dict[str, float]:
    """Launch as many trials and wait for them."""
    with tempfile.TemporaryDirectory(prefix="ppc-bench-") as folder:
        study = write_study(Path(folder), trials)
        storage = Storage(Path(folder) / "storage")
        words = ["study", "launch", str(study), "--tiny", "--max-concurrent", "2", "--num-cpus", "2"]
        command = [sys.executable, "-c", "from ppc.cli import main; main()", *words, "--storage", str(storage.root)]
        start = time.time()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        end = time.time()
        if done.returncode:
            sys.exit(f"a launch of {trials} trials ended with exit code {done.returncode}:\n{done.stdout[-20_000:]}")
        rows = read_rows(storage, storage.study(NAME).definition())
        assert len(rows) == trials and all(row.state == FINISHED for row in rows)
        ends_s = sorted(row.result["finished_ms"] / 1000 for row in rows if row.result)
        return {
            "whole_s": end - start,
            "to_first_result_s": ends_s[0] - start,
            "a_trial_s": (ends_s[-1] - ends_s[0]) / max(trials - 1, 1),
            "after_last_result_s": end - ends_s[-1],
        }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[25, 50, 100])
    print("Launches of many tiny trials, two at a time\n", flush=True)
    head("trials", "whole, s", "to the first result, s", "a later trial, s", "ratio", "after the last result, s")
    first = None
    for trials in parser.parse_args().trials:
        found = launch(trials)
        first = first or found["a_trial_s"]
        row(
            digits(trials),
            found["whole_s"],
            found["to_first_result_s"],
            found["a_trial_s"],
            found["a_trial_s"] / first,
            found["after_last_result_s"],
        )


if __name__ == "__main__":
    main()
