"""Ahead-of-time compilation for pods that are not here: memory, FLOPs, communication, time.

Nothing here was checked against TPUs. Compilers of the real targets say what fits and what is moved; how long it takes
is computed from data sheets and stated assumptions (`estimate`).
"""
