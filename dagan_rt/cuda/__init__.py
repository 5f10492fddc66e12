"""CUDA without a framework: the driver (libcuda, by ctypes), streams and graphs, and the ring of whole frames."""
