"""The learned prior: network, device, models on disk, the denoiser, and how far it is believed.

May import from reconstruction, files and maps.
"""
