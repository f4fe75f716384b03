"""Which copy of an expert a token visits: the copy at home, else one where the token goes anyway, else the least loaded.

A pure function of the batch, the copies and who is up: solver, benchmarks and dispatcher all choose by it.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NO_DEVICE = -1
"""Stands where no copy of an expert is up."""

_HOME = 0


class ReplicaTable:
    """The copies of one layer's experts, arranged for choosing.

    Args:
        devices_of_expert: ``[num_experts]``, the devices that hold a copy; at least one each, all different.
        num_devices: D.
    """

    def __init__(self, devices_of_expert: Sequence[Sequence[int]], num_devices: int) -> None:
        self._num_devices = num_devices
        width = max(len(copies) for copies in devices_of_expert)
        self._copies = np.full((len(devices_of_expert), width), NO_DEVICE, np.int64)  # [E, R]
        for expert_id, copies in enumerate(devices_of_expert):
            self._copies[expert_id, : len(copies)] = copies
        self._is_single = width == 1

    def choose(self, expert_indices: npt.NDArray[np.integer], is_up: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Choose a device for each choice of each token.

        Args:
            expert_indices: ``[T, K]``, all different within a row.
            is_up: ``[D]``, which devices can be asked.
        Returns:
            int64 ``[T, K]``; :data:`NO_DEVICE` where no copy is up.
        """
        if self._is_single:
            devices = self._copies[expert_indices, 0]
            return devices if is_up.all() else np.where(is_up[devices], devices, NO_DEVICE)
        copies = self._copies[expert_indices]  # [T, K, R]
        is_live = (copies != NO_DEVICE) & is_up[copies]
        num_live = is_live.sum(axis=2)
        first = np.take_along_axis(copies, is_live.argmax(axis=2)[..., None], axis=2)[..., 0]
        devices = np.where(num_live > 0, first, NO_DEVICE)
        is_home = (is_live & (copies == _HOME)).any(axis=2)
        devices[is_home] = _HOME
        is_free = (num_live > 1) & ~is_home
        if is_free.any():
            self._choose_free(expert_indices, copies, is_live, is_free, devices)
        return devices

    def _choose_free(
        self,
        expert_indices: npt.NDArray[np.integer],
        copies: npt.NDArray[np.int64],
        is_live: npt.NDArray[np.bool_],
        is_free: npt.NDArray[np.bool_],
        devices: npt.NDArray[np.int64],
    ) -> None:
        """Fill in the choices between several live copies away from home, one column after the other."""
        num_tokens, top_k = devices.shape
        is_visited = np.zeros((num_tokens, self._num_devices), bool)
        is_fixed = ~is_free & (devices != NO_DEVICE)
        is_visited[np.nonzero(is_fixed)[0], devices[is_fixed]] = True
        load = np.bincount(devices[is_fixed], minlength=self._num_devices)
        for column in range(top_k):
            tokens = np.flatnonzero(is_free[:, column])
            if not len(tokens):
                continue
            options, live = copies[tokens, column], is_live[tokens, column]  # [n, R]
            # sort each row's copies: visited before others, then by load; those that are down come last
            cost = load[options] + np.where(is_visited[tokens[:, None], options], 0, load.sum() + len(tokens) + 1)
            order = np.argsort(np.where(live, cost, np.iinfo(np.int64).max), axis=1, kind="stable")
            attached = np.take_along_axis(is_visited[tokens[:, None], options] & live, order, axis=1)[:, 0]
            # tokens that choose freely share an expert's copies out in turn
            turn = np.where(attached, 0, _rank_within(expert_indices[tokens, column]) % live.sum(axis=1))
            chosen = np.take_along_axis(options, np.take_along_axis(order, turn[:, None], axis=1), axis=1)[:, 0]
            devices[tokens, column] = chosen
            is_visited[tokens, chosen] = True
            load += np.bincount(chosen, minlength=self._num_devices)


def _rank_within(expert_ids: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Return how many equal ids come before each one; ``[n]``."""
    order = np.argsort(expert_ids, kind="stable")
    sorted_ids = expert_ids[order]
    starts = np.searchsorted(sorted_ids, sorted_ids)
    ranks = np.empty(len(expert_ids), np.int64)
    ranks[order] = np.arange(len(expert_ids)) - starts
    return ranks
