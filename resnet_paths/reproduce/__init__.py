"""Execution of the notebooks, data sets, and training of the shipped networks."""
