"""Other implementations of the same model shape, to be timed in turns with ours."""
