"""Hold a run's report.json against the gates of its config: python tests/check_demo.py runs/emoji/report.json

Exits with 1 where a gate is missed or none is there. What was left out (the unseen vendor, without npm) is said.
"""

import json
import sys


def main(path: str) -> int:
    """Print every gate with what was reached, and return the exit code."""
    with open(path, encoding="utf-8") as file:
        report = json.load(file)
    gates = {key.removesuffix("/gate"): value for key, value in report.items() if key.endswith("/gate")}
    failed = not gates
    for key, gate in gates.items():
        reached = report.get(key)
        reached = float("nan") if reached is None else reached
        passed = reached >= gate  # False for NaN
        failed |= not passed
        print(f"{'passed' if passed else 'FAILED'}    {key}: {reached:.3f}, gate {gate:.2f}")
    for key, reason in report.items():
        if key.startswith("run/skipped."):
            print(f"left out  {key.removeprefix('run/skipped.')}: {reason}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
