"""Errors, files, devices and statistics: what every other part of the package uses and what knows none of them."""
