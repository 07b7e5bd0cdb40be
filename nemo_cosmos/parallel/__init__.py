"""Process groups, devices and everything that depends on them.

This is the only package that names process groups, imports TransformerEngine or asks on which device it runs.
"""
