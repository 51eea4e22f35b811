"""Where a run reports to."""
