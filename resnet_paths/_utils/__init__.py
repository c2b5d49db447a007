"""Errors, files, devices and statistics: helpers without dependencies on the rest of the package."""
