"""Which expert lives on which device: pure functions, data in and data out.

Read in this order: ``problem`` (what must be placed), ``selection`` (which devices),
``spread`` (how many experts of each layer on each), ``solver`` (both together),
``placement`` (the answer), ``bound`` (how few devices there could be), ``cost`` (what travels).
"""
