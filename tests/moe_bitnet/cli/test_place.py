import json
import re

import pytest

from cluster.config import ClusterConfig
from cluster.routing.synthetic import clustered_trace
from cluster.routing.trace_file import write_trace
from cluster.runtime import connect
from cluster.topology import Device, Topology
from moe_bitnet.checkpoint.native import load_model, save_model
from moe_bitnet.checkpoint.pack import pack_model
from moe_bitnet.checkpoint.sizes import model_sizes
from moe_bitnet.cli.main import main
from moe_bitnet.cli.planning.known_shapes import KNOWN_SHAPES
from moe_bitnet.cli.planning.model_bytes import kv_bytes
from moe_bitnet.cli.presets import PRESETS
from moe_bitnet.units import format_bytes

GB = 10**9

# devices and bounds, expert weights only: fp16, 2 bits, 1.6 bits
FEWEST = [
    ("mixtral-8x7b", "rtx-4090-24gb", (5, 1, 1)),
    ("mixtral-8x7b", "a100-80gb", (2, 1, 1)),
    ("qwen3-30b-a3b", "rtx-3090-24gb", (3, 1, 1)),
    ("qwen3-30b-a3b", "h100-80gb", (1, 1, 1)),
    ("olmoe-1b-7b", "l4-24gb", (1, 1, 1)),
    ("olmoe-1b-7b", "h100-80gb", (1, 1, 1)),
    ("deepseek-v3", "l4-24gb", (66, 9, 7)),
    ("deepseek-v3", "h100-80gb", (18, 3, 2)),
]


def placed(capsys, *arguments):
    """Plan with --json and return what was printed."""
    assert main(["place", "--json", *(str(argument) for argument in arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys, *arguments):
    assert main(["place", *(str(argument) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split()).partition("error: ")[2]


def plans(result, counted):
    return {plan["weights"]: plan for plan in result["plans"] if plan["counted"] == counted}


@pytest.mark.parametrize(("shape", "device", "expected"), FEWEST)
def test_published_shapes_need_the_fewest_devices_that_any_placement_could(shape, device, expected, capsys):
    result = plans(placed(capsys, "--shape", shape, "--device", device, "--shared-bits", "2bit"), "experts only")
    assert tuple(plan["num_devices"] for plan in result.values()) == expected
    assert tuple(plan["lower_bound"] for plan in result.values()) == expected
    for plan in result.values():
        assert plan["shared_bytes"] == plan["kv_bytes"] == 0
        assert (plan["report"]["uniform_bytes_per_token"] == 0) == (plan["num_devices"] == 1)


def test_everything_counts_shared_weights_and_the_cache_at_home(capsys):
    options = ("--shape", "mixtral-8x7b", "--device", "rtx-4090-24gb")
    bare = plans(placed(capsys, *options), "everything")
    full = plans(placed(capsys, *options, "--context", "32k", "--kv-format", "K8V8"), "everything")
    for weights in ("fp16", "2bit", "base3"):
        assert bare[weights]["shared_bytes"] == full[weights]["shared_bytes"] == 3_211_272_192
        assert bare[weights]["kv_bytes"] == 0
        assert 32_768 * 32 * 8 * 2 * 128 < full[weights]["kv_bytes"] < 1.1 * 32_768 * 32 * 8 * 2 * 128
    shared = [
        plans(placed(capsys, *options, "--shared-bits", bits), "everything")["2bit"]["shared_bytes"]
        for bits in ("16", "8", "base3")
    ]
    assert shared == sorted(shared, reverse=True)


def test_shared_weights_and_a_long_cache_may_need_another_device(capsys):
    shape = ("--shape", "deepseek-v3", "--device", "h100-80gb", "--layout", "base3")
    result = placed(capsys, *shape)
    assert plans(result, "everything")["base3"]["num_devices"] == 3
    small = placed(capsys, *shape, "--shared-bits", "2bit", "--context", "128k")
    assert plans(small, "everything")["base3"]["num_devices"] == 2
    assert len(small["placement"]["device_names"]) == 2


def test_the_table_shows_both_ways_of_counting(capsys):
    assert main(["place", "--shape", "mixtral-8x7b", "--device", "l4-24gb", "--devices", "2", "--context", "8k"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "experts only fp16 90.19 GB 5 > 2 5" in output
    assert "experts only 2bit 11.27 GB 1 1 0 B" in output
    cache = format_bytes(kv_bytes(KNOWN_SHAPES["mixtral-8x7b"], 8192, "FP16"))
    assert f"everything fp16 90.19 GB 3.211 GB {cache} 5 > 2 5" in output
    assert "cache of 8,192 tokens in FP16" in output
    assert "24 GB, 20 GB usable" in output
    assert "2bit, everything: 1 device, bound 1; 0 B/token if routing is uniform" in output
    assert "traced" not in output


def test_a_written_placement_is_one_of_ones_own(tmp_path, capsys):
    options = ("--shape", "deepseek-v3", "--device", "h100-80gb", "--layout", "2bit")
    out, topology = tmp_path / "placement.json", tmp_path / "topology.json"
    result = placed(capsys, *options, "--output", out, "--save-topology", topology)
    assert json.loads(out.read_text()) == result["placement"]
    for devices in (("--device", "h100-80gb"), ("--device", "h100-80gb", "--devices", 3), ("--topology", topology)):
        again = placed(capsys, "--shape", "deepseek-v3", *devices, "--placement", out)
        assert again["placement"] == result["placement"]
        own = plans(again, "own placement")["2bit"]
        assert own == {**plans(result, "everything")["2bit"], "counted": "own placement"}
    assert "device 'h100-80gb-2' is not" in fails(capsys, *options, "--devices", 2, "--placement", out)
    assert "--devices allows 2" in fails(
        capsys, "--shape", "deepseek-v3", "--topology", topology, "--devices", 2, "--placement", out
    )
    assert "placement.json" in fails(capsys, "--shape", "mixtral-8x7b", "--device", "h100-80gb", "--placement", out)


def test_an_uneven_placement_of_ones_own_has_its_own_traffic(tmp_path, capsys):
    own = tmp_path / "own.json"
    own.write_text(
        json.dumps({"device_names": ["device-1", "device-0"], "devices_of_expert": [[0] * 6 + [1] * 2] * 32})
    )
    options = ("--shape", "mixtral-8x7b", "--device-memory", "80GB", "--devices", 2)
    result = plans(placed(capsys, *options, "--placement", own), "own placement")["2bit"]
    visits = 1 - (6 * 5) / (8 * 7)  # a token visits the device that holds 2 of 8
    row = 4096 + 4 + 2 * 4096
    assert result["report"]["uniform_bytes_per_token"] == pytest.approx(32 * visits * row, rel=0.01)


def test_devices_of_a_file_may_differ(tmp_path, capsys):
    path = tmp_path / "two.json"
    Topology((Device("small", 8 * GB), Device("large", 40 * GB, 2 * GB))).to_json(path)
    result = placed(capsys, "--shape", "mixtral-8x7b", "--topology", path, "--devices", 1)
    assert result["placement"]["device_names"] == ["large"]
    fp16 = plans(result, "experts only")["fp16"]
    assert (fp16["num_devices"], fp16["fits"]) == (None, False)
    assert "have no place" in fp16["shortfall"]
    assert result["topology"] == json.loads(path.read_text())


HUGGING_FACE = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 4096,
}


def test_a_config_file_is_enough(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(HUGGING_FACE))
    result = plans(placed(capsys, "--config", path, "--device-memory", "100kB"), "experts only")
    assert result["fp16"]["expert_bytes"] == 2 * 3 * 32 * 48
    assert result["2bit"]["expert_bytes"] == 3 * 32 * 48 // 4 + 12
    assert "sliding window" in fails(capsys, "--config", path, "--device-memory", "100kB", "--context", "64")
    ours = PRESETS["tiny"].model_config(320, "ternary")
    path.write_text(json.dumps(ours.to_dict()))
    result = plans(placed(capsys, "--config", path, "--device-memory", "1MB"), "everything")
    assert result["base3"]["expert_bytes"] == model_sizes(ours, "base3").expert_bytes
    assert result["base3"]["shared_bytes"] == model_sizes(ours, "base3").home_bytes


def test_a_checkpoint_is_weighed_by_its_tensors(filled_run, tmp_path, capsys):
    packed = pack_model(load_model(filled_run.model("ternary")), "2bit")
    save_model(packed, tmp_path / "packed")
    for path in (tmp_path / "packed", filled_run.path):
        result = plans(placed(capsys, "--model", path, "--device-memory", "1MB"), "everything")
        sizes = model_sizes(packed.config, "2bit")
        assert (result["2bit"]["expert_bytes"], result["2bit"]["shared_bytes"]) == (
            sizes.expert_bytes,
            sizes.home_bytes,
        )
        assert result["fp16"]["all_expert_bytes"] > 6 * result["2bit"]["all_expert_bytes"]


@pytest.fixture
def small_model(tmp_path):
    """A config with one large expert part, so that devices are few and a trace matters; its options."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**HUGGING_FACE, "num_local_experts": 16, "sliding_window": None}))
    return ("--config", path, "--device-memory", "20kB", "--shared-bits", "2bit")


def test_a_trace_saves_traffic_and_replicas_fill_the_rest(small_model, tmp_path, capsys):
    trace = tmp_path / "trace.parquet"
    write_trace(trace, clustered_trace(2000, 2, 16, 2, num_topics=4, run_length=5))
    contiguous, own = placed(capsys, *small_model, "--output", tmp_path / "own.json"), tmp_path / "own.json"
    result = placed(capsys, *small_model, "--trace", trace, "--placement", own)
    before, after = plans(result, "own placement")["2bit"], plans(result, "everything")["2bit"]
    assert before["num_devices"] == after["num_devices"] == plans(contiguous, "everything")["2bit"]["num_devices"] > 1
    assert after["report"]["bytes_per_token"] < 0.9 * before["report"]["bytes_per_token"]
    assert after["report"]["num_replicas"] == 0
    assert 1 <= after["report"]["imbalance"] < 2
    assert plans(result, "experts only")["2bit"]["report"]["bytes_per_token"] is None
    assert main(["place", *map(str, small_model), "--trace", str(trace)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "Traced is the same in the 2,000 tokens of the trace" in output
    assert f"2bit, everything: {after['report']['summary']}" in output
    copied = placed(capsys, *small_model, "--devices", 3, "--trace", trace, "--replicas")
    assert plans(copied, "everything")["base3"]["report"]["num_replicas"] > 0


def test_a_trace_of_another_model_is_refused(small_model, tmp_path, capsys):
    trace = tmp_path / "trace.parquet"
    write_trace(trace, clustered_trace(50, 2, 16, 3, num_topics=4))
    message = fails(capsys, *small_model, "--trace", trace)
    assert "2 layers of 16 experts, top-3; the model 2 of 16, top-2" in message
    assert "absent.parquet" in fails(capsys, *small_model, "--trace", tmp_path / "absent.parquet")
    assert "--replicas copies" in fails(capsys, *small_model, "--replicas")
    write_trace(trace, clustered_trace(50, 2, 16, 2, num_topics=4))
    assert "max_imbalance is 0.5" in fails(capsys, *small_model, "--trace", trace, "--max-imbalance", 0.5)


MIXTRAL, DEEPSEEK = "--shape mixtral-8x7b ", "--shape deepseek-v3 "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--shape mixtral --device l4-24gb", "--shape mixtral is not known. Known are .*mixtral-8x7b"),
        (MIXTRAL + "--device h100", "'h100' is not in the catalogue, which has .*h100-80gb"),
        (MIXTRAL, "no devices were given. Give --device NAME"),
        (MIXTRAL + "--device l4-24gb --devices 0", "--devices is 0.*Give 1 to"),
        (MIXTRAL + "--device l4-24gb --reserve 24GB", "leaves nothing"),
        (MIXTRAL + "--device-memory 1GB --reserve 1GB", "nothing is left"),
        (MIXTRAL + "--device l4-24gb --label a=b", "--label.*--discover"),
        (MIXTRAL + "--discover --label a", "--label is 'a'; give KEY=VALUE"),
        (MIXTRAL + "--topology missing.json", "missing.json: cannot be read"),
        (MIXTRAL + "--topology missing.json --reserve 1GB", "missing.json states"),
        (MIXTRAL + "--device-memory 8GB --devices 1", r"148 experts, 6\.518 GB, have no place"),
        (DEEPSEEK + "--device h100-80gb --context 8k --kv-format K4V4", "MLA.*Use FP16"),
        (DEEPSEEK + "--device l4-24gb", r"needs 34\.24 GB.*'l4-24gb-0' offers 20 GB; 14\.24 GB are missing"),
        ("--model nowhere --device l4-24gb", "nowhere: is neither a known name nor a folder"),
        ("--context 8k", "--context goes with --shape"),
        ("--output x.json", "--output goes with --shape"),
    ],
)
def test_what_cannot_be_planned_is_an_error_that_says_what_is_allowed(options, message, capsys):
    assert re.search(message, fails(capsys, *options.split()))


def test_more_devices_than_there_are_is_an_error_that_names_them(tmp_path, capsys):
    path = tmp_path / "two.json"
    Topology((Device("small", 8 * GB), Device("large", 40 * GB))).to_json(path)
    message = fails(capsys, "--shape", "olmoe-1b-7b", "--topology", path, "--devices", 3)
    assert "--devices is 3" in message
    assert "has 2 (small, large). Give 1 to 2" in message


@pytest.mark.parametrize("text", ["many", "0", "-5", "k", "1.5k", "9" * 30])
def test_a_context_is_a_number_of_tokens(text, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["place", "--shape", "olmoe-1b-7b", "--device", "l4-24gb", f"--context={text}"])
    assert exit_.value.code == 2
    assert "--context" in capsys.readouterr().err


def test_nothing_is_written_where_the_model_does_not_fit(tmp_path, capsys):
    out = tmp_path / "placement.json"
    fails(capsys, "--shape", "deepseek-v3", "--device", "h100-80gb", "--devices", 1, "--output", out)
    assert not out.exists()


@pytest.mark.ray
def test_devices_are_discovered(tmp_path, capsys):
    saved, out = tmp_path / "topology.json", tmp_path / "placement.json"
    options = ("--shape", "olmoe-1b-7b", "--shared-bits", "2bit", "--output", out)
    with connect(ClusterConfig(num_cpus=1)):
        result = placed(capsys, *options, "--discover", "--reserve", "100MB", "--save-topology", saved)
        assert "--devices is 2, but the Ray cluster" in fails(capsys, *options, "--discover", "--devices", 2)
        assert "no node carries the labels rack=1" in fails(capsys, *options, "--discover", "--label", "rack=1")
    (device,) = Topology.from_json(saved).devices
    assert device.kind == "cpu"
    assert device.reserved_bytes == 100_000_000
    assert device.node_id is None  # that Ray is gone when the file is read
    assert result["placement"]["device_names"] == [device.name]
    assert "the Ray cluster" in result["devices"]
    assert placed(capsys, *options, "--topology", saved, "--placement", out)["placement"] == result["placement"]
