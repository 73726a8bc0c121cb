"""The Ming networks. Start with ``README.md`` in this folder, then ``omni.py``."""
