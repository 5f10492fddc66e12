"""Serving by Triton Inference Server: the model it runs, the client, what starts, checks and loads a server."""
