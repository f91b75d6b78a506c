"""``report.html``: a run, or several against each other, as one file that needs nothing else."""
