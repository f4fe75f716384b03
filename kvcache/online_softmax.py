"""Causal softmax attention over keys and values that arrive tile by tile.

In: the queries of one chunk, then tiles of keys and values in any order. Out: softmax(q k) v over everything that
came, without ever holding the scores of more than one tile of queries against one tile of keys. Two such
sums over different keys can be merged, which is how differently stored parts of a cache meet.

For each row it keeps the largest score m, the sum z of exp(score - m) and the vector a = sum of exp(score - m) v;
when a tile raises m, z and a are scaled down by exp(old m - new m).

Source: Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135, section 3.1.
"""

import torch
from torch import Tensor

# Query rows per score tile: with 512 keys a tile has 2**18 scores (1 MiB in float32) per KV head.
MAX_ROWS_PER_TILE = 512


class OnlineSoftmax:
    """The running attention of one chunk of queries.

    Args:
        query: ``[num_kv_heads, num_rows, head_dim]`` float32, already scaled; rows of one token are neighbours.
        first_position: position of the first row's token in the sequence.
        rows_per_token: query heads that share a KV head.

    Attributes:
        max_score: m, ``[num_kv_heads, num_rows, 1]`` float32.
        sum_of_weights: z, ``[num_kv_heads, num_rows, 1]`` float32.
        weighted_values: a, ``[num_kv_heads, num_rows, head_dim]`` float32; may be replaced by a linear map of itself
            (undoing a rotation of the values) before merging.
    """

    def __init__(self, query: Tensor, first_position: int, rows_per_token: int) -> None:
        num_kv_heads, num_rows, head_dim = query.shape
        self._query = query
        self._positions = first_position + torch.arange(num_rows) // rows_per_token
        # The least finite number instead of -inf: differences of two such maxima stay defined (no inf - inf).
        self.max_score = torch.full((num_kv_heads, num_rows, 1), torch.finfo(torch.float32).min)
        self.sum_of_weights = torch.zeros(num_kv_heads, num_rows, 1)
        self.weighted_values = torch.zeros(num_kv_heads, num_rows, head_dim)

    def add_tile(self, key: Tensor, value: Tensor, first_position: int) -> None:
        """Attend to one more tile; each row sees the keys at or before its own position.

        Args:
            key: ``[num_kv_heads, num_keys, head_dim]`` float32, ``num_keys`` at least 1.
            value: like ``key``.
            first_position: position of the tile's first key.
        """
        key_positions = first_position + torch.arange(key.shape[1])
        for start in range(0, self._query.shape[1], MAX_ROWS_PER_TILE):
            rows = slice(start, start + MAX_ROWS_PER_TILE)
            row_positions = self._positions[rows]
            if row_positions[-1] < first_position:
                continue  # the whole tile lies in the future of these rows
            scores = self._query[:, rows] @ key.transpose(1, 2)  # [G, rows, keys]
            if row_positions[0] < key_positions[-1]:
                scores.masked_fill_(row_positions[:, None] < key_positions, -torch.inf)
            self._add_scores(rows, scores, value)

    def _add_scores(self, rows: slice, scores: Tensor, value: Tensor) -> None:
        old_max = self.max_score[:, rows]
        new_max = torch.maximum(old_max, scores.amax(dim=-1, keepdim=True))
        weights = (scores - new_max).exp_()
        decay = (old_max - new_max).exp_()
        self.sum_of_weights[:, rows] = decay * self.sum_of_weights[:, rows] + weights.sum(dim=-1, keepdim=True)
        self.weighted_values[:, rows] = decay * self.weighted_values[:, rows] + weights @ value
        self.max_score[:, rows] = new_max


def merge(first: OnlineSoftmax, second: OnlineSoftmax) -> Tensor:
    """Finish the attention of the same queries over two disjoint sets of keys.

    Args:
        first: one part.
        second: the other part; at least one of the two saw a key for every row.

    Returns:
        ``[num_kv_heads, num_rows, head_dim]`` float32.
    """
    max_score = torch.maximum(first.max_score, second.max_score)
    first_factor = (first.max_score - max_score).exp()
    second_factor = (second.max_score - max_score).exp()
    weighted_values = first_factor * first.weighted_values + second_factor * second.weighted_values
    return weighted_values / (first_factor * first.sum_of_weights + second_factor * second.sum_of_weights)
