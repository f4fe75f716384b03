"""The command line: one file a subcommand. It composes the packages and computes nothing itself."""
