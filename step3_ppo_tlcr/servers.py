"""Rollouts by vLLM servers whose weights follow the policy (``--rollout vllm``); docs/vllm.md.

Nothing of vLLM is imported: servers have an environment of their own, and ``training_scripts/vllm_plugin`` in it.
"""

import contextlib
import http.client
import json
import math
import shutil
import socket
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.errors import InputError, RunError, one_line
from deepspeed_chat_tlcr.models import load_config
from deepspeed_chat_tlcr.optim import merge_lora
from deepspeed_chat_tlcr.records import parse_json
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.turns import end_ids
from step3_ppo_tlcr.options import Options

_TOGETHER = 256  # requests on their way at a time, of one rank
_BUCKET = 64_000_000  # elements gathered and sent at a time
_FIRST_CHECKS = 3  # syncs after each of which log-probs are compared
_COMPARED = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
TOLERANCE = {"fp32": 1e-3, "bf16": 0.3, "fp16": 0.3}
"""Nats a token by which a server's log-probs may differ from the actor's own, in the mean of a check."""


class ServerError(RunError):
    """A server died, hangs, or is not what it was. All ranks raise it together, before they learn anything."""


@dataclass
class ServedBatch(RolloutBatch):
    """With the servers' log-probs of the responses' tokens, ``(B, A)``, 0 behind their ends."""

    logprobs: torch.Tensor


@dataclass(frozen=True)
class Server:
    """One address; ``seconds`` is how long it may take over one request."""

    url: str
    seconds: float

    def ask(self, path: str, body: dict[str, Any] | None = None, seconds: float | None = None) -> dict[str, Any]:
        """GET, or POST of a body. Raises ``ServerError`` naming the server and what it said."""
        request = urllib.request.Request(self.url + path, headers={"Content-Type": "application/json"})
        if body is not None:
            request.data = json.dumps(body).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # servers are near: no proxy knows them
        try:
            with opener.open(request, timeout=seconds or self.seconds) as response:
                answer = parse_json(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            if error.code in (404, 405):
                raise self.error(f"has no route {path.split('?')[0]}; start it with serve_rollouts.sh") from None
            raise self.error(f"refused {path.split('?')[0]}: {_message(error)}") from None
        except TimeoutError:
            raise self.error(f"did not answer within {seconds or self.seconds:g} s (--vllm_timeout)") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise self.error(f"did not answer within {seconds or self.seconds:g} s (--vllm_timeout)") from None
            raise self.error(f"does not answer ({reason or type(error).__name__})") from None
        if not isinstance(answer, dict):
            raise self.error(f"answered {path.split('?')[0]} with something that is no JSON object")
        return answer

    def error(self, what: str) -> ServerError:
        return ServerError(f"--vllm_server {self.url} {what}")


def _message(error: urllib.error.HTTPError) -> str:
    """What a refusal says: vLLM's ``error.message``, FastAPI's ``detail``, or the body."""
    text = error.read(4000).decode(errors="replace")
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        said = parse_json(text)
        said = said.get("error", said.get("detail", said))
        text = said.get("message", said) if isinstance(said, dict) else said
    return f"{error.code}, {one_line(text)[:500]}"


class Servers:
    """The servers of ``--vllm_server``: looked at and joined before any model loads; rank 0 sends them weights."""

    def __init__(self, options: Options, runtime: Runtime):
        """A collective. Raises ``InputError`` for a server that cannot be had or has another model or torch."""
        self.all = [Server(url.rstrip("/"), options.vllm_timeout) for url in options.vllm_server]
        run = [uuid.uuid4().hex[:12]]
        dist.broadcast_object_list(run, device=runtime.device)  # rank 0's
        self.run = run[0]
        self.folder = Path(options.vllm_weights_folder) / self.run if options.vllm_weights_folder else None
        self.pool = ThreadPoolExecutor(_TOGETHER, "vllm")
        self.runtime, self.version = runtime, ""
        self.group: Any = None  # rank 0: of itself and all workers
        try:
            agreed(lambda: self._join(options) if runtime.is_main else None)
        except ServerError as error:
            raise InputError(str(error)) from None

    def _join(self, options: Options) -> None:
        """Compare versions and sizes, and make the process group that weights go through."""
        config = load_config(options.actor_model_name_or_path).get_text_config()
        longest = options.max_prompt_seq_len + options.max_answer_seq_len
        sizes = []
        for server in self.all:
            models = server.ask("/v1/models", seconds=30).get("data")
            known = models[0].get("max_model_len") if isinstance(models, list) and models else None
            if not isinstance(known, int):
                raise server.error("is no vLLM server: /v1/models lists no model with its length")
            if known < longest:
                raise server.error(
                    f"takes {known} tokens, and --max_prompt_seq_len + --max_answer_seq_len are {longest}: "
                    "start it with a larger MAX_MODEL_LEN, or lower them"
                )
            sizes.append(int(server.ask("/get_world_size", seconds=30).get("world_size", 1)))
        model = {name: getattr(config, name) for name in _COMPARED if getattr(config, name, None) is not None}
        facts: dict[str, Any] = {"run": self.run, "torch": torch.__version__, "model": model}
        facts |= {"dtype": str(self.runtime.torch_dtype).removeprefix("torch."), "seconds": options.vllm_timeout}
        ranks = [1 + sum(sizes[:place]) for place in range(len(sizes))]
        if self.folder is None:
            limit = timedelta(seconds=options.vllm_timeout)
            store = dist.TCPStore("0.0.0.0", 0, None, True, limit, wait_for_workers=False)
            store.set("weights", "")
            facts |= {"world_size": 1 + sum(sizes), "port": store.port}
        asked = [
            self.pool.submit(
                server.ask,
                "/init_weight_transfer_engine",
                {"init_info": facts | {"first_rank": rank, "host": _address_towards(server.url)}},
            )
            for server, rank in zip(self.all, ranks, strict=True)
        ]
        if self.folder is None:
            joining = self.pool.submit(_group, self.runtime.device, store, 1 + sum(sizes), limit)
            _wait(joining.done, asked, options.vllm_timeout)
            self.group = joining.result()
        for answer in asked:
            answer.result()

    def everywhere(self, path: str, body: dict[str, Any] | None = None) -> list[Future]:
        return [self.pool.submit(server.ask, path, body) for server in self.all]

    def require_version(self) -> None:
        """Raise ``ServerError`` where a server's weights are not those of the newest sync."""
        for server, answer in zip(self.all, self.everywhere("/weight_info"), strict=True):
            found = answer.result().get("weight_version")
            if found != self.version:
                why = "was started again and has old weights" if found == "default" else "got another trainer's weights"
                raise server.error(f"{why} since; the same command continues")

    @contextlib.contextmanager
    def update(self, version: str, names: list[str], shapes: list[list[int]]) -> Iterator[Callable]:
        """Rank 0: within it, what it yields takes the weights in the order of the names; afterwards they are in use."""
        _all(self.everywhere("/pause?mode=wait&clear_cache=true", {}))
        _all(self.everywhere("/start_weight_update", {}))
        info: dict[str, Any] = {"run": self.run}
        if self.folder is None:
            info |= {"names": names, "shapes": shapes}
            asked = self.everywhere("/update_weights", {"update_info": info})
            yield lambda weights: self._broadcast(weights, asked)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            files: list[str] = []

            def write(weights: dict[str, torch.Tensor]) -> None:
                files.append(str((self.folder / f"{len(files):05}.safetensors").resolve()))
                save_file({name: weight.cpu().clone() for name, weight in weights.items()}, files[-1])

            yield write
            asked = self.everywhere("/update_weights", {"update_info": info | {"files": files}})
        _all(asked)
        _all(self.everywhere("/finish_weight_update", {"weight_version": version}))
        _all(self.everywhere("/resume", {}))
        if self.folder is not None:
            shutil.rmtree(self.folder)

    def _broadcast(self, weights: dict[str, torch.Tensor], asked: list[Future]) -> None:
        options = dist.BroadcastOptions()
        for weight in weights.values():
            work = self.group.broadcast([weight.contiguous()], options)
            _wait(work.is_completed, asked, self.all[0].seconds)
            try:
                work.wait()
            except RuntimeError:
                _all(asked)  # a server's own words, where it has any
                raise ServerError("a --vllm_server went away while weights were sent") from None


def _group(device: torch.device, store: dist.Store, world_size: int, limit: timedelta) -> Any:
    """Rank 0 of a group beside DeepSpeed's own, which the plugin's ``_group`` joins."""
    store = dist.PrefixStore("weights", store)
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, 0, world_size, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, 0, world_size, options)


def _all(answers: Sequence[Future]) -> None:
    for answer in answers:
        answer.result()


def _wait(done: Callable[[], bool], asked: Sequence[Future], seconds: float) -> None:
    """Until ``done``. Raises what a server refused meanwhile, and after ``seconds`` that none moved."""
    deadline = time.monotonic() + seconds
    while not done():
        for answer in asked:
            if answer.done() and answer.exception():
                raise answer.exception()
        if time.monotonic() > deadline:
            raise ServerError(f"the --vllm_server took no weights within {seconds:g} s (--vllm_timeout)")
        time.sleep(0.0005)


def _address_towards(url: str) -> str:
    """This machine's address as the server at a URL sees it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((parts.hostname, parts.port or 80))
        except OSError as error:
            raise ServerError(f"--vllm_server {url} cannot be reached ({error.strerror})") from None
        return probe.getsockname()[0]


def agreed(work: Callable[[], Any]) -> Any:
    """What ``work`` returns. Raises ``ServerError`` on all ranks where it does so on any; a collective."""
    result, error = None, None
    try:
        result = work()
    except ServerError as raised:
        error = str(raised)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if told := next((one for one in errors if one), None):
        raise ServerError(told)
    return result


class Flight:
    """Requests on their way to the servers; ``batch()`` waits for them, once, on all ranks together."""

    def __init__(self, collect: Callable[[], ServedBatch]):
        self.collect, self.landed = collect, None

    def batch(self) -> ServedBatch:
        if self.landed is None:
            self.landed = agreed(self.collect)
        return self.landed


class VllmRollout(RolloutEngine):
    """Token ids in, token ids and their log-probs out; each prompt is a request with a seed of its own."""

    name = "vllm"

    def __init__(self, engine: DeepSpeedEngine, tokenizer: PreTrainedTokenizerFast, servers: Servers, options: Options):
        self.engine, self.tokenizer, self.servers, self.options = engine, tokenizer, servers, options
        self.ends = end_ids(tokenizer)
        self.syncs = 0
        self.flight: Flight | None = None  # the newest

    @property
    def check_due(self) -> bool:
        """Whether log-probs are to be compared after the newest sync."""
        return self.syncs <= _FIRST_CHECKS or self.syncs % self.options.vllm_check_interval == 0

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Sample one response per prompt; temperature 0 takes the likeliest tokens. A collective."""
        return self.start(request, sampling).batch()

    def start(self, request: RolloutRequest, sampling: SamplingConfig) -> Flight:
        """The same without waiting."""
        seeds = torch.randint(2**31, (len(request.prompt_ids),)).tolist()
        masked = zip(request.prompt_ids, request.prompt_attention_mask, strict=True)
        prompts = [ids[mask > 0].tolist() for ids, mask in masked]
        servers, begin = self.servers.all, self.servers.runtime.rank
        asked = [
            self.servers.pool.submit(self._answer, servers[(begin + row) % len(servers)], prompt, sampling, seed)
            for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        self.flight = Flight(lambda: self._batch(request, [answer.result() for answer in asked]))
        return self.flight

    def _answer(
        self, server: Server, prompt: list[int], sampling: SamplingConfig, seed: int
    ) -> tuple[list[int], list[float]]:
        """Token ids of one response, its end included, and their log-probs under the distribution sampled from."""
        body = {
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": self.options.min_answer_seq_len,
            "temperature": sampling.temperature,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            # What ends a response is the trainer's to say, not the server's copy of a config.
            "ignore_eos": True,
            "stop_token_ids": list(self.ends),
        }
        body["min_tokens"] = min(body["min_tokens"], sampling.max_new_tokens)
        if sampling.temperature > 0:
            body |= {"top_p": sampling.top_p, "top_k": sampling.top_k if sampling.top_k > 0 else -1}
        answer = server.ask("/v1/completions", body)
        try:
            (choice,) = answer["choices"]
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            ended, limit = ids[-1] in self.ends, sampling.max_new_tokens
            right = len(ids) == len(logprobs) and all(map(math.isfinite, logprobs))
            right = right and (ended or len(ids) == limit) and len(ids) <= limit and not set(ids[:-1]) & set(self.ends)
        except (KeyError, TypeError, ValueError, IndexError):
            right = False
        if not right:
            raise server.error(f"gave an answer that cannot be used: {one_line(json.dumps(answer))[:300]}")
        return ids, logprobs

    def _batch(self, request: RolloutRequest, answers: list[tuple[list[int], list[float]]]) -> ServedBatch:
        self.servers.require_version()
        device, longest = request.prompt_ids.device, max(len(ids) for ids, _ in answers)
        responses = torch.full((len(answers), longest), self.tokenizer.pad_token_id)
        mask, logprobs = torch.zeros_like(responses), torch.zeros(responses.shape)
        for row, (ids, its_logprobs) in enumerate(answers):
            responses[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
            logprobs[row, : len(ids)] = torch.tensor(its_logprobs)
        return ServedBatch(
            input_ids=torch.cat([request.prompt_ids, responses.to(device)], dim=1),
            attention_mask=torch.cat([request.prompt_attention_mask, mask.to(device)], dim=1),
            response_start_idx=torch.full((len(answers),), request.prompt_ids.size(1), device=device),
            logprobs=logprobs.to(device),
        )

    def sync_weights(self, step: int) -> None:
        """Give all servers the actor's weights, LoRA merged, and have them confirm it; a collective.

        Answers on their way are waited for. Raises ``ServerError`` on all ranks, in step, whatever happens on rank 0.
        """
        if self.flight is not None:
            self.flight.batch()
        self.syncs += 1
        version = f"{self.servers.run}-{self.syncs}"
        buckets = _buckets(list(self.engine.module.named_parameters()))
        sizes = {_saved_name(n): list(getattr(p, "ds_shape", p.shape)) for bucket in buckets for n, p in bucket}
        sizes.pop("", None)
        error: ServerError | None = None
        with contextlib.ExitStack() as stack:
            send = None
            for bucket in buckets:
                with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
                    if not self.servers.runtime.is_main or error is not None:
                        continue
                    try:
                        if send is None:
                            update = self.servers.update(version, list(sizes), list(sizes.values()))
                            send = stack.enter_context(update)
                        weights = merge_lora({name: p.detach() for name, p in bucket}, self.engine.module)
                        dtype = self.servers.runtime.torch_dtype
                        send({name: weight.to(dtype) for name, weight in weights.items()})
                    except ServerError as raised:
                        error = raised
                        stack.pop_all()  # what it was to finish cannot be

            def finish() -> None:
                if error is not None:
                    raise error
                stack.close()

            agreed(finish)
        self.servers.version = version
        agreed(self.servers.require_version)


def _saved_name(name: str) -> str:
    """A parameter's name in a saved model; none for what LoRA adds, which is merged."""
    return "" if ".lora_" in name else name.replace(".base_layer.", ".")


def _buckets(parameters: list[tuple[str, torch.nn.Parameter]]) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """Parameters in order, as many at a time as ``_BUCKET`` holds; what LoRA merges into one weight stays together."""
    units: dict[str, list] = {}
    for name, parameter in parameters:
        units.setdefault(name.split(".base_layer.")[0].split(".lora_")[0], []).append((name, parameter))
    buckets: list[list] = []
    size = _BUCKET
    for unit in units.values():
        elements = sum(getattr(parameter, "ds_numel", parameter.numel()) for _, parameter in unit)
        if size + elements > _BUCKET:
            buckets.append([])
            size = 0
        buckets[-1] += unit
        size += elements
    return buckets
