"""From queries to scored completions, and how they are packed."""
