"""Measurements of sam_fused against what a user would pick instead. `python -m benchmarks.throughput --help`."""

import os

# The memory probe starts torch's profiler, which announces each start and stop on stderr, through the progress bar;
# it reads this when torch is first imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
