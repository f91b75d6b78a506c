"""A run whose processes are killed at random and on purpose, and that must end as if nothing had happened.

==============  ==============================================================================================
``__main__``    ``python -m benchmarks.chaos``: the run, its table and its JSON
``aimed``       starts a role that kills itself at a chosen point
``killer``      kills roles from outside, at random
``recovery``    from kill to full throughput, read from what the run wrote
==============  ==============================================================================================
"""
