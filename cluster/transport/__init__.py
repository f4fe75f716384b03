"""Rows of hidden states between devices: their byte formats, frames, codec and meter.

Plain data in and out; sockets and Ray live elsewhere.
"""
