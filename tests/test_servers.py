"""Rollouts by servers: a small fake one for odd answers, and the arithmetic of the correction by hand."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT  # noqa: F401 (sets DeepSpeed's accelerator before it is imported)
from deepspeed.runtime.rollout import SamplingConfig

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.optim import add_lora, merge_lora
from step3_ppo_tlcr.objectives import correction
from step3_ppo_tlcr.options import parse_args
from step3_ppo_tlcr.run import with_next
from step3_ppo_tlcr.servers import Server, ServerError, VllmRollout, _buckets, _saved_name

ARGUMENTS = ["--actor_model_name_or_path=A", "--critic_model_name_or_path=C", "--data_path=D", "--output_dir=O"]


def test_weights_of_tokens_by_hand():
    half, ninth = math.log(0.5), math.log(0.9)
    logprobs = torch.tensor([[half, ninth, half, 5.0]])
    sampled = torch.tensor([[math.log(0.25), math.log(0.3), math.log(0.8), -math.inf]])
    weights = correction(logprobs, sampled, torch.tensor([[1, 1, 1, 0]]), 2.0)
    assert weights.tolist() == [pytest.approx([2.0, 2.0, 0.625, 0.0])]


def options_of(*more: str):
    return parse_args([*ARGUMENTS, *more])


def test_corrected_where_numbers_are_coarse_or_old():
    servers = ("--rollout", "vllm", "--vllm_server", "http://127.0.0.1:8000")
    assert not options_of(*servers, "--dtype", "fp32").corrects_rollouts
    assert options_of(*servers, "--dtype", "bf16").corrects_rollouts
    assert options_of(*servers, "--dtype", "fp32", "--rollout_ahead", "1").corrects_rollouts
    assert options_of(*servers, "--dtype", "fp32", "--rollout_correction", "token").corrects_rollouts
    assert not options_of(*servers, "--dtype", "bf16", "--rollout_correction", "off").corrects_rollouts
    assert not options_of("--dtype", "bf16").corrects_rollouts


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--rollout vllm", "--vllm_server"),
        ("--vllm_server http://h:1", "--rollout vllm"),
        ("--rollout vllm --vllm_server h:1", "not an http address"),
        ("--rollout vllm --vllm_server http://h:1/v1", "leave /v1 out"),
        ("--rollout vllm --vllm_server http://h:1 http://h:1", "given twice"),
        ("--rollout_ahead 1", "needs --rollout vllm"),
        ("--rollout vllm --vllm_server http://h:1 --rollout_ahead 1 --rollout_correction off", "rollout_correction"),
        ("--rollout vllm --vllm_server http://h:1 --rollout_ahead 1 --algo remax", "--algo ppo"),
    ],
)
def test_options_that_cannot_be(line, said):
    with pytest.raises(InputError, match=said):
        options_of(*line.split())


def test_the_next_set_is_known_only_ahead():
    sets = [(1, ["a"]), (2, ["b"])]
    assert list(with_next(iter(sets), 0)) == [(sets[0], None), (sets[1], None)]
    assert list(with_next(iter(sets), 1)) == [(sets[0], ["b"]), (sets[1], None)]


def test_what_lora_merges_is_sent_together(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    names = {name for name, _ in model.named_parameters()}
    plain = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    add_lora(model, 2, 4.0, "q_proj", only_lora=True)
    layer = model.model.layers[0].self_attn.q_proj
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    sent = {}
    for bucket in _buckets(list(model.named_parameters())):
        sent |= merge_lora({name: parameter.detach() for name, parameter in bucket}, model)
    assert set(sent) == names == {_saved_name(name) for name, _ in model.named_parameters()} - {""}
    # B is all ones: each row of the change is alpha / rank times the sum of A's rows.
    change = 4.0 / 2 * layer.lora_A["default"].weight.sum(0).expand_as(plain)
    torch.testing.assert_close(sent["model.layers.0.self_attn.q_proj.weight"], plain + change)


@pytest.fixture
def fake():
    """A server that answers each path with what ``answers`` has for it; a number is a status with a message."""
    answers: dict = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = answers.get(self.path.split("?")[0], 404)
            body = {"error": {"message": "out of\nluck"}} if isinstance(found, int) else found
            self.send_response(found if isinstance(found, int) else 200)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Server(f"http://127.0.0.1:{server.server_port}", 5.0), answers
    server.shutdown()
    server.server_close()


def choice(ids, logprobs):
    return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logprobs}}]}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        choice([], []),
        choice([5, 1], [-0.5]),
        choice([5], [-0.5]),  # neither ended nor at the limit
        choice([1, 5, 1], [-0.5, -0.5, -0.5]),  # goes on behind an end
        choice([5, 6, 7, 8], [-0.5] * 4),  # longer than asked
        choice([5, 1], [-0.5, math.inf]),
        choice([5, 1], [-0.5, None]),
    ],
)
def test_an_odd_answer_is_one_sentence(fake, answer):
    server, answers = fake
    rollouts = VllmRollout.__new__(VllmRollout)
    rollouts.ends, rollouts.options = (1,), options_of("--rollout", "vllm", "--vllm_server", server.url)
    sampling = SamplingConfig(3)
    answers["/v1/completions"] = choice([5, 1], [-0.5, -0.25])
    assert rollouts._answer(server, [3, 4], sampling, 0) == ([5, 1], [-0.5, -0.25])
    answers["/v1/completions"] = choice([5, 6, 7], [-0.5] * 3)
    assert rollouts._answer(server, [3, 4], sampling, 0) == ([5, 6, 7], [-0.5] * 3)
    answers["/v1/completions"] = answer
    with pytest.raises(ServerError, match="cannot be used"):
        rollouts._answer(server, [3, 4], sampling, 0)


def test_refusals_name_server_and_reason(fake):
    server, answers = fake
    answers |= {"/full": 500, "/text": b"hello", "/list": [1]}
    for path, said in {
        "/none": "has no route /none; start it with serve_rollouts.sh",
        "/full": r"refused /full: 500, out of\\nluck",
        "/text": "does not answer",
        "/list": "no JSON object",
    }.items():
        with pytest.raises(ServerError, match=said) as error:
            server.ask(path)
        assert server.url in str(error.value)
    with pytest.raises(ServerError, match="does not answer"):
        Server("http://127.0.0.1:9", 5.0).ask("/v1/models")
