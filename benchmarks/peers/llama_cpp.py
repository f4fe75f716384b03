"""llama.cpp as a peer: a synthetic ternary model behind its C interface.

The model is written as a GGUF file into a temporary folder, read into memory (not mapped,
so that no page fault is timed) and the file deleted. Needs the packages ``llama-cpp-python``
and ``gguf``: ``pip install 'moe-bitnet[peers]'``.
"""

import functools
import tempfile
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.peers.gguf_blocks import BlockFormat
from benchmarks.peers.gguf_file import HeadFormat, write_synthetic_gguf
from benchmarks.peers.peer import PeerMissingError
from benchmarks.peers.shape import SyntheticShape
from moe_bitnet.errors import BackendError, ConfigError

PACKAGES = ("llama-cpp-python", "gguf")
"""Packages whose versions belong to a figure of this peer."""

_LOG_LEVEL_WARN = 3


class LlamaCppPeer:
    """A dense LLaMA-architecture model with random weights in llama.cpp.

    One sequence at a time; keys and values are float16. The logits of the last token are computed and not read.

    Args:
        shape: sizes; widths are multiples of 256 for the ternary formats.
        body_format: of the projections in the blocks: ``TQ2_0``, ``TQ1_0`` or ``Q4_0``.
        head_format: of the embedding and the output projection. llama.cpp itself would store
            them in 4 to 8 bits; Q8_0 decodes faster than F16.
        num_threads: for single tokens and for prompts.
        max_seq_len: tokens that the cache holds.
        max_batch_size: tokens in one batch, logical and physical.
    Raises:
        PeerMissingError: a package is not installed.
        BackendError: llama.cpp refused the model.
    """

    def __init__(
        self,
        shape: SyntheticShape,
        *,
        body_format: BlockFormat = "TQ2_0",
        head_format: HeadFormat = "Q8_0",
        num_threads: int = 2,
        max_seq_len: int = 1024,
        max_batch_size: int = 512,
    ) -> None:
        self._library = load_library()
        self._api = self._library.api
        self.name = f"llama.cpp {body_format}"
        self.max_seq_len = max_seq_len
        self.max_batch_size = max_batch_size
        self._model: Any = None
        self._context: Any = None
        self._prompt_len = self._length = 0
        self._tokens = (self._api.llama_token * max_batch_size)(
            *(index * 7919 % shape.vocab_size for index in range(max_batch_size))
        )
        with tempfile.TemporaryDirectory(prefix="synthetic-gguf-") as folder:
            path = Path(folder) / "model.gguf"
            self.weight_bytes = write_synthetic_gguf(
                path, shape, body_format=body_format, head_format=head_format, max_seq_len=max_seq_len
            )
            self._model = self._load(path)
        try:
            self._context = self._make_context(num_threads)
        except BackendError:
            self.close()
            raise

    def prefill(self, num_tokens: int) -> None:
        """Forget the sequence, and start another with ``num_tokens`` tokens in one batch.

        Raises:
            ConfigError: more tokens than a batch or the cache holds.
        """
        if not 1 <= num_tokens <= min(self.max_batch_size, self.max_seq_len):
            raise ConfigError(
                f"llama.cpp prefill: {num_tokens} tokens; a batch takes 1 to {self.max_batch_size}, the cache "
                f"{self.max_seq_len}. Give max_batch_size and max_seq_len of at least that."
            )
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        self._decode(num_tokens)
        self._prompt_len = self._length = num_tokens

    def decode_token(self) -> None:
        """Append one token and score the next. A full sequence first falls back to its prompt."""
        if self._length >= self.max_seq_len:
            self._length = min(self._prompt_len, self.max_seq_len - 1)
            memory = self._api.llama_get_memory(self._context)
            self._api.llama_memory_seq_rm(memory, 0, self._length, -1)
        self._decode(1)
        self._length += 1

    def close(self) -> None:
        """Free context and model; the file is gone already."""
        if self._context is not None:
            self._api.llama_free(self._context)
            self._context = None
        if self._model is not None:
            self._api.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> "LlamaCppPeer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decode(self, num_tokens: int) -> None:
        assert self._context is not None, "the peer is closed"
        batch = self._api.llama_batch_get_one(self._tokens, num_tokens)
        status = self._api.llama_decode(self._context, batch)
        # llama_decode may return before the work is done; the logits are there after this.
        self._api.llama_synchronize(self._context)
        if status != 0:
            raise BackendError(
                f"llama.cpp: llama_decode of {num_tokens} tokens returned {status}. {self._library.why()}"
            )

    def _load(self, path: Path) -> Any:
        parameters = self._api.llama_model_default_params()
        parameters.load_mode = self._api.LLAMA_LOAD_MODE_NONE
        parameters.n_gpu_layers = 0
        model = self._api.llama_model_load_from_file(str(path).encode(), parameters)
        if not model:
            raise BackendError(f"llama.cpp refused the synthetic model. {self._library.why()}")
        return model

    def _make_context(self, num_threads: int) -> Any:
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = self.max_seq_len
        parameters.n_batch = parameters.n_ubatch = self.max_batch_size
        parameters.n_threads = parameters.n_threads_batch = num_threads
        context = self._api.llama_init_from_model(self._model, parameters)
        if not context:
            raise BackendError(
                f"llama.cpp could not make a context of {self.max_seq_len} tokens. {self._library.why()}"
            )
        return context


class Library:
    """The C library with its last warnings, which say why a call failed.

    Attributes:
        api: the module ``llama_cpp``, whose functions mirror the C header.
        warnings: the last lines that the library logged as warnings or errors.
    """

    def __init__(self, api: ModuleType) -> None:
        self.api = api
        self.warnings: deque[str] = deque(maxlen=8)
        # The C side holds no reference: the callback lives as long as this object.
        self._callback = api.llama_log_callback(self._keep_warning)
        api.llama_log_set(self._callback, None)
        api.llama_backend_init()

    def why(self) -> str:
        """Return what the log says of a failure."""
        return f"Its log: {' / '.join(self.warnings)}" if self.warnings else "Its log says nothing."

    def _keep_warning(self, level: int, text: bytes, _: object) -> None:
        if level >= _LOG_LEVEL_WARN:
            self.warnings.append(text.decode("utf-8", errors="replace").strip())


@functools.cache
def load_library() -> Library:
    """Load llama.cpp once, and keep its log off the terminal.

    Raises:
        PeerMissingError: a package is not installed.
    """
    try:
        import gguf  # noqa: F401
        import llama_cpp
    except ImportError as error:
        raise PeerMissingError(
            f"The llama.cpp peer needs {' and '.join(PACKAGES)} ({error.name} is missing): "
            f"pip install 'moe-bitnet[peers]'."
        ) from error
    return Library(llama_cpp)
