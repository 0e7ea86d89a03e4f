"""Networks that sample in few steps: one objective, ``student``, and methods, each its own file."""
