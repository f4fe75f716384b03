from pathlib import Path

import pytest
import torch
from factories import tiny_model

from cluster.routing.recorder import TraceRecorder
from cluster.routing.trace_file import TraceWriter, read_trace
from moe_bitnet.errors import ShapeError
from moe_bitnet.router import Routing


class Routings:
    """An executor that notes the choices it is given and returns zeros."""

    def __init__(self) -> None:
        self.seen = []

    def run(self, hidden_states, routing):
        self.seen.append(routing.expert_indices.clone())
        return torch.zeros_like(hidden_states)


class Broken:
    def run(self, hidden_states, routing):
        raise RuntimeError("host is gone")


def routing_of(num_tokens, seed=0, num_experts=5, top_k=2):
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    weights, indices = logits.topk(top_k)
    return Routing(indices, weights.softmax(dim=-1), logits)


@torch.inference_mode()
def test_a_recorded_model_computes_the_same_and_leaves_its_routing(tmp_path: Path) -> None:
    model = tiny_model()
    config = model.config
    batches = [torch.randint(config.vocab_size, (1, length)) for length in (1, 7, 3)]
    expected = [model(batch).logits for batch in batches]
    sizes = {"num_experts": config.num_experts, "num_layers": config.num_layers, "top_k": config.top_k}
    with TraceWriter(tmp_path / "trace.parquet", **sizes) as writer:
        recorder = TraceRecorder(writer.append, config.num_layers)
        model.replace_experts(recorder.wrap([block.moe.experts for block in model.blocks]))
        for batch, logits in zip(batches, expected, strict=True):
            assert torch.equal(model(batch).logits, logits)
    trace = read_trace(tmp_path / "trace.parquet")
    assert (trace.num_tokens, trace.num_layers, trace.top_k) == (11, config.num_layers, config.top_k)


def test_tokens_keep_their_order_and_layers_their_place() -> None:
    blocks: list = []
    inner = [Routings(), Routings(), Routings()]
    layers = TraceRecorder(blocks.append, 3).wrap(inner)
    for step in range(2):
        for index, layer in enumerate(layers):
            layer.run(torch.zeros(4, 6), routing_of(4, seed=10 * step + index))
    assert len(blocks) == 2
    for step, block in enumerate(blocks):
        for index in range(3):
            assert block[:, index].tolist() == inner[index].seen[step].tolist()


def test_a_step_that_fails_is_left_out_whole() -> None:
    blocks: list = []
    recorder = TraceRecorder(blocks.append, 2)
    first, _ = recorder.wrap([Routings(), Routings()])
    _, broken = recorder.wrap([Routings(), Broken()])
    first.run(torch.zeros(3, 6), routing_of(3))
    with pytest.raises(RuntimeError, match="host is gone"):
        broken.run(torch.zeros(3, 6), routing_of(3))
    assert blocks == []
    first, second = recorder.wrap([Routings(), Routings()])
    first.run(torch.zeros(2, 6), routing_of(2, seed=1))
    second.run(torch.zeros(2, 6), routing_of(2, seed=2))
    assert [block.shape for block in blocks] == [(2, 2, 2)]


def test_layers_out_of_step_are_refused() -> None:
    first, second = TraceRecorder([].append, 2).wrap([Routings(), Routings()])
    with pytest.raises(ShapeError, match="layer 1"):
        second.run(torch.zeros(2, 6), routing_of(2))
    first.run(torch.zeros(2, 6), routing_of(2))
    with pytest.raises(ShapeError, match=r"layer 1 gave choices \[3, 2\]"):
        second.run(torch.zeros(3, 6), routing_of(3))
    with pytest.raises(ShapeError, match="1 executors for 2 layers"):
        TraceRecorder([].append, 2).wrap([Routings()])
