"""A map and its numerics, arrays in and arrays out: grid, Fourier convention, resampling, masks, FSC, grey scale.

Imports nothing of cryored but errors and threads.
"""
