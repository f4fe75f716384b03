"""Plans by arithmetic: how many tokens fit beside a model in one memory, and how many devices its experts need."""
