"""Train SOLO many times with other settings; the best model is registered, and its configuration kept.

python jobs/tune_solo.py --config configs/tune/solo_learning_rate.yaml --run-name N --storage URL [k=v ...]
"""

import sys

from freesolo.config import TuneJob
from freesolo.entry import run_job
from freesolo.tuning import tune_stage

if __name__ == "__main__":
    sys.exit(run_job(TuneJob, "tune", tune_stage))
