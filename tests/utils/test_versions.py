"""`show_versions` prints what is installed."""

import importlib.metadata
import platform

import resnet_paths as rp


def test_versions_are_those_that_are_installed(capsys):
    rp.show_versions()
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["resnet_paths"] == rp.__version__
    assert rows["python"] == platform.python_version()
    for name in ("torch", "numpy", "timm", "lightning-fabric"):
        assert rows[name] == importlib.metadata.version(name)
    assert "pytest" not in rows
