"""nemo_cosmos: world foundation models in the NVIDIA NeMo Framework.

Importing this package is cheap: frameworks are imported by the sub-packages that use them.
"""

import glob
import os

__version__ = "0.1.0"

if not glob.glob("/dev/nvidia[0-9]*") and not os.path.exists("/dev/dxg"):
    # Megatron builds a CUDA extension at import, and forgives a failure. Without a GPU, a CUDA build of torch fails
    # earlier, while it asks the GPUs for their architectures, by an IndexError, which Megatron does not forgive.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0")
