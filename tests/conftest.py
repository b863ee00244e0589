"""The tests need neither network nor GPU."""

import os
import sys
from pathlib import Path

os.environ['ONEDNN_MAX_CPU_ISA'] = 'AVX512_CORE_FP16'  # some virtual machines advertise AMX and trap it
os.environ['CUDA_VISIBLE_DEVICES'] = ''
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['PYTHONPATH'] = str(ROOT)
