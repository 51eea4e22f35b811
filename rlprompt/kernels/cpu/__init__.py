"""Small CPU kernels in C++, built on first use where a compiler is there."""
