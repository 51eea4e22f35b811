"""The command line: `rlprompt COMMAND`."""
