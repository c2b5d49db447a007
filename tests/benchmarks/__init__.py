"""Benchmarks: this project beside what people would use instead, measured side by side in one run.

    __main__    the one command: ``python -m tests.benchmarks``
    peers       an environment of their own for the other libraries
    workers     a process for each contender, run in turns, so that they share the machine's weather
    table       rows, CSV, Markdown and figure
    lesions, gradients, scaling, limit, startup      one part each

Not collected by pytest. ``python -m tests.benchmarks.architectures`` is a table of its own: what can be unraveled.
``python -m tests.benchmarks.gpu`` is for a machine with a GPU.
"""
