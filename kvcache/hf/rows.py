"""A batch of sequences as transformers sees it: rows of equal length, some of whose positions are padding.

In: how many positions a forward pass brings, and the padding mask. Out: which of them are tokens (``Step``). Padding
never enters the store, so rows hold different numbers of tokens; the mask of all earlier positions is kept, because
``generate`` counts positions and crops by them.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache.cache import PagedKVCache
from moe_bitnet.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class Step:
    """The new positions of one forward pass, the same for every layer.

    Attributes:
        num_positions: by row, padding included.
        is_token: bool ``[batch_size, num_positions]`` on the CPU; ``None`` where there is no padding.
        num_new_tokens: by row, padding excluded.
    """

    num_positions: int
    is_token: Tensor | None
    num_new_tokens: list[int]


class SequenceRows:
    """One sequence of the store for every row of the batch.

    ``num_positions`` counts committed steps: those that every layer has taken. A step that was broken off is undone
    when the next one begins.

    Args:
        store: where tokens go; they are freed when the rows are collected.
        num_layers: L.
        device: where the store computes.
    """

    def __init__(self, store: PagedKVCache, num_layers: int, device: torch.device) -> None:
        self.store = store
        self.num_positions = 0
        self.sequence_ids: list[int] = []
        self._num_layers = num_layers
        self._device = device
        self._num_layers_done = 0
        self._step: Step | None = None
        self._is_token: Tensor | None = None  # bool [batch_size, num_positions]; None while there is no padding
        weakref.finalize(self, _free_all, store, self.sequence_ids).atexit = False

    @property
    def batch_size(self) -> int:
        """Rows; 0 before the first step."""
        return len(self.sequence_ids)

    def extend(
        self,
        layer_index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding_mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """Attend from the new positions of one layer and append them; layers come in order.

        Args:
            layer_index: which layer; layer 0 begins a step.
            query: ``[batch_size, num_new, num_heads, head_dim]``.
            key: ``[batch_size, num_new, num_kv_heads, head_dim]``.
            value: like ``key``.
            padding_mask: bool ``[batch_size, num_positions]`` of all positions, or ``None``: all new ones are tokens.
            scale: what scores are multiplied with.

        Returns:
            Like ``query``; zeros for padding.
        """
        if layer_index == 0:
            self._begin_step(query.shape[0], query.shape[1], padding_mask)
        step = self._step
        if step is None or layer_index != self._num_layers_done or step.num_positions != query.shape[1]:
            raise ConfigError(
                f"HFPagedCache: layer {layer_index} attends to {query.shape[1]} new tokens out of turn. Every layer "
                f"must attend once in a forward pass, in order. Call cache.reset()."
            )
        output = self._extend_tokens(layer_index, step, query, key, value, scale)
        self._num_layers_done += 1
        if self._num_layers_done == self._num_layers:
            self._commit(step)
        return output

    def _extend_tokens(
        self, layer_index: int, step: Step, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        rows = [row for row, num_tokens in enumerate(step.num_new_tokens) if num_tokens]
        if not rows:
            return torch.zeros_like(query)
        is_token = None if step.is_token is None else step.is_token.to(query.device)
        tokens = [self._tokens_of(tensor, is_token) for tensor in (query, key, value)]
        attended = self.store.extend(
            layer_index,
            [self.sequence_ids[row] for row in rows],
            tokens[0],
            tokens[1],
            tokens[2],
            num_new_tokens=[step.num_new_tokens[row] for row in rows],
            scale=scale,
        ).to(query.device)
        if is_token is None:
            return attended.view_as(query)
        output = torch.zeros_like(query)
        output[is_token] = attended
        return output

    def _tokens_of(self, positions: Tensor, is_token: Tensor | None) -> Tensor:
        """Gather ``[T, heads, head_dim]``, row after row, on the store's device."""
        tokens = positions.flatten(0, 1) if is_token is None else positions[is_token]
        return tokens.to(self._device)

    def select(self, indices: Sequence[int]) -> None:
        """Replace the rows by those at ``indices``, any number of times each; equal ones share their pages."""
        self._undo_step()
        if not self.sequence_ids:
            return
        self._replace([self.store.fork(self.sequence_ids[row]) for row in indices])
        if self._is_token is not None:
            self._is_token = self._is_token[torch.tensor(indices, dtype=torch.int64)]

    def crop(self, num_removed: int) -> None:
        """Forget the last ``num_removed`` positions of every row.

        Raises:
            ConfigError: a row would end inside a packed page; nothing is changed.
        """
        self._undo_step()
        num_kept = max(self.num_positions - num_removed, 0)
        if num_kept == self.num_positions:
            return
        shortened: list[int] = []
        try:
            for row, sequence_id in enumerate(self.sequence_ids):
                shortened.append(self.store.fork(sequence_id))
                self.store.truncate(shortened[-1], self._num_tokens(row, num_kept))
        except ConfigError:
            _free_all(self.store, shortened)
            raise
        self._replace(shortened)
        self.num_positions = num_kept
        if self._is_token is not None:
            self._is_token = self._is_token[:, :num_kept]

    def clear(self) -> None:
        """Give all sequences back."""
        self._replace([])
        self.num_positions, self._num_layers_done, self._step, self._is_token = 0, 0, None, None

    def fork(self) -> "SequenceRows":
        """Return rows of their own that share all pages."""
        self._undo_step()
        rows = SequenceRows(self.store, self._num_layers, self._device)
        for sequence_id in self.sequence_ids:
            rows.sequence_ids.append(self.store.fork(sequence_id))
        rows.num_positions, rows._is_token = self.num_positions, self._is_token
        return rows

    def _begin_step(self, batch_size: int, num_new: int, padding_mask: Tensor | None) -> None:
        self._undo_step()
        if self.num_positions == 0 and self.batch_size != batch_size:
            self.clear()
        if not self.sequence_ids:
            for _ in range(batch_size):
                self.sequence_ids.append(self.store.new_sequence())
        if self.batch_size != batch_size:
            raise ShapeError(
                f"HFPagedCache: the batch has {batch_size} rows, the cache holds {self.batch_size}. Give as many, or "
                f"call cache.reset()."
            )
        self._step = self._plan(num_new, padding_mask)

    def _plan(self, num_new: int, padding_mask: Tensor | None) -> Step:
        all_tokens = Step(num_new, None, [num_new] * self.batch_size)
        if padding_mask is None:
            return all_tokens
        mask = padding_mask.to(device="cpu", dtype=torch.bool)
        num_positions = self.num_positions + num_new
        if mask.shape[0] != self.batch_size or mask.shape[1] < num_positions:
            raise ShapeError(
                f"HFPagedCache: attention_mask has shape {list(mask.shape)}; give "
                f"[{self.batch_size}, {num_positions}], all positions from the first on, or none."
            )
        self._check_past(mask[:, : self.num_positions])
        is_token = mask[:, self.num_positions : num_positions]
        if bool(is_token.all()):
            return all_tokens
        return Step(num_new, is_token, is_token.sum(dim=1).tolist())

    def _check_past(self, mask: Tensor) -> None:
        is_same = mask.all() if self._is_token is None else torch.equal(mask, self._is_token)
        if not is_same:
            raise ConfigError(
                "HFPagedCache: attention_mask shows or hides positions that the cache already holds otherwise. Keep "
                "the mask of earlier positions as it was, or call cache.reset()."
            )

    def _commit(self, step: Step) -> None:
        if step.is_token is not None or self._is_token is not None:
            parts = (
                self._all_tokens(self.num_positions) if self._is_token is None else self._is_token,
                self._all_tokens(step.num_positions) if step.is_token is None else step.is_token,
            )
            self._is_token = torch.cat(parts, dim=1)
        self.num_positions += step.num_positions
        self._num_layers_done, self._step = 0, None

    def _all_tokens(self, num_positions: int) -> Tensor:
        return torch.ones(self.batch_size, num_positions, dtype=torch.bool)

    def _undo_step(self) -> None:
        """Take back the layers of a step that was broken off, so that all layers hold the same tokens."""
        if self._step is None:
            return
        self._num_layers_done, self._step = 0, None
        for row, sequence_id in enumerate(self.sequence_ids):
            self.store.truncate(sequence_id, self._num_tokens(row, self.num_positions))

    def _num_tokens(self, row: int, num_positions: int) -> int:
        """Count the tokens among a row's first positions."""
        return num_positions if self._is_token is None else int(self._is_token[row, :num_positions].sum())

    def _replace(self, sequence_ids: Sequence[int]) -> None:
        """Give the sequences back and hold these instead; the list stays the same object, see the finalizer."""
        old_ids = list(self.sequence_ids)
        self.sequence_ids[:] = sequence_ids
        _free_all(self.store, old_ids)


def _free_all(store: PagedKVCache, sequence_ids: Sequence[int]) -> None:
    for sequence_id in sequence_ids:
        store.free(sequence_id)
