"""Expert parallelism in training: workers share one copy of the routed experts, and send each other rows.

Read in this order: :mod:`~cluster.training.expert_parallel.division` (who holds which experts),
:mod:`~cluster.training.expert_parallel.visits` (which rows of a batch go where),
:mod:`~cluster.training.expert_parallel.messages` (what a row looks like on its way),
:mod:`~cluster.training.expert_parallel.exchange` (two exchanges with gradients),
:mod:`~cluster.training.expert_parallel.executor` (the walk of a layer),
:mod:`~cluster.training.expert_parallel.sharding` (a model's experts divided, and put together again).
"""
