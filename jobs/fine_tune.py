"""Supervised training from several starts with several fractions of the labels: what is each start worth?

python jobs/fine_tune.py --config configs/fine_tune/smoke.yaml --run-name N --storage URL [k=v ...]
"""

import sys

from freesolo.config import FineTuneJob
from freesolo.entry import run_job
from freesolo.fine_tuning import fine_tune_stage

if __name__ == "__main__":
    sys.exit(run_job(FineTuneJob, "fine-tuning", fine_tune_stage))
