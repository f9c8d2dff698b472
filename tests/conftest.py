"""No test asks a network for anything: a name on the hub is looked for in its cache alone."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
