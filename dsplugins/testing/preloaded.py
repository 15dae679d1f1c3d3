"""What a worker starts with: megatron-core on the CPU platform. For workers only: it changes its process.

`pool` has it imported once, by the process that all workers are forked from.
"""

import gc
import importlib
import os
import warnings

from dsplugins.testing.world import prepare_cpu

os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TORCHDYNAMO_DISABLE="1")
warnings.filterwarnings("ignore", module="megatron")  # what core misses would be told once a rank
prepare_cpu()
importlib.import_module("dsplugins.assemble")
importlib.import_module("torch").set_num_threads(1)
gc.freeze()  # what was imported stays: a collection after each job then has little to look through
