"""Train SOLO on a label set, or on a data set's own annotations, and register it.

python jobs/train_solo.py --config configs/train/solo_r50.yaml --run-name N --storage URL [k=v ...]
"""

import sys

from freesolo.config import TrainJob
from freesolo.entry import run_job
from freesolo.jobs import train_stage

if __name__ == "__main__":
    sys.exit(run_job(TrainJob, "solo", train_stage))
