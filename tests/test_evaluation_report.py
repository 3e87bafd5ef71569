"""The report: everything by one command, hostile text stays text, and the page stands in a browser."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from chromium import browsing
from conftest import ROOT, write_jsonl
from evaluation_helpers import other_model, reward_model, texts_of, write_bench
from judge_server import judging
from test_pictures import HOSTILE, Parsed, assert_harmless

from evaluation import main as evaluation
from evaluation import report
from evaluation.human import make
from evaluation.results import load_results, save_results

PARTS = [part.folder for part in report.PARTS]


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory):
    """evaluation/main.py over two tiny models with all it can have, but for human votes; its folder and the judge."""
    folder = tmp_path_factory.mktemp("evaluated")
    other = other_model(folder / "other", tiny)
    disc, rm = (reward_model(folder / f"judge{labels}", tiny, labels) for labels in (2, 1))
    write_jsonl(folder / "prompts.jsonl", [{"instruction": f"Tell me of {n} cats."} for n in range(8)])
    write_jsonl(folder / "metrics.jsonl", [{"step": n, "policy/kl": 0.1 * n} for n in range(1, 9)])

    def verdict(prompt: str, asked: int) -> str:
        return "[[A]]" if "Answer A" in prompt else f"Rating: [[{len(prompt) % 7 + 2}]]"

    with judging(verdict) as (judge, url):
        arguments = [
            *("--models", f"sft={tiny / 'model'}", f"tlcr={other}", "--out", str(folder / "out"), "--dtype", "fp32"),
            *("--discriminator", str(disc), "--sequence_reward", str(rm), "--data_path", str(tiny / "data.jsonl")),
            *("--revisions", str(tiny / "revisions.jsonl"), "--runs", f"tlcr={folder / 'metrics.jsonl'}"),
            *("--mt_bench_dir", str(write_bench(folder / "fastchat")), "--prompts", str(folder / "prompts.jsonl")),
            *("--judge", "judge", "--base_url", url, "--max_new_tokens", "8", "--max_answer_seq_len", "8"),
        ]
        assert evaluation.main(arguments) == 0
        first = judge.asked.total()
        assert evaluation.main(arguments) == 0
        assert judge.asked.total() == first > 0
    return folder / "out"


def test_one_command_measures_everything_and_names_what_is_missing(evaluated):
    assert [part for part in PARTS if load_results(evaluated, part) is None] == ["human"]
    text = texts_of(evaluated / "report.html")
    assert "Evaluation: sft, tlcr" in text
    assert "Missing: Human votes." in text
    assert "Human votes: not run. evaluation/human/make.py, then count.py, measures it." in text
    # The verdict stands first; the judge's stand-in prefers neither.
    assert "tlcr is rated" in text[: text.index("What was measured")]
    assert "evaluation/main.py --" in text
    for number in ("5.04", "84.89", "45.23", "4.28", "0.814"):
        assert (number in text) == (number != "45.23"), number  # the votes' chapter is not there
    assert json.loads((evaluated / "run_options.json").read_text())["judge"] == "judge"
    # AlpacaEval and side by side show the same prompts: answered once.
    assert len(list((evaluated / "answers").glob("*/sft.jsonl"))) == 2


def test_people_can_vote_on_what_was_evaluated(evaluated, tmp_path):
    """Prompts of a file and those of the data alike: each stand beside the folder of their answers."""
    folders = [folder for folder in (evaluated / "answers").iterdir() if folder.is_dir()]
    assert len(folders) == 2
    for folder in folders:
        answers = [f"{name}={folder / name}.jsonl" for name in ("sft", "tlcr")]
        prompts = ["--prompts", f"{folder}.jsonl", "--items", "0", "--annotators", "ann"]
        make.main(["--answers", *answers, *prompts, "--out", str(tmp_path / folder.name)])
        key = json.loads((tmp_path / folder.name / "human" / "key.json").read_text())
        assert len(key["slots"]["ann"]) == int(folder.name.split("-")[0])


def test_the_page_is_harmless_whatever_the_models_say(evaluated, tmp_path):
    """Every text of every part is replaced by hostile ones: scripts, right-to-left marks, 100 kB tokens, bad UTF-8."""
    long = "x<b>" * 25_000
    texts = iter([*HOSTILE, long] * 1000)

    def spoilt(value, key=""):
        if isinstance(value, dict):
            return {name: spoilt(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [spoilt(one, key) for one in value]
        # Names of this program's own choice stay: they say where the numbers are, not what a model wrote.
        own = ("models", "rewards", "categories", "kind")
        return next(texts) if isinstance(value, str) and key not in own else value

    for part in PARTS:
        if results := load_results(evaluated, part):
            (tmp_path / part).mkdir()
            # JSON can spell lone surrogates, which no UTF-8 file can hold.
            (tmp_path / part / "results.json").write_text(json.dumps(spoilt(results)))
    page = report.refresh_report(tmp_path)
    document = page.read_text(encoding="utf-8")
    assert_harmless(Parsed(document), scripts=1)
    assert document.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 3
    assert "\\ud800" in document
    with browsing() as tab:
        tab.open(page)
        assert tab.run("document.querySelectorAll('script').length") == 1
        assert tab.run("document.querySelectorAll('.token b, .t b').length") == 0
        assert tab.complaints == []


def test_the_page_fits_laptops_and_phones_in_both_themes_and_shows_values(evaluated):
    with browsing() as tab:
        backgrounds = set()
        for width, mobile in ((1280, False), (390, True)):
            for dark in (False, True):
                tab.screen(width, 844, dark, mobile)
                tab.open(evaluated / "report.html")
                assert tab.run("document.documentElement.scrollWidth") <= width
                backgrounds.add(tab.run("getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2
        assert tab.run("document.querySelectorAll('svg[role=img]').length") >= 8
        spot = (
            "(async () => { const one = document.querySelector('.heatmap .t'); one.scrollIntoView({block: 'center'});"
            # Scrolling hides the value, and is told of with the next frame only.
            "for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);"
            "const box = one.getBoundingClientRect(); return [box.x + 2, box.y + 5]; })()"
        )
        tab.screen(1280, 844)
        x, y = tab.run(spot)
        tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        tab.until("!document.querySelector('.tip').hidden")
        assert "D = " in tab.run("document.querySelector('.tip').textContent") or "label" in tab.run(
            "document.querySelector('.tip').textContent"
        )
        assert tab.complaints == []


def test_an_empty_folder_is_a_report_of_missing_parts(tmp_path):
    text = texts_of(report.refresh_report(tmp_path))
    assert text.count(": not run. ") == len(PARTS)


def test_results_that_are_none_are_refused(tmp_path, capsys):
    (tmp_path / "mt_bench").mkdir()
    (tmp_path / "mt_bench" / "results.json").write_text("[")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert "not results that this program wrote" in capsys.readouterr().err
    save_results(tmp_path, "x", {"a": float("nan"), "b": [(1.0, float("inf"))]})
    assert load_results(tmp_path, "x") == {"a": None, "b": [[1.0, None]]}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to evaluate"),
        (["--judge", "j", "--concurrency", "0"], "--concurrency 0"),
        (["--discriminator", "MODEL"], "not a token classifier with 2 label"),
        (["--mt_bench_dir", "/nowhere"], "no question.jsonl"),
    ],
)
def test_wrong_input_is_said_before_anything_starts(tiny, tmp_path, options, words, capsys):
    options = [str(tiny / "model") if option == "MODEL" else option for option in options]
    with pytest.raises(SystemExit) as exit:
        evaluation.main(["--out", str(tmp_path / "out"), *options])
    assert exit.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_script_takes_a_file_of_variables(tmp_path):
    lines = [{"step": n, "policy/kl": 0.1 * n} for n in range(1, 9)]
    write_jsonl(tmp_path / "metrics.jsonl", lines)
    (tmp_path / "config.sh").write_text(f"RUNS='a={tmp_path} b={tmp_path}'\nOUT={tmp_path / 'out'}\n")
    script = ROOT / "training_scripts" / "evaluate.sh"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "config.sh"), "--smoothing", "0"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "mt_bench: left out, needs --models, --mt_bench_dir" in done.stdout
    results = load_results(tmp_path / "out", "curves")
    assert results["runs"] == {"a": 8, "b": 8}
    assert results["smoothing"] == 0
    done = subprocess.run(["bash", str(script), "/nowhere"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "RUN_FOLDER | CONFIG_FILE" in done.stderr


def run_script(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """evaluate.sh, up to evaluation/main.py, in whose place its words are printed, one to a line."""
    words = "import sys; print(*sys.argv[1:], sep='\\n')"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        python = Path(folder) / "python3"
        python.write_text(f"""#!/bin/bash
case $1 in
  */evaluation/main.py) exec {shlex.quote(sys.executable)} -c {shlex.quote(words)} "${{@:2}}" ;;
  *) exec {shlex.quote(sys.executable)} "$@" ;;
esac
""")
        python.chmod(0o755)
        own = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", str(ROOT / "training_scripts" / "evaluate.sh"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": own} | variables)


def test_a_folder_with_blanks_is_one_word(tmp_path):
    run = tmp_path / "my run"
    (run / "step3_ppo_tlcr").mkdir(parents=True)
    (run / "step3_ppo_tlcr" / "run_options.json").write_text("{}")
    done = run_script(run)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    models = words.index("--models")
    assert words[models + 1 : models + 3] == [f"sft={run}/step1_sft", f"tlcr={run}/step3_ppo_tlcr/actor"]
    assert f"--run_options={run}/step3_ppo_tlcr/run_options.json" in words
    assert f"--out={run}/evaluation" in words
    assert f"--discriminator={run}/step2_discriminator" in words
    (tmp_path / "conf").write_text("MODELS=('a=my model' b=other) REVISIONS='one two' JUDGE='a b'\n")
    words = run_script(tmp_path / "conf").stdout.splitlines()
    assert words[words.index("--models") + 1 :][:2] == ["a=my model", "b=other"]
    assert words[words.index("--revisions") + 1 :][:2] == ["one", "two"]
    assert "--judge=a b" in words
    assert not any(word.startswith(("--num_processes", "--attn_implementation")) for word in words)
    words = run_script(run, NUM_GPUS="3", ATTENTION="eager").stdout.splitlines()
    assert {"--num_processes=3", "--attn_implementation=eager"} <= set(words)
    (tmp_path / "conf").write_text("RUNS='a=x --base_url=http://h'\n")
    refused = run_script(tmp_path / "conf")
    assert refused.returncode == 2
    assert 'RUNS has "--base_url=http://h"' in refused.stderr


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (
            {"data_path": ["d.jsonl --judge m --base_url URL"], "data_split": "2,4,4", "data_seed": 1},
            "d.jsonl --judge m",
        ),
        ({"data_path": ["d.jsonl", "--judge", "m"], "data_split": "2,4,4", "data_seed": 1}, ""),
        ({"data_path": ["d.jsonl"], "data_split": "2,4,4 --base_url URL --judge m", "data_seed": 1}, ""),
        ({"data_path": ["d.jsonl"], "data_split": "2,4,4", "data_seed": "1 --judge m"}, "as step 3 writes them"),
        ("[" * 100_000, "not JSON (nested too deep)"),
        ('{"data_seed": ' + "9" * 5000 + "}", "not JSON (Exceeds the limit"),
    ],
)
def test_a_run_folder_cannot_set_options(tiny, tmp_path, capsys, monkeypatch, saved, words):
    """What a run folder says of its data is data: no address in it is asked, with the key or without."""
    run = tmp_path / "run"
    for folder in ("step1_sft", "step3_ppo_tlcr/actor"):
        shutil.copytree(tiny / "model", run / folder)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-secret")
    with judging(lambda prompt, asked: "[[A]]") as (judge, url):
        text = saved if isinstance(saved, str) else json.dumps(saved).replace("URL", url)
        (run / "step3_ppo_tlcr" / "run_options.json").write_text(text)
        given = run_script(run, "--dtype", "fp32", DISCRIMINATOR="", REVISIONS="").stdout.splitlines()
        with pytest.raises(SystemExit) as ended:
            evaluation.main(given)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not judge.asked


def test_a_password_in_the_judges_address_is_not_shown(tiny, tmp_path, capsys):
    address = "http://me:hidden-password@127.0.0.1:9/v1"
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "policy/kl": 0.1}])
    runs = ["--runs", f"a={tmp_path}", "--out", str(tmp_path / "out")]
    assert evaluation.main([*runs, "--base_url", address]) == 0
    assert "hidden-password" not in capsys.readouterr().out + (tmp_path / "out" / "run_options.json").read_text()


def test_a_table_over_seeds_of_what_run_table1_left(tiny, tmp_path):
    """Two seeds with SFT, one of them with a TLCR policy too, rated by a real server; its table from their results."""
    other, root = other_model(tmp_path / "other", tiny), tmp_path / "table1"
    for seed in ("1", "2"):
        for folder, model in (("step1_sft", tiny / "model"), ("step3_ppo_tlcr/actor", other)):
            shutil.copytree(model, root / f"seed-{seed}" / folder)
        for folder in ("step1_sft", "step3_ppo_tlcr"):
            (root / f"seed-{seed}" / folder / "results.json").write_text("{}")
        write_jsonl(root / f"seed-{seed}" / "step3_ppo_tlcr" / "metrics.jsonl", [{"step": 1, "policy/kl": 0.1}])
    shutil.rmtree(root / "seed-2" / "step3_ppo_tlcr")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ratings = itertools.cycle([4, 8, 5, 9, 2])
    with judging(lambda prompt, asked: f"[[{next(ratings)}]]") as (_, url):
        environment |= {"JUDGE": "j", "JUDGE_BASE_URL": url, "MT_BENCH_DIR": str(write_bench(tmp_path / "fastchat"))}
        command = ["bash", str(ROOT / "training_scripts" / "evaluate_table1.sh"), str(root), "--dtype", "fp32"]
        command += ["--max_new_tokens", "8", "--concurrency", "1"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = json.loads((root / "table1.json").read_text())
    assert table["seeds"] == ["1", "2"]
    by_seed = [load_results(root / f"seed-{seed}" / "evaluation", "mt_bench")["models"] for seed in ("1", "2")]
    sft = table["models"]["sft"]["MT-Bench, overall"]
    values = [models["sft"]["overall"] for models in by_seed]
    assert sft["by_seed"] == dict(zip(("1", "2"), values, strict=True))
    assert sft["mean"] == pytest.approx(sum(values) / 2)
    assert sft["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    tlcr = table["models"]["tlcr"]["MT-Bench, overall"]
    assert (tlcr["mean"], tlcr["sd"]) == (by_seed[0]["tlcr"]["overall"], None)
    assert "(1 of 2)" in done.stdout
    empty = subprocess.run([*command[:2], str(tmp_path)], capture_output=True, text=True, env=environment)
    assert empty.returncode == 2
    assert "no seed-N folders" in empty.stderr


def test_one_cost_cap_holds_for_all_judged_parts_together(tiny, tmp_path):
    """100 tokens in and 10 out are US$ 0.0013: MT-Bench's 8 ratings take most of the cap, the pairs get the rest."""
    other = other_model(tmp_path / "other", tiny)
    write_jsonl(tmp_path / "prompts.jsonl", [{"instruction": f"Tell me of {n} cats."} for n in range(8)])
    cap = 0.025
    arguments = [
        *("--models", f"sft={tiny / 'model'}", f"tlcr={other}", "--out", str(tmp_path / "out"), "--dtype", "fp32"),
        *("--mt_bench_dir", str(write_bench(tmp_path / "fastchat")), "--prompts", str(tmp_path / "prompts.jsonl")),
        *("--judge", "gpt-4-0125-preview", "--judge_max_tokens", "50", "--concurrency", "1"),
        *("--max_new_tokens", "8", "--max_answer_seq_len", "8"),
    ]
    with judging(lambda prompt, asked: "[[A]]" if "Answer A" in prompt else "[[5]]") as (judge, url):
        arguments += ["--base_url", url]
        assert evaluation.main([*arguments, "--max_cost_usd", str(cap)]) == 3
        bench, pairs = (load_results(tmp_path / "out", part) for part in ("mt_bench", "alpaca_eval"))
        assert (bench["missing"], bench["stopped"], pairs["stopped"]) == (0, None, "cost cap")
        assert bench["usd"] == pytest.approx(16 * 0.0013)
        assert 0.0013 * judge.paid.total() == pytest.approx(bench["usd"] + pairs["usd"])
        assert bench["usd"] + pairs["usd"] <= cap
        assert f"Together US$ {bench['usd'] + pairs['usd']:.2f}" in texts_of(tmp_path / "out" / "report.html")
        assert evaluation.main(arguments) == 0
        assert set(judge.paid.values()) == {1}
