"""The shell scripts, run as users run them. Where a stage itself is not the matter, a recorded stand-in for the
``deepspeed`` launcher takes its place; everything else is real."""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, patience, preferences, write_jsonl
from deepspeed.launcher.multinode_runner import PDSHRunner
from test_plan import PAPER

from deepspeed_chat_tlcr.runtime import free_port
from tests.labeling_helpers import fault_server
from training_scripts.planning.machine_checks import package_problems
from training_scripts.planning.preflight import main

SCRIPTS = ROOT / "training_scripts"
STAGES = ("step1_sft", "step2_discriminator", "step3_ppo_tlcr")


def run(script, *arguments, path=None, cwd=ROOT, timeout=120, **variables) -> subprocess.CompletedProcess:
    """Run a script with this Python first on PATH and no variable of the recipe but those given."""
    own = str(Path(sys.executable).parent)
    environment = {"PATH": path or f"{own}{os.pathsep}{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/")}
    environment |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    kept = ("HF_DATASETS_CACHE", "TORCH_EXTENSIONS_DIR")
    alone = Path(script).stem in ("step1", "label", "step2", "step2_sequence", "step3", "dpo", "figa")
    environment |= {"PREFLIGHT": "0"} if alone else {}  # stand-ins would not pass; one test is about it
    environment |= {name: os.environ[name] for name in kept if name in os.environ} | variables
    return subprocess.run(
        ["bash", str(script if Path(script).is_absolute() else SCRIPTS / script), *map(str, arguments)],
        env={name: str(value) for name, value in environment.items() if value is not None},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=patience(timeout),
    )


def commands(output: str) -> dict[str, list[str]]:
    """The words of each program's command in what PLAN=1 prints, by the folder that its program lies in."""
    found = {}
    for line in output.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if line.startswith(("deepspeed", "python3")) else []
        for word in words:
            if word.endswith(".py"):
                found[
                    f"{Path(word).parent.name} {words[words.index(word) + 1]}"
                    if "testbed" in word
                    else Path(word).parent.name
                ] = words
    return found


def options_of(stage: str, words: list[str]):
    """What the stage's own parser makes of a command."""
    arguments = words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :]
    module = importlib.import_module(f"{stage}.main")
    if stage == "labeling":
        from deepspeed_chat_tlcr.arguments import parse
        from labeling.options import Options

        return parse(Options, arguments)
    return module.parse_args(arguments)


@pytest.fixture
def launcher(tmp_path):
    """A stand-in for the ``deepspeed`` launcher: writes its arguments to calls.txt and ends with status $STATUS."""
    folder = tmp_path / "stand-in"
    folder.mkdir()
    program = folder / "deepspeed"
    program.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$*" >>"$(dirname "$0")/calls.txt"\n'
        'echo "said on stdout"; echo "said on stderr" >&2\n'
        "status=${STATUS:-0}; while [[ $# -gt 1 ]]; do [[ $1 != --output_dir ]] || folder=$2; shift; done\n"
        '[[ $status != 0 || -n ${HALF:-} ]] || echo "{}" >"$folder/results.json"; exit "$status"\n'
    )
    program.chmod(0o755)
    return folder


def path_with(folder: Path) -> str:
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


# ---- all scripts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [*sorted(SCRIPTS.glob("*.sh")), ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", "-x", script], capture_output=True, text=True, cwd=ROOT)
        assert checked.returncode == 0, checked.stdout


# ---- PLAN=1 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan_7b(tmp_path_factory) -> str:
    """PLAN=1 of run_7b.sh in an environment with nothing: no key, no GPU, no installed package."""
    folder = tmp_path_factory.mktemp("plan")
    done = run("run_7b.sh", folder / "out", PLAN=1, path=os.defpath, HOME=folder, HF_HUB_OFFLINE=None)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == [], "a plan writes nothing"
    return done.stdout


def test_plan_lists_the_stages_in_order(plan_7b):
    assert list(commands(plan_7b)) == ["step1_sft", "labeling", "step2_discriminator", "step3_ppo_tlcr"]
    for expected in ("44,821", "US$", "Memory of step3_ppo_tlcr", "Disk under"):
        assert expected in plan_7b


def test_every_planned_command_is_one_its_stage_understands(plan_7b):
    """The paper's settings (section 5, appendix B), as the stages' own parsers read them."""
    planned = commands(plan_7b)
    options = {stage: options_of(stage, planned[stage]) for stage in STAGES}
    for stage in STAGES:
        assert " ".join(planned[stage]).startswith("deepspeed --log_level warning --num_gpus 8 ")
        assert options[stage].data_path == ["Dahoas/full-hh-rlhf"]
        assert (options[stage].data_split, options[stage].data_seed) == ("2,4,4", 1234)
        assert (options[stage].lr_scheduler_type, options[stage].num_warmup_steps) == ("cosine", 0)
    sft, discriminator, ppo = (options[stage] for stage in STAGES)
    assert (sft.learning_rate, sft.num_train_epochs, sft.per_device_train_batch_size) == (1e-5, 2, 16)
    assert (sft.max_seq_len, sft.model_name_or_path) == (512, "meta-llama/Llama-2-7b-hf")
    assert (discriminator.learning_rate, discriminator.num_train_epochs, discriminator.weight_decay) == (1e-5, 2, 0.1)
    assert discriminator.objective == "token"
    assert (ppo.actor_learning_rate, ppo.critic_learning_rate, ppo.kl_ctl) == (1e-6, 1e-6, 0.1)
    assert (ppo.gamma, ppo.lam, ppo.num_train_epochs, ppo.reward) == (1.0, 0.95, 1, ["tlcr"])
    stages = (ppo.actor_zero_stage, ppo.critic_zero_stage, ppo.reference_zero_stage, ppo.reward_zero_stage)
    assert stages == (2, 2, 3, 3)
    # Where the memory plan fits on the GPUs, the paper's offload is one variable away.
    assert not ppo.offload
    assert "--offload" in run("step3.sh", PLAN=1, PPO_OFFLOAD=1).stdout
    assert "--enable_ema" in run("step3.sh", PLAN=1, PPO_EMA=1).stdout
    assert "--offload" in run("step3.sh", PLAN=1, GPU_MEMORY_GB=40).stdout
    assert (sft.tokens_per_micro_batch, discriminator.tokens_per_micro_batch) == (0, 1024)
    assert ppo.tokens_per_micro_batch == 2048
    assert ppo.actor_gradient_checkpointing
    assert ppo.critic_gradient_checkpointing
    # Each stage starts from what an earlier one writes.
    assert discriminator.revisions == [f"{Path(sft.output_dir).parent}/labeling/revisions.jsonl"]
    assert ppo.actor_model_name_or_path == sft.output_dir
    assert ppo.critic_model_name_or_path == discriminator.output_dir


def test_labelling_command_is_one_that_labelling_understands(plan_7b):
    options = options_of("labeling", commands(plan_7b)["labeling"])
    assert (options.model, options.split, options.data_seed) == ("gpt-6-luna", "train", 1234)
    assert (options.base_url, options.api_key_env) == (None, "OPENAI_API_KEY")
    assert options.max_cost_usd == 100


def test_run_7b_restates_the_defaults_of_the_recipe(plan_7b):
    """A stage's script run alone does what it does within run_7b.sh."""
    together = commands(plan_7b)
    output = Path(options_of("step1_sft", together["step1_sft"]).output_dir).parent
    for script, stage in zip(("step1", "label", "step2", "step3"), together, strict=True):
        alone = run(f"{script}.sh", PLAN=1, OUTPUT=output)
        assert commands(alone.stdout) == {stage: together[stage]}


def test_variables_positional_arguments_and_further_options():
    planned = commands(run("run_7b.sh", "out", "3", PLAN=1, SEED=7, DTYPE="fp16", NUM_GPUS=2, MASTER_PORT=1).stdout)
    for stage in STAGES:
        assert " ".join(planned[stage]).startswith("deepspeed --log_level warning --num_gpus 2 --master_port 1 ")
        options = options_of(stage, planned[stage])
        assert (options.seed, options.dtype) == (7, "fp16")
        assert options.output_dir == f"out/{stage}"
    assert options_of("step1_sft", planned["step1_sft"]).zero_stage == 3
    assert options_of("step3_ppo_tlcr", planned["step3_ppo_tlcr"]).actor_zero_stage == 3

    nodes = run(
        "step1.sh", "--max_grad_norm", "0.5", PLAN=1, HOSTFILE="hosts file", NUM_GPUS="", DATA="a.jsonl b.jsonl"
    )
    words = commands(nodes.stdout)["step1_sft"]
    assert words[3:6] == ["--hostfile", "hosts file", "--master_port"]
    options = options_of("step1_sft", words)
    assert (options.data_path, options.max_grad_norm) == (["a.jsonl", "b.jsonl"], 0.5)

    for visible, wanted, included in (("2,3,5", 2, "2,3"), ("6", "", "6")):
        some = run("step1.sh", PLAN=1, CUDA_VISIBLE_DEVICES=visible, NUM_GPUS=wanted, DS_ACCELERATOR="cuda")
        assert commands(some.stdout)["step1_sft"][3:5] == ["--include", f"localhost:{included}"]
    named = run("step1.sh", PLAN=1, CUDA_VISIBLE_DEVICES="GPU-1", DS_ACCELERATOR="cuda")
    assert named.returncode == 2
    assert "CUDA_VISIBLE_DEVICES=GPU-1: DeepSpeed's launcher knows GPUs by number" in named.stderr

    terms = run("step3.sh", PLAN=1, REWARD="tlcr@0.5 sequence:rm@2")
    assert options_of("step3_ppo_tlcr", commands(terms.stdout)["step3_ppo_tlcr"]).reward == [
        "tlcr@0.5",
        "sequence:rm@2",
    ]


def test_attention_is_one_variable():
    for script, folder in (("step1.sh", "step1_sft"), ("step3.sh", "step3_ppo_tlcr")):
        for name in ("sdpa", "flash_attention_2"):
            words = commands(run(script, PLAN=1, ATTENTION=name).stdout)[folder]
            assert ("--attn_implementation" in words) == (name != "sdpa")
            assert options_of(folder, words).attn_implementation == name


def test_a_switch_is_on_or_off():
    done = run("step1.sh", PLAN=1, SFT_OFFLOAD="yes")
    assert done.returncode == 2
    assert '--offload is switched on with 1 and off with 0, not with "yes"' in done.stderr
    assert "--offload" in run("step1.sh", PLAN=1, SFT_OFFLOAD=1).stdout


@pytest.mark.parametrize(
    ("script", "name"), [("run_tiny.sh", "MODEL"), ("run_tiny.sh", "DATA"), ("run_qa_feedback.sh", "EVAL_REVISIONS")]
)
def test_a_variable_that_a_script_would_overwrite_is_refused(script, name):
    done = run(script, PLAN=1, **{name: "mine"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {name}=mine: this script makes its own")


def test_what_the_user_brings_is_not_made_again():
    planned = run("run_7b.sh", PLAN=1, REVISIONS="mine.jsonl", SFT_MODEL="my/sft").stdout
    assert list(commands(planned)) == ["step2_discriminator", "step3_ppo_tlcr"]
    assert options_of("step2_discriminator", commands(planned)["step2_discriminator"]).revisions == ["mine.jsonl"]


def test_run_tiny_differs_only_in_its_variables(plan_7b):
    """The same programs with the same options (switches aside), and the testbed's part before and after."""
    done = run("run_tiny.sh", PLAN=1)
    assert done.returncode == 0, done.stderr
    tiny, large = commands(done.stdout), commands(plan_7b)
    assert [name for name in tiny if "testbed" not in name] == list(large)
    for stage in STAGES:
        flags = [{word for word in words[stage] if word.startswith("--")} for words in (tiny, large)]
        assert flags[0] ^ flags[1] <= {
            "--gradient_checkpointing",
            "--actor_gradient_checkpointing",
            "--critic_gradient_checkpointing",
            "--offload",
            "--whiten_advantages",
            "--tokens_per_micro_batch",
            "--save_answers",  # the true score over training is drawn from them
        }
        options = options_of(stage, tiny[stage])
        assert (options.seed, options.output_dir) == (1, f"output/tiny-seed1/{stage}")
    # Another seed never meets this one's results.
    assert "output/tiny-seed2/step1_sft" in run("run_tiny.sh", PLAN=1, SEED=2).stdout


def test_called_from_elsewhere(tmp_path):
    words = commands(run("step1.sh", PLAN=1, OUTPUT="out", cwd=tmp_path).stdout)["step1_sft"]
    assert str(SCRIPTS.parent / "step1_sft" / "main.py") in words
    assert words[words.index("--output_dir") + 1] == "out/step1_sft"


# ---- one stage, with a stand-in for the launcher ---------------------------------------------------------------------


def test_stage_logs_to_terminal_and_file_and_keeps_the_exit_status(launcher, tmp_path):
    output = tmp_path / "out"
    done = run("step1.sh", "--max_grad_norm", "0.5", path=path_with(launcher), OUTPUT=output, STATUS=7)
    assert done.returncode == 7
    log = (output / "step1_sft" / "training.log").read_text()
    for text in ("said on stdout", "said on stderr", "--learning_rate 1e-5"):
        assert text in done.stdout
        assert text in log
    assert (launcher / "calls.txt").read_text().rstrip().endswith("--max_grad_norm 0.5")
    again = run("step1.sh", path=path_with(launcher), OUTPUT=output)
    assert again.returncode == 0
    assert (output / "step1_sft" / "training.log").read_text().startswith(log), "a second run adds to the log"


def test_a_stage_that_leaves_no_results_is_not_done(launcher, tmp_path):
    """A launcher that is ended from outside, or a stage that was asked to stop, leaves status 0."""
    done = run("step1.sh", path=path_with(launcher), OUTPUT=tmp_path / "out", HALF=1)
    assert done.returncode == 1
    assert f"error: {tmp_path}/out/step1_sft: ended without its results; the same command continues it" in done.stderr


def test_a_stage_by_itself_is_looked_at_before_its_start(launcher, tmp_path):
    same = {"path": path_with(launcher), "OUTPUT": tmp_path / "out", "NUM_GPUS": 1, "DTYPE": "fp32"}
    done = run("step1.sh", **same, PREFLIGHT=1, MODEL=tmp_path / "nowhere", DATA=tmp_path / "absent.jsonl")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "absent.jsonl" in done.stderr
    assert "calls.txt" not in os.listdir(launcher)


def test_a_host_must_be_a_name(tmp_path):
    """ssh takes a name that begins with a dash for an option, which may be a command to run."""
    hosts = tmp_path / "hosts"
    for line, words in (("-oProxyCommand=touch${IFS}x slots=1", "is not a host name"), ("a slots=1", "named twice")):
        hosts.write_text(f"a slots=1\n{line}\n")
        done = run("step1.sh", PLAN=0, PREFLIGHT=1, HOSTFILE=hosts, OUTPUT=tmp_path / "out", DATA=tmp_path / "no.jsonl")
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr


def test_nodes_are_told_the_variables_that_stages_read(launcher, tmp_path):
    """As DeepSpeed's launcher exports them there; the user's own lines win, and secrets stay here."""
    (tmp_path / ".deepspeed_env").write_text("\nHF_HOME=/scratch/hf\nHF_TOKEN=mine")
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    odd = "a \"b\" $HOME `id` \\ 'c'"
    given = {
        "HF_HOME": "/home/hf",
        "HF_TOKEN": "hf_x",
        "WANDB_API_KEY": "w",
        "WANDB_PROJECT": odd,
        "NCCL_DEBUG": "WARN",
    }
    same = {"path": path_with(launcher), "HOSTFILE": hosts, "HOME": tmp_path, "OUTPUT": tmp_path / "out"}
    assert run("step1.sh", **same, **given, NUM_GPUS="", GLOO_SOCKET_IFNAME="a\nb").returncode == 0

    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    for line in (tmp_path / "out/.deepspeed_env").read_text().splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {name}={value}; " for name, value in runner.exports.items())
    told = subprocess.run(["env", "-i", "bash", "-c", f"{exports} env -0"], capture_output=True, text=True).stdout
    told = dict(line.split("=", 1) for line in told.split("\0") if line)
    expected = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "HF_HOME": "/scratch/hf"}
    expected |= {"HF_TOKEN": "mine", "WANDB_PROJECT": odd, "NCCL_DEBUG": "WARN"}
    assert {name: told.get(name) for name in expected} == expected
    assert not {"WANDB_API_KEY", "GLOO_SOCKET_IFNAME"} & set(told)

    # A file that the user names is the user's.
    own = tmp_path / "own.env"
    own.write_text("NCCL_DEBUG=INFO\n")
    (tmp_path / "out/.deepspeed_env").unlink()
    assert run("step1.sh", **same, NUM_GPUS="", DS_ENV_FILE=own).returncode == 0
    assert own.read_text() == "NCCL_DEBUG=INFO\n"
    assert not (tmp_path / "out/.deepspeed_env").exists()


def test_finished_stage_is_skipped_and_other_settings_are_refused(launcher, tmp_path):
    output = tmp_path / "out"
    path = path_with(launcher)
    assert run("step2.sh", path=path, OUTPUT=output).returncode == 0
    (output / "step2_discriminator" / "results.json").write_text("{}")
    # Moved elsewhere and on other GPUs: still the same stage.
    moved = output.rename(tmp_path / "moved")
    skipped = run("step2.sh", path=path, OUTPUT=moved, NUM_GPUS=2, MASTER_PORT=29501)
    assert skipped.returncode == 0
    assert "step2_discriminator: complete, skipped" in skipped.stdout
    refused = run("step2.sh", path=path, OUTPUT=moved, SEED=2)
    assert refused.returncode == 2
    assert "was made with other settings" in refused.stderr
    assert "--seed 2" in refused.stderr
    assert len((launcher / "calls.txt").read_text().splitlines()) == 1


def test_finished_labelling_stays_so_when_a_later_one_needs_more_money(launcher, tmp_path):
    """run_iterated.sh labels in every round: a larger LABEL_MAX_USD, or another key, changes none of the old labels."""
    folder, path = tmp_path / "labeling", path_with(launcher)
    assert run("label.sh", path=path, OUTPUT=tmp_path, DATA=str(tmp_path / "absent.jsonl")).returncode == 2
    (folder / "run.json").write_text('{"complete": true}')
    more = {"LABEL_MAX_USD": 2000, "API_KEY_ENV": "OTHER_KEY", "LABEL_BATCH": 1, "LABEL_PRICE": "1,1"}
    more |= {"LABEL_MODEL": "gpt-6-luna", "LABEL_BASE_URL": "http://127.0.0.1:1/v1"}
    same = {"OUTPUT": tmp_path, "DATA": str(tmp_path / "absent.jsonl")}
    assert f"{folder}: complete, skipped" in run("label.sh", path=path, **same, **more).stdout
    assert "complete, skipped" in run("label.sh", path=path, **same, LABEL_MAX_USD="").stdout, "it asks"
    refused = run("label.sh", path=path, **same, LABEL_MODEL="other")
    assert (refused.returncode, "was made with other settings" in refused.stderr) == (2, True)


def test_labelling_is_skipped_only_when_complete(tmp_path):
    folder = tmp_path / "labeling"
    folder.mkdir()
    (folder / "run.json").write_text('{"complete": true}')
    done = run("label.sh", OUTPUT=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"{folder}: complete, skipped")
    (folder / "run.json").write_text('{"complete": false}')
    # Now the real program runs, and says what it misses.
    done = run("label.sh", OUTPUT=tmp_path, DATA=str(tmp_path / "absent.jsonl"))
    assert done.returncode == 2
    assert "absent.jsonl" in (folder / "training.log").read_text()


def test_a_failing_stage_ends_the_recipe(launcher, tmp_path):
    """run_7b.sh's stages behind a preflight that finds nothing, on small real inputs."""
    done = run(
        "step1.sh", path=path_with(launcher), OUTPUT=tmp_path / "out", STATUS=3, LABEL_BASE_URL="http://127.0.0.1:9/v1"
    )
    assert done.returncode == 3
    chain = "source training_scripts/recipe.sh; prepare; train; echo reached the end"
    environment = os.environ | {"PATH": path_with(launcher), "OUTPUT": str(tmp_path / "out"), "STATUS": "3"}
    environment["PREFLIGHT"] = "0"
    done = subprocess.run(["bash", "-c", chain], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 3
    assert "reached the end" not in done.stdout
    assert not (tmp_path / "out" / "labeling").exists()


# ---- setup.sh --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare_machine(tmp_path):
    """A copy of the project's setup, and a PATH whose Python is real but has no package; its pip is a stand-in."""
    project, programs = tmp_path / "project", tmp_path / "bin"
    (project / "training_scripts").mkdir(parents=True)
    programs.mkdir()
    scripts = (f"training_scripts/{name}.sh" for name in ("setup", "recipe", "run_7b"))
    for name in ("requirements.txt", "constraints.txt", "pyproject.toml", *scripts):
        shutil.copy(ROOT / name, project / name)
    shutil.copytree(ROOT / "deepspeed_chat_tlcr", project / "deepspeed_chat_tlcr", ignore=shutil.ignore_patterns("__*"))
    shutil.copytree(ROOT / "labeling", project / "labeling", ignore=shutil.ignore_patterns("__*"))
    stand_in = f"""#!/usr/bin/env bash
# Python without packages, which notes what pip was asked for instead of doing it.
case "$1 $2" in
  "-m venv") mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" && cp "$0" "${{@: -1}}/bin/python3" ;;
  "-m pip") echo "$PWD $*" >>"{tmp_path}/pip.txt"; exit ${{PIP_ENDS_WITH:-0}} ;;
  *) exec {sys.executable} -S "$@" ;;
esac
"""
    for name in ("python3", "c++"):
        (programs / name).write_text(stand_in)
        (programs / name).chmod(0o755)
    return project, f"{programs}{os.pathsep}{os.defpath}"


def test_setup_installs_once_and_again_when_the_requirements_change(bare_machine, tmp_path):
    project, path = bare_machine
    setup = project / "training_scripts" / "setup.sh"
    done = run(setup, path=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Python: {project}/.venv/bin/python3"
    calls = (tmp_path / "pip.txt").read_text().splitlines()
    # Constraints are the versions tested on 3.11 and later.
    constrained = [] if sys.version_info < (3, 11) else ["-c", f"{project}/constraints.txt"]
    asked = shlex.split(calls[0])
    assert asked[0] == str(project)
    assert asked[-len(constrained) - 2 :] == [*constrained, "-e", ".[dev]"]
    assert run(setup, path=path).returncode == 0
    assert len((tmp_path / "pip.txt").read_text().splitlines()) == 1, "nothing had changed"
    with (project / "requirements.txt").open("a") as file:
        file.write("tqdm>=4.68\n")
    assert run(setup, path=path).returncode == 0
    assert len((tmp_path / "pip.txt").read_text().splitlines()) == 2


def test_packages_that_cannot_be_had_are_told_with_all_else_that_is_missing(bare_machine, tmp_path):
    project, path = bare_machine
    offline = {"PIP_ENDS_WITH": 1, "HF_ENDPOINT": "http://127.0.0.1:9", "OUTPUT": tmp_path / "out"}
    done = run(project / "training_scripts" / "run_7b.sh", path=path, **offline)
    assert done.returncode == 2
    assert "the Python package torch is not installed" in done.stderr
    assert "OPENAI_API_KEY, the variable with the API key for gpt-6-luna, is not set" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the packages cannot be installed")
    assert not (project / ".venv" / ".installed-from").exists()


def test_setup_uses_an_environment_that_has_the_packages():
    done = run("setup.sh")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f"Python: {Path(sys.executable).parent}/python3"


def test_setup_names_what_is_missing(bare_machine, tmp_path):
    project, path = bare_machine
    setup = project / "training_scripts" / "setup.sh"
    done = run(setup, path=path, CXX="no-such-compiler")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no C++ compiler (no-such-compiler)" in done.stderr
    # A machine whose only Pythons are too old.
    old = tmp_path / "old"
    old.mkdir()
    for name in ("python3", "python3.10", "python3.11", "python3.12", "python"):
        (old / name).write_text("#!/usr/bin/env bash\nexit 1\n")
        (old / name).chmod(0o755)
    done = run(setup, path=f"{old}{os.pathsep}{path}")
    assert done.returncode == 2
    assert "no Python 3.10, 3.11 or 3.12 found on PATH" in done.stderr
    assert not (project / ".venv").exists()


# ---- preflight -------------------------------------------------------------------------------------------------------


def problems(done: subprocess.CompletedProcess) -> list[str]:
    return re.findall(r"^ +\d+\. (.*)\n +-> .+$", done.stderr, flags=re.MULTILINE)


def test_preflight_lists_everything_at_once(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        done = run(
            "run_7b.sh",
            tmp_path / "out",
            MODEL=tmp_path / "no-model",
            DATA=tmp_path / "absent.jsonl",
            DS_ACCELERATOR=None,
            CUDA_VISIBLE_DEVICES="",
            MASTER_PORT=taken.getsockname()[1],
            PPO_BATCH_SIZE=3,
            DECODE_BATCH_SIZE=24,
            API_KEY_ENV="MY_KEY",
            MY_KEY="",
        )
    assert done.returncode == 2
    found = problems(done)
    for expected in (
        "no GPU was found, but NUM_GPUS=8",
        "MASTER_PORT=",
        "GENERATION_BATCH_SIZE=16 is not a multiple of PPO_BATCH_SIZE=3",
        "DECODE_BATCH_SIZE=24 is not a multiple of GENERATION_BATCH_SIZE=16",
        "MY_KEY, the variable with the API key",
        "no-model",
        "absent.jsonl",
    ):
        assert len([problem for problem in found if expected in problem]) == 1, done.stderr
    assert f"preflight: {len(found)} problem(s)" in done.stderr
    assert not (tmp_path / "out").exists(), "nothing was started"


class _Models(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    """A labelling endpoint on this machine that wants a key."""
    server = HTTPServer(("127.0.0.1", 0), _Models)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def preflight(tiny, tmp_path, monkeypatch, capsys):
    """Runs the preflight on inputs that are all there, but for the changes; returns status, output and problems."""

    def check(**changes) -> tuple[int, str, list[str]]:
        sizes = dict.fromkeys(("sft_batch_size", "discriminator_batch_size", "generation_batch_size"), 2)
        inputs = {"model": tiny / "model", "data": tiny / "data.jsonl", "output": tmp_path / "out"}
        own = {
            "num_gpus": 1,
            "master_port": int(free_port()),
            "dtype": "fp32",
            "ppo_batch_size": 2,
            "label_base_url": "",
        }
        settings = PAPER | sizes | inputs | own | changes
        settings["revisions"] = changes.get("revisions", settings["output"] / "labeling" / "revisions.jsonl")
        for name, value in settings.items():
            monkeypatch.setenv(name.upper(), str(int(value)) if isinstance(value, bool) else str(value))
        status = 0
        try:
            main([])
        except SystemExit as end:
            status = end.code
        shown = capsys.readouterr()
        return status, shown.out + shown.err, re.findall(r"^ +\d+\. (.*)\n +-> .+$", shown.err, flags=re.MULTILINE)

    monkeypatch.setenv("PATH", path_with(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    return check


def test_preflight_passes_where_nothing_is_missing(preflight, endpoint):
    status, output, found = preflight(label_base_url=endpoint)
    assert (status, found) == (0, [])
    assert "nothing stands in the way" in output


def test_preflight_never_shows_the_key(preflight):
    status, output, found = preflight(model="nowhere")
    assert (status, len(found)) == (2, 1)
    assert "sk-secret" not in output


def test_preflight_asks_the_endpoint_for_the_reviser(preflight):
    """Before SFT begins: a model that is gone, several to choose from, one whose price nobody knows, all well."""
    models = {"reviser": {"shutdown_date": None}, "other": {"shutdown_date": "2020-01-01"}}
    with fault_server(models=json.dumps(models)) as url:
        assert preflight(label_base_url=url, label_model="reviser")[2] == []
        for model, sentence in (
            ("gone", "the endpoint has no model 'gone'"),
            ("other", "other was shut down on 2020-01-01"),
            ("", "LABEL_MODEL is empty, and"),
        ):
            status, _, (problem,) = preflight(label_base_url=url, label_model=model)
            assert status == 2
            assert sentence in problem
    assert "LABEL_BASE_URL" in preflight(label_base_url="127.0.0.1:8000/v1")[2][0]


def test_a_password_in_an_address_is_in_no_log(tmp_path):
    address = "http://user:pass-word-1@127.0.0.1:9/v1?code=query-secret"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in preferences(8)))
    same = {"OUTPUT": tmp_path / "out", "DATA": str(tmp_path / "pairs.jsonl"), "LABEL_BASE_URL": address}
    for plan in (1, 0):
        done = run("label.sh", **same, PLAN=plan)
        for text in (done.stdout, done.stderr, *(file.read_text() for file in tmp_path.rglob("*") if file.is_file())):
            assert "pass-word-1" not in text
            assert "query-secret" not in text
    assert "SECRET@127.0.0.1:9/v1" in (tmp_path / "out" / "labeling" / "training.log").read_text()


def test_preflight_of_each_input(preflight, tiny, tmp_path, monkeypatch):
    nobody = free_port()
    no_eos, no_weights = tmp_path / "no_eos", tmp_path / "no_weights"
    shutil.copytree(tiny / "model", no_eos)
    config = json.loads((no_eos / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (no_eos / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copytree(tiny / "model", no_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "file").touch()

    monkeypatch.setenv("CXX", "no-such-compiler")
    _, _, found = preflight(
        label_base_url=f"http://127.0.0.1:{nobody}/v1",
        model=no_eos,
        data=write_jsonl(tmp_path / "few.jsonl", preferences(8)),
        dtype="fp16",
        output=tmp_path / "file" / "out",
    )
    expected = (
        "nothing answers there",
        "has no EOS token",
        "the SFT part of the data (1 of 7 records at 2,4,4) does not fill one batch of 2",
        "DTYPE=fp16",
        "is not a writable folder",
        "no C++ compiler (no-such-compiler)",
    )
    for text in expected:
        assert len([problem for problem in found if text in problem]) == 1, (text, found)
    assert len(found) == len(expected)

    monkeypatch.delenv("CXX")
    _, _, found = preflight(model=no_weights, revisions=tmp_path / "absent.jsonl")
    assert len(found) == 2
    assert any("its weights are neither here" in problem for problem in found)
    assert any("REVISIONS=" in problem for problem in found)


def test_preflight_weighs_memory_and_disk(preflight, tiny, tmp_path):
    """A model too large for any machine, known by its config alone; what is finished needs no room any more."""
    large = tmp_path / "large"
    shutil.copytree(tiny / "model", large)
    config = json.loads((large / "config.json").read_text())
    config |= {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 512, "head_dim": 32768}
    (large / "config.json").write_text(json.dumps(config))
    _, _, found = preflight(model=large)
    assert [problem.split(" needs ")[0] for problem in found if "this machine's memory" in problem] == list(STAGES)
    assert len([problem for problem in found if "GiB free, the run writes up to" in problem]) == 1
    for stage in STAGES:
        (tmp_path / "out" / stage).mkdir(parents=True)
        (tmp_path / "out" / stage / "results.json").write_text("{}")
    assert preflight(model=large)[2] == []


def test_package_problems(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# comment\npytest>=8\npytest>=999.1 # too new\nno-such-package-here>=1\n")
    found = [problem.found for problem in package_problems(requirements, ["ruff", "nor-this"])]
    assert [text.split(",")[0].split(" is ")[0].split(" needed")[0] for text in found] == [
        f"pytest {pytest.__version__}",
        "the Python package no-such-package-here",
        "the Python package nor-this",
    ]
    assert "999.1 or newer" in found[0]


# ---- the reviser's server in run_tiny.sh -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["finished", "interrupted"])
def test_background_server_ends_with_its_script(tmp_path, how):
    """The lines of run_tiny.sh that start and end the reviser, with the real server."""
    text = (SCRIPTS / "run_tiny.sh").read_text()
    lines = text[text.index("# The testbed's reviser") : text.index("\ntrain\n")]
    script = tmp_path / "serve.sh"
    script.write_text(
        f'source {SCRIPTS}/recipe.sh; prepare\n{lines}\necho "pid $! url $LABEL_BASE_URL"\n'
        + ("exit 5" if how == "finished" else "sleep 60 & wait $!")
    )
    own = str(Path(sys.executable).parent)
    environment = os.environ | {
        "OUTPUT": str(tmp_path),
        "LABEL_MODEL": "oracle-reviser",
        "TESTBED_WORLD": "2",
        "PATH": f"{own}{os.pathsep}{os.environ['PATH']}",
    }
    process = subprocess.Popen(["bash", script], env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    line = next(line for line in process.stdout if line.startswith("pid"))
    server, url = int(line.split()[1]), line.split()[3]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", url)
    if how == "interrupted":
        os.kill(server, 0)
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=patience(30)) == (5 if how == "finished" else -signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


@pytest.mark.parametrize("stages", ["../tests/evil", "step1 ../../tmp/evil", "run_tiny", "step1;id"])
def test_a_stage_is_one_of_the_recipes(tmp_path, stages):
    done = run("run_7b.sh", tmp_path / "out", STAGES=stages, PLAN=1)
    assert done.returncode == 2
    assert "error: STAGES has no stage" in done.stderr
    assert "known: step1 label step2" in done.stderr
    assert done.stdout == ""


# ---- a script that is told to end ------------------------------------------------------------------------------------


def test_sigterm_ends_the_stage_with_its_script(tmp_path):
    """Script calls label.sh calls labelling, which waits for an endpoint that never answers: it stops and says so."""
    data = write_jsonl(tmp_path / "pairs.jsonl", preferences(40))
    script = tmp_path / "outer.sh"
    script.write_text(f"source {SCRIPTS}/recipe.sh; prepare; attended bash {SCRIPTS}/label.sh --timeout 2")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OUTPUT": str(tmp_path / "out"),
            "DATA": str(data),
            "LABEL_MODEL": "nobody",
            "LABEL_MAX_USD": "",
            "PREFLIGHT": "0",
            "LABEL_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/v1",
        }
        process = subprocess.Popen(["bash", script], env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        call, _ = silent.accept()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=patience(30)) == -signal.SIGTERM
        # The pipe ends when nothing that the script started is left.
        assert "the same command continues" in process.communicate(timeout=patience(30))[0]
        call.close()
    assert "the same command continues" in (tmp_path / "out" / "labeling" / "training.log").read_text()


def test_sigterm_at_the_very_start_leaves_nothing_behind(tmp_path):
    """As the first process starts, and as that starts others in its turn; what the script does at its end is done."""
    script, ended = tmp_path / "script.sh", tmp_path / "ended"
    body = "while :; do sleep 30 & sleep 0.01; done"  # a launcher that goes on starting processes
    script.write_text(
        f"source {SCRIPTS}/recipe.sh\ntrap 'touch {ended}' EXIT\necho starting; attended bash -c {shlex.quote(body)}\n"
    )
    for delay in (0, 0, 0, 0.002, 0.01, 0.05, 0.3):
        to = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "start_new_session": True}
        process = subprocess.Popen(["bash", script], **to)
        assert process.stdout.readline() == "starting\n"
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=patience(30)) == -signal.SIGTERM
        process.communicate(timeout=patience(20))  # the pipe ends when nothing that the script started is left
        assert ended.is_file()
        ended.unlink()


# ---- the whole of it -------------------------------------------------------------------------------------------------


def test_run_tiny_end_to_end(tmp_path):
    """Every stage through its real entry point, on a small testbed; then once more, from what is there.

    What the policy learns in one update is not the matter here.
    """
    output = tmp_path / "run"
    sizes = {"TESTBED_PAIRS": 320, "TESTBED_EVAL_PAIRS": 64, "TESTBED_PROMPTS": 8, "TESTBED_DOCUMENTS": 160}
    sizes |= {"MAX_ANSWER_LEN": 24, "NUM_GPUS": 1}
    done = run("run_tiny.sh", output, SEED=3, timeout=600, **sizes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((output / "results.json").read_text())
    for policy in ("sft", "tlcr", "sft_best", "tlcr_best"):
        assert 1 <= results[policy]["true_score"] <= 10
        assert 0 < results[policy]["response_length"] <= 24
        assert 0 <= results[policy]["repeats"] <= 1
    assert results["tlcr"]["kl"] != 0
    for policy in ("sft", "tlcr"):
        tried = results["temperatures"][policy]
        assert tried[f"{results[policy + '_best']['temperature']:g}"] == max(tried.values())
    best = results["tlcr_best"]["true_score"] - results["sft_best"]["true_score"]
    assert results["tlcr_over_sft"]["best"]["mean"] == pytest.approx(best)
    assert 0 <= results["discriminator"]["edited_accuracy"] <= 1
    assert set(results["seconds"]) == {"base", "sft", "labeling", "discriminator", "ppo"}
    assert "<html" in (output / "report.html").read_text()[:500]
    stages = ("data", "base", "step1_sft", "labeling", "step2_discriminator", "step3_ppo_tlcr", "evaluation")
    # Each log begins with the command; behind it stands what the stage said, as it did on the terminal.
    said = {
        "step1_sft": "SFT: held-out loss",
        "labeling": "estimate:",
        "step2_discriminator": "held-out edited tokens accuracy",
        "step3_ppo_tlcr": "reward/token",
        "evaluation": "report:",
    }
    for stage in stages:
        log = (output / stage / "training.log").read_text()
        assert ".py" in log
        assert said.get(stage, "") in log
        assert said.get(stage, "") in done.stdout
    assert "SFT, best T" in done.stdout, "the table"
    revised = [json.loads(line) for line in (output / "labeling" / "revisions.jsonl").read_text().splitlines()]
    assert len(revised) > 100
    assert all(record["model"] == "oracle-reviser" for record in revised)
    assert not (output / "reviser.port").exists()

    again = run("run_tiny.sh", output, SEED=3, PREFLIGHT=0, **sizes)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines() == [f"{output}/{stage}: complete, skipped" for stage in stages]
