"""An exponential moving average (EMA) of the weights, which is evaluated beside them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llm.machine.parallel import reshard
from llm.machine.world import local_shard


class Average:
    """The exponential moving average of a model's parameters, on their devices and sharded as they are.

    After t updates the decay is min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten. This
    warm-up is TensorFlow's (`tf.train.ExponentialMovingAverage` with `num_updates`).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self._parameters = dict(model.named_parameters())
        self.weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._updates = torch.zeros((), dtype=torch.int64, device=next(iter(self.weights.values())).device)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: the averaged weights, and the number of updates so far."""
        return self.weights | {"updates": self._updates}

    @torch.no_grad()
    def update(self, accepted: Tensor) -> None:
        """Move the average toward the weights. If `accepted`, a boolean on the device, is false, nothing changes."""
        accepted = accepted.to(self._updates.device)
        share = torch.clamp(9 / (10 + self._updates), min=1 - self.decay) * accepted  # 1 - decay
        averages = [local_shard(average) for average in self.weights.values()]
        weights = [local_shard(p.detach()) for p in self._parameters.values()]
        torch._foreach_lerp_(averages, weights, [share] * len(averages))
        self._updates += accepted

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the weights of the model and their average within the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        reshard(self._model)  # the root would keep its gathered weights
        for name, p in self._parameters.items():
            weights, average = local_shard(p.detach()), local_shard(self.weights[name])
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
