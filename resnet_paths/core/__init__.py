"""The chain of blocks and what follows from it alone: edits, paths, inputs, summary.

Nothing here knows where chains come from or what is measured on them.
"""
