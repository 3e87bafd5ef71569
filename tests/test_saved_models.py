"""What lies beside the weights of a saved model, and its way to the Hub."""

import json
import shutil

import pytest
from conftest import launch
from fake_hub import fake_hub
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, GenerationConfig

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.hub import require_repository
from deepspeed_chat_tlcr.model_card import Card, write_card
from step1_sft.main import main as sft
from step1_sft.main import parse_args
from step2_discriminator.main import main as discriminator
from step3_ppo_tlcr.main import main as ppo

BASE_CARD = "---\nlicense: other\nlicense_name: gardeners-1.0\nlicense_link: LICENSE\n---\n\n# Tiny\n"
ONE_STEP = ["--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 4, "--max_seq_len", 128]


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """The tiny model with a card and a licence, as a download from the Hub has them."""
    folder = shutil.copytree(tiny / "model", tmp_path_factory.mktemp("base") / "tiny-base")
    (folder / "README.md").write_text(BASE_CARD)
    (folder / "LICENSE.txt").write_text("Water it daily.\n")
    return folder


def test_every_stage_saves_card_licence_sampling_and_length(base, tiny, tmp_path, in_process):
    data = ["--data_path", tiny / "data.jsonl"]
    in_process(sft, "--model_name_or_path", base, *data, "--output_dir", tmp_path / "sft", *ONE_STEP)
    revisions = [*data, "--revisions", tiny / "revisions.jsonl"]
    in_process(discriminator, "--model_name_or_path", base, *revisions, "--output_dir", tmp_path / "d", *ONE_STEP)
    sampling = ["--temperature", 0.7, "--top_p", 0.9, "--top_k", 50, "--max_answer_seq_len", 6]
    sizes = ["--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4]
    in_process(
        ppo,
        *["--actor_model_name_or_path", tmp_path / "sft", "--critic_model_name_or_path", tmp_path / "d"],
        *["--reward", f"tlcr:{tmp_path / 'd'}@0.5", "--output_dir", tmp_path / "ppo"],
        *[*data, *sampling, *sizes, "--max_prompt_seq_len", 64, "--enable_test_mode", "--test_stop_step", 1],
    )
    for folder, kind in (("sft", "sft"), ("d", "step2_token"), ("ppo/actor", "ppo"), ("ppo/critic", "critic")):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert (card.data.license, card.data.license_name) == ("other", "gardeners-1.0")
        assert card.data.base_model == "tiny-base"  # SFT's base is also its policy's
        assert kind in card.data.tags
        assert (tmp_path / folder / "LICENSE.txt").read_text() == "Water it daily.\n"
        assert AutoTokenizer.from_pretrained(tmp_path / folder).model_max_length == 256  # the model's positions
        assert str(tmp_path) not in card.content  # nor any other folder of this machine
    actor = ModelCard.load(tmp_path / "ppo/actor/README.md").content
    assert "| `--temperature` | 0.7 |" in actor
    assert "| `--reward` | tlcr:d@0.5 |" in actor
    assert "`--actor_zero_stage`" not in actor  # left at its default
    results = json.loads((tmp_path / "ppo/results.json").read_text())
    assert f"| reward/per_token | {results['reward/per_token']:.5g} |" in actor
    assert "- Data: data.jsonl" in actor
    assert "- Data: revisions.jsonl" in (tmp_path / "d/README.md").read_text()
    trained = GenerationConfig.from_pretrained(tmp_path / "ppo/actor")
    assert (trained.do_sample, trained.temperature, trained.top_p, trained.top_k) == (True, 0.7, 0.9, 50)
    assert trained.max_new_tokens == 6
    assert GenerationConfig.from_pretrained(tmp_path / "sft").temperature is None


def test_an_unknown_licence_is_called_so(tiny, tmp_path):
    options = parse_args(["--model_name_or_path", str(tiny / "model"), "--data_path", "garden/roses"])
    write_card(tmp_path, Card("sft", str(tiny / "model"), options, {"eval/loss": 1.25}))
    text = (tmp_path / "README.md").read_text()
    assert "- Licence: unknown: that of the base model\n" in text
    assert "- Data: garden/roses\n" in text
    assert "| eval/loss | 1.25 |" in text


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_right"}, "HF_HUB_OFFLINE is set"),
        ({"HF_TOKEN": ""}, "set HF_TOKEN"),
        ({"HF_TOKEN": "hf_wrong"}, "Invalid user token"),
        ({"HF_TOKEN": "hf_right", "HF_ENDPOINT": "http://127.0.0.1:9"}, "127.0.0.1:9"),
    ],
)
def test_an_upload_that_cannot_work_is_refused_before_training(environment, named, base, tiny, tmp_path, monkeypatch):
    with fake_hub({}) as address:
        setting = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_TOKEN": ""} | environment
        for name, value in setting.items():
            monkeypatch.setenv(name, value)
        command = ["--model_name_or_path", base, "--data_path", tiny / "data.jsonl", "--output_dir", tmp_path / "out"]
        done = launch("step1_sft/main.py", *command, "--push_to_hub", "me/garden", check=False)
    assert done.returncode == 2
    assert "error: --push_to_hub me/garden: " in done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out/run_options.json").exists()


def test_a_name_that_is_no_repository_is_refused(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    options = parse_args(["--model_name_or_path", "m", "--push_to_hub", "a/b/c"])
    with pytest.raises(InputError, match="expected OWNER/NAME"):
        require_repository(options)


def test_a_finished_stage_is_uploaded(base, tiny, tmp_path, monkeypatch):
    trees = {}
    with fake_hub(trees) as address:
        for name, value in {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_TOKEN": "hf_right"}.items():
            monkeypatch.setenv(name, value)
        command = ["--model_name_or_path", base, "--data_path", tiny / "data.jsonl", "--output_dir", tmp_path / "out"]
        done = launch("step1_sft/main.py", *command, *ONE_STEP, "--push_to_hub", "me/garden")
        assert f"uploaded to {address}/me/garden" in done.stdout
        uploaded = trees["me/garden", "main"]
        assert {"README.md", "LICENSE.txt", "config.json", "model.safetensors", "results.json"} <= set(uploaded)
        assert not {"run_options.json", "metrics.jsonl"} & set(uploaded)
        assert uploaded["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()
        uploaded.clear()  # whoever deletes it there gets it again, without training
        again = launch("step1_sft/main.py", *command, *ONE_STEP, "--push_to_hub", "me/garden")
        assert "finished already" in again.stdout
        assert set(uploaded) >= {"model.safetensors"}
