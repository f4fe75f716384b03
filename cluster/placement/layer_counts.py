"""What the local search knows of a placement, kept up to date under moves.

For tokens t and devices d, ``C[t, d]`` counts the experts of t on d. From it, for every expert e:

    zeros[e, d] = tokens of e with C[t, d] = 0     visits that begin if e moves to d
    ones[e, d]  = tokens of e with C[t, d] = 1     visits that end if e leaves d

A move of e changes C for the tokens of e alone, in two columns, so both tables follow by counting the experts of
just those tokens. The gain of swapping e (on a) with f (on b) is that of the two moves, less what
both count wrongly for tokens that have e and f: such a token visits after the swap what it did before.
"""

import numpy as np

from cluster.placement.arrays import FloatArray, IntArray
from cluster.placement.layer_problem import LayerProblem


class LayerCounts:
    """A placement of one layer that can be changed expert by expert.

    Args:
        problem: the layer.
        device_of_expert: ``[num_experts]`` where to begin; copied.
    """

    def __init__(self, problem: LayerProblem, device_of_expert: IntArray) -> None:
        self.problem = problem
        self.device_of_expert = np.array(device_of_expert, dtype=np.int64)
        self.counts = np.bincount(self.device_of_expert, minlength=problem.num_devices)
        self.loads = np.bincount(
            self.device_of_expert, weights=problem.expert_loads, minlength=problem.num_devices
        ).astype(float)
        self._experts = np.arange(problem.num_experts)
        self._index_tokens()
        self._count()

    def move(self, expert_id: int, device: int) -> None:
        """Put an expert on another device; the caller has checked that it may be there."""
        source = int(self.device_of_expert[expert_id])
        if source == device:
            return
        self._step(expert_id, source, -1)
        self._step(expert_id, device, 1)
        load = self.problem.expert_loads[expert_id]
        self.counts[source] -= 1
        self.counts[device] += 1
        self.loads[source] -= load
        self.loads[device] += load
        self.device_of_expert[expert_id] = device

    def place(self, device_of_expert: IntArray) -> None:
        """Move every expert to where ``device_of_expert`` ``[num_experts]`` says."""
        for expert_id in np.flatnonzero(self.device_of_expert != device_of_expert):
            self.move(int(expert_id), int(device_of_expert[expert_id]))

    def cost(self) -> float:
        """Return :func:`cluster.placement.layer_problem.layer_cost` of the placement."""
        problem = self.problem
        visits = np.count_nonzero(self._copies, axis=0)
        overload = np.maximum(0.0, self.loads - problem.load_cap).sum()
        moving = problem.expert_costs[self._experts, self.device_of_expert].sum()
        return float(visits @ problem.visit_costs + moving + problem.overload_cost * overload)

    def move_gains(self, expert_id: int) -> FloatArray:
        """Return the cost that moving an expert to each device saves; -inf where it is or has no room."""
        problem, source = self.problem, self.device_of_expert[expert_id]
        visits, costs = problem.visit_costs, problem.expert_costs[expert_id]
        load = problem.expert_loads[expert_id]
        gains: FloatArray = (
            visits[source] * self._ones[expert_id, source]
            - visits * self._zeros[expert_id]
            + costs[source]
            - costs
            + self._relief(np.full(problem.num_devices, source), load)
            + self._relief(np.arange(problem.num_devices), -load)
        )
        gains[self.counts >= problem.max_counts] = -np.inf
        gains[source] = -np.inf
        return gains

    def swap_gains(self, expert_id: int) -> FloatArray:
        """Return the cost that swapping an expert with each other one saves; -inf on its own device."""
        problem, source = self.problem, self.device_of_expert[expert_id]
        targets = self.device_of_expert  # [E], where each partner is
        both_at_source, both_at_target = self._shared_ones(expert_id)
        visits, costs = problem.visit_costs, problem.expert_costs
        ends_at_source = self._ones[expert_id, source] - self._zeros[:, source] - both_at_source
        ends_at_target = self._ones[self._experts, targets] - self._zeros[expert_id, targets] - both_at_target
        moved_load = problem.expert_loads[expert_id] - problem.expert_loads
        gains: FloatArray = (
            visits[source] * ends_at_source
            + visits[targets] * ends_at_target
            + costs[expert_id, source]
            - costs[expert_id, targets]
            + costs[self._experts, targets]
            - costs[:, source]
            + self._relief(np.full(problem.num_experts, source), moved_load)
            + self._relief(targets, -moved_load)
        )
        gains[targets == source] = -np.inf
        return gains

    def _relief(self, devices: IntArray, removed_load: FloatArray | float) -> FloatArray:
        """Return the cost of overload that taking a load off each device saves."""
        loads, cap = self.loads[devices], self.problem.load_cap
        before, after = np.maximum(0.0, loads - cap), np.maximum(0.0, loads - removed_load - cap)
        relief: FloatArray = self.problem.overload_cost * (before - after)
        return relief

    def _shared_ones(self, expert_id: int) -> tuple[FloatArray, FloatArray]:
        """Return, for each partner f, the tokens of both experts that have one expert on e's, and on f's, device."""
        tokens, companions = self._tokens[expert_id], self._companions[expert_id]
        num_experts, top_k = self.problem.num_experts, self.problem.expert_indices.shape[1]
        is_one = self._copies[tokens] == 1  # [n, D]
        at_source = np.repeat(is_one[:, self.device_of_expert[expert_id]], top_k)
        at_target = np.take_along_axis(is_one, self.device_of_expert[companions].reshape(-1, top_k), axis=1)
        both_at_source = np.bincount(companions, weights=at_source, minlength=num_experts).astype(float)
        both_at_target = np.bincount(companions, weights=at_target.ravel(), minlength=num_experts).astype(float)
        return both_at_source, both_at_target

    def _step(self, expert_id: int, device: int, step: int) -> None:
        """Add ``step`` experts on one device to all tokens of an expert."""
        tokens, companions = self._tokens[expert_id], self._companions[expert_id]
        num_experts, top_k = self.problem.num_experts, self.problem.expert_indices.shape[1]
        before = self._copies[tokens, device]
        after = before + step
        for table, number in ((self._zeros, 0), (self._ones, 1)):
            change = (after == number).astype(np.int8) - (before == number)
            table[:, device] += np.bincount(companions, weights=np.repeat(change, top_k), minlength=num_experts)
        self._copies[tokens, device] = after

    def _index_tokens(self) -> None:
        """For each expert find its tokens, and all experts of those tokens, one token after another."""
        choices = self.problem.expert_indices.astype(np.int64)
        by_expert = np.argsort(choices.ravel(), kind="stable")
        ends = np.cumsum(np.bincount(choices.ravel(), minlength=self.problem.num_experts))
        self._tokens = np.split(by_expert // choices.shape[1], ends[:-1])
        self._companions = [choices[tokens].ravel() for tokens in self._tokens]

    def _count(self) -> None:
        choices, num_devices = self.problem.expert_indices.astype(np.int64), self.problem.num_devices
        num_tokens, top_k = choices.shape
        pairs = np.arange(num_tokens)[:, None] * num_devices + self.device_of_expert[choices]
        self._copies = np.bincount(pairs.ravel(), minlength=num_tokens * num_devices).reshape(num_tokens, num_devices)
        self._copies = self._copies.astype(np.int16 if top_k < 2**15 else np.int64)
        self._zeros, self._ones = (
            np.stack(
                [
                    np.bincount(
                        choices.ravel(),
                        weights=np.repeat(self._copies[:, device] == number, top_k),
                        minlength=self.problem.num_experts,
                    )
                    for device in range(num_devices)
                ],
                axis=1,
            )
            for number in (0, 1)
        )
