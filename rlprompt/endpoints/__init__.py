"""Models behind servers: how they are reached, asked, paced, paid, and never paid twice."""
