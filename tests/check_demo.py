"""Checks a run's report.json against the thresholds of its config: python tests/check_demo.py runs/emoji/report.json

Exits with 1 if a threshold is missed or there is none. Lists skipped datasets (the unseen vendor, without npm).
"""

import json
import sys


def main(path: str) -> int:
    """Print every threshold with its metric, and return the exit code."""
    with open(path, encoding="utf-8") as file:
        report = json.load(file)
    thresholds = {key.removesuffix("/threshold"): v for key, v in report.items() if key.endswith("/threshold")}
    failed = not thresholds
    for key, threshold in thresholds.items():
        value = float("nan") if report.get(key) is None else report[key]
        passed = value >= threshold  # False for NaN
        failed |= not passed
        print(f"{'passed' if passed else 'FAILED'}    {key}: {value:.3f}, threshold {threshold:.2f}")
    for key, reason in report.items():
        if key.startswith("run/skipped."):
            print(f"skipped   {key.removeprefix('run/skipped.')}: {reason}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
