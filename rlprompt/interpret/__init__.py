"""What a learned prompt means and does, each claim with the number that says how far it holds."""
