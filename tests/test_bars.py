"""Progress bars: in a log each is a few whole lines, whoever draws it."""

import subprocess
import sys

BARS = """
import time
from datasets.utils import tqdm as of_datasets
from tqdm.auto import tqdm
from transformers.utils.logging import tqdm as of_transformers
from deepspeed_chat_tlcr import bars
bars.SECONDS_BETWEEN_LINES, bars.SHORTEST_SHOWN = 0.5, 0.05
bars.lines_instead_of_bars()
for kind, name in ((tqdm, "ours"), (of_datasets, "datasets"), (of_transformers, "transformers")):
    for _ in kind(range(40), desc=name, mininterval=0):
        time.sleep(0.005)
with tqdm(total=2, desc="written") as bar:
    bar.update(1)
    tqdm.write("between")
with tqdm(total=10, desc="slow", mininterval=0) as bar:
    time.sleep(0.6)
    bar.update(5)
"""


def test_a_log_gets_lines():
    done = subprocess.run([sys.executable, "-c", BARS], capture_output=True, check=True)
    assert b"\r" not in done.stdout + done.stderr
    lines = done.stderr.decode().splitlines()
    ends = [line for line in lines if "100%" in line]
    assert [line.split(":")[0] for line in ends] == ["ours", "datasets", "transformers"]
    assert all(" 40/40 " in line for line in ends)
    assert any(line.startswith("slow:  50%") for line in lines)
    assert len(lines) < 40  # of 120 steps
    assert done.stdout == b"between\n"
