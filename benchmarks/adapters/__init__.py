"""One small module for each system that `peers.py` compares, behind one interface.

Each module runs in an environment of its own, where the other benchmarks cannot be
imported: `python -m adapters NAME COMMAND URL [COUNT]`, described in `__main__.py`.
"""
