"""Checkpoints that any layout can read: every tensor by global name and position, written by torch's DCP."""
