"""A program of the study's kind that does next to nothing: notes that it ran, and fails while a file is there."""

import json
import os
import sys
import time
from pathlib import Path


def main(argv: list[str]) -> int:
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    folder = Path(given["--output_dir"])
    with folder.with_name(f"{folder.name}.ran").open("a") as file:  # beside the folder, which each run begins anew
        file.write(f"ran {os.getpid()}\n")
    time.sleep(float(given.get("--sleep", "0")))
    if "--fails_while" in given and Path(given["--fails_while"]).exists():
        print("the reason", file=sys.stderr)
        return 3
    (folder / "results.json").write_text(json.dumps(given))
    return 0
