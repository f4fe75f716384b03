import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers.llama_cpp import LlamaCppPeer, load_library
from benchmarks.peers.peer import PeerMissingError, time_decode, time_prefill
from benchmarks.peers.shape import SyntheticShape
from moe_bitnet.errors import ConfigError

SHAPE = SyntheticShape(
    num_layers=2, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=33
)


@pytest.fixture
def _installed():
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'moe-bitnet[peers]'")
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'moe-bitnet[peers]'")


def logits(peer):
    pointer = peer._api.llama_get_logits(peer._context)
    return np.ctypeslib.as_array(pointer, shape=(SHAPE.vocab_size,)).copy()


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("body_format", ["TQ2_0", "TQ1_0", "Q4_0"])
@pytest.mark.parametrize("head_format", ["Q8_0", "F16"])
def test_a_synthetic_model_scores_tokens(body_format, head_format):
    with LlamaCppPeer(SHAPE, body_format=body_format, head_format=head_format, num_threads=1) as peer:
        assert peer.weight_bytes > 0
        peer.prefill(7)
        peer.decode_token()
        assert np.isfinite(logits(peer)).all()
        assert logits(peer).std() > 0


@pytest.mark.usefixtures("_installed")
def test_a_full_sequence_falls_back_to_its_prompt():
    with LlamaCppPeer(SHAPE, num_threads=1, max_seq_len=256) as peer:
        peer.prefill(253)
        seen = []
        for _ in range(6):
            peer.decode_token()
            seen.append(logits(peer))
        assert [np.array_equal(seen[0], other) for other in seen] == [True, False, False, True, False, False]


@pytest.mark.usefixtures("_installed")
def test_a_batch_has_a_limit():
    with LlamaCppPeer(SHAPE, num_threads=1, max_batch_size=16) as peer, pytest.raises(ConfigError, match="1 to 16"):
        peer.prefill(17)


@pytest.mark.usefixtures("_installed")
def test_speed_is_measured_and_no_file_stays():
    folder = Path(tempfile.gettempdir())
    before = set(folder.glob("synthetic-gguf-*"))
    with LlamaCppPeer(SHAPE, num_threads=1) as peer:
        assert set(folder.glob("synthetic-gguf-*")) <= before
        assert len(time_decode(peer, prompt_len=4, num_tokens=5).samples_s) == 5
        assert len(time_prefill(peer, num_tokens=16, num_runs=2).samples_s) == 2
    peer.close()  # a second time is harmless


def test_an_absent_package_is_named(monkeypatch):
    load_library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(PeerMissingError, match=r"pip install 'moe-bitnet\[peers\]'"):
        LlamaCppPeer(SHAPE)
