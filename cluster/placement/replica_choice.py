"""Which copy of an expert a token visits, for one batch of one layer.

The rule, in this order, for each (token, expert) pair:

1. the copy at home, device 0: it costs no transfer; or the only live copy;
2. a copy on a device that the token visits anyway: its row is there already; of several the least loaded;
3. the least loaded device with a live copy. The pairs of one expert are poured over its copies like
   water, so that one batch does not rush to one device; experts take their turn by id, and what
   a token got in an earlier turn counts as visited.

All pairs pass step 1 before any passes step 2, and so on; loads grow with every pair that is placed. The
answer depends on nothing but the arguments, so every replay of a batch takes the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.placement.arrays import BoolArray, FloatArray, IntArray

HOME = 0
NO_DEVICE = -1
"""The answer for an expert without a live copy; the caller must reload it or fail, never skip it."""

_OPEN = -2  # an expert with several live copies, none at home


def choose_devices(
    expert_indices: IntArray,
    devices_of_layer: Sequence[Sequence[int]],
    is_up: BoolArray,
    load: FloatArray | None = None,
) -> IntArray:
    """Choose a device for every (token, expert) pair; for one layer called once.

    Build a :class:`ReplicaTable` where the same layer is asked again and again.

    Args:
        expert_indices: ``[num_tokens, top_k]`` expert ids, all different within a row.
        devices_of_layer: for each expert the devices that hold a copy, as in
            ``Placement.devices_of_expert[layer_index]``.
        is_up: ``[num_devices]``, whether a device answers.
        load: ``[num_devices]``, (token, expert) pairs that each device has lately been given, in any weighting;
            none by default.
    Returns:
        ``[num_tokens, top_k]`` device indices; ``NO_DEVICE`` (-1) where no copy is on a live device.
    """
    return ReplicaTable(devices_of_layer, len(is_up)).choose(expert_indices, is_up, load)


@dataclass(frozen=True)
class _LiveCopies:
    """Copies on live devices, by expert.

    Attributes:
        decided: ``[num_experts]`` the device where there is no choice, ``NO_DEVICE`` or ``_OPEN``.
        decided_list: the same as a list, for single tokens.
        copies: for each expert its live devices; of use where it is open.
        copy_table: the same as ``[num_experts, most copies]``, filled up with -1.
        has_choice: whether any expert is open.
    """

    decided: IntArray
    decided_list: list[int]
    copies: list[tuple[int, ...]]
    copy_table: IntArray
    has_choice: bool


class ReplicaTable:
    """The copies of one layer's experts, prepared for choosing.

    Args:
        devices_of_layer: for each expert the devices that hold a copy.
        num_devices: D.
    """

    def __init__(self, devices_of_layer: Sequence[Sequence[int]], num_devices: int) -> None:
        self._devices_of_layer = devices_of_layer
        self._num_devices = num_devices
        self._seen_up = b""
        self._live = self._find_live(np.ones(num_devices, dtype=bool))

    def choose(self, expert_indices: IntArray, is_up: BoolArray, load: FloatArray | None = None) -> IntArray:
        """Choose a device for every pair; arguments and result as in :func:`choose_devices`.

        Without ``load`` all devices were idle before this batch.
        """
        up_now = is_up.tobytes()
        if up_now != self._seen_up:
            self._live, self._seen_up = self._find_live(is_up), up_now
        live = self._live
        if not live.has_choice:
            return live.decided[expert_indices]
        load = np.zeros(self._num_devices) if load is None else load
        if len(expert_indices) == 1:
            return np.array([_choose_for_token(expert_indices[0].tolist(), live, load)], dtype=np.int64)
        return _choose_for_batch(expert_indices, live, load)

    def _find_live(self, is_up: BoolArray) -> _LiveCopies:
        copies = [tuple(device for device in devices if is_up[device]) for devices in self._devices_of_layer]
        decided = [_decide(live) for live in copies]
        table = np.full((len(copies), max(1, *map(len, copies))), -1)
        for expert_id, live in enumerate(copies):
            table[expert_id, : len(live)] = live
        return _LiveCopies(np.array(decided), decided, copies, table, _OPEN in decided)


def _decide(live: tuple[int, ...]) -> int:
    if HOME in live:
        return HOME
    if len(live) > 1:
        return _OPEN
    return live[0] if live else NO_DEVICE


def _choose_for_token(experts: list[int], live: _LiveCopies, load: FloatArray) -> list[int]:
    """The rule for one token in plain Python, which is faster than arrays of one row."""
    devices = [live.decided_list[expert] for expert in experts]
    if _OPEN not in devices:
        return devices
    running = load.tolist()
    visited = {device for device in devices if device >= 0}
    for device in devices:
        if device >= 0:
            running[device] += 1
    beside = list(devices)  # after step 2
    for k, expert in enumerate(experts):
        if devices[k] == _OPEN:
            there = [device for device in live.copies[expert] if device in visited]
            if there:
                beside[k] = min(there, key=running.__getitem__)
    for k, device in enumerate(beside):
        if devices[k] == _OPEN and device != _OPEN:
            running[device] += 1
    for expert, k in sorted((experts[k], k) for k, device in enumerate(beside) if device == _OPEN):
        there = [device for device in live.copies[expert] if device in visited]
        chosen = min(there or live.copies[expert], key=running.__getitem__)
        beside[k] = chosen
        visited.add(chosen)
        running[chosen] += 1
    return beside


def _choose_for_batch(expert_indices: IntArray, live: _LiveCopies, load: FloatArray) -> IntArray:
    num_tokens, num_devices = len(expert_indices), len(load)
    devices = live.decided[expert_indices]  # [T, K]
    is_visited = np.zeros((num_tokens, num_devices + 2), dtype=bool)  # the last two columns take -1 and -2
    is_visited[np.arange(num_tokens)[:, None], devices] = True
    running = load + np.bincount(devices[devices >= 0], minlength=num_devices)

    tokens, slots = np.nonzero(devices == _OPEN)
    experts = expert_indices[tokens, slots]
    chosen, is_beside = _least_loaded_visited(live.copy_table[experts], is_visited[tokens], running)
    devices[tokens[is_beside], slots[is_beside]] = chosen[is_beside]
    running += np.bincount(chosen[is_beside], minlength=num_devices)

    tokens, slots, experts = tokens[~is_beside], slots[~is_beside], experts[~is_beside]
    by_expert = np.argsort(experts, kind="stable")
    ids, starts = np.unique(experts[by_expert], return_index=True)
    for expert_id, group in zip(ids.tolist(), np.split(by_expert, starts[1:]), strict=False):
        chosen = _take_turn(live.copy_table[expert_id], live.copies[expert_id], is_visited[tokens[group]], running)
        devices[tokens[group], slots[group]] = chosen
        is_visited[tokens[group], chosen] = True
        running += np.bincount(chosen, minlength=num_devices)
    return devices


def _take_turn(table: IntArray, copies: tuple[int, ...], is_visited: BoolArray, running: FloatArray) -> IntArray:
    """Step 3 for the pairs of one expert: ``[n]`` devices."""
    pairs = np.broadcast_to(table, (len(is_visited), len(table)))
    chosen, is_beside = _least_loaded_visited(pairs, is_visited, running)
    others = np.flatnonzero(~is_beside)
    if len(others):
        loads = running[list(copies)] + np.bincount(chosen[is_beside], minlength=len(running))[list(copies)]
        chosen[others] = np.repeat(copies, pour(loads, len(others)))
    return chosen


def _least_loaded_visited(copies: IntArray, is_visited: BoolArray, running: FloatArray) -> tuple[IntArray, BoolArray]:
    """Return for each pair the least loaded visited copy, and whether there is one.

    Args:
        copies: ``[n, most copies]`` devices, -1 where there are fewer.
        is_visited: ``[n, num_devices + 2]`` of the pair's token.
        running: ``[num_devices]`` loads.
    """
    is_there = (copies >= 0) & np.take_along_axis(is_visited, copies, axis=1)
    best = np.where(is_there, running[copies], np.inf).argmin(axis=1)
    return np.take_along_axis(copies, best[:, None], axis=1)[:, 0], np.any(is_there, axis=1)


def pour(loads: FloatArray, num_pairs: int) -> IntArray:
    """Share ``num_pairs`` out so that the fullest of ``loads`` rises as little as possible.

    Returns:
        One count for each load; where one is left over, the lowest gets it, of equals the first.
    """
    in_order = np.sort(loads)
    # filled up to the level of the next higher one, the i + 1 lowest take this many
    levels = (np.cumsum(in_order) + num_pairs) / np.arange(1, len(loads) + 1)
    num_filled = int(np.flatnonzero(levels > in_order)[-1])
    counts: IntArray = np.floor(np.maximum(0.0, levels[num_filled] - loads)).astype(np.int64)
    for _ in range(num_pairs - int(counts.sum())):
        counts[np.argmin(loads + counts)] += 1
    return counts
