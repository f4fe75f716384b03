"""Checkpoints: the native format, packing, and the manifest that guards both."""
