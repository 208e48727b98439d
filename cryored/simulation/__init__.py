"""From atomic models to maps, particles and training pairs.

May import from reconstruction, files and maps.
"""
