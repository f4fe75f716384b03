"""The command line: composes the three packages and computes nothing itself."""
