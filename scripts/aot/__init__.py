"""Training programs compiled ahead of time, for chips that are not here.

topologies   the chips, and their compilers
programs     the programs of a config, lowered for shapes in place of arrays
compiled     the facts in what a compiler returns: bytes, copies, cycles
"""
