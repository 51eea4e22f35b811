"""What the commands do, one module each; `rlprompt.cli.main` names their arguments.

Modules here may import torch: the command line imports them when their command runs.
"""
