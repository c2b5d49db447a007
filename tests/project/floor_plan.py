"""The floor plan of CONTRIBUTING.md, made from the imports: ``python -m tests.project.floor_plan``.

It prints the wings as a Mermaid flowchart, which GitHub draws, with an arrow from each wing to those that it imports.
Arrows that follow from others are omitted.
"""

from __future__ import annotations

import itertools
import sys

import grimp
import networkx as nx


def floor_plan() -> str:
    """The flowchart as Markdown."""
    modules = grimp.build_graph("resnet_paths", cache_dir=None)
    wing = {module: module.split(".")[1] for module in modules.modules if "." in module}
    imports = nx.DiGraph()
    imports.add_nodes_from(sorted(set(wing.values())))
    for upper, lower in itertools.permutations(wing, 2):
        if wing[upper] != wing[lower] and modules.direct_import_exists(importer=upper, imported=lower):
            imports.add_edge(wing[upper], wing[lower])
    plan = nx.transitive_reduction(imports)
    arrows = [f"    {upper} --> {lower}" for upper, lower in sorted(plan.edges)]
    return "\n".join(["```mermaid", "flowchart TD", *arrows, "```"])


if __name__ == "__main__":
    sys.stdout.write(floor_plan() + "\n")
