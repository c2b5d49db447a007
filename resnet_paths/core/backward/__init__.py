"""The backward pass with the paths kept apart: what all instruments need that split something by path length.

- `forward`: the states between blocks, and the context, of some examples;
- `operations`: the transposed Jacobian of one operation; `linearize`: of a part of a block;
- `cotangents`: stacks of cotangents, one for each path length;
- `recursion`: from block to block.
"""
