"""Build hook of hatchling: distributions have the notebooks without the outputs that are kept in them."""

import json
import shutil
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NotebooksWithoutOutputs(BuildHookInterface):
    """Puts copies of the notebooks in the place of the files, which the selection of files leaves out."""

    def initialize(self, version, build_data):
        """Write the copies; an editable installation uses the notebooks of the checkout."""
        self.copies = Path(tempfile.mkdtemp())
        if version == "editable":
            return
        place = {"wheel": "resnet_paths/notebooks", "sdist": "notebooks"}[self.target_name]
        for path in Path(self.root, "notebooks").glob("*.ipynb"):
            notebook = json.loads(path.read_text(encoding="utf-8"))
            notebook["metadata"].pop("resnet_paths", None)
            for cell in notebook["cells"]:
                if cell["cell_type"] == "code":
                    cell["outputs"] = []
            copy = self.copies / path.name
            copy.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            build_data["force_include"][str(copy)] = f"{place}/{path.name}"

    def finalize(self, version, build_data, artifact_path):
        """Remove the copies."""
        shutil.rmtree(self.copies)
