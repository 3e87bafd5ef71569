"""What one step of PPO asks of a GPU, counted on the pretended device, and the time that this implies on a named card.

    python benchmarks/counts.py step3_ppo_tlcr/main.py --actor_model_name_or_path … (any of its options)
    python benchmarks/counts.py --check_cpu     (the model of time against this machine's clock; a minute)

Runs the program to two and to three steps and prints the difference: loading, saving and most recording of graphs are
not in it. The device is that of the tests (tests/pretended/gpu.py): it counts, it does not measure time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training_scripts.planning import duration  # noqa: E402
from training_scripts.planning.plan import table  # noqa: E402

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
    return {kind: dict((Counter(counts) - Counter(fewer[kind])).most_common()) for kind, counts in more.items()}


def by_phase(done: dict[str, int]) -> dict[str, dict[str, float]]:
    """Sums of a step's ``done`` (tests/pretended/gpu.py: counts) by phase; a card's column is in seconds."""
    names = {"kernel": "kernels", "launch": "launches", "wait": "waits"}
    phases: dict[str, dict[str, float]] = {}
    keys = [key.split(";") for key in done]
    tables = {int(a) for phase, kind, a, _ in keys if kind == "token" and not phase.endswith("backward")}
    for key, count in done.items():
        phase, kind, a, b = key.split(";")
        sums = phases.setdefault(phase or "between", dict.fromkeys((*COUNTED, *duration.CARDS), 0.0))
        if kind in names:
            sums[names[kind]] += count
        if kind == "kernel":
            sums["operations"] += int(a) * count
            for card in duration.CARDS:
                each = duration.kernel(duration.CARDS[card], int(a), int(b))
                sums[card] += max(duration.KERNEL, each) * count
        elif kind in ("host", "link"):
            sums[kind] += int(b) * count
            for name, card in duration.CARDS.items():
                sums[name] += int(b) * count / (getattr(card, kind) * duration.LINK_SHARE)
        elif kind in ("computed", "real"):
            sums[kind] += count
        elif kind == "token" and int(a) == max(tables) and not phase.endswith("backward"):
            sums["looked up"] += count
    for sums in phases.values():
        for card in duration.CARDS:
            sums[card] = duration.elapsed(sums[card], sums["launches"], sums["waits"])
    return phases


COUNTED = ("launches", "waits", "kernels", "operations", "host", "link", "computed", "real", "looked up")


def report(phases: dict[str, dict[str, float]]) -> str:
    rows = []
    for phase, sums in phases.items():
        # Replayed graphs look up tokens without calling the model, so how many of them are padding is not known.
        called = 0 < sums["computed"] == sums["looked up"]
        share = f"{1 - sums['real'] / sums['computed']:.1%}" if called else ""
        whole = (f"{sums[name]:,.0f}" for name in ("launches", "waits", "kernels", "looked up"))
        sizes = (f"{sums[name] / 1e6:,.1f}" for name in ("host", "link"))
        cards = (f"{1e3 * sums[card]:,.1f}" for card in duration.CARDS)
        rows.append((phase, *whole, share, f"{sums['operations'] / 1e9:,.2f}", *sizes, *cards))
    header = ("phase", "launches", "waits", "kernels", "tokens", "padding", "GFLOP", "host MB", "links MB")
    return table((*header, *(f"{card}, ms" for card in duration.CARDS)), rows)


# ---- the model of time against a clock -------------------------------------------------------------------------------

CHECKED = ((768, 6, 192), (768, 12, 192), (1024, 8, 320))
"""Width, blocks and tokens of the shapes; the MLP is 3 times as wide, the vocabulary has 4,000 words."""


def seconds_of(works: list[Callable[[], object]]) -> list[float]:
    """Processor seconds of each work, the least of five rounds through all, after one to warm up.

    In rounds, because a machine's speed drifts; the processor's seconds, because others may use it too.
    """
    times: list[list[float]] = [[] for _ in works]
    for _ in range(6):
        for work, its_times in zip(works, times, strict=True):
            begun = time.process_time()
            work()
            its_times.append(time.process_time() - begun)
    return [min(its_times[1:]) for its_times in times]


def check_cpu() -> None:
    """Print the times of three shapes, in fp32 on one thread, beside those that duration.py says."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    a, b, long = torch.randn(256, 768), torch.randn(768, 2048), torch.randn(50_000_000)
    product, reading = seconds_of([lambda: a @ b, long.sum])
    flops, bandwidth = 2 * 256 * 768 * 2048 / product, 4 * len(long) / reading  # decoding reads much, writes little
    card = duration.Card(flops, bandwidth, 1, 1, utilisation=1, share=1)
    print(f"this CPU, one thread: {flops / 1e9:.0f} GFLOP/s by a product, {bandwidth / 1e9:.1f} GB/s by reading")
    works, names, said = [], [], []
    for width, blocks, tokens in CHECKED:
        heads = width // 64
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": blocks}
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=4000, num_attention_heads=heads, num_key_value_heads=heads, **sizes)
        )
        ids = torch.randint(0, 4000, (1, tokens))
        parameters = model.num_parameters() - 4000 * width  # the embedding is looked up, without arithmetic

        def learn(model=model, ids=ids):
            model(input_ids=ids, labels=ids).loss.backward()

        @torch.no_grad()
        def decode(model=model, ids=ids):
            model(input_ids=ids[:, :1])

        works += [learn, decode]
        names += [f"learning, {width} x {blocks}, {tokens} tokens", f"decoding, {width} x {blocks}, a token"]
        through = parameters + duration.attending(blocks, width, tokens)
        said += [
            duration.computing(card, through, tokens, 3),
            duration.decoding(card, parameters, 1, size=4),
        ]
    rows, measured = [], seconds_of(works)
    for number, name in enumerate(names):
        first = number % 2  # the same work of the first shape
        ratios = said[number] / said[first], measured[number] / measured[first]
        cells = (f"{1e3 * said[number]:.1f}", f"{1e3 * measured[number]:.1f}", *(f"{ratio:.2f}" for ratio in ratios))
        rows.append((name, *cells, f"{ratios[0] / ratios[1] - 1:+.0%}"))
    print(table(("work", "model, ms", "measured, ms", "ratio, model", "ratio, measured", "off"), rows))


def main(program: list[str]) -> None:
    if program == ["--check_cpu"]:
        check_cpu()
        return
    step = difference(counted(program, 2), counted(program, 3))
    print(report(by_phase(step.pop("done"))))
    for kind, counts in step.items():
        print(f"{kind}: {sum(counts.values())}")
        for name, count in list(counts.items())[:SHOWN]:
            print(f"  {count:>7}  {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
