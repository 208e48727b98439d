"""The loop with RELION: its request answered, resident or not, and its programs as we start them.

May import from every room below: training, simulation, assessment, prior, reconstruction, files, maps.
"""
