"""The labs: a course cut out of this package. Students write the functions that are blank in their copy.

Decides what a lab is, makes workspaces, and checks what students wrote. Leaves to others: what is printed (`cli.lab`).
Read first: regions, catalogue, workspace, check.
"""
