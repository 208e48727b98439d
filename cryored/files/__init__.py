"""All that is read and written: MRC, STAR, RELION's requests, FSC tables, pictures; files come into being whole.

May import from maps.
"""
