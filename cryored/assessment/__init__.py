"""How good a map is: the FSC of files, and the test for detail that a network invents.

May import from prior, reconstruction, files and maps.
"""
