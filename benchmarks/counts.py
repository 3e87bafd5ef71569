"""What one step of PPO asks of a GPU: kernel launches, waits and collectives, counted on the pretended device.

    python benchmarks/counts.py step3_ppo_tlcr/main.py --actor_model_name_or_path … (any of its options)

Runs the program to two and to three steps and prints the difference: loading, saving and most recording of graphs are
not in it. The device is that of the tests (tests/pretended/gpu.py): it counts, it does not measure time.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 12


def counted(program: list[str], steps: int) -> dict[str, dict[str, int]]:
    """Counts of a whole run of ``steps`` steps. Exits with the program's words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counts.json"
        limit = ["--enable_test_mode", "--test_stop_step", str(steps), "--output_dir", f"{folder}/run"]
        done = subprocess.run(
            [sys.executable, ROOT / "tests" / "pretended" / "gpu.py", *program, *limit],
            env=os.environ | {"PRETENDED_COUNTS": str(file), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        if done.returncode or not file.exists():
            sys.exit(f"{' '.join(program)}: status {done.returncode}\n{done.stderr[-3000:]}")
        return json.loads(file.read_text())


def difference(fewer: dict[str, dict[str, int]], more: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """What ``more`` counted beyond ``fewer``, the largest first."""
    extra = {
        kind: {name: count - fewer[kind].get(name, 0) for name, count in counts.items()}
        for kind, counts in more.items()
    }
    return {
        kind: dict(sorted(((name, n) for name, n in counts.items() if n > 0), key=lambda pair: -pair[1]))
        for kind, counts in extra.items()
    }


def main(program: list[str]) -> None:
    step = difference(counted(program, 2), counted(program, 3))
    for kind, counts in step.items():
        print(f"{kind}: {sum(counts.values())}")
        for name, count in list(counts.items())[:SHOWN]:
            print(f"  {count:>7}  {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
