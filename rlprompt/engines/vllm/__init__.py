"""Drawing completions on running vLLM servers."""
