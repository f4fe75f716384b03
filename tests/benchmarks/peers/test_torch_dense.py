import pytest
import torch

from benchmarks.peers.peer import time_decode, time_prefill
from benchmarks.peers.shape import BITNET_2B4T_BODY, SyntheticShape
from benchmarks.peers.torch_dense import TorchDensePeer
from moe_bitnet.errors import ConfigError

SHAPE = SyntheticShape(
    num_layers=2, hidden_size=24, intermediate_size=40, num_heads=6, num_kv_heads=2, head_dim=4, vocab_size=33
)
NUM_WEIGHTS = SHAPE.num_body_weights + 2 * SHAPE.num_head_weights + 5 * SHAPE.hidden_size


def step_by_step(peer):
    """Logits of the ninth token, four of them decoded one by one."""
    peer.prefill(5)
    return [peer.decode_token() for _ in range(4)][-1]


def test_tokens_one_by_one_equal_one_batch():
    with TorchDensePeer(SHAPE, dtype=torch.float64) as peer:
        in_batch = peer.prefill(9)
        assert in_batch.shape == (1, SHAPE.vocab_size)
        torch.testing.assert_close(step_by_step(peer), in_batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_single_tokens_are_as_exact_as_a_batch(dtype):
    """The error of a batch is its largest over a few models, since one may be lucky."""
    batch_errors, token_errors = [], []
    for seed in range(8):
        with TorchDensePeer(SHAPE, dtype=torch.float64, seed=seed) as exact:
            truth = exact.prefill(9)
        with TorchDensePeer(SHAPE, dtype=dtype, seed=seed) as peer:
            batch_errors.append(float((peer.prefill(9) - truth).abs().max() / truth.abs().max()))
            token_errors.append(float((step_by_step(peer) - truth).abs().max() / truth.abs().max()))
    assert sum(token_errors) / 8 <= max(batch_errors) + 2 * torch.finfo(dtype).eps


def test_values_keep_a_sane_size():
    with TorchDensePeer(SHAPE, dtype=torch.float32) as peer:
        assert 0.1 < float(peer.prefill(7).std()) < 10


def test_weight_bytes_count_every_weight():
    with TorchDensePeer(SHAPE, dtype=torch.float16) as peer:
        assert peer.weight_bytes == 2 * NUM_WEIGHTS


def test_a_full_sequence_falls_back_to_its_prompt():
    with TorchDensePeer(SHAPE, dtype=torch.float32, max_seq_len=5) as peer:
        peer.prefill(3)
        logits = [peer.decode_token() for _ in range(4)]
        assert torch.equal(logits[0], logits[2])
        assert torch.equal(logits[1], logits[3])
        assert not torch.equal(logits[0], logits[1])


def test_a_prompt_beyond_the_cache_is_refused():
    with TorchDensePeer(SHAPE, max_seq_len=5) as peer, pytest.raises(ConfigError, match="1 to 5"):
        peer.prefill(6)


def test_speed_is_measured():
    with TorchDensePeer(SHAPE) as peer:
        assert len(time_decode(peer, prompt_len=4, num_tokens=5).samples_s) == 5
        assert len(time_prefill(peer, num_tokens=16, num_runs=2).samples_s) == 2


def test_the_body_of_2b4t_has_its_published_size():
    """2.08e9 ternary weights: 30 layers of 69.5 million."""
    assert BITNET_2B4T_BODY.num_body_weights == 30 * 69_468_160
