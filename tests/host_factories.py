"""Models of every stored kind, placements of them, and expert hosts in this process."""

import torch
from factories import tiny_model

from cluster.expert_host import ExpertHost, slice_experts
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.topology import logical_devices
from cluster.transport.frames import DispatchFrame
from moe_bitnet.checkpoint.pack import model_layout, pack_model
from moe_bitnet.dispatch import sort_by_expert
from moe_bitnet.quantization import quantize_activation

TERNARY_KINDS = ("2bit", "base3", "latent")
FLOAT_KINDS = ("float32", "float16")
KINDS = (*TERNARY_KINDS, *FLOAT_KINDS)
EXACT_RECIPES = {
    "squared_relu, odd": {"activation": "squared_relu", "intermediate_size": 7},
    "swiglu, odd": {"activation": "swiglu", "intermediate_size": 33},
}
EXACT_DISPATCH = {kind: "int8" if kind in TERNARY_KINDS else "float32" for kind in KINDS}


def model_of(kind, seed=0, recipe="squared_relu, odd", **changes):
    """A tiny model, by how its weights are stored."""
    changes = {**EXACT_RECIPES[recipe], **changes}
    model = tiny_model(seed, precision="float" if kind in FLOAT_KINDS else "ternary", **changes)
    if kind in ("2bit", "base3"):
        return pack_model(model, kind)
    if kind == "float16":
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.data.half()
    return model


def experts_of(model, layer_index=0):
    return model.blocks[layer_index].moe.experts


def host_for(model, expert_ids, layer_index=0, usable_bytes=10**9, **settings):
    """A host with some experts of one layer."""
    host = ExpertHost("device-0", usable_bytes, model.config, model_layout(model), **settings)
    host.load(slice_experts(experts_of(model, layer_index), layer_index, expert_ids))
    return host


def random_choices(num_tokens, num_experts, top_k, seed=0):
    """``expert_indices [T, K]``, all different within a row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]


@torch.inference_mode()
def local_rows(experts, hidden_states, expert_indices):
    """The row ``[T·K, H]`` of every (token, choice) pair as the local executor computes it, before it is weighed."""
    dispatch = sort_by_expert(expert_indices, experts.num_experts)
    rows = experts.prepare(hidden_states).take(dispatch.sorted_token_indices)
    return experts.compute(rows, dispatch.expert_offsets)[dispatch.slot_positions]


def frame_for(hidden_states, expert_indices, expert_ids, row_format, layer_index=0, epoch=0):
    """The plain twin of what the remote executor sends; returns the frame and the slot of each pair."""
    choices = enumerate(expert_indices.flatten().tolist())
    pairs = sorted((expert_id, slot) for slot, expert_id in choices if expert_id in expert_ids)
    slots = [slot for _, slot in pairs]
    token_of_pair = [slot // expert_indices.shape[1] for slot in slots]
    tokens = sorted(set(token_of_pair))
    rows, scales = hidden_states[tokens], None
    if row_format == "int8":
        rows, scales = quantize_activation(rows)
    frame = DispatchFrame(
        layer_index,
        epoch,
        rows,
        torch.tensor([expert_id for expert_id, _ in pairs], dtype=torch.int32),
        torch.tensor([tokens.index(token) for token in token_of_pair], dtype=torch.int32),
        scales,
    )
    return frame, slots


def place(device_of_expert, num_devices, expert_bytes=1, home_bytes=0, memory_bytes=10**9):
    """A problem and a placement of it on equal devices, all of them in use."""
    topology = logical_devices(num_devices, memory_bytes)
    problem = PlacementProblem(len(device_of_expert), len(device_of_expert[0]), expert_bytes, home_bytes, topology)
    return problem, Placement.for_problem(problem, [device.name for device in topology.devices], device_of_expert)


class LocalClient:
    """Reaches a host in this process; keeps the frames that it was sent.

    Args:
        host: answers.
        log: takes the names "send" and "receive" in the order of the calls.
    """

    def __init__(self, host, log=None):
        self.host = host
        self.frames = []
        self.log = [] if log is None else log

    def send(self, frame):
        self.frames.append(frame)
        self.log.append("send")

        def receive():
            self.log.append("receive")
            return self.host.answer(frame)

        return receive


def start_local_hosts(model, placement, combine="float32", epoch=0):
    """One host for each device of a placement, loaded; returns their clients."""
    log = []
    clients = []
    for device_index, name in enumerate(placement.device_names):
        host = ExpertHost(name, 10**9, model.config, model_layout(model), combine, epoch)
        for layer_index in range(placement.num_layers):
            expert_ids = placement.expert_ids_on(device_index, layer_index)
            if expert_ids:
                host.load(slice_experts(experts_of(model, layer_index), layer_index, expert_ids))
        clients.append(LocalClient(host, log))
    return clients
