"""The float16 tokens of a sequence: its first ones (sinks) and its most recent ones (window), for all layers.

One tensor, allocated at once. Slots of a layer, for keys and for values:

    | 0 .. num_sink_tokens - 1 | num_sink_tokens .. num_slots - 1                           |
    | sinks, filled first      | window: oldest token first, taken away a page at a time    |
"""

import torch
from torch import Tensor


class RecentTokens:
    """Sinks and window of every layer of one sequence.

    Args:
        num_layers: L.
        num_kv_heads: G.
        head_dim: D.
        num_sink_tokens: slots that keep the first tokens for good.
        num_slots: slots per layer, sinks included.
    """

    def __init__(
        self, *, num_layers: int, num_kv_heads: int, head_dim: int, num_sink_tokens: int, num_slots: int
    ) -> None:
        self.num_sink_tokens = num_sink_tokens
        self.num_slots = num_slots
        # Zeros, so that the memory is committed now, as in the page pool. [layer, key or value, head, slot, channel]
        self._memory = torch.empty(num_layers, 2, num_kv_heads, num_slots, head_dim, dtype=torch.float16).zero_()
        self._num_held = [0] * num_layers

    @property
    def allocated_bytes(self) -> int:
        """Bytes of memory held, used or not."""
        return self._memory.nbytes

    def num_held(self, layer_index: int) -> int:
        """Count the tokens of a layer in float16, sinks and window together."""
        return self._num_held[layer_index]

    def append(self, layer_index: int, key_value: Tensor) -> int:
        """Store the leading tokens of a chunk, as many as have room.

        Args:
            layer_index: which layer.
            key_value: ``[2, num_kv_heads, num_tokens, head_dim]`` float16, keys then values.

        Returns:
            How many tokens were stored; 0 when all slots are taken.
        """
        start = self._num_held[layer_index]
        num_stored = min(self.num_slots - start, key_value.shape[2])
        self._memory[layer_index, :, :, start : start + num_stored] = key_value[:, :, :num_stored]
        self._num_held[layer_index] += num_stored
        return num_stored

    def take_oldest(self, layer_index: int, num_tokens: int) -> Tensor:
        """Remove the oldest tokens of the window.

        Args:
            layer_index: which layer.
            num_tokens: at most what the window holds.

        Returns:
            ``[2, num_kv_heads, num_tokens, head_dim]`` float16, a copy: keys, then values.
        """
        assert self.num_sink_tokens + num_tokens <= self._num_held[layer_index], "the window holds fewer tokens"
        window = self._memory[layer_index, :, :, self.num_sink_tokens : self._num_held[layer_index]]
        taken = window[:, :, :num_tokens].clone()
        window[:, :, : window.shape[2] - num_tokens] = window[:, :, num_tokens:].clone()  # move the rest to the front
        self._num_held[layer_index] -= num_tokens
        return taken

    def sinks(self, layer_index: int) -> Tensor:
        """View the sinks: ``[2, num_kv_heads, up to num_sink_tokens, head_dim]`` float16, keys then values."""
        return self._memory[layer_index, :, :, : min(self.num_sink_tokens, self._num_held[layer_index])]

    def window(self, layer_index: int) -> Tensor:
        """View the window: ``[2, num_kv_heads, num_tokens, head_dim]`` float16, keys then values, oldest first."""
        return self._memory[layer_index, :, :, self.num_sink_tokens : self._num_held[layer_index]]

    def clear(self) -> None:
        """Forget all tokens of all layers."""
        self._num_held = [0] * len(self._num_held)

    def check_integrity(self) -> None:
        """Assert that no layer holds more tokens than it has slots."""
        assert all(0 <= num_held <= self.num_slots for num_held in self._num_held)
