"""Which expert lives on which device: pure functions, data in and data out.

Read in this order: ``problem`` (what must be placed), ``placement`` (the answer), ``solver`` (from one to the other),
and below it ``selection`` (which devices), ``spread`` (how many experts of each layer on each) and, with a routing
trace, ``traced_solver`` over ``layer_problem`` (the cost of one layer), ``layer_solver`` and ``replicas``.

What an answer is worth: ``bound`` (how few devices there could be), ``traffic`` (a replay), ``cost`` (bytes by formula)
and ``report`` (all in a line). At run time: ``replica_choice`` (which copy a token visits), ``evacuation`` (after a
loss) and ``rebalance`` (from the old plan to a new one with few moves).
"""
