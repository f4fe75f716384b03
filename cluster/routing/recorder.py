"""Records the routing of any run: an ``ExpertExecutor`` around each layer's own.

    recorder = TraceRecorder(writer.append, num_layers=len(model.blocks))
    model.replace_experts(recorder.wrap([block.moe.experts for block in model.blocks]))

Every layer notes its ``expert_indices`` and passes the call on; when the last layer has run, the tokens of the
step go to the sink as ``[num_tokens, num_layers, top_k]``. The results are those of the wrapped executors, bit
for bit. A step that fails on the way is left out whole.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from cluster.routing.trace import IntArray
from moe_bitnet.errors import ShapeError
from moe_bitnet.experts import ExpertExecutor
from moe_bitnet.router import Routing


class TraceRecorder:
    """Collects the routing of one step from all layers.

    Args:
        sink: takes ``[num_tokens, num_layers, top_k]`` integers after each step, such as
            :meth:`cluster.routing.trace_file.TraceWriter.append` or a list's ``append``.
        num_layers: L; layers run in order, 0 first.
    """

    def __init__(self, sink: Callable[[IntArray], None], num_layers: int) -> None:
        self._sink = sink
        self._num_layers = num_layers
        self._step: list[IntArray] = []

    def wrap(self, executors: Sequence[ExpertExecutor]) -> list["RecordingExperts"]:
        """Return one recording executor for each of ``executors``, in the order of the layers.

        Raises:
            ShapeError: not one executor a layer.
        """
        if len(executors) != self._num_layers:
            raise ShapeError(f"TraceRecorder: {len(executors)} executors for {self._num_layers} layers. Give one each.")
        return [RecordingExperts(executor, index, self) for index, executor in enumerate(executors)]

    def record(self, layer_index: int, expert_indices: Tensor) -> None:
        """Note the choices ``[T, K]`` of one layer.

        Raises:
            ShapeError: the layers of a step do not come in order, or with other tokens.
        """
        if layer_index == 0:
            self._step = []  # what a failed step left is dropped
        choices = expert_indices.detach().cpu().numpy()
        if layer_index != len(self._step) or (self._step and choices.shape != self._step[0].shape):
            raise ShapeError(
                f"TraceRecorder: layer {layer_index} gave choices {list(choices.shape)} after {len(self._step)} layers "
                f"of the same step. Run all layers in order on the same tokens, one step at a time."
            )
        self._step.append(choices)
        if len(self._step) == self._num_layers:
            step, self._step = self._step, []
            self._sink(np.stack(step, axis=1))


class RecordingExperts:
    """An ``ExpertExecutor`` that tells a recorder what it is asked for.

    Args:
        inner: runs the experts.
        layer_index: which MoE layer this is.
        recorder: where the choices go.
    """

    def __init__(self, inner: ExpertExecutor, layer_index: int, recorder: TraceRecorder) -> None:
        self._inner = inner
        self._layer_index = layer_index
        self._recorder = recorder

    def run(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Fulfil :class:`moe_bitnet.experts.ExpertExecutor`; see there."""
        output = self._inner.run(hidden_states, routing)
        self._recorder.record(self._layer_index, routing.expert_indices)
        return output
