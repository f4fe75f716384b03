import pytest
import torch

from cluster.training.checkpoint_writer import _Task
from cluster.training.config import TrainConfig
from cluster.training.document import Document
from cluster.training.shards import build_shards, read_summary, train_tokenizer
from moe_bitnet.config import ModelConfig

SENTENCES = ["the cat sat on the mat", "a dog ran to the park", "one two three four five", "we like warm green tea"]


@pytest.fixture(autouse=True)
def _one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """Shards of a text that repeats itself, so that a tiny model learns it in a few steps."""
    documents = [
        Document(f"text {index}", f"{index} " + f"{SENTENCES[index % 4]}, {SENTENCES[(index + 1) % 4]}. " * 12)
        for index in range(40)
    ]
    folder = tmp_path_factory.mktemp("data") / "shards"
    build_shards(documents, train_tokenizer(documents, 280), folder, 0.2)
    return folder


@pytest.fixture(params=["ternary", "float"])
def precision(request):
    return request.param


@pytest.fixture
def model_config(data_folder):
    return ModelConfig(
        vocab_size=read_summary(data_folder).vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        num_experts=4,
        top_k=2,
        num_shared_experts=1,
        max_seq_len=64,
    )


@pytest.fixture
def config(data_folder, tmp_path):
    """Eager float32, so that equal runs have equal bits."""
    return TrainConfig(
        data_folder,
        tmp_path / "out",
        num_steps=6,
        batch_size=4,
        seq_len=16,
        warmup_steps=2,
        eval_every_steps=3,
        num_eval_batches=2,
        compute_dtype="float32",
        is_compiled=False,
    )


@pytest.fixture
def immediate_writes(monkeypatch):
    """Checkpoints are written at once instead of in the background, so that which ones there are is known."""

    class Immediate(_Task):
        is_running = False

        def __init__(self, function):
            self.error = None
            self._function = function
            self._run()

        def join(self):
            pass

    monkeypatch.setattr("cluster.training.checkpoint_writer._Task", Immediate)
