"""Models of every stored kind, placements of them, and expert hosts in this process."""

import copy

import torch
from factories import tiny_model

from cluster.dispatch_batch import RowRules
from cluster.expert_host import ExpertHost
from cluster.expert_store import ExpertStore, slice_experts
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.remote_experts import Dispatcher, DispatchPlan, RemoteExperts
from cluster.topology import logical_devices
from cluster.transport.codec import decode, encode
from cluster.transport.frames import DispatchFrame
from cluster.transport.header import FrameLimits
from cluster.transport.links import Answer
from cluster.transport.meter import TrafficMeter
from cluster.transport.row_format import Combine
from moe_bitnet.checkpoint.pack import model_layout, pack_model
from moe_bitnet.dispatch import sort_by_expert
from moe_bitnet.errors import ClusterError, HostDownError
from moe_bitnet.quantization import quantize_activation

TERNARY_KINDS = ("2bit", "base3", "latent")
FLOAT_KINDS = ("float32", "float16")
KINDS = (*TERNARY_KINDS, *FLOAT_KINDS)
EXACT_RECIPES = {
    "squared_relu, odd": {"activation": "squared_relu", "intermediate_size": 7},
    "swiglu, odd": {"activation": "swiglu", "intermediate_size": 33},
}
EXACT = Combine("rows", "float32")
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


def store_of(model, usable_bytes=10**9, device_name="device-0"):
    """An empty store for a model's experts."""
    return ExpertStore(device_name, usable_bytes, model.config, model_layout(model))


def host_for(model, expert_ids, layer_index=0, usable_bytes=10**9, epoch=0):
    """A host with some experts of one layer."""
    store = store_of(model, usable_bytes)
    store.load(slice_experts(experts_of(model, layer_index), layer_index, expert_ids))
    return ExpertHost(store, epoch)


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


def frame_for(
    hidden_states, expert_indices, expert_ids, row_format, layer_index=0, epoch=0, weights=None, combine=EXACT
):
    """The plain twin of what the remote executor sends; returns the frame and the slot of each pair."""
    here = [[expert_id for expert_id in choices if expert_id in expert_ids] for choices in expert_indices.tolist()]
    tokens = [token for token, experts in enumerate(here) if experts]
    top_k = expert_indices.shape[1]
    flat = expert_indices.flatten().tolist()
    slots = [slot for slot, expert_id in enumerate(flat) if expert_id in expert_ids]
    rows, scales = hidden_states[tokens], None
    if row_format == "int8":
        rows, scales = quantize_activation(rows)
    weights = torch.ones(len(hidden_states), top_k) if weights is None else weights
    frame = DispatchFrame(
        layer_index,
        epoch,
        rows,
        scales,
        torch.tensor([flat[slot] for slot in slots], dtype=torch.int64),
        torch.tensor([len(here[token]) for token in tokens], dtype=torch.int64),
        weights.flatten()[slots] if combine.mode == "partial_sums" else None,
        combine,
    )
    return frame, slots


def place(device_of_expert, num_devices, expert_bytes=1, home_bytes=0, memory_bytes=10**9):
    """A problem and a placement of it on equal devices, all of them in use."""
    topology = logical_devices(num_devices, memory_bytes)
    problem = PlacementProblem(len(device_of_expert), len(device_of_expert[0]), expert_bytes, home_bytes, topology)
    return problem, Placement.for_problem(problem, [device.name for device in topology.devices], device_of_expert)


class LocalLinks:
    """Reaches hosts in this process, as ``HostLinks`` does; keeps what it was sent.

    Args:
        hosts: device name → ExpertHost.
    """

    def __init__(self, hosts):
        self.hosts = dict(hosts)
        self.frames = []  # (device name, frame as bytes)
        self.log = []
        self.down = set()
        self.failures = {}  # device name → function of the answer's bytes; may raise

    def set_addresses(self, addresses):
        self.log.append("set_addresses")

    def is_up(self, name):
        return name in self.hosts and name not in self.down

    def is_encrypted(self, name):
        return False

    def send(self, name, frame):
        self.frames.append((name, encode(frame, len(self.frames) + 1)))
        self.log.append("send")
        return len(self.frames)

    def wait(self, requests):
        """Answer in the reverse order of the requests, which no caller may depend on."""
        for name, request_id in reversed(requests.items()):
            self.log.append("receive")
            yield self._answer(name, self.frames[request_id - 1][1])

    def _answer(self, name, frame):
        try:
            answer = self.hosts[name].answer(frame)
            answer = self.failures.get(name, lambda each: each)(answer)
            return Answer(name, decode(answer, FrameLimits()).frame)
        except HostDownError as error:
            self.down.add(name)
            return Answer(name, None, error)
        except ClusterError as error:
            return Answer(name, None, error)


def start_local_hosts(model, placement, epoch=0):
    """One host for each device of a placement but the home, loaded; returns links to them, and the home's store."""
    stores = [store_of(model, device_name=name) for name in placement.device_names]
    for device_index, store in enumerate(stores):
        for layer_index in range(placement.num_layers):
            expert_ids = placement.expert_ids_on(device_index, layer_index)
            if expert_ids:
                store.load(slice_experts(experts_of(model, layer_index), layer_index, expert_ids))
    return LocalLinks({store.device_name: ExpertHost(store, epoch) for store in stores[1:]}), stores[0]


def distribute(model, placement, rules=None, recover=None, epoch=0):
    """A copy of a model with its experts on hosts in this process; also the dispatcher, the links and the meter."""
    links, home = start_local_hosts(model, placement, epoch)
    meter = TrafficMeter()
    plan = DispatchPlan.of(placement, epoch)
    dispatcher = Dispatcher(plan, links, home, meter, rules or RowRules(combine=EXACT), recover)
    remote = copy.deepcopy(model)
    remote.replace_experts([RemoteExperts(index, dispatcher) for index in range(placement.num_layers)])
    return remote, dispatcher, links, meter
