"""Pre-train a backbone with DenseCL on unlabelled photos, and register it.

python jobs/pretrain_densecl.py --config configs/pretrain/densecl_r50_coco.yaml --run-name N --storage URL [k=v ...]
"""

import sys

from freesolo.config import PretrainJob
from freesolo.entry import run_job
from freesolo.jobs import pretrain_stage

if __name__ == "__main__":
    sys.exit(run_job(PretrainJob, "pretrain", pretrain_stage))
