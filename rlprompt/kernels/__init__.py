"""Attention over [shared prefix | group's query | own causal keys] and the chunked LM head."""
