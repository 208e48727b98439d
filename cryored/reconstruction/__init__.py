"""From images to maps: projection, back-projection, the MAP and the CW-RED update, orientations.

May import from files and maps.
"""
