"""What may be said of measured prompts: intervals, comparisons, acceptance, certificates.

Pure functions of arrays: no model, no run, no file. Each names its source, what it assumes, and
what breaks it.
"""
