"""How many tokens of keys and values fit beside a model: shapes, weights, and the plan of a memory."""
