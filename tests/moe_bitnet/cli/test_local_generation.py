"""``moe-bitnet generate --model``: one process, through the fused decoder where it can be."""

import json
import shutil

import pytest
import torch
from kernel_variants import torch_threads

from kvcache import QuantizedKVCache
from moe_bitnet.checkpoint.native import load_model, save_model
from moe_bitnet.checkpoint.pack import pack_model
from moe_bitnet.cli import local_generation
from moe_bitnet.cli.local_generation import TimedText
from moe_bitnet.cli.main import main
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.decoder import PackedDecoder
from moe_bitnet.errors import BackendError
from moe_bitnet.kernels.backend_cpp import instruction_set
from moe_bitnet.packing import LAYOUTS

PROMPT = ("--prompt", "abc def ghi", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def run(filled_run, tmp_path_factory):
    """A run with packed checkpoints; no test of this file writes to it."""
    run = RunFolder(shutil.copytree(filled_run.path, tmp_path_factory.mktemp("runs") / "packed"))
    latent = load_model(run.model("ternary"))
    for layout in LAYOUTS:
        save_model(pack_model(latent, layout), run.packed(layout))
    return run


@pytest.fixture
def decoders(monkeypatch):
    """The decoders that a command makes."""
    made = []

    class Recorded(PackedDecoder):
        def __init__(self, *args):
            made.append(self)
            self.num_threads = torch.get_num_threads()
            super().__init__(*args)

    monkeypatch.setattr(local_generation, "PackedDecoder", Recorded)
    return made


def generate(capsys, run, model, *options):
    """Run the command with --json; returns what it printed and its remarks."""
    arguments = ["generate", "--run", run.path, "--model", model, *PROMPT, *options, "--json"]
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), " ".join(captured.err.split())


def fails(capsys, run, *options):
    assert main(["generate", "--run", str(run.path), *PROMPT, *(str(option) for option in options)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return " ".join(captured.err.split()).partition("error: ")[2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_checkpoint_runs_through_the_fused_decoder(run, layout, decoders, capsys):
    result, remarks = generate(capsys, run, run.packed(layout))
    (decoder,) = decoders
    assert result["num_new_tokens"] == 12
    assert decoder.length == decoder.max_tokens - 1 == result["num_prompt_tokens"] + 11, "the last is not computed"
    assert decoder.table_format == "float32"
    assert result["weight_bytes"] == decoder.weight_bytes
    assert result["backend"] == f"cpp {instruction_set()}"
    assert result["prompt_tokens_per_s"] > 0
    assert result["decode_tokens_per_s"] > 0
    assert f"decoding {result['decode_tokens_per_s']:.1f} tok/s" in remarks
    assert f"prompt {result['prompt_tokens_per_s']:.1f} tok/s" in remarks


def test_its_text_is_that_of_the_model_with_a_cache(run, decoders, capsys, monkeypatch):
    fused, _ = generate(capsys, run, run.packed("2bit"), "--temperature", "1", "--seed", "3")
    monkeypatch.setenv("MOE_BITNET_BACKEND", "reference")
    plain, remarks = generate(capsys, run, run.packed("2bit"), "--temperature", "1", "--seed", "3")
    assert plain["text"] == fused["text"]
    assert len(decoders) == 1
    assert plain["backend"] == "reference"
    assert "without the fused decoder: MOE_BITNET_BACKEND is 'reference'" in remarks


@pytest.mark.parametrize("table_format", ["float32", "bfloat16", "int8"])
def test_the_head_has_the_format_that_is_named(run, table_format, decoders, capsys):
    result, _ = generate(capsys, run, run.packed("2bit"), "--head", table_format)
    assert decoders[0].table_format == table_format
    config = decoders[0].config
    table_bytes = {
        "float32": 4 * config.hidden_size,
        "bfloat16": 2 * config.hidden_size,
        "int8": config.hidden_size + 8,
    }
    in_float32, _ = generate(capsys, run, run.packed("2bit"))
    saved = (table_bytes["float32"] - table_bytes[table_format]) * config.vocab_size
    assert in_float32["weight_bytes"] - result["weight_bytes"] == saved


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_cache_runs_module_by_module(run, bits, decoders, capsys, monkeypatch):
    caches = []
    monkeypatch.setattr(
        local_generation,
        "QuantizedKVCache",
        lambda config, budget: caches.append(QuantizedKVCache(config, budget)) or caches[0],
    )
    result, _ = generate(capsys, run, run.packed("2bit"), "--kv-bits", bits)
    assert not decoders
    assert caches[0].config.key_bits == bits
    assert caches[0].length == result["num_prompt_tokens"] + 11
    assert result["backend"] == f"cpp {instruction_set()}"
    assert result["decode_tokens_per_s"] > 0


@pytest.mark.parametrize("precision", ["ternary", "float"])
def test_checkpoints_that_are_not_packed_run_in_torch(run, precision, decoders, capsys):
    result, _ = generate(capsys, run, run.model(precision))
    assert not decoders
    assert result["backend"] == "torch"
    model = load_model(run.model(precision))
    assert result["weight_bytes"] == sum(4 * parameter.numel() for parameter in model.parameters())
    assert result["num_new_tokens"] == 12


def test_a_head_format_is_refused_where_it_would_do_nothing(run, decoders, capsys):
    packed = run.packed("2bit")
    for options in (
        ("--model", packed, "--kv-bits", 8),
        ("--model", run.model("ternary")),
        ("--model", run.model("float")),
    ):
        message = fails(capsys, run, *options, "--head", "int8")
        assert "--head int8 needs a packed checkpoint and --kv-bits 16" in message
        assert f"{options[1]} is {'packed' if options[1] == packed else 'not packed'}" in message
    assert "--head int8 is for one checkpoint in this process" in fails(capsys, run, "--head", "int8")
    assert not decoders


def test_without_the_library_it_is_said_and_the_model_runs(run, capsys, monkeypatch):
    def absent(*_):
        raise BackendError("libternary.so was not built")

    monkeypatch.setattr(local_generation, "PackedDecoder", absent)
    result, remarks = generate(capsys, run, run.packed("2bit"))
    assert result["num_new_tokens"] == 12
    assert "without the fused decoder: libternary.so was not built" in remarks
    assert "libternary.so" in fails(capsys, run, "--model", run.packed("2bit"), "--head", "int8")


def test_torchs_threads_are_used_and_stay(run, decoders, capsys):
    with torch_threads(3):
        generate(capsys, run, run.packed("2bit"))
        assert torch.get_num_threads() == 3
    assert decoders[0].num_threads == 3


def test_more_tokens_than_any_sequence_has_are_an_error(run, capsys):
    message = fails(capsys, run, "--model", run.packed("2bit"), "--max-new-tokens", 10**14)
    assert "max_tokens" in message


def test_one_new_token_has_no_decoding_rate(run, capsys):
    result, remarks = generate(capsys, run, run.packed("2bit"), "--max-new-tokens", 1)
    assert result["decode_tokens_per_s"] is None
    assert result["prompt_tokens_per_s"] > 0
    assert "decoding" not in remarks


def test_rates_are_tokens_over_seconds():
    text = TimedText([1, 2, 3, 4, 5], prompt_s=2.0, decode_s=0.5)
    assert text.decode_tokens_per_s == 8
    assert text.seconds == 2.5


def test_inspect_says_the_bits_a_weight(run, capsys):
    bits = {}
    for name, folder in {**{layout: run.packed(layout) for layout in LAYOUTS}, "float": run.model("float")}.items():
        assert main(["inspect", str(folder), "--json"]) == 0
        bits[name] = json.loads(capsys.readouterr().out)["bits_per_expert_weight"]
    # of 3 * 32 * 32 weights: packed bytes, three scales and a norm of 32 in float32
    beside = 8 * 4 * (3 + 32) / (3 * 32 * 32)
    assert bits["2bit"] == pytest.approx(2 + beside)
    assert bits["base3"] == pytest.approx(8 * 7 / 32 + beside), "7 bytes hold 32 weights"
    assert bits["float"] is None
