"""For vLLM servers: weights come from step 3 of deepspeed-chat-tlcr, over a process group or a shared disk.

It runs in vLLM's environment and imports nothing of the trainer's; the trainer imports no vLLM. Read at vLLM 0.32.
"""

import datetime
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class Init(WeightTransferInitInfo):
    """Who trains what: ``run`` names the trainer, ``model`` its config's values, ``dtype`` its weights' type.

    ``world_size`` 0: weights come in files. Else the server's workers are ``first_rank`` and following of a process
    group whose store is at ``host:port``, rank 0 of which is the trainer.
    """

    run: str
    torch: str
    dtype: str
    model: dict[str, Any]
    host: str = ""
    port: int = 0
    first_rank: int = 1
    world_size: int = 0
    seconds: float = 600.0


@dataclass
class Update(WeightTransferUpdateInfo):
    """Checkpoint names of all weights in the order in which they come; or the files that hold them."""

    run: str
    names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class TrainedWeights(WeightTransferEngine):
    """Loads what the trainer sends with the model's own ``load_weights``, so that tensor parallelism is vLLM's."""

    init_info_cls, update_info_cls = Init, Update
    run, store, group = "", None, None

    def init_transfer_engine(self, info: Init) -> None:
        self._compare(info)
        if self.run != info.run and self._trainer_lives():
            raise ValueError("another trainer uses this server; start one of your own, or end the other run")
        self.run, self.store, self.group = info.run, None, None
        if not info.world_size:
            return
        limit = datetime.timedelta(seconds=info.seconds)
        parallel = self.parallel_config
        rank = info.first_rank + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.store = dist.TCPStore(info.host, info.port, None, False, limit)
        store = dist.PrefixStore("weights", self.store)
        if self.device.type == "cpu":
            self.group = dist.ProcessGroupGloo(store, rank, info.world_size, limit)
            return
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        self.group = dist.ProcessGroupNCCL(store, rank, info.world_size, options)

    def _compare(self, info: Init) -> None:
        """Raise ``ValueError`` that names what the trainer has otherwise."""
        own = torch.__version__.split("+")[0]
        if info.torch.split("+")[0] != own:
            raise ValueError(f"the trainer has torch {info.torch}, the server {own}")
        if info.dtype != str(self.model_config.dtype).removeprefix("torch."):
            raise ValueError(f"the trainer's weights are {info.dtype}, the server's {self.model_config.dtype}")
        config = self.model_config.hf_text_config
        for name, value in info.model.items():
            if (found := getattr(config, name, value)) != value:
                raise ValueError(f"another model: {name} is {value} in the trainer, {found} in the server")

    def _trainer_lives(self) -> bool:
        if self.store is None:
            return False
        try:
            self.store.check(["weights"])
        except RuntimeError:  # its store went with it
            return False
        return True

    def start_weight_update(self) -> None:
        """Nothing yet: the model is not touched before its weights are at hand."""

    def receive_weights(self, info: Update) -> None:
        if info.run != self.run:
            raise ValueError("another trainer has taken this server since")
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, "pt", str(self.device))) for path in info.files]
            initialize_layerwise_reload(self.model)
            weights = self._of_files(files) if files else self._of_group(info)
            loaded = self.model.load_weights(weights)
        own = {name for name, _ in self.model.named_parameters()}
        if getattr(self.model_config.hf_text_config, "tie_word_embeddings", False):
            own.discard("lm_head.weight")  # the embedding, which was sent
        if loaded is not None and (left := own - set(loaded)):
            raise ValueError(f"the trainer sent no {min(left)} (and {len(left) - 1} others)")

    def _of_files(self, files: list) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, file.get_tensor(name)) for file in files for name in file.keys())  # noqa: SIM118 (no dict)

    def _of_group(self, info: Update) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in zip(info.names, info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=self.model_config.dtype, device=self.device)
            self.group.broadcast([tensor], dist.BroadcastOptions()).wait()  # from rank 0
            yield name, tensor

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        # On a CPU the output layer computes with a packed copy of its weight, which a tied one's reload leaves as it
        # was: answers would come from the old head without a word.
        head = getattr(self.model, "lm_head", None)
        if hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        self.store = self.group = None


def register() -> None:
    """vLLM calls it in each of its processes."""
    if "tlcr" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("tlcr", TrainedWeights)
