"""What every test shares. This file is imported before anything that it sets an environment variable for."""

import os

# Else gcsfs asks for a bucket's type over gRPC when it is imported against an emulator, and loses 60 s.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
