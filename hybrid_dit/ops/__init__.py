"""Attention functions: pure, no parameters of their own, no mesh, no configuration object."""
