"""nemo_cosmos: world foundation models in the NVIDIA NeMo Framework.

Importing this package is cheap: frameworks are imported by the sub-packages that use them.
"""

__version__ = "0.1.0"
